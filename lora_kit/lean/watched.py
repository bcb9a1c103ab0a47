"""A prefix for attention that is written out by hand, `softmax(q Kᵀ · scale + M) V`, without touching its code.

Models from before transformers' attention interface compute scores, weights and their product with the values step by
step, each in its own way. `Watch` sees torch's functions on their way to the kernels, on this thread and for as long as
it is entered. It adds the prefix's columns to the softmax and their share to the product with the values; the scores
of the tokens, with whatever bias or mask the model adds to them, stay the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_kit.lean import prefix_attention

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
ADDED = (torch.baddbmm, Tensor.baddbmm)
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)
DROPOUTS = (torch.dropout, F.dropout)


@dataclass
class Product:
    """One matrix product on the way: `left @ right`, or an einsum of the two."""

    left: Tensor
    right: Tensor
    factor: float = 1.0
    equation: tuple[str, str, str] | None = None
    """The letters of left, right and result, for an einsum."""
    mark: Tensor | None = None
    """While looking: zeros in the result, through which a gradient shows what became of it."""
    shape: tuple[int, ...] = ()

    def with_prefix(self, states: Tensor) -> Tensor:
        """The product of `left` with a prefix (*heads, virtual tokens, width) in the place of the keys."""
        if self.equation is None:
            return self.factor * (self.left @ _for_rows(states, self.left).mT)
        left, right, out = self.equation
        return torch.einsum(f"{left},{right}->{out}", self.left, self._in_layout(states, key=out[-1], width=None))

    def of_values(self, weights: Tensor, states: Tensor) -> Tensor:
        """The product of prefix weights with a prefix (*heads, virtual tokens, width) in the place of the values."""
        weights = weights.reshape(*self.left.shape[:-1], weights.shape[-1])
        if self.equation is None:
            return weights @ _for_rows(states, weights)
        left, right, out = self.equation
        layout = self._in_layout(states, key=self._summed(), width=out[-1])
        return torch.einsum(f"{left},{right}->{out}", weights, layout)

    def keys(self, batch: int) -> Tensor:
        """The right operand as keys (batch, *heads, tokens, width)."""
        if self.equation is None:
            return _with_batch(self.right.mT, batch)
        return self.right.permute(self._order(self.equation[2][-1], None))

    def values(self, batch: int) -> Tensor:
        """The right operand as values (batch, *heads, tokens, width)."""
        if self.equation is None:
            return _with_batch(self.right, batch)
        return self.right.permute(self._order(self._summed(), self.equation[2][-1]))

    def _summed(self) -> str:
        left, right, out = self.equation or ("", "", "")
        return next(letter for letter in left if letter in right and letter not in out)

    def _order(self, key: str, width: str | None) -> list[int]:
        """Where batch, heads, key and width are among the right operand's dimensions."""
        left, right, out = self.equation or ("", "", "")
        width = width or self._summed()
        batch = next(letter for letter in out if letter in left and letter in right)
        heads = [letter for letter in right if letter not in (batch, key, width)]
        return [right.index(letter) for letter in (batch, *heads, key, width)]

    def _in_layout(self, states: Tensor, *, key: str, width: str | None) -> Tensor:
        order = self._order(key, width)
        return states.unsqueeze(0).permute([order.index(i) for i in range(len(order))]).to(self.right)


