"""A function whose intermediate results are all made again in the backward pass; it keeps its input alone.

Like activation checkpointing of a part of a layer, with one difference: the layer behind may need the result too, to
pass on its own gradients. It then gets it from the same second run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lora_kit.lean.lora_linear import Source, default_generator


def recomputed(
    run: Callable[[Tensor], Tensor], x: Tensor, parameters: tuple[Tensor, ...], *, random: bool
) -> tuple[Tensor, Source]:
    """`run(x)` and how to make it again.

    Args:
        run: differentiable in x and the parameters; gives the same again when run again.
        x: the only input that is kept.
        parameters: what else `run` uses and wants a gradient for.
        random: whether `run` draws random numbers, which must be the same the second time.
    """
    again = _Again(run, x.device, random)
    result = _Recomputed.apply(again, x, *parameters)
    return result, Source(again.result, (x,))


class _Again:
    """The second run, shared by all who need its result, and dropped by the last."""

    def __init__(self, run: Callable[[Tensor], Tensor], device: torch.device, random: bool) -> None:
        self.run, self.device = run, device
        self.random = [generator.get_state() for generator in _generators(device)] if random else []
        kind = device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.graph: tuple[Tensor, Tensor] | None = None

    def result(self, x: Tensor) -> Tensor:
        return self.graph_of(x)[1].detach()

    def graph_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            with torch.enable_grad(), torch.autocast(*self.autocast), _drawing_from(self.random, self.device):
                leaf = x.detach().requires_grad_()
                self.graph = leaf, self.run(leaf)
        return self.graph


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, again: _Again, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(x, *parameters)
        return again.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, *parameters = ctx.saved_tensors
        leaf, result = ctx.again.graph_of(x)
        ctx.again.graph = None
        wanted = [tensor for tensor, need in zip((leaf, *parameters), ctx.needs_input_grad[1:], strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, dy, allow_unused=True))
        return None, *(next(found) if need else None for need in ctx.needs_input_grad[1:])


def _generators(device: torch.device) -> list[torch.Generator]:
    """What random operations on this device, and on the CPU, draw from."""
    return [torch.default_generator] + ([default_generator(device)] if device.type != "cpu" else [])


@contextmanager
def _drawing_from(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Random operations inside draw from these states; outside nothing has been drawn."""
    generators = _generators(device) if states else []
    before = [generator.get_state() for generator in generators]
    try:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
