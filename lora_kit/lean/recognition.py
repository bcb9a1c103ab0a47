"""Gated MLPs, RMS normalizations and activations, known by what they compute and not by what they are called.

A part is taken for one of these only if its class's forward gives, to the last bit, what the formula gives on random
input, with maps and weights of our own in the place of the model's: no weight of the model is read, none has to be
there. One module of each kind (class, sizes, settings) is asked, the others are like it.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.lean.rms_norm import rms_norm

ATTENTION = {"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention"}
"""What a forward names that calls torch's attention."""


@dataclass(frozen=True)
class Gate:
    """`down(act(g) · u)`: names of the parts within the module."""

    into: tuple[str, ...]
    """The maps that give g and u, or the one map that gives both, half and half."""
    act: str
    down: str
    swapped: bool = False
    """For one map: the activation is for the second half."""

    def halves(self, maps: list[Any], x: Tensor) -> tuple[Tensor, Tensor]:
        """(g, u) of the input."""
        if len(maps) == 2:
            return maps[0](x), maps[1](x)
        first, second = maps[0](x).chunk(2, dim=-1)
        return (second, first) if self.swapped else (first, second)


@dataclass(frozen=True)
class Norm:
    """How an RMS normalization is written."""

    eps: str
    """Name of ε on the module."""
    from_one: bool
    rounds_first: bool


def gates(model: nn.Module) -> dict[str, Gate]:
    """Path → gated MLP."""
    return _found(model, _could_be_gated, _gate)


def norms(model: nn.Module) -> dict[str, Norm]:
    """Path → RMS normalization."""
    return _found(model, _could_be_norm, _norm)


def activations(model: nn.Module) -> list[str]:
    """Paths of modules that apply a function entry by entry."""
    return list(_found(model, _could_be_activation, _entrywise))


def attentions(model: nn.Module) -> list[str]:
    """Paths of modules that call torch's attention, by themselves or through transformers' interface, with dropout."""
    return [path for path, module in model.named_modules() if _calls_attention(module) and _drops(module)]


