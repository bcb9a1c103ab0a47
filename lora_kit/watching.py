"""The trial forward's eyes for attention that is written out by hand: which products, which softmax, which scale."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_kit.lean.watched import SOFTMAXES, Product, fits, over_the_last, product_of

Run = tuple[str, int]
"""One run of a module: its path, and how often it had been entered before."""


@dataclass
class Seen:
    """One attention as it ran: keys and values are (batch, *heads, tokens, width)."""

    path: str
    call: int
    watched: bool
    keys: Tensor
    values: Tensor | None = None
    scale: float = 1.0
    window: int | None = None
    mark: Tensor | None = None
    """Zeros that were added to the output, through which a gradient shows whether it reaches the model's."""
    used: bool = True


class Look(TorchFunctionMode):
    """Notes each attention of a forward in `seen`.

    Zeros are added to the result of every product of two stacks of matrices. Where a softmax follows, the gradient of
    its input by those zeros shows that the one became the other, and with what factor.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.seen: list[Seen] = []
        self.muted = 0
        self._stack: list[Run] = []
        self._entered: Counter[str] = Counter()
        self._attentions: Counter[Run] = Counter()
        self._products: list[tuple[Product, list[Run]]] = []
        self._open: tuple[Seen, torch.Size] | None = None

    def enter(self, path: str, module: Any, inputs: Any) -> None:
        self._stack.append((path, self._entered[path]))
        self._entered[path] += 1

    def leave(self, module: Any, inputs: Any, output: Any) -> None:
        left = self._stack.pop()
        # a product may be made in a module of its own, but it becomes scores in the one around that
        self._products = [pair for pair in self._products if left not in pair[1][:-1]]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            run = self._stack[-1]
            key, value = (args[1], args[2]) if len(args) > 2 else (kwargs["key"], kwargs["value"])
            seen = Seen(run[0], self._count(run), True, key.detach(), value.detach())
            self.seen.append(seen)
            return self.marked(seen, func(*args, **kwargs))
        product = product_of(func, args, kwargs)
        if product is not None:
            return self._product(product, func(*args, **kwargs))
        if func in SOFTMAXES and over_the_last(args, kwargs):
            scores = args[0] if args else kwargs["input"]
            self._softmax(scores)
        return func(*args, **kwargs)

    def marked(self, seen: Seen, output: Tensor) -> Tensor:
        """The output of an attention, with zeros in it."""
        with torch.enable_grad():
            seen.mark = torch.zeros_like(output, requires_grad=True)
            return output + seen.mark

    def _count(self, run: Run) -> int:
        self._attentions[run] += 1
        return self._attentions[run] - 1

    def _product(self, product: Product, result: Tensor) -> Tensor:
        if self._open is not None and fits(tuple(product.left.shape), tuple(self._open[1])):
            seen, self._open = self._open[0], None
            seen.values = product.values(self.rows).detach()
            return self.marked(seen, result)
        if not result.is_floating_point():
            return result
        with torch.enable_grad():
            product.mark = torch.zeros_like(result, requires_grad=True)
            product.shape = tuple(result.shape)
            self._products.append((product, list(self._stack)))
            return result + product.mark

    def _softmax(self, scores: Tensor) -> None:
        fitting = [
            (p, _common(stack, self._stack)) for p, stack in self._products if fits(p.shape, tuple(scores.shape))
        ]
        if not fitting:
            return
        # those of the module that is running, or of the nearest around it
        run = max((pair[1] for pair in fitting), key=self._stack.index)
        call = self._count(run)
        for product in (p for p, common in fitting if common == run):
            if product.mark is None or not scores.requires_grad:
                continue
            slope = torch.autograd.grad(scores.sum(), product.mark, retain_graph=True, allow_unused=True)[0]
            scale = None if slope is None else _steepness(slope)
            if scale is not None:
                seen = Seen(run[0], call, True, product.keys(self.rows).detach(), scale=scale)
                self.seen.append(seen)
                self._open = seen, scores.shape
                return


def _steepness(slope: Tensor) -> float | None:
    """The factor that most scores were multiplied with; where a mask was put over them it is nothing, or half."""
    steps = slope[slope != 0]
    if not steps.numel():
        return None
    scale = float(steps.median())
    alike = (steps - scale).abs() <= 1e-2 * abs(scale)
    return scale if float(alike.float().mean()) > 0.5 else None


def _common(one: list[Run], other: list[Run]) -> Run:
    """The innermost run that both were part of."""
    shared = [a for a, b in zip(one, other, strict=False) if a == b]
    return shared[-1]
