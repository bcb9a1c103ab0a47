"""`lora-kit inspect`: what a saved folder holds, whether it is whole, and who serves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import StorageError
from lora_kit.storage import config as settings
from lora_kit.storage import manifest, units
from lora_kit.storage.serving import Serving, check_serving


@dataclass(frozen=True)
class Inspection:
    """What was found. Printed, it is a list."""

    path: Path
    facts: dict[str, Any]
    """The manifest's; empty where there is none."""
    files: int
    """Files whose SHA-256 was checked."""
    serving: Serving | None
    """For an adapter: what servers make of it."""

    def __str__(self) -> str:
        if not self.facts:
            head = [f"{self.path}: no {manifest.NAME}, so nothing was checked but that the tensors can be read"]
        else:
            options = self.facts["options"].items()
            known = ", ".join(f"{key}={str(value)[:40]}" for key, value in options if value is not None)
            head = [
                f"{self.path}: whole, {self.files} files match their SHA-256",
                f"method: {self.facts['method']}" + (f" ({known})" if known else ""),
                f"base: {self.facts['base'] or 'unknown'}, {self.facts['base_dtype']}, {self.facts['quantization']} "
                f"in training, {self.facts['parameters']:,} parameters",
                "written with " + ", ".join(f"{name} {number}" for name, number in self.facts["versions"].items()),
            ]
            if "step" in self.facts:
                head.append(f"checkpoint of step {self.facts['step']}")
        return "\n".join([*head, *([str(self.serving)] if self.serving else [])])


def inspect(path: str) -> Inspection:
    """Show what a saved folder holds, whether every file is as it was written, and which servers load it.

    Args:
        path: folder that was saved, an adapter or a whole model.

    Raises:
        StorageError: no such folder, nothing saved in it, or a file that was changed or damaged.
    """
    folder = Path(path)
    root = units.current(folder)
    adapter = (root / settings.NAME).exists()
    if not adapter and not (root / "config.json").exists():
        raise StorageError(
            f"{path} has neither {settings.NAME} nor config.json, so it holds no saved model. Pass what "
            "save(model, path) wrote."
        )
    facts = manifest.facts(root)
    return Inspection(folder, facts, len(facts.get("files", {})), check_serving(folder) if adapter else None)