def _for_rows(states: Tensor, left: Tensor) -> Tensor:
    """A prefix (heads, virtual tokens, width) beside operands whose rows and heads may share one dimension."""
    states = states.to(left)
    if left.dim() > states.dim():
        return states.unsqueeze(0)
    return states.repeat(left.shape[0] // states.shape[0], 1, 1)


def _with_batch(states: Tensor, batch: int) -> Tensor:
    return states.unflatten(0, (batch, -1)) if states.dim() == 3 else states


class Watch(TorchFunctionMode):
    """Puts the prefix into the attention that runs while it is entered.

    `states(i)` gives keys and values for the `i`-th attention since the entry, each (*heads, virtual tokens, width),
    and the scale of its scores.
    """

    def __init__(self, states: Callable[[int], tuple[Tensor, Tensor, float] | None]):
        super().__init__()
        self.states = states
        self.count = 0
        self.products: list[Product] = []
        self.waiting: tuple[Tensor, Tensor, torch.Size] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        product = product_of(func, args, kwargs)
        if product is not None:
            return self._multiply(product, func(*args, **kwargs))
        if func in SOFTMAXES and over_the_last(args, kwargs):
            return self._softmax(func, args, kwargs)
        if func in DROPOUTS and self.waiting is not None and args[0].shape == self.waiting[2]:
            weights, values, shape = self.waiting
            self.waiting = func(weights, *args[1:], **kwargs), values, shape
        return func(*args, **kwargs)

    def _next(self) -> tuple[Tensor, Tensor, float] | None:
        self.count += 1
        return self.states(self.count - 1)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        found = self._next()
        if found is None:
            return F.scaled_dot_product_attention(query, key, value, **options)
        prefix_key, prefix_value = found[0].to(key), found[1].to(value)
        mask = options.get("attn_mask")
        is_causal = options.pop("is_causal", False)
        if is_causal and query.shape[-2] == key.shape[-2]:
            scale, dropout = options.get("scale"), options.get("dropout_p", 0.0)
            return prefix_attention.causal(query, key, value, prefix_key, prefix_value, scale=scale, dropout=dropout)
        if is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
        if mask is not None:
            options["attn_mask"] = prefix_attention.put_before(
                mask, prefix_key.shape[1], True if mask.dtype == torch.bool else 0.0
            )
        key, value = prefix_attention.join(prefix_key, key), prefix_attention.join(prefix_value, value)
        return F.scaled_dot_product_attention(query, key, value, **options)

    def _softmax(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        scores = args[0] if args else kwargs["input"]
        product = matching(self.products, scores.shape)
        found = self._next() if product is not None else None
        if product is None or found is None:
            return func(*args, **kwargs)
        prefix_key, prefix_value, scale = found
        more = product.with_prefix(prefix_key) * scale
        more = more.reshape(*scores.shape[:-1], more.shape[-1]).to(scores.dtype)
        size = more.shape[-1]
        weights = func(torch.cat([more, scores], -1), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        own = weights[..., size:]
        self.waiting = weights[..., :size], prefix_value, own.shape
        return own

    def _multiply(self, product: Product, result: Tensor) -> Tensor:
        product.shape = tuple(result.shape)
        if self.waiting is not None and fits(tuple(product.left.shape), tuple(self.waiting[2])):
            weights, values, _ = self.waiting
            self.waiting = None
            weights = weights.to(product.left.dtype)
            return result + product.of_values(weights, values).to(result.dtype)
        self.products.append(product)
        return result


def product_of(func: Any, args: tuple, kwargs: dict[str, Any]) -> Product | None:
    """What the call multiplies, where it is a product of two stacks of matrices."""
    if func in MATMULS and not kwargs and len(args) == 2:
        left, right = args
        return Product(left, right) if left.dim() > 2 and right.dim() > 2 else None
    if func in ADDED:
        left, right = (*args[1:3], *(kwargs[name] for name in ("batch1", "batch2") if name in kwargs))
        return Product(left, right, factor=kwargs.get("alpha", 1.0))
    if func is torch.einsum and isinstance(args[0], str):
        operands = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        inputs, _, out = args[0].replace(" ", "").partition("->")
        letters = inputs.split(",")
        if len(operands) == 2 and len(letters) == 2 and out and not any("." in part for part in letters):
            shared = [x for x in letters[0] if x in letters[1]]
            if any(x in out for x in shared) and any(x not in out for x in shared):
                return Product(operands[0], operands[1], equation=(letters[0], letters[1], out))
    return None


def over_the_last(args: tuple, kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    tensor = args[0] if args else kwargs.get("input")
    return isinstance(tensor, Tensor) and dim in (-1, tensor.dim() - 1)


def matching(products: list[Product], shape: tuple[int, ...]) -> Product | None:
    """The first product whose result may have become these scores: the first is the content's, biases come later."""
    return next((product for product in products if fits(product.shape, tuple(shape))), None)


def fits(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Equal but for how batch and heads are laid out."""
    return shape[-2:] == other[-2:] and torch.Size(shape).numel() == torch.Size(other).numel()
