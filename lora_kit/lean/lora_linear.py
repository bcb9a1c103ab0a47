"""A linear map with a low-rank update, `y = W x + b + s · B A drop(x)`, as one step of the autograd graph.

PEFT composes it of separate operations, and the graph keeps a float32 copy of the input for every adapted layer, the
dropped-out input and its mask. Here the input is kept as it came (one tensor for all layers that see it), or not at
all where it can be made again; the mask is drawn again from the random state that it was drawn from; the small
products come first: `B (A x)`, never `(B A) x`. One pass through the base map each way, at any width of its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Source:
    """How to make a tensor again: `make(*kept)`. The backward pass keeps `kept` instead of the tensor."""

    make: Callable[..., Tensor]
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class Map:
    """A frozen linear map, however its weight is stored."""

    run: Callable[[Tensor], Tensor]
    """(rows, in) -> (rows, out), bias included; the result is new memory."""
    pull: Callable[[Tensor], Tensor]
    """Gradient of the result (rows, out) -> gradient of the input (rows, in), new memory."""


def lora_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Map,
    scale: float,
    *,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    source: Source | None = None,
) -> Tensor:
    """`base(x) + scale · (drop(x) Aᵀ Bᵀ + lora_bias)`: (..., in) -> (..., out).

    Args:
        x: the input, in any layout.
        a: (rank, in), and
        b: (out, rank), in any floating dtype; the small products run in the dtype of the base's result.
        base: the map that is adapted.
        scale: alpha / rank.
        dropout: share of x that the update does not see.
        bias: the base's bias if it is trained; `base.run` adds it.
        lora_bias: a bias of the update, (out,).
        source: makes x again in the backward pass; x is not kept then.
    """
    kept = (x,) if source is None else source.kept
    make = None if source is None else source.make
    y = _LoraLinear.apply(x, a, b, bias, lora_bias, base, scale, dropout, make, *(t.detach() for t in kept))
    return y.view(*x.shape[:-1], b.shape[0])


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        lora_bias: Tensor | None,
        base: Map,
        scale: float,
        dropout: float,
        make: Callable[..., Tensor] | None,
        *kept: Tensor,
    ) -> Tensor:
        # of rows, so that what comes out is no view, which nobody could change in place
        y = base.run(x.reshape(-1, x.shape[-1])).contiguous()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
        rows = _rows(x, dtype)
        ctx.random = None
        if dropout:
            ctx.random = default_generator(x.device).get_state()
            rows = rows * _mask(rows, dropout, None)
        small = rows @ a.to(dtype).t()
        if y.dtype == dtype:
            y.addmm_(small, b.to(dtype).t(), alpha=scale)
        else:
            y.add_(small @ b.to(dtype).t(), alpha=scale)
        if lora_bias is not None:
            y.add_(lora_bias.to(y.dtype), alpha=scale)
        ctx.base, ctx.scale, ctx.dropout, ctx.make, ctx.dtype = base, scale, dropout, make, dtype
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.lora_bias_dtype = None if lora_bias is None else lora_bias.dtype
        ctx.save_for_backward(small, a, b, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        small, a, b, *kept = ctx.saved_tensors
        need_x, need_a, need_b, need_bias, need_lora_bias = ctx.needs_input_grad[:5]
        scale, dtype = ctx.scale, ctx.dtype
        dx = da = db = None
        low = dy.to(dtype)
        dsmall = (low @ b.to(dtype)).mul_(scale)
        if need_b:
            db = (small.t() @ low).t().to(b.dtype, memory_format=torch.contiguous_format).mul_(scale)
        mask = _mask_again(ctx, dsmall, a) if ctx.dropout else None
        if need_a:
            x = _rows(ctx.make(*kept) if ctx.make is not None else kept[0], dtype)
            x = x if mask is None else x * mask
            da = (dsmall.t() @ x).to(a.dtype)
            del x
        if need_x:
            dx = ctx.base.pull(dy)
            if mask is not None:
                dx.add_(mask.mul_(dsmall @ a.to(dtype)))
            elif dx.dtype == dtype:
                dx.addmm_(dsmall, a.to(dtype))
            else:
                dx.add_(dsmall @ a.to(dtype))
            dx = dx.to(ctx.input_dtype).view(ctx.shape)
        total = dy.sum(0) if need_bias or need_lora_bias else None
        dbias = total.to(ctx.bias_dtype) if total is not None and need_bias else None
        dlora = (total * scale).to(ctx.lora_bias_dtype) if total is not None and need_lora_bias else None
        return dx, da, db, dbias, dlora, None, None, None, None, *(None for _ in kept)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random operations on this device draw from."""
    if device.type == "cpu":
        return torch.default_generator
    module = getattr(torch, device.type)
    return module.default_generators[device.index if device.index is not None else module.current_device()]


def can_redraw(device: torch.device) -> bool:
    """Whether this device's random state can be read and set, so that a mask can be drawn twice."""
    return device.type == "cpu" or hasattr(getattr(torch, device.type, None), "default_generators")


def _mask(like: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """0 where an input is dropped, else 1 / (1 - dropout); the draws of `torch.nn.functional.dropout` on a CPU."""
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _mask_again(ctx: Any, like: Tensor, a: Tensor) -> Tensor:
    generator = torch.Generator(like.device)
    generator.set_state(ctx.random)
    return _mask(like.new_empty(like.shape[0], a.shape[1]), ctx.dropout, generator)
