"""The share of an optimizer's updates that 16-bit weights lose to rounding, on a sample of their entries."""

from typing import Any

import torch
from torch import Tensor

STEPS = 20
SAMPLE = 100_000


class LostUpdates:
    """Compares a fixed sample of the trained 16-bit entries before and after each of the first `STEPS` steps.

    An entry counts where its gradient is not zero and the learning rate neither; it is lost where its value stays.
    """

    def __init__(self, optimizer: Any) -> None:
        from lora_kit.lean.optimizer import AdamW

        self.optimizer = optimizer
        sixteen = [p for group in optimizer.param_groups for p in group["params"] if _is_sixteen_bit(p)]
        # stochastic rounding leaves most entries where they are in a step, and moves the right share of them
        self.active = bool(sixteen) and not isinstance(optimizer, AdamW)
        self.stride = -(-sum(p.numel() for p in sixteen) // SAMPLE)
        self.steps = 0
        self.rate, self.dtype = 0.0, str(sixteen[0].dtype).removeprefix("torch.") if sixteen else ""
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._counts: list[Tensor] = []

    def before(self) -> None:
        """To be called before the optimizer steps."""
        if not self.active or self.steps >= STEPS:
            return
        self._before = []
        for group in self.optimizer.param_groups:
            if not float(group["lr"]) > 0:
                continue  # warm-up starts from zero
            self.rate = max(self.rate, float(group["lr"]))
            for p in group["params"]:
                if _is_sixteen_bit(p) and p.grad is not None:
                    self._before.append((p, self._sampled(p).clone(), self._sampled(p.grad) != 0))

    def after(self) -> None:
        """To be called after it has stepped."""
        if not self._before:
            return
        self.steps += 1
        for p, value, moved in self._before:
            self._counts.append(torch.stack([(moved & (self._sampled(p) == value)).sum(), moved.sum()]))
        self._before = []

    def share(self) -> float:
        """Lost updates over all updates so far, 0 to 1."""
        if not self._counts:
            return 0.0
        lost, counted = torch.stack([count.cpu() for count in self._counts]).sum(0).tolist()
        return lost / counted if counted else 0.0

    def _sampled(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1)[:: self.stride]


def _is_sixteen_bit(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 2
