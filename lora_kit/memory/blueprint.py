"""What a plan builds: the model that `adapt` would make, at any depth, without weights.

It goes through the functions that `adapt` goes through (`base.skeleton_of`, `quantization.quantize_`, the method's
`attach`), on `meta`, where tensors have shapes and no memory.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kit import base, quantization
from lora_kit.methods import Method
from lora_kit.types import Model


@dataclass(frozen=True)
class Blueprint:
    """A model to be adapted, and how."""

    config: Any
    task: str
    dtype: torch.dtype
    method: Method
    bits: Any = None
    """A `BitsAndBytesConfig`, or None."""
    checkpointing: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    """What else transformers' classes are given."""

    def skeleton(self, depths: "dict[Axis, int] | None" = None) -> Model:
        """The base alone, on `meta`, with fewer layers where `depths` says so."""
        config = copy.deepcopy(self.config)
        for axis, depth in (depths or {}).items():
            axis.set(config, depth)
        model = base.skeleton_of(config, self.task, dtype=self.dtype, **dict(self.extra))
        model.tie_weights()
        _keep_in_float32(model, self.dtype)
        return model

    def build(self, depths: "dict[Axis, int] | None" = None) -> Model:
        """The adapted model, on `meta`."""
        model = self.skeleton(depths)
        heads = base.heads_of(model)
        if self.bits is not None:
            quantization.quantize_(model, copy.deepcopy(self.bits), heads)
        if self.checkpointing:
            base.checkpoint(model)
        method: Any = self.method
        if getattr(method, "pissa", False):
            method = dataclasses.replace(method, pissa=False)  # other values, from a decomposition; the same sizes
        method.check(model, heads)
        return method.attach(model, heads, "default").model.train()


def _keep_in_float32(model: Model, dtype: torch.dtype) -> None:
    """What transformers keeps in float32 when it loads in 16 bit."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, parameter in model.named_parameters():
        if names & set(path.split(".")):
            parameter.data = parameter.data.float()


# ---- depth


@dataclass(frozen=True)
class Axis:
    """A number of layers in the config, and the lists of layers that it governs."""

    part: tuple[str, ...]
    """Attributes that lead from the config to the one that holds the number."""
    name: str
    depth: int
    stacks: tuple[str, ...]
    """Paths of the lists of layers in the model."""
    lead: int = 0
    """Layers at the start that are unlike those behind."""
    period: int = 1
    """After how many layers the kinds of layers repeat."""

    def set(self, config: Any, depth: int) -> None:
        """Have a config ask for so many layers, the first ones, in place."""
        for name in self.part:
            config = getattr(config, name)
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == self.depth:
                setattr(config, key, value[:depth])
        setattr(config, self.name, depth)

    @property
    def least(self) -> int:
        """The smallest depth from which on the model grows by whole periods."""
        rest = (self.depth - self.lead) % self.period
        periods = -(-3 // self.period)  # so that a layer between the first and the last is seen
        return self.lead + rest + periods * self.period


def layer_lists(model: Model) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules with weights: path → list."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module) > 1
            and not inside
            and any(True for _ in module.parameters())
        ):
            found[path] = module
    return found


def axes_of(blueprint: Blueprint) -> tuple[Axis, ...]:
    """Along which numbers of layers the model may be shortened, with the same adapters on every layer of a kind."""
    if _names_layers(blueprint.method):
        return ()
    whole = blueprint.skeleton()
    lists = layer_lists(whole)
    kinds = {path: [_kind(layer) for layer in layers] for path, layers in lists.items()}
    found: list[Axis] = []
    for part, config in _configs(blueprint.config):
        for name, depth in list(vars(config).items()):
            if "layer" not in name or isinstance(depth, bool) or not isinstance(depth, int):
                continue
            if depth not in {len(layers) for layers in lists.values()} or depth < 4:
                continue
            trial = Axis(part, name, depth, ())
            try:
                shorter = layer_lists(blueprint.skeleton({trial: depth - 1}))
            except Exception:  # a config that does not allow it: not along this one
                continue
            governed = tuple(path for path, layers in shorter.items() if len(layers) == len(lists[path]) - 1)
            others = [path for path in lists if path not in governed and len(shorter.get(path, ())) != len(lists[path])]
            if not governed or others or any(set(governed) & set(axis.stacks) for axis in found):
                continue
            together = list(zip(*(kinds[path] for path in governed), strict=True))
            lead, period = _repeats(together)
            axis = Axis(part, name, depth, governed, lead, period)
            if axis.least + axis.period < depth and _same_start(blueprint, axis, kinds):
                found.append(axis)
    return tuple(found)


def _names_layers(method: Method) -> bool:
    """Whether a method's options speak of single layers, by a number or a pattern."""
    config = getattr(method, "config", None)
    asked = [getattr(method, "target_modules", None), getattr(config, "target_modules", None)]
    if any(getattr(config, name, None) for name in ("layers_to_transform", "rank_pattern", "alpha_pattern")):
        return True
    named = [one for one in asked if one and one != "all-linear"]
    return any(isinstance(one, str) or any(re.search(r"\d", str(name)) for name in one) for one in named)


def _same_start(blueprint: Blueprint, axis: Axis, kinds: dict[str, list[Any]]) -> bool:
    """Whether a shorter model has the first layers of the whole one."""
    for depth in (axis.least, axis.least + axis.period):
        shorter = layer_lists(blueprint.skeleton({axis: depth}))
        for path in axis.stacks:
            if path not in shorter or [_kind(layer) for layer in shorter[path]] != kinds[path][:depth]:
                return False
    return True


def _configs(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield (), config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield (name,), value


def _kind(layer: nn.Module) -> tuple:
    """What two layers of the same kind have in common: classes, sizes and settings, not their number."""
    found = []
    for path, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, int | float | str)
            and not key.startswith("_")
            and not key.endswith(("idx", "index", "id"))
        )
        weights = tuple((name, p.shape, p.dtype) for name, p in module._parameters.items() if p is not None)
        found.append((path, type(module), settings, weights))
    return tuple(found)


def _repeats(kinds: list[Any]) -> tuple[int, int]:
    """(layers before, period) of the shortest repetition that goes to the end."""
    best = (len(kinds), 1)
    for period in range(1, len(kinds) // 2 + 1):
        lead = len(kinds) - period
        while lead > 0 and kinds[lead - 1] == kinds[lead - 1 + period]:
            lead -= 1
        if lead + 2 * period <= len(kinds) and lead + 2 * period < best[0] + 2 * best[1]:
            best = lead, period
    return best
