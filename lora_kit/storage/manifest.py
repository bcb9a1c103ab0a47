"""`lora_kit.json`: what was saved, how it was made, on which base, and the SHA-256 of every file beside it.

PEFT and transformers do not need the file; without it a folder still loads, only less is checked. Its last line is the
SHA-256 of the lines before it, so that damage to the manifest itself shows too.
"""

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import lora_kit
from lora_kit.errors import StorageError

NAME = "lora_kit.json"
FORMAT = 2
_LARGEST = 1 << 24
"""Bytes that a manifest may have: one of a model in thousands of shards is far below."""
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {"lora_kit": lora_kit.__version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest over the files that lie in `folder`, with these facts in it."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != NAME
    }
    content = {"format": FORMAT, **facts, "versions": versions(), "files": files}
    text = json.dumps(content, indent=2, allow_nan=False).encode()[: -len("\n}")]
    seal = hashlib.sha256(text).hexdigest()
    (folder / NAME).write_bytes(text + f',\n  "sha256": "{seal}"\n}}\n'.encode())


def parse(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, sound in itself; None where there is none. The files it names are not looked at.

    Raises:
        StorageError: it was changed or damaged, or another version's.
    """
    file = folder / NAME
    if not file.exists():
        return None
    content = read_json(file, _LARGEST)
    if content.get("format") != FORMAT:
        raise StorageError(
            f"{file} has format {str(content.get('format'))[:20]}, this lora_kit reads {FORMAT}; nothing was loaded. "
            "Take the version of lora_kit that wrote it: pip install lora_kit==<version>."
        )
    text = file.read_bytes()
    seal = _SEAL.search(text)
    if seal is None or hashlib.sha256(text[: seal.start()]).hexdigest().encode() != seal[1]:
        raise StorageError(
            f"{file} does not match its own SHA-256 ({len(text):,} bytes): it was changed or damaged after it was "
            "saved. Nothing was loaded. Take another copy of the folder, or save(model, path) again."
        )
    files = content.get("files")
    sound = isinstance(files, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, entry in files.items()
    )
    if not sound:
        raise StorageError(
            f"{file} has 'files' that are not of the form {{name: {{'bytes': …, 'sha256': …}}}} with names inside the "
            f"folder, got {str(files)[:80]}; nothing was loaded. Take a folder that save(model, path) wrote."
        )
    return content


def read(folder: Path) -> dict[str, Any] | None:
    """The same after every file's hash has been checked.

    Raises:
        StorageError: a file is missing, or was changed or damaged.
    """
    content = parse(folder)
    for name, entry in (content or {"files": {}})["files"].items():
        found, size = folder / name, entry["bytes"]
        if not found.is_file():
            raise StorageError(
                f"{found} is missing, but {NAME} lists it ({size:,} bytes); nothing was loaded. Copy it back, or "
                "save(model, path) again."
            )
        if found.stat().st_size != size or sha256(found) != entry["sha256"]:
            raise StorageError(
                f"{found} does not match its recorded SHA-256 ({size:,} bytes recorded, {found.stat().st_size:,} "
                "found): it was changed or damaged after it was saved. Nothing was loaded. Take another copy of it, or "
                "save(model, path) again."
            )
    return content


_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "options": (dict,),
    "task": (str, type(None)),
    "labels": (list, type(None)),
    "base": (str, type(None)),
    "base_dtype": (str,),
    "quantization": (str,),
    "parameters": (int,),
    "embeddings": (int, type(None)),
    "heads": (list,),
    "prefix": (dict,),
    "fingerprint": (dict,),
}


def facts(folder: Path) -> dict[str, Any]:
    """The manifest after all checks, each fact of the type that `load` relies on; empty where there is none."""
    found = read(folder) or {}
    for name, kinds in _TYPES.items():
        if name in found and not isinstance(found[name], kinds):
            raise StorageError(
                f"{folder / NAME}: {name} = {str(found[name])[:80]!r} should be "
                f"{' or '.join(kind.__name__ for kind in kinds)}; nothing was loaded. Take another copy of the folder, "
                "or save(model, path) again."
            )
    words = [*(found.get("labels") or []), *(found.get("heads") or [])]
    if not all(isinstance(word, str) for word in words):
        raise StorageError(
            f"{folder / NAME}: labels and heads should be names, and not all {len(words)} are; nothing was "
            "loaded. Take another copy of the folder, or save(model, path) again."
        )
    return found


def read_json(file: Path, largest: int) -> dict[str, Any]:
    """A JSON object of at most so many bytes."""
    size = file.stat().st_size
    if size > largest:
        raise StorageError(
            f"{file} has {size:,} bytes, more than the {largest:,} that such a file may have; nothing was loaded. Take "
            "a folder that save(model, path) wrote."
        )
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{file} is no JSON ({size:,} bytes; {str(error)[:80]}); nothing was loaded. Take another copy of it, or "
            "save(model, path) again."
        ) from None
    if not isinstance(content, dict):
        raise StorageError(
            f"{file} holds a JSON {type(content).__name__} ({size:,} bytes) where an object is needed; nothing was "
            "loaded. Take another copy of it, or save(model, path) again."
        )
    return content


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
