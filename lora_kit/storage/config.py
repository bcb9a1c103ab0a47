"""`adapter_config.json` read as data: known fields of the right type, and nothing that names code or other files.

PEFT drops a field that it does not know, even one that changes the mathematics, follows paths and module names that a
config gives, and runs its patterns as regular expressions without a bound. Here a config is a stranger's word.
"""

import dataclasses
import enum
import math
import re
import time
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.errors import StorageError, listing, nearest
from lora_kit.storage.manifest import read_json

if TYPE_CHECKING:
    import torch

NAME = "adapter_config.json"
LARGEST = 1 << 22
"""Bytes that a config may have."""
_SECONDS = 0.5
"""Time that all patterns of a config may take together."""
_FOLLOWED = {
    "megatron_config": "imports a module",
    "prompt_tuning_init_state_dict_path": "reads a file of its choice",
    "tokenizer_kwargs": "loads a tokenizer as it says",
    "shadow_model": "loads another model",
    "adapters": "loads other folders",
}
"""Fields that would have PEFT follow a name in the file."""
_SIZES = frozenset(
    [
        *("r", "init_r", "target_r", "hybrid_r", "num_virtual_tokens", "token_dim", "encoder_hidden_size", "depth"),
        *("encoder_num_layers", "num_layers", "adapter_len", "adapter_layers", "num_vectors", "vector_length"),
        *("n_frequency", "theta_d_length", "num_ranks", "xlora_size", "xlora_depth", "n_skills", "n_splits"),
        *("n_tasks", "num_tasks"),
    ]
)
"""Fields that say how much PEFT is to allocate."""
_PLAIN = re.compile(r"[\w.\-]*\Z")


def read(folder: Path, tensors: "dict[str, torch.Tensor]") -> Any:
    """The PEFT config that lies in a folder beside these tensors.

    Raises:
        StorageError: an unknown field with a value, a value of the wrong type, a size that the tensors have not, or a
            field that would run code or read other files.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

    file = folder / NAME
    content = read_json(file, LARGEST)
    word = content.get("peft_type")
    installed = sorted(getattr(key, "value", str(key)) for key in CLASSES)
    if not isinstance(word, str) or word not in list(CLASSES):
        raise StorageError(
            f"{file}: peft_type is {_short(word)}, which is none of the {len(installed)} that the installed PEFT has "
            f"({listing(installed, 6)}). Nothing was loaded. If a newer PEFT wrote it: pip install -U peft."
        )
    kind = CLASSES[word]
    hints = typing.get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    for name in [name for name in content if name not in known]:
        if content[name] not in (None, False, [], {}, "", 0):
            raise StorageError(
                f"{file} has the field {name!r} = {_short(content[name])}, which the installed PEFT does not know and "
                f"which may change what the adapter computes; {len(known)} fields are known."
                f"{nearest(name, known)} Nothing was loaded. If a newer PEFT wrote it: pip install -U peft."
            )
        del content[name]
    for name, value in content.items():
        if not fits(value, known[name], name):
            raise StorageError(
                f"{file}: {name} = {_short(value)} is not of the type that PEFT has for it "
                f"({_short(known[name])}). Nothing was loaded. Take another copy of it, or save(model, path) again."
            )
        if name in _FOLLOWED and value:
            raise StorageError(
                f"{file}: {name} = {_short(value)} {_FOLLOWED[name]}, which no file may ask for here. Nothing was "
                f'loaded. If the adapter is good without it: write "{name}": null there.'
            )
    _refuse_sizes(file, content, tensors)
    if "prompt_tuning_init" in content:
        content["prompt_tuning_init"] = "RANDOM"  # the numbers are in the file; another start would load a tokenizer
    try:
        return kind(**content)
    except Exception as error:  # each of PEFT's config classes checks itself, and raises what it likes
        raise StorageError(
            f"{file} is refused by PEFT ({len(content)} fields): {_short(error)}. Nothing was loaded. Take another "
            "copy of it, or save(model, path) again."
        ) from None


def fits(value: Any, hint: Any, name: str = "") -> bool:
    """Whether a value out of JSON is one that the type hint of a config's field allows."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part, name) for part in inside)
    if origin is typing.Literal:
        # PEFT has words that the hint spells out as a pattern
        return value in inside or (name == "init_lora_weights" and isinstance(value, str))
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is float or (hint is int and "alpha" in name):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    if hint is str:
        return isinstance(value, str)
    if hint is dict or origin is dict:
        values = inside[1] if len(inside) == 2 else Any
        return isinstance(value, dict) and all(fits(part, values, name) for part in value.values())
    if hint is list or origin in (list, tuple, set):
        values = inside[0] if inside else Any
        return isinstance(value, list) and all(fits(part, values, name) for part in value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str) and value in [member.value for member in hint]
    if dataclasses.is_dataclass(hint):
        return value is None or isinstance(value, dict)
    return True


