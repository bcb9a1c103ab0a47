"""Models that were saved whole: checked against their own config before they are loaded."""

import math
import re
from pathlib import Path
from typing import Any

from lora_kit import base as base_models
from lora_kit import fingerprint
from lora_kit import quantization as bits
from lora_kit.errors import AdapterMismatchError, OptionError, StorageError, listing
from lora_kit.messages import say
from lora_kit.methods import METHODS
from lora_kit.storage import config as settings
from lora_kit.storage import stored
from lora_kit.storage.manifest import read_json
from lora_kit.types import Model

_LAYERS = re.compile(r"(num_(hidden_|encoder_|decoder_)?|n_|encoder_|decoder_)layers?")
_COMPUTED = 5_000_000


def load_whole(
    folder: Path, facts: dict[str, Any], *, train: bool, quantization: Any, dtype: Any, device: str | None
) -> Model:
    """A model that `save` or transformers wrote whole, to use or to go on training."""
    config = bits.resolve(quantization)
    _refuse_impossible(folder)
    with stored.or_refused(
        StorageError, f"transformers cannot make a model of {folder}", "Take another copy, or save(model, path) again"
    ):
        source = base_models.examine(str(folder), task=facts.get("task"), dtype=dtype, device=device, model_kwargs=None)
        if train:
            METHODS["full"]().check(source.skeleton, [])
            if config is not None:
                raise OptionError("train=True with quantization on a whole model: quantized weights cannot be trained.")
        _refuse_larger(folder, source.skeleton)
        model, missing = base_models.load(source, config, base_models.heads_of(source.skeleton))
    if missing or source.unexpected:
        raise AdapterMismatchError(
            f"{folder} does not fit its own config: no weights for {len(missing)} modules "
            f"({listing(missing, 3) or '–'}), no place for {len(source.unexpected)} tensors "
            f"({listing(source.unexpected, 3) or '–'}). Nothing was loaded. Take another copy of the folder, or "
            "save(model, path) again."
        )
    if config is None:
        _restore(model, folder)
    if train and (facts.get("options") or {}).get("weights", "float32") == "float32":
        _to_float32(model)
    model.requires_grad_(train)
    model.train(train)
    return model


def _to_float32(model: Model) -> None:
    """As `Full` trains: most updates of a 16-bit weight are smaller than its rounding step."""
    import torch

    halves = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize == 2})
    if halves:
        model.to(torch.float32)
        say(f"weights cast from {'/'.join(halves)} to float32 to be trained")


def _restore(model: Model, folder: Path) -> None:
    """Copy again, in place, what transformers changed after reading the file (it zeroes the padding token's row)."""
    import torch
    from safetensors import safe_open

    state = model.state_dict()
    with torch.no_grad():
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in set(opened.keys()) & set(state):
                    value = opened.get_tensor(name)
                    if value.shape == state[name].shape:
                        state[name].copy_(value)


def _refuse_impossible(folder: Path) -> None:
    """Refuse a whole model whose config speaks of more layers than its files have tensors, or that is pickled."""
    file = folder / "config.json"
    content, tensors = read_json(file, settings.LARGEST), len(_shapes(folder))
    if not tensors:
        pickled = listing(sorted(path.name for path in folder.glob("*.bin")), 3)
        said = f", only pickled weights ({pickled}), which could run code when they are read" if pickled else ""
        raise StorageError(
            f"{folder} has no *.safetensors{said}. Nothing was loaded. Convert it where you trust it: "
            "model.save_pretrained(folder)."
        )
    for name, value in content.items():
        if _LAYERS.fullmatch(name) and isinstance(value, int) and value > tensors:
            raise StorageError(
                f"{file}: {name} = {value}, and the files beside it have {tensors} tensors. Nothing was loaded. Take "
                "another copy of it, or save(model, path) again."
            )


def _refuse_larger(folder: Path, skeleton: Any) -> None:
    """Refuse a whole model whose config asks for far more numbers than its files have: nothing would fill them.

    Some are computed and not stored (sinusoidal positions), hence the room.
    """
    there = sum(math.prod(shape) for shape in _shapes(folder))
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if wanted > 2 * there + _COMPUTED:
        raise StorageError(
            f"{folder / 'config.json'} describes {wanted:,} parameters, the files beside it have {there:,}. Nothing "
            "was loaded. Take another copy of the folder, or save(model, path) again."
        )


def _shapes(folder: Path) -> list[list[int]]:
    """The shape of every tensor in a folder's files, by their headers."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found += [[int(size) for size in entry[2]] for entry in fingerprint.tensors_in(file)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{file} has no header of safetensors ({file.stat().st_size:,} bytes; {str(error)[:80]}). Nothing was "
                "loaded. Take another copy of it, or save(model, path) again."
            ) from None
    return found
