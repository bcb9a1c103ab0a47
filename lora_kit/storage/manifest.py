"""`lora_kit.json`: what was saved, how it was made, and the SHA-256 of every file beside it.

PEFT and transformers do not need the file; without it a folder still loads, only less is checked.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import lora_kit
from lora_kit.adaptation import Record
from lora_kit.errors import StorageError

NAME = "lora_kit.json"
FORMAT = 1


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {"lora_kit": lora_kit.__version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(folder: Path, record: Record, labels: dict[int, str] | None, embeddings: int | None = None) -> None:
    """Write the manifest over the files that lie in `folder`; `embeddings` is the number of the base's token rows."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != NAME
    }
    content = {
        "format": FORMAT,
        "method": record.method,
        "options": record.options,
        "task": record.task,
        "labels": None if labels is None else [labels[i] for i in sorted(labels)],
        "base": record.base,
        "base_dtype": record.base_dtype,
        "quantization": record.quantization,
        "parameters": record.parameters,
        "embeddings": embeddings,
        "heads": list(record.heads),
        **record.facts,
        "versions": versions(),
        "files": files,
    }
    (folder / NAME).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder after every file's hash has been checked, or None where there is none."""
    file = folder / NAME
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        recorded = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file} is not readable as a manifest ({error}); nothing was loaded.") from None
    if content.get("format") != FORMAT:
        raise StorageError(
            f"{file} has format {content.get('format')!r}, this lora_kit reads {FORMAT}. Use the version that wrote it "
            f"({content.get('versions', {}).get('lora_kit', 'unknown')})."
        )
    for name, (size, digest) in recorded.items():
        found = folder / name
        if not found.is_file():
            raise StorageError(
                f"{found} is missing, but {NAME} lists it; nothing was loaded. Save again, or copy it back."
            )
        if found.stat().st_size != size or _sha256(found) != digest:
            raise StorageError(
                f"{found} does not match its recorded SHA-256 ({size:,} bytes recorded, {found.stat().st_size:,} "
                "found): it was changed or damaged after it was saved. Nothing was loaded."
            )
    return content


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
