"""Rows of the vocabulary that were changed without an adapter: new tokens after a resize, rows edited by hand.

PEFT stores the whole of both matrices for that, or nothing. Here the rows that differ from the base's own files are
stored, and put back when the adapter is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import fingerprint
from lora_kit.errors import StorageError
from lora_kit.messages import say
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

NAME = "changed_rows.safetensors"
_SEEN = "lora_kit_rows_seen"


@dataclass(frozen=True)
class Rows:
    """Rows of one matrix."""

    rows: int
    """Rows that the matrix has in all."""
    places: "torch.Tensor"
    """(changed,) their numbers."""
    values: "torch.Tensor"
    """(changed, hidden)"""


def changed(model: Model, source: str | None) -> dict[str, Rows]:
    """Name → the rows of the input embeddings and the output head that differ from the base's files.

    Matrices that carry an adapter or are trained whole are the adapter's, which stores them itself. Without files to
    compare with (a model that came from no folder) nothing can be told, and nothing is stored.
    """
    import torch

    folder = fingerprint.folder_of(source) if source else None
    if folder is None:
        return {}
    found: dict[str, Rows] = {}
    seen = model.__dict__.setdefault(_SEEN, {})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = getattr(module, "weight", None)
        name = names.get(id(weight))
        plain = isinstance(module, torch.nn.Embedding | torch.nn.Linear)
        if name is None or name in found or not plain or weight.is_meta or not weight.is_floating_point():
            continue
        # reading a large matrix takes a second; what was not written to since is as it was
        state = (weight.data_ptr(), weight._version, tuple(weight.shape))
        if name not in seen or seen[name][0] != state:
            seen[name] = (state, _against(folder, name, weight.detach(), getattr(module, "padding_idx", None)))
        if seen[name][1] is not None:
            found[name] = seen[name][1]
    return found


def _against(folder: Path, name: str, weight: "torch.Tensor", padding: int | None) -> Rows | None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        entry = fingerprint.file_of(folder, name)
        if entry is None:
            return None
        with safe_open(entry[0], framework="pt") as file:
            before = file.get_tensor(entry[1]).to(weight.dtype)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    now = weight.cpu()
    if before.shape[1:] != now.shape[1:] or before.shape[0] > now.shape[0]:
        return None
    differs = torch.ones(now.shape[0], dtype=torch.bool)
    differs[: before.shape[0]] = (now[: before.shape[0]] != before).any(dim=-1)
    if padding is not None and not now[padding].any():
        differs[padding] = False  # transformers sets it to zero after it has read it
    places = differs.nonzero().flatten()
    return Rows(now.shape[0], places, now[places].clone()) if len(places) else None


def write(folder: Path, found: dict[str, Rows]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}:places": rows.places for name, rows in found.items()}
    tensors |= {f"{name}:values": rows.values for name, rows in found.items()}
    sizes = json.dumps({name: rows.rows for name, rows in found.items()})
    save_file(tensors, folder / NAME, metadata={"rows": sizes})


def read(folder: Path) -> dict[str, Rows]:
    """What `write` wrote.

    Raises:
        StorageError: the file is not there or not of this form.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / NAME, framework="pt") as file:
            sizes = json.loads(file.metadata()["rows"])
            return {
                name: Rows(int(sizes[name]), file.get_tensor(f"{name}:places"), file.get_tensor(f"{name}:values"))
                for name in sizes
            }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{folder / NAME} cannot be read ({error}); nothing was loaded. Take another copy of it, or "
            "save(model, path) again."
        ) from None


def put_back(model: Model, brought: dict[str, Rows]) -> None:
    """Write the rows into the base's matrices, in place."""
    import torch

    held: dict[str, Any] = dict(model.named_parameters())
    for name, found in brought.items():
        weight, places = held.get(name), found.places
        fits = (
            weight is not None
            and weight.is_floating_point()
            and found.values.dim() == 2
            and weight.shape[1] == found.values.shape[1]
            and places.dtype == torch.int64
            and places.shape == found.values.shape[:1]
            and (len(places) == 0 or 0 <= int(places.min()) <= int(places.max()) < weight.shape[0])
        )
        if not fits:
            raise StorageError(
                f"{NAME}: {len(places)} rows of {name} have no place in this model. Nothing was loaded. "
                "load(path, base=...) with the base it was trained on."
            )
    with torch.no_grad():
        for name, found in brought.items():
            held[name][found.places.to(held[name].device)] = found.values.to(held[name])
            say(f"{len(found.places)} rows of {name}, which were changed without an adapter, were put back")
