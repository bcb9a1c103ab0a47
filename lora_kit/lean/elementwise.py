"""The gate of a gated MLP, `act(g) · u`, that keeps g and u alone.

The graph of separate operations keeps the activation's result too, and the product once more as the input of the layer
behind. Both are a few elementwise operations away from g and u.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lora_kit.lean.device import kind_of

Elementwise = Callable[[Tensor], Tensor]

BLOCK = {"cpu": 2**19}
"""Entries that the backward pass of a gate takes at a time: its scratch space, four times so many. A CPU's caches want
them few; elsewhere each block is several kernels to launch."""
BLOCK_ELSEWHERE = 2**24


def gated(g: Tensor, u: Tensor, act: Elementwise) -> Tensor:
    """`act(g) · u`, same shape; keeps g and u."""
    return _Gated.apply(g, u, act)


def product(act: Elementwise, g: Tensor, u: Tensor) -> Tensor:
    """What `gated` computes, without a graph."""
    with torch.no_grad():
        h = act(g)
        own = h.untyped_storage()._cdata != g.untyped_storage()._cdata
        return h.mul_(u) if own and h.dtype == u.dtype else h * u


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
        dg = torch.empty(dh.shape, dtype=g.dtype, device=g.device) if need_g else None
        du = torch.empty(dh.shape, dtype=u.dtype, device=u.device) if need_u else None
        rows = max(1, BLOCK.get(kind_of(dh), BLOCK_ELSEWHERE) // dh.shape[-1])
        g, u, dh = (t.reshape(-1, t.shape[-1]) for t in (g, u, dh))
        for start in range(0, len(dh), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                leaf = g[part].detach().requires_grad_()
                h = ctx.act(leaf)
            if dg is not None:
                (found,) = torch.autograd.grad(h, leaf, dh[part] * u[part])
                dg.view(dh.shape)[part] = found
            if du is not None:
                torch.mul(h.detach(), dh[part], out=du.view(dh.shape)[part])
        return dg, du, None
