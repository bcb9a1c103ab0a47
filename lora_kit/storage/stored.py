"""The tensors of an adapter's file, and whether they are what a model has a place for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.errors import AdapterMismatchError, LoraKitError, OptionError, StorageError, listing
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

NAME = "adapter_model.safetensors"


@contextmanager
def or_refused(kind: type[StorageError], what: str, fix: str) -> Iterator[None]:
    """Whatever another library raises over a file's content, as one of our errors; a lack of memory stays."""
    import torch

    try:
        yield
    except (LoraKitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each class checks itself in its own way, or fails where it first meets the mistake
        said = " ".join(str(error).split())[:300]
        raise kind(f"{what} ({type(error).__name__}: {said}). Nothing was loaded. {fix}.") from error


def read(folder: Path) -> "dict[str, torch.Tensor]":
    """Name → tensor of an adapter's folder, all of them finite.

    Raises:
        StorageError: the file is missing, pickled, damaged, or holds NaN or infinite values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / NAME
    if not file.exists():
        if (folder / "adapter_model.bin").exists():
            raise StorageError(
                f"{folder} holds a pickled adapter (adapter_model.bin, "
                f"{(folder / 'adapter_model.bin').stat().st_size:,} bytes), which could run code when it is read. "
                "Nothing was loaded. Convert it where you trust it: safetensors.torch.save_file("
                "torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')."
            )
        raise StorageError(
            f"{file} is missing (1 of the 2 files of an adapter); nothing was loaded. Copy it back, or "
            "save(model, path) again."
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} cannot be read ({file.stat().st_size:,} bytes; {error}); nothing was loaded. Take another copy of "
            "it, or save(model, path) again."
        ) from None
    refuse_non_finite(tensors, f"{file} has", "Nothing was loaded. Take an earlier copy: load(path_of_it, base).")
    return tensors


def refuse_non_finite(tensors: "dict[str, torch.Tensor]", where: str, fix: str) -> None:
    """Refuse NaN and infinite values, before they are written over good ones or loaded among them."""
    import torch

    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise StorageError(
            f"{where} NaN or infinite values in {len(bad)} of {len(tensors)} tensors ({listing(bad, 3)}). {fix}"
        )


def renamed(tensors: "dict[str, torch.Tensor]", rename: dict[str, str] | None) -> "dict[str, torch.Tensor]":
    """The same tensors with parts of their names exchanged."""
    for old, new in (rename or {}).items():
        if not isinstance(old, str) or not isinstance(new, str):
            raise OptionError(
                f"rename must be a dict of str to str, such as {{'language_model.': ''}}; got {rename!r}."
            )
        if old not in "\n".join(tensors):
            raise OptionError(
                f"rename: none of {len(tensors)} tensors has {old!r} in its name; the file has {listing(tensors, 3)}. "
                "Write rename={'old.': 'new.'} with a part of these."
            )
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def places_in(adapted: Model, name: str = "default") -> "dict[str, torch.Tensor]":
    """Name in a file → the tensor of the adapted model that it belongs to."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)


def compare(file: Path, tensors: "dict[str, torch.Tensor]", adapted: Model, name: str = "default") -> None:
    """Refuse unless the file has exactly the tensors, by name, shape and kind, that the wrapped model expects."""
    expected = places_in(adapted, name)
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes = [
        f"{name} is {found[name]}, needed {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    kinds = [
        f"{name} is {tensors[name].dtype}, needed {tensor.dtype}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].is_floating_point() != tensor.is_floating_point()
    ]
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if not (shapes or kinds or missing or unexpected):
        return
    fitting = sum(found.get(name) == size for name, size in wanted.items())
    parts = [f"{fitting} of {len(wanted)} tensors in {file} fit this model"]
    if shapes:
        parts.append(f"of another shape: {listing(shapes, 3)}")
    if kinds:
        parts.append(f"of another dtype: {listing(kinds, 3)}")
    if missing:
        parts.append(f"missing: {listing(missing, 3)}")
    if unexpected:
        parts.append(f"without a place here: {listing(unexpected, 3)}")
    hint = suggestion(unexpected, missing)
    fix = (
        f"This looks like a renamed part: load(..., rename={hint!r})"
        if hint
        else "load(path, base=...) with the base it was trained on"
    )
    raise AdapterMismatchError("; ".join(parts) + f". {fix}. Nothing was loaded.")


def suggestion(unexpected: list[str], missing: list[str]) -> dict[str, str] | None:
    """The `rename` that makes every unexpected name a missing one, if exchanging one part of the names does."""
    if not unexpected or len(unexpected) != len(missing):
        return None
    old = unexpected[0].split(".")
    for new in [name.split(".") for name in missing if name.split(".")[-2:] == old[-2:]][:50]:
        head = _shared(old, new)
        tail = min(_shared(old[::-1], new[::-1]), len(old) - head, len(new) - head)
        was, now = old[head : len(old) - tail], new[head : len(new) - tail]
        if not was:  # something stands between two parts of the name: say it with the part before
            was, now = old[head - 1 : head], [*old[head - 1 : head], *now]
        rename = {".".join([*was, ""]): ".".join([*now, ""])}
        if was and {name.replace(*pair) for name in unexpected for pair in rename.items()} == set(missing):
            return rename
    return None


def _shared(a: list[str], b: list[str]) -> int:
    """How many parts two names begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def refuse_changed(file: Path, tensors: "dict[str, torch.Tensor]", adapted: Model, name: str = "default") -> None:
    """After loading: what the model holds is what the file holds."""
    import torch

    held = places_in(adapted, name)
    wrong = [n for n, t in tensors.items() if not torch.equal(held[n].detach().cpu(), t.to(held[n].dtype))]
    if wrong:
        raise AdapterMismatchError(
            f"{len(wrong)} of {len(tensors)} tensors in the model are not those of {file} after loading "
            f"({listing(wrong, 3)}); the installed PEFT put them elsewhere. Nothing was loaded. pip install -U peft."
        )
