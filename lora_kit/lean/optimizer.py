"""AdamW for bfloat16 weights without a float32 copy of them: 8 bytes a parameter in all, where float32 takes 16.

Weight, gradient and both states are bfloat16. Each update is computed in float32, a piece of a tensor at a time, and
written back by stochastic rounding, weights and states alike: the second moment's share of new gradients, 0.001, is
smaller than bfloat16's rounding step, so that rounding to the nearest would freeze it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lora_kit.lean.rounding import stochastic_round

PIECE = 2**22
"""Entries that are updated at a time: the float32 temporaries of a step take at most about 100 MiB."""


class AdamW(torch.optim.AdamW):
    """torch's AdamW, but bfloat16 weights are updated in float32 and rounded stochastically.

    Arguments, groups and the names of the states are torch's. Tensors of other dtypes take torch's own path. Random
    bits come from torch's generator of the device, so a seeded run repeats.

    Raises:
        ValueError: for `amsgrad`, `capturable` or `differentiable`, which torch's own offers, or under a GradScaler.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        >>> optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0)
        >>> for _ in range(10):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> round(1 - weight.float().mean().item(), 4)  # rounding to the nearest would have left it at 1
        0.001
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for option in ("amsgrad", "capturable", "differentiable"):
            if kwargs.get(option):
                raise ValueError(f"{option}=True is not for bfloat16 weights; torch.optim.AdamW has it.")
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("a GradScaler is for float16; train bfloat16 weights without one.")
        for group in self.param_groups:
            weights: list[Tensor] = []
            grads: list[Tensor] = []
            means: list[Tensor] = []
            squares: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, weights, grads, means, squares, [], steps)
            plain: list[tuple[Tensor, ...]] = []
            for entry in zip(weights, grads, means, squares, steps, strict=True):
                if entry[0].dtype == torch.bfloat16:
                    _update(*entry, group)
                else:
                    plain.append(entry)
            if plain:
                weights, grads, means, squares, steps = (list(column) for column in zip(*plain, strict=True))
                adamw(
                    weights,
                    grads,
                    means,
                    squares,
                    [],
                    steps,
                    foreach=group["foreach"],
                    fused=group["fused"],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=group["maximize"],
                )
        return loss


def _update(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]) -> None:
    """One tensor, in place, a piece at a time."""
    step += 1
    count = float(step)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    rate = float(group["lr"])
    # views where the memory is in order, as it is for nearly every weight; a copy would have to be written back
    flat = all(t.is_contiguous() for t in (weight, mean, square))
    tensors = (weight, grad, mean, square)
    pieces = zip(*(t.reshape(-1).split(PIECE) for t in tensors), strict=True) if flat else iter([tensors])
    for w, g, m, s in pieces:
        gradient = g.float()
        if group["maximize"]:
            gradient = -gradient
        first = m.float().lerp_(gradient, 1 - beta1)
        second = s.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        m.copy_(stochastic_round(first))
        s.copy_(stochastic_round(second))
        denominator = second.sqrt_().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        new = w.float().mul_(1 - rate * group["weight_decay"])
        new.addcdiv_(first, denominator, value=-rate / (1 - beta1**count))
        w.copy_(stochastic_round(new))
