"""RMS normalization with a frozen weight that keeps its 16-bit input instead of a float32 copy of it.

`y = w · x / √(mean(x²) + ε)` (Zhang & Sennrich 2019), computed in float32 and rounded as the two written forms do: the
normalized input is rounded before it is multiplied by the weight (Llama), or the product is (Gemma, whose weight counts
from one).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, from_one: bool = False, rounds_first: bool = True) -> Tensor:
    """(..., width) -> (..., width); no gradient for the weight.

    Args:
        x: the input, 16 bits wide.
        weight: (width,).
        eps: ε.
        from_one: the factor is 1 + weight.
        rounds_first: round to x's dtype before the factor is applied.
    """
    return _RMSNorm.apply(x, weight, eps, from_one, rounds_first)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    exact = x.float()
    rate = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    # a copy was made by float() unless x is float32 already
    return (exact.mul_(rate) if exact is not x else exact * rate), rate


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, from_one: bool, rounds_first: bool) -> Tensor:
        scaled, rate = _normalized(x, eps)
        ctx.from_one = from_one
        ctx.save_for_backward(x, weight, rate)
        factor = 1.0 + weight.float() if from_one else weight
        if rounds_first:
            return factor * scaled.to(x.dtype)
        return scaled.mul_(factor.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, rate = ctx.saved_tensors
        factor = 1.0 + weight.float() if ctx.from_one else weight.float()
        dscaled = dy.float() * factor
        scaled = x.float().mul_(rate) if x.dtype != torch.float32 else x * rate
        dot = torch.linalg.vecdot(dscaled, scaled, dim=-1).unsqueeze(-1).div_(x.shape[-1])
        return dscaled.addcmul_(scaled, dot, value=-1).mul_(rate).to(x.dtype), None, None, None, None
