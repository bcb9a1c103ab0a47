"""Which model an adapter was trained on, told again later: by the base's files, and by samples of its values.

From files: every tensor's name, dtype, shape and a few of its bytes. That is exact, and the same however the model is
quantized once it is loaded. From memory: a few values of each weight that is not quantized. Norms and embeddings alone
prove nothing (many a fine-tuned model has the base's own), so without a matrix to compare the answer is "cannot tell".
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

TENSORS = 48
"""Weights that are sampled from memory, spread over the model."""
VALUES = 8
"""Values sampled of each."""
_BYTES = 64
"""Bytes that are read of a tensor in a file, at its start, its middle and its end."""
_LARGEST_HEADER = 100_000_000


def of_files(path: str | None, revision: str | None = None) -> dict[str, str] | None:
    """`{"layout": …, "content": …}` of a folder or of a hub id that lies in the cache; None without safetensors there.

    Two copies of a model that are cut into files differently have the same.
    """
    folder = folder_of(path, revision) if path else None
    if folder is None:
        return None
    layout, content = hashlib.sha256(), hashlib.sha256()
    try:
        entries = [entry for file in _weight_files(folder) for entry in tensors_in(file)]
        for name, dtype, shape, file, start, end in sorted(entries, key=lambda entry: entry[0]):
            layout.update(json.dumps([name, dtype, shape]).encode())
            with file.open("rb") as stream:
                for at in (start, (start + end) // 2, max(start, end - _BYTES)):
                    stream.seek(at)
                    content.update(stream.read(min(_BYTES, end - at)))
    except (OSError, ValueError, KeyError, TypeError):  # not a model's files: nothing to tell by
        return None
    return {"layout": layout.hexdigest(), "content": content.hexdigest()} if entries else None


def folder_of(path: str, revision: str | None = None) -> Path | None:
    """Where a model's files lie on this machine: the folder, or a hub id's place in the cache."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    try:
        found = cached_file(path, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    return [file for file in [folder / "model.safetensors"] if file.exists()]


def file_of(folder: Path, name: str) -> tuple[Path, str] | None:
    """The file that holds a weight, and its name there: its own, or the only one that ends alike."""
    named = {entry[0]: entry[3] for file in _weight_files(folder) for entry in tensors_in(file)}
    if name in named:
        return named[name], name
    alike = [other for other in named if name.endswith(f".{other}") or other.endswith(f".{name}")]
    return (named[alike[0]], alike[0]) if len(alike) == 1 else None


def tensors_in(file: Path) -> list[tuple[str, str, list[int], Path, int, int]]:
    """(name, dtype, shape, file, first byte, byte after the last) of every tensor."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return [
        (name, entry["dtype"], entry["shape"], file, *(8 + length + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    ]


def of_model(model: Model, without: "tuple[str, ...]" = ()) -> dict[str, Any]:
    """`{name: {"shape", "dtype", "matmul", "values"}}` of weights that are not quantized, but those below `without`.

    Weights on `meta` have no values, and none are made: they are left out.
    """
    import torch

    from lora_kit.structure import within

    embeddings = {id(m.weight): m.weight.shape[0] for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    named = [
        (name, parameter)
        for name, parameter in _of_the_base(model)
        if parameter.is_floating_point()
        and parameter.dtype.itemsize >= 2
        and parameter.numel()
        and not parameter.is_meta
        and not within(name, without)
        and getattr(parameter, "quant_state", None) is None
    ]
    # matrices first: norms prove nothing, and a model may have many; nor does an output head, which few tunings change
    matrices = [e for e in named if e[1].dim() >= 2 and e[1].shape[0] not in embeddings.values()]
    others = [entry for entry in named if not any(entry is other for other in matrices)]
    chosen = [*_spread(matrices, 2 * TENSORS // 3), *_spread(others, TENSORS // 3)]
    drawn = [(name, p, _places(tuple(p.shape))) for name, p in chosen]
    values = [p.detach()[tuple(torch.tensor(places, device=p.device).T)].double() for _, p, places in drawn]
    # one copy from the device for all of them
    flat = torch.cat([value.to(values[0].device) for value in values]).tolist() if values else []
    found, at = {}, 0
    for name, parameter, places in drawn:
        found[name] = {
            "shape": list(parameter.shape),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "matmul": any(entry[1] is parameter for entry in matrices),
            "values": [value if value == value and abs(value) < float("inf") else None for value in flat[at:][:VALUES]],
        }
        at += len(places)
    return found


def _of_the_base(model: Model) -> "list[tuple[str, torch.Tensor]]":
    """The base's own parameters by the names that they have without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrapped = tuple(
        f"{path}." for path, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    found = []
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain != name or not name.startswith(wrapped):
            found.append((plain, parameter))
    return found


def _spread(entries: list[Any], count: int) -> list[Any]:
    """At most so many, evenly from first to last."""
    if len(entries) <= count:
        return entries
    return [entries[i * (len(entries) - 1) // (count - 1)] for i in range(count)]


def _places(shape: tuple[int, ...]) -> list[list[int]]:
    """`VALUES` indices into a tensor, spread along each dimension at a pace of its own."""
    return [
        [(i * (2 * d + 3) * size // (2 * VALUES) + i) % size for d, size in enumerate(shape)] for i in range(VALUES)
    ]


def differing(recorded: dict[str, Any], model: Model, without: "tuple[str, ...]" = ()) -> tuple[list[str], int, bool]:
    """(weights whose values differ, how many were compared, whether a matrix was among those).

    Values may differ by a rounding step of the coarser of the two dtypes.
    """
    import torch

    now = dict(model.named_parameters())
    wrong, compared, matrices = [], 0, False
    for name, entry in recorded.items():
        weight = now.get(name)
        shape = tuple(entry["shape"])
        if weight is None or weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            continue
        # rows may have been added to the vocabulary
        if name in without or tuple(weight.shape[1:]) != shape[1:] or weight.shape[0] < shape[0]:
            continue
        dtype = getattr(torch, entry["dtype"])
        step = max(torch.finfo(weight.dtype).eps, torch.finfo(dtype).eps)
        places = torch.tensor(_places(shape), device=weight.device)
        found = weight.detach()[tuple(places.T)].double().tolist()
        pairs = [(a, b) for a, b in zip(found, entry["values"], strict=True) if b is not None]
        compared += 1
        matrices = matrices or entry["matmul"]
        if any(not abs(a - b) <= step * max(abs(a), abs(b)) + 1e-30 for a, b in pairs):
            wrong.append(name)
    return wrong, compared, matrices
