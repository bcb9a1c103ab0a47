"""Activations that keep their input alone: `act(f)`, and the gate of a gated MLP, `act(g) · u`.

The graph of separate operations keeps every intermediate: the activation's result beside its input, the steps of an
activation that is written out in Python, and the product once more as the input of the layer behind. All of them are
a few elementwise operations away from `f`, or from `g` and `u`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Elementwise = Callable[[Tensor], Tensor]


def activation(f: Tensor, act: Elementwise) -> Tensor:
    """`act(f)`, same shape; keeps f."""
    return _Activation.apply(f, act)


def gated(g: Tensor, u: Tensor, act: Elementwise) -> Tensor:
    """`act(g) · u`, same shape; keeps g and u."""
    return _Gated.apply(g, u, act)


def product(act: Elementwise, g: Tensor, u: Tensor) -> Tensor:
    """What `gated` computes, without a graph."""
    with torch.no_grad():
        h = act(g)
        return h.mul_(u) if h.data_ptr() != g.data_ptr() and h.dtype == u.dtype else h * u


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, act: Elementwise) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(f)
        return act(f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple:
        (f,) = ctx.saved_tensors
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            h = ctx.act(f)
        return torch.autograd.grad(h, f, dh)[0], None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: Elementwise) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(g, u)
        return product(act, g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple:
        g, u = ctx.saved_tensors
        need_g, need_u = ctx.needs_input_grad[:2]
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            h = ctx.act(g)
        dg = torch.autograd.grad(h, g, dh * u)[0] if need_g else None
        du = h.detach().mul_(dh) if need_u else None
        return dg, du, None