def _refuse_sizes(file: Path, content: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> None:
    """No config makes PEFT allocate more than what its tensors fill."""
    ranks = [t.shape[0] for name, t in tensors.items() if "lora_A" in name or "lora_embedding_A" in name]
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    bound = max(ranks) if content["peft_type"] == "LORA" and ranks else max(most, 1024)
    # a stack of experts has its ranks side by side
    named = [(name, content.get(name)) for name in _SIZES]
    named += [(f"rank_pattern[{key!r}]", value) for key, value in (content.get("rank_pattern") or {}).items()]
    for name, value in named:
        if isinstance(value, int | float) and not -1 <= value <= bound:
            raise StorageError(
                f"{file}: {name} = {_short(value)}, and no tensor beside it is larger than {bound:,}. Nothing was "
                "loaded. Take another copy of it, or save(model, path) again."
            )
    replicas = sum(abs(end - start) for start, end in content.get("layer_replication") or [])
    if replicas > 1000:
        raise StorageError(
            f"{file}: layer_replication makes {replicas:,} layers; at most 1,000 are accepted from a file. Nothing was "
            "loaded. Take another copy of it, or save(model, path) again."
        )


def resolve_patterns(config: Any, names: list[str], tensors: Iterable[str], folder: Path) -> bool:
    """Put the full names of this model's modules in the place of a config's patterns, in place; whether there were any.

    PEFT would run them as regular expressions, and one in a file can be written so that it never ends. Modules that
    it would copy to train them whole must have their tensors in the file.
    """
    changed, until = False, time.monotonic() + _SECONDS
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if not isinstance(pattern, str) or pattern == "all-linear":
            continue
        found = _matching(pattern, names, folder, field, until)
        if not found and field == "target_modules":
            raise StorageError(
                f"{folder / NAME}: target_modules = {_short(pattern)} matches none of the {len(names)} modules of this "
                "base. Nothing was loaded. load(path, base=...) with the base it was trained on."
            )
        setattr(config, field, set(found) or None)
        changed = True
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field, None) or {}
        if all(_PLAIN.match(key) for key in patterns):
            continue
        resolved: dict[str, Any] = {}
        for key, value in patterns.items():
            for name in _matching(rf"(.*\.)?({key})", names, folder, field, until):
                resolved.setdefault(name, value)
        setattr(config, field, resolved)
    for field in ("modules_to_save", "layers_pattern", "feedforward_modules"):
        value = getattr(config, field, None) or []
        for name in [value] if isinstance(value, str) else value:
            if not _PLAIN.match(name):
                raise StorageError(
                    f"{folder / NAME}: {field} has {_short(name)} ({len(name)} characters), which is no name of a "
                    "module. Nothing was loaded. Take another copy of it, or save(model, path) again."
                )
    for name in getattr(config, "modules_to_save", None) or []:
        copied = [path for path in names if path == name or path.endswith(f".{name}")]
        if copied and not any(f".{name}." in f".{tensor}" for tensor in tensors):
            raise StorageError(
                f"{folder / NAME}: modules_to_save has {_short(name)}, which is {copied[0]} here, and none of the "
                "tensors beside it is for that. Nothing was loaded. Take another copy of it, or save(model, path)."
            )
    return changed


def _matching(pattern: str, names: list[str], folder: Path, field: str, until: float) -> list[str]:
    import regex  # re has no timeout

    why = f"is longer than 10,000 characters ({len(pattern):,})"
    if len(pattern) <= 10_000:
        try:
            compiled = regex.compile(pattern)
            return [n for n in names if compiled.fullmatch(n, timeout=max(until - time.monotonic(), 1e-6))]
        except TimeoutError:
            why = f"takes more than {_SECONDS} s to match this model's names"
        except (regex.error, RecursionError) as error:
            why = f"is no regular expression ({error})"
    raise StorageError(
        f"{folder / NAME}: {field} = {_short(pattern)} {why}. Nothing was loaded. Write the names out: "
        '"target_modules": ["q_proj", "v_proj"].'
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split()) if isinstance(value, Exception) or not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
