"""Where a figure comes from: machine, versions and commit, written beside it."""

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def facts(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine and commit."""
    from lora_kit.comparison.cell import machine
    from lora_kit.storage.manifest import versions

    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {**versions(), **machine(device), "commit": done.stdout.strip()}


def sentence(found: dict[str, Any]) -> str:
    """The facts for the foot of a table."""
    return (
        f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}, peft {found['peft']}; "
        f"commit {found['commit']}."
    )


def write_rows(file: Path, rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """One JSON object a row, with the facts in each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({**row, **found}) + "\n" for row in rows))