def _calls_attention(module: nn.Module) -> bool:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if "forward" in vars(module) or not str(chosen).endswith("sdpa"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not ATTENTION.isdisjoint(code.co_names)


def _drops(module: nn.Module) -> bool:
    shares = [part.p for part in module.children() if isinstance(part, nn.Dropout)]
    shares += [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return any(share > 0 for share in shares)


def _found(model: nn.Module, candidate: Callable[[Any], Any], recognize: Callable[[Any], Any]) -> dict[str, Any]:
    known: dict[Any, Any] = {}
    found = {}
    for path, module in model.named_modules():
        if not candidate(module):
            continue
        key = _kind(module)
        if key not in known:
            known[key] = _asked(module, recognize)
        if known[key]:
            found[path] = known[key]
    return found


def _kind(module: nn.Module) -> tuple:
    """What two modules that compute the same have in common."""
    own = sorted(vars(module).items())
    settings = tuple((key, repr(value)) for key, value in own if isinstance(value, int | float | str))
    functions = tuple((key, id(value)) for key, value in own if callable(value))
    parts = tuple((name, type(part), linear_size(part)) for name, part in module.named_children())
    weights = tuple((name, p.shape, p.dtype) for name, p in module._parameters.items() if p is not None)
    return type(module), settings, functions, parts, weights


def _asked(module: nn.Module, recognize: Callable[[Any], Any]) -> Any:
    """The answer of `recognize` for the module; None where it is another in training than in evaluation.

    As where a part of the result is dropped in training, in a line of the forward's own.
    """
    if "forward" in vars(module):
        return None
    answers = [_answer(module, recognize, training) for training in (False, True)]
    return answers[0] if answers[0] == answers[1] else None


def _answer(module: nn.Module, recognize: Callable[[Any], Any], training: bool) -> Any:
    """The answer for a copy of the module without its parts' weights; None where it raises."""
    twin = copy.copy(module)
    vars(twin).update(_modules=dict(module._modules), _parameters=dict(module._parameters), training=training)
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(0)
            return recognize(twin)
    except Exception:  # whatever a module raises that takes something else
        return None


class StandIn(nn.Module):
    """Some affine map of the right sizes that costs nothing: each output is one input, scaled and shifted."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs))
        self.shift = torch.randn(outputs)
        self.chosen = torch.randint(inputs, (outputs,))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.chosen] * self.weight + self.shift


def linear_size(part: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear map, adapted or quantized or not; None for anything else."""
    if hasattr(part, "in_features") and hasattr(part, "out_features"):
        return int(part.in_features), int(part.out_features)  # type: ignore[arg-type]  # numbers on every such class
    if type(part).__name__ == "Conv1D" and hasattr(part, "nx"):
        return int(part.nx), int(part.nf)  # type: ignore[arg-type]  # the same
    return None


def _could_be_gated(module: nn.Module) -> bool:
    sizes = [linear_size(part) for part in module.children()]
    return 2 <= sum(size is not None for size in sizes) <= 3


def _gate(module: nn.Module) -> Gate | None:
    children = dict(module.named_children())
    sizes = {name: size for name, part in children.items() if (size := linear_size(part)) is not None}
    rest = {name: part for name, part in children.items() if name not in sizes}
    if any(isinstance(part, nn.Dropout) and part.p for part in rest.values()):
        return None
    acts = [name for name, part in rest.items() if not any(True for _ in part.parameters())]
    acts += [name for name, value in vars(module).items() if callable(value) and not isinstance(value, type)]
    maps = {name: StandIn(*size) for name, size in sizes.items()}
    module._modules.update(maps)
    for candidate in _gates(sizes, acts):
        x = torch.randn(2, 3, sizes[candidate.into[0]][0])
        g, u = candidate.halves([maps[name] for name in candidate.into], x)
        found = maps[candidate.down](getattr(module, candidate.act)(g) * u)
        if torch.equal(found, module.forward(x)):
            return candidate
    return None


def _gates(sizes: dict[str, tuple[int, int]], acts: list[str]) -> Iterator[Gate]:
    for act, down in itertools.product(acts, sizes):
        others = [name for name in sizes if name != down]
        if len(others) == 2 and sizes[others[0]] == sizes[others[1]] and sizes[others[0]][1] == sizes[down][0]:
            for into in itertools.permutations(others):
                yield Gate(into, act, down)
        if len(others) == 1 and sizes[others[0]][1] == 2 * sizes[down][0]:
            yield Gate((others[0],), act, down)
            yield Gate((others[0],), act, down, swapped=True)


def _could_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    return alone and weight is not None and weight.dim() == 1 and _eps(module) is not None


def _eps(module: nn.Module) -> str | None:
    return next((name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)), None)


def _norm(module: Any) -> Norm | None:
    eps = _eps(module)
    # a weight of ones, as after initialization, would hide how it enters
    weight = (torch.rand(module.weight.shape) + 0.5).to(module.weight.dtype)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(4, 16, weight.shape[0]).to(torch.bfloat16)
    wanted = module.forward(x)
    for from_one, rounds_first in itertools.product((False, True), (True, False)):
        found = rms_norm(x, weight, getattr(module, eps or ""), from_one=from_one, rounds_first=rounds_first)
        if found.dtype == wanted.dtype and torch.equal(found, wanted):
            return Norm(eps or "", from_one, rounds_first)
    return None


def _could_be_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    known = home in ("transformers.activations", "torch.nn.modules.activation")
    return known and not module._parameters and not module._buffers and not getattr(module, "inplace", False)


def _entrywise(module: nn.Module) -> bool:
    x = torch.randn(6, 8)
    y = module(x)
    if y.shape != x.shape:
        return False
    order = torch.randperm(x.numel())
    mixed = module(x.flatten()[order].view_as(x))
    # some are random
    return torch.equal(mixed, y.flatten()[order].view_as(x)) and torch.equal(module(x), y)
