"""Adapters that belong together: one adapter for a weight that several layers share, and where PiSSA started from."""

import functools
from typing import TYPE_CHECKING

from lora_kit import stacks
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

# what PEFT keeps per adapter and layer, and what training changes
_TENSORS = ("lora_A", "lora_B", "lora_magnitude_vector")
_START = "lora_kit_start"


def _layers(model: Model) -> dict[str, Model]:
    """Path → PEFT's LoRA layer."""
    from peft.tuners.lora.layer import LoraLayer

    return {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}


def adapted_modules(model: Model) -> list[str]:
    """Paths, in the base, of the layers that PEFT adapts as modules, not as parameters."""
    layers = _layers(model.get_base_model())
    return [path for path, layer in layers.items() if not isinstance(layer, stacks.AdaptedParameter)]


def groups(model: Model) -> list[list[Model]]:
    """The LoRA layers that sit on one and the same weight, two or more each."""
    found: dict[tuple, list[Model]] = {}
    for layer in _layers(model).values():
        base = layer.get_base_layer()
        name = getattr(layer, "parameter_name", None) or "weight"
        weight = base._parameters.get(name)
        if weight is not None:
            place = id(weight) if weight.is_meta else weight.data_ptr()
            found.setdefault((place, weight.shape, name), []).append(layer)
    return [layers for layers in found.values() if len(layers) > 1]


def share_adapters(model: Model, name: str) -> None:
    """Give layers that share a weight one adapter, in place: one set of tensors, added once when they are merged."""
    for first, *others in groups(model):
        for other in others:
            for kind in _TENSORS:
                mine = getattr(first, kind, {})
                if name in mine:
                    getattr(other, kind)[name] = mine[name]
            other.merge = functools.partial(stacks.merged_with_its_twin, other)
            other.unmerge = functools.partial(stacks.unmerged_with_its_twin, other)


def share_equal_adapters(model: Model, name: str) -> None:
    """The same after loading, where the tensors agree; adapters that differ are left as they are."""
    if conflict(model, name) is None:
        share_adapters(model, name)


def conflict(model: Model, name: str) -> tuple[str, str] | None:
    """Two layers on one weight whose adapters differ, so that no merge can be right for both; None without such."""
    import torch

    paths = {id(layer): path for path, layer in _layers(model).items()}
    for first, *others in groups(model):
        for other in others:
            for kind in ("lora_A", "lora_B"):
                a, b = getattr(first, kind), getattr(other, kind)
                if name in a and not (name in b and torch.equal(a[name].weight, b[name].weight)):
                    return paths[id(first)], paths[id(other)]
    return None


def untie(model: Model) -> None:
    """Give an adapted layer a weight of its own where another module has that weight without this adapter, in place.

    What is merged into the layer would else be merged into the other (an output head tied to the input embeddings).
    """
    from torch import nn

    base = model.get_base_model()
    adapted = list(_layers(base).values())
    inside = {id(layer.get_base_layer()) for layer in adapted}
    holders: dict[int, tuple[int, ...] | None] = {
        id(p): None for module in base.modules() if id(module) not in inside for p in module._parameters.values()
    }
    own: dict[tuple, nn.Parameter] = {}
    for layer in adapted:
        inner = layer.get_base_layer()
        weight = getattr(inner, "weight", None)
        # layers that share an adapter hold the same tensors
        adapter = tuple(id(p) for name, p in layer.named_parameters() if "base_layer" not in name)
        if weight is not None and holders.setdefault(id(weight), adapter) != adapter:
            place = id(weight), adapter
            if place not in own:
                own[place] = nn.Parameter(weight.detach().clone(), requires_grad=False)
            inner.weight = own[place]
            base.config.tie_word_embeddings = False


def remember_start(model: Model, name: str) -> None:
    """Keep A and B as PiSSA made them, on the instance: the base has lost their product."""
    start = {}
    for path, layer in _layers(model).items():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        start[path] = (a.detach().cpu().clone(), b.detach().cpu().clone())
    model.__dict__[_START] = start


def started_elsewhere(model: Model) -> bool:
    return _START in model.__dict__


def on_the_unchanged_base(model: Model, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The adapter that does on the unchanged base what this one does on PiSSA's remainder: `B A - B0 A0`, rank 2 r."""
    import torch

    changed = dict(tensors)
    for path, (a0, b0) in model.__dict__[_START].items():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        changed[a] = torch.cat([tensors[a].cpu(), a0.to(tensors[a].dtype)], dim=0).contiguous()
        changed[b] = torch.cat([tensors[b].cpu(), -b0.to(tensors[b].dtype)], dim=1).contiguous()
    return changed
