"""The state of a run as safetensors and JSON: optimizer, schedule, scaler, random generators. Nothing is pickled.

A state is made of dictionaries, lists, tuples, numbers, words and tensors; tensors go into one file, the rest into the
other, with a reference where a tensor was. What is read back is equal, to the last bit and to the type.
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.errors import ResumeError, StorageError
from lora_kit.storage.manifest import read_json

if TYPE_CHECKING:
    import torch

NUMBERS = "training_state.safetensors"
WORDS = "training_state.json"
_LARGEST = 1 << 28


def write(folder: Path, states: dict[str, Any]) -> None:
    """Write named states into a folder.

    Raises:
        StorageError: something in a state is neither data nor a tensor.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    words = {name: _plain(state, name, tensors) for name, state in states.items()}
    (folder / WORDS).write_text(json.dumps(words))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / NUMBERS)


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote, tensors on the CPU.

    Raises:
        ResumeError: there is no such state in the folder.
        StorageError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    missing = [name for name in (WORDS, NUMBERS) if not (folder / name).exists()]
    if missing:
        raise ResumeError(
            f"{folder} has no optimizer state ({', '.join(missing)} of 2 files missing), so no run can go on from it. "
            "Start a new run from its weights: load(path, base, train=True)."
        )
    try:
        tensors = load_file(folder / NUMBERS)
        return {name: _whole(state, tensors) for name, state in read_json(folder / WORDS, _LARGEST).items()}
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StorageError(
            f"the training state in {folder} cannot be read ({type(error).__name__}: {error}); nothing was loaded. "
            "Take an earlier checkpoint: finetune(..., resume=path_of_it)."
        ) from None


def _plain(value: Any, path: str, tensors: "dict[str, torch.Tensor]") -> Any:
    """A value as JSON: numbers and words as they are, all else as `{"kind of thing": content}`."""
    import numpy as np
    import torch

    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, np.ndarray):
        # safetensors through torch has no unsigned types of more than a byte
        tensors[path] = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        return {"array": path, "dtype": value.dtype.str, "shape": list(value.shape)}
    if torch.is_tensor(value):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        pairs = [[_plain(key, path, tensors), _plain(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise StorageError(
        f"{path} is a {type(value).__name__}; a checkpoint holds numbers, words and tensors alone. "
        "finetune(..., save_every=None) trains without checkpoints."
    )


def _whole(value: Any, tensors: "dict[str, torch.Tensor]") -> Any:
    import numpy as np

    if isinstance(value, list):
        return [_whole(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float.fromhex(value["float"])
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        flat = np.frombuffer(tensors[value["array"]].numpy().tobytes(), dtype=np.dtype(value["dtype"]))
        return flat.reshape(value["shape"]).copy()
    if "tuple" in value:
        return tuple(_whole(item, tensors) for item in value["tuple"])
    return {_whole(key, tensors): _whole(item, tensors) for key, item in value["dict"]}


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random generators."""
    import numpy as np
    import torch

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back to where `random_states` found them."""
    import numpy as np
    import torch

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
