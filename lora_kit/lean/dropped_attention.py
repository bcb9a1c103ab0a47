"""Attention with dropout on a CPU, `drop(softmax(q kᵀ · scale + M)) v`, as one step of the autograd graph.

torch has a fused kernel there for attention without dropout alone. With it, it composes the step of separate operations
on float32 copies of queries, keys and values, and the graph keeps those, the weights, the mask and the dropped weights:
12 bytes for each pair of tokens and head. Here queries, keys and values are kept as they came, the weights once, and
the mask as a byte: 5 bytes. The draws are torch's own, one for one.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_kit.lean.device import is_plain, kind_of

VECTOR = 16
"""Float32 numbers in a register. torch's softmax over fewer takes them one by one, several times slower."""


class Instead(TorchFunctionMode):
    """While entered, torch's attention is computed by `attention` where that can do what is asked."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return (attention if can_attend(*args, **kwargs) else func)(*args, **kwargs)


def can_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether `attention` does what torch's function would do with these arguments."""
    states = (query, key, value)
    if not 0 < dropout_p < 1 or kind_of(query) != "cpu" or not any(t.requires_grad for t in states):
        return False
    if not all(is_plain(t) and t.dim() == 4 and t.is_floating_point() and t.numel() for t in states):
        return False
    fits = key.shape[:2] == value.shape[:2] == query.shape[:2] and key.shape[3] == query.shape[3]
    if not fits or key.shape[2] != value.shape[2] or not query.dtype == key.dtype == value.dtype:
        return False
    if attn_mask is None:
        return True
    if is_causal or not is_plain(attn_mask) or not 2 <= attn_mask.dim() <= 4:
        return False
    whole = (*query.shape[:3], key.shape[2])
    return all(found in (1, size) for found, size in zip(attn_mask.shape[::-1], whole[::-1], strict=False))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` for what `can_attend` takes.

    Queries are (batch, heads, tokens, width), keys (batch, heads, keys, width), values (batch, heads, keys, any); the
    mask is boolean, True where a key is seen, or added to the scores (T5 trains one). A query that sees no key gets
    zeros.
    """
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return _Attention.apply(
        query, key, value, attn_mask, dropout_p, query.shape[-1] ** -0.5 if scale is None else scale
    )


class _Attention(Function):
    """Under autocast, too, the products run in the dtype of `_exact`, as those of torch's kernels do."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            batch, heads, tokens, _ = query.shape
            scores = torch.bmm(_exact(query), _exact(key).mT).view(batch, heads, tokens, -1)
            bias, factor = _bias(mask, scores.dtype, 1 / (1 - dropout))
            scores = scores.mul_(scale) if bias is None else torch.add(bias, scores, alpha=scale, out=scores)
            weights = _softmax(scores)
            del scores
            seen = torch.empty(weights.shape, dtype=torch.bool, device=weights.device).bernoulli_(1 - dropout)
            found = torch.bmm(_flat(weights * seen), _exact(value)).view(batch, heads, tokens, -1).mul_(factor)
        ctx.save_for_backward(query, key, value, weights, seen, factor)
        ctx.scale = scale
        if mask is not None:
            ctx.mask_shape, ctx.mask_dtype = mask.shape, mask.dtype
        return _like(query, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        query, key, value, weights, seen, factor = ctx.saved_tensors
        need_query, need_key, need_value, need_mask = ctx.needs_input_grad[:4]
        by_query = by_key = by_value = by_mask = None
        with torch.autocast("cpu", enabled=False):
            # what dropout multiplies by, and the zero of a query without keys, are for a whole row: cheaper here
            upstream = _flat(_exact(upstream).view(upstream.shape).mul(factor))
            if need_value:
                by_value = _like(value, torch.bmm(_flat(weights * seen).mT, upstream))
            if need_query or need_key or need_mask:
                by_weights = torch.bmm(upstream, _exact(value).mT).view(weights.shape).mul_(seen)
                by_scores = _flat(_softmax_backward(by_weights, weights))
                del by_weights
            if need_query:
                by_query = _like(query, torch.bmm(by_scores, _exact(key)).mul_(ctx.scale))
            if need_key:
                by_key = _like(key, torch.bmm(by_scores.mT, _exact(query)).mul_(ctx.scale))
            if need_mask:
                by_mask = by_scores.view(weights.shape).sum_to_size(ctx.mask_shape).to(ctx.mask_dtype)
        return by_query, by_key, by_value, by_mask, None, None


def _bias(mask: Tensor | None, dtype: torch.dtype, kept: float) -> tuple[Tensor | None, Tensor]:
    """What is added to the scores, and what the result is multiplied by: `kept`, or 0 for a query that sees nothing."""
    if mask is None:
        return None, torch.tensor(kept, dtype=dtype, device="cpu")
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    else:
        bias = mask.to(dtype, copy=True)
    nothing = (bias == -math.inf).all(-1, keepdim=True)
    bias.masked_fill_(nothing, 0.0)  # all of a row at -inf would be no number
    return bias, torch.full_like(nothing, kept, dtype=dtype).masked_fill_(nothing, 0.0)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; may take the memory of the scores."""
    if scores.shape[-1] >= VECTOR:
        return scores.softmax(-1)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


def _softmax_backward(upstream: Tensor, weights: Tensor) -> Tensor:
    """`w · (u - Σ w u)`; may take the memory of `upstream`."""
    if weights.shape[-1] >= VECTOR:
        return torch._softmax_backward_data(upstream, weights, -1, weights.dtype)
    upstream.mul_(weights)
    return upstream.addcmul_(weights, upstream.sum(-1, keepdim=True), value=-1)


def _exact(states: Tensor) -> Tensor:
    """(batch · heads, tokens, width), at least in float32, as torch multiplies them."""
    exact = torch.promote_types(states.dtype, torch.float32)
    return _flat(states.to(exact, memory_format=torch.contiguous_format))


def _flat(states: Tensor) -> Tensor:
    return states.reshape(-1, *states.shape[-2:])


def _like(states: Tensor, result: Tensor) -> Tensor:
    """The result as (batch, heads, tokens, width) with the heads of a token side by side, as models want them next."""
    batch, heads, tokens, _ = states.shape
    width = result.shape[-1]
    strides = (heads * tokens * width, width, heads * width, 1)
    made = torch.empty_strided((batch, heads, tokens, width), strides, dtype=states.dtype, device=states.device)
    return made.copy_(result.view(made.shape))
