"""A folder's files as one unit: all of one save or all of another, whatever moment the process dies at.

A save is written into a folder inside the folder, flushed to the disk, hashed, read again and compared, and then
renamed to `.lora_kit-new`. That rename is the moment at which it counts: from then on a reader takes it from there. Its
files are then linked to their places, the file that other tools look for first taken away first and put back last, so
that those find the old save, none, or the new one, and never halves of two. A process that is killed leaves at worst a
finished `.lora_kit-new`, which is read as it is, or an unfinished staging folder, which the next save removes.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_kit.errors import StorageError
from lora_kit.storage import manifest

STAGING = ".lora_kit-writing-"
"""What is being written; followed by the process's number."""
NEW = ".lora_kit-new"
"""What has been written and proven, and is not yet in its place."""
FIRST_LOOKED_FOR = ("adapter_config.json", "config.json")
"""Without these PEFT and transformers see no model in a folder."""
_SPARE = 1 << 14
"""Bytes that a save needs beyond its tensors: configs, the manifest, folders."""


def write(folder: Path, fill: Callable[[Path], None], *, needed: int = 0) -> None:
    """Have `fill` write a save into the folder it is given, prove it, and put it in the place of what is in `folder`.

    Files that belong to no save are left alone. Whatever fails, `folder` still holds what it held before.

    Args:
        folder: made if need be.
        fill: writes every file of the save, the manifest among them.
        needed: bytes that it will write, as far as known, to refuse a full disk before anything is written.

    Raises:
        StorageError: the folder cannot be written, the disk is full, or what was read back is not what was written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder):
            _clear(folder)
            _refuse_full_disk(folder, needed)
            staging = folder / f"{STAGING}{os.getpid()}"
            try:
                staging.mkdir()
                fill(staging)
                flush(staging)
                manifest.read(staging)  # from the disk, every hash
                staging.rename(folder / NEW)
                _flush_one(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            _publish(folder)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """What the operating system or safetensors' writer raises, as a `StorageError` that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(folder).free:,} bytes are free there)"
        raise StorageError(
            f"{folder} cannot be written: {error}{free}. What it held before is as it was; free some space, or "
            "save(model, another_path)."
        ) from error


def current(folder: Path) -> Path:
    """Where the newest finished save of a folder is: in the folder, or still on its way into it."""
    return folder / NEW if (folder / NEW / manifest.NAME).exists() else folder


def flush(folder: Path) -> None:
    """Have the disk hold every file below a folder, then the folders themselves; and forget what the memory holds of
    them, so that what is read next comes from the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # pragma: no cover # Windows has no handle of a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise") and path.is_file():
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE > free:
        raise StorageError(
            f"{folder} has {free:,} bytes free and the save needs {needed + _SPARE:,}; nothing was written. Free some "
            "space, or save(model, another_path)."
        )


def _clear(folder: Path) -> None:
    """Finish what a killed process had proven, and remove what it had not."""
    for left in folder.glob(f"{STAGING}*"):
        if _runs(left.name.removeprefix(STAGING).partition("-")[0]):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    if not (folder / NEW).exists():
        return
    try:
        proven = manifest.read(folder / NEW) is not None
    except StorageError:
        proven = False
    if proven:
        _publish(folder)
    else:  # files leave it, the manifest first, only after all of them are in their places
        shutil.rmtree(folder / NEW)


def _runs(number: str) -> bool:
    """Whether a process of this number runs on this machine."""
    if not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _publish(folder: Path) -> None:
    """Put the files of the proven save in their places, and remove those of the one before that it has not."""
    new = folder / NEW
    files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    stale = _files_of(folder) - {str(file) for file in files}
    for name in FIRST_LOOKED_FOR:
        (folder / name).unlink(missing_ok=True)
    _flush_one(folder)
    files.sort(key=lambda file: (str(file) == manifest.NAME, str(file) in FIRST_LOOKED_FOR))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        _link(new / file, folder / file)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    _flush_one(folder)
    (new / manifest.NAME).unlink()  # from here on the folder itself is the save
    shutil.rmtree(new)


def _files_of(folder: Path) -> set[str]:
    """The files of the save that a folder holds, as its manifest names them."""
    try:
        return set((manifest.parse(folder) or {"files": {}})["files"])
    except StorageError:
        return set()


def _link(source: Path, target: Path) -> None:
    """The same file under another name, replacing what has it; a copy where the file system knows no links."""
    between = target.with_name(f"{STAGING}{os.getpid()}-{target.name}")
    try:
        between.unlink(missing_ok=True)
        try:
            between.hardlink_to(source)
        except OSError:
            shutil.copy2(source, between)
            _flush_one(between)
        between.replace(target)
    finally:
        between.unlink(missing_ok=True)
