"""Attention over a few trained keys and values in front of a layer's own. Tensors in, tensors out.

`softmax(q [P_k; K]ᵀ · scale + [0, M]) [P_v; V]` (Li & Liang 2021): every query sees the whole prefix, whatever the mask
`M` hides of the tokens. Queries are (batch, heads, tokens, width), keys and values (batch, key heads, tokens, width);
the prefix has no batch: (key heads, virtual tokens, width).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kit.lean.device import kind_of


def attend(
    inner: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    kind: str,
    **kwargs: Any,
) -> Any:
    """`inner`, one of transformers' attention functions, with the prefix in front of its keys and values.

    `kind` is transformers' name of `inner`, such as `"sdpa"`. What `inner` would do to the tokens alone (soft capping,
    sinks, position bias, windows) holds for the tokens still. A causal mask that exists only as a promise ("no mask,
    but causal") stays one where there is a kernel for it.

    Raises:
        NotImplementedError: a paged cache; flash attention on packed rows or with a window that the tokens exceed: its
            kernels count from the end of the keys, so that the prefix would move out of sight.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError("a paged cache (continuous batching) would store the prefix; use model.generate().")
    size = prefix_key.shape[1]
    prefix_key, prefix_value = prefix_key.to(key), prefix_value.to(value)
    bias = kwargs.get("position_bias")
    if kind == "sdpa" and mask is None and _is_causal(module, query, kwargs):
        # keys beyond the queries are the empty rest of a static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if bias is None:
            scale, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
            out = causal(query, key, value, prefix_key, prefix_value, scale=scale, dropout=dropout)
            return out.transpose(1, 2).contiguous(), None
        mask = causal_mask(query.shape[2], device=query.device)
    if kind == "sdpa" and mask is None:
        kwargs["is_causal"] = False  # one query, or an encoder's: all of the keys are seen
    if "flash" in kind:
        _check_flash(key, mask, size, kwargs)
    if bias is not None:
        kwargs["position_bias"] = put_before(bias[..., : key.shape[2]], size, 0.0)
    joined_key, joined_value = join(prefix_key, key), join(prefix_value, value)
    return inner(module, query, joined_key, joined_value, longer_mask(mask, size, key.shape[2]), **kwargs)


def join(prefix: Tensor, states: Tensor) -> Tensor:
    """(batch, key heads, virtual tokens + tokens, width)."""
    return torch.cat([prefix.unsqueeze(0).expand(states.shape[0], -1, -1, -1), states], dim=2)


def causal_mask(tokens: int, *, device: torch.device) -> Tensor:
    """(1, 1, tokens, tokens), True where a query may look."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]


def put_before(mask: Tensor, size: int, value: float | bool) -> Tensor:
    """`size` columns of `value` in front of the last dimension."""
    return torch.nn.functional.pad(mask, (size, 0), value=value)


def longer_mask(mask: Any, size: int, tokens: int) -> Any:
    """The mask with `size` columns that hide nothing in front; `tokens` is how many keys the layer has itself.

    Boolean masks are True where a key is seen, floating-point ones are added to the scores, integer ones are
    (batch, tokens) with 1 for a token and 0 for padding, block masks are flex attention's.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _longer_block_mask(mask, size)
    if mask.shape[-1] == 1 and tokens != 1:
        mask = mask.expand(*mask.shape[:-1], tokens)
    sees_all = True if mask.dtype == torch.bool else 1 if mask.dim() == 2 else 0.0
    return put_before(mask[..., :tokens], size, sees_all)


def _longer_block_mask(mask: Any, size: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = torch.clamp(key - size, min=0)
        return (key < size) | mask.mask_mod(batch, head, query, token)

    batch, heads, queries, keys = mask.shape
    return create_block_mask(sees, batch, heads, queries, keys + size, device=mask.kv_num_blocks.device)


def _check_flash(key: Tensor, mask: Any, size: int, kwargs: dict[str, Any]) -> None:
    window = kwargs.get("sliding_window")
    if window and key.shape[2] + size > window:
        raise NotImplementedError(
            f"flash attention over {key.shape[2]} tokens and a prefix of {size} with a sliding window of {window}: the "
            "prefix would slide out of sight. Load the model with attn_implementation='sdpa'."
        )
    rows = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if mask is None and not packed and rows is not None and rows.dim() == 2 and key.shape[2] == rows.shape[1] > 1:
        packed = bool((rows[:, 1:] < rows[:, :-1]).any())
    if packed:
        raise NotImplementedError(
            "flash attention on packed rows: only the first sequence of a row would see the prefix. Load the model "
            "with attn_implementation='sdpa', or do not pack."
        )


def _is_causal(module: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    return bool(causal) and query.shape[2] > 1


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of as many queries as keys, and to the whole prefix, by the best kernel there is.

    On a GPU torch's bias that is causal counted from the last key, for which its flash kernels need no mask; on a CPU
    `two_parts`; else a mask. (batch, heads, tokens, width).
    """
    whole = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[0] == key.shape[0] and key.numel() > 0
    if kind_of(query) == "cpu" and whole and not dropout:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return two_parts(query, key, value, prefix_key, prefix_value, scale)
    if kind_of(query) == "cuda":
        return lower_right(query, key, value, prefix_key, prefix_value, scale=scale, dropout=dropout)
    mask = put_before(causal_mask(query.shape[2], device=query.device), prefix_key.shape[1], True)
    return _joined(query, key, value, prefix_key, prefix_value, mask, scale, dropout)


def lower_right(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`causal` through torch's own bias type, for which its kernels on a GPU need no mask in memory."""
    from torch.nn.attention.bias import causal_lower_right

    # a step for a GPU that is simulated on a CPU: no mask is what the kernel there is given
    simulated = kind_of(query) != query.device.type
    mask = None if simulated else causal_lower_right(query.shape[2], prefix_key.shape[1] + key.shape[2])
    return _joined(query, key, value, prefix_key, prefix_value, mask, scale, dropout)


def _joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Any,
    scale: float | None,
    dropout: float,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = _repeated(join(prefix_key, key), repeats), _repeated(join(prefix_value, value), repeats)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )


def two_parts(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, scale: float
) -> Tensor:
    """Causal attention to the tokens by torch's own kernel, and to the prefix beside it: (batch, heads, tokens, width).

    The two are merged by their log-sum-exp, `out = out_t · exp(lse_t - lse) + out_p · exp(lse_p - lse)`. No mask is
    made, the prefix is never copied for each row of the batch, and keys and values are kept for the backward pass once
    for each key head.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return TwoParts.apply(query, key, value, prefix_key.to(key.dtype), prefix_value.to(value.dtype), scale)


class TwoParts(torch.autograd.Function):
    """`two_parts`; torch's kernel computes its part of the backward pass from the merged output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        scale: float,
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        own, own_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, _repeated(key, repeats), _repeated(value, repeats), 0.0, True, scale=scale
        )
        scores = _scores(query, prefix_key, scale)
        total = torch.logaddexp(own_sum, scores.logsumexp(-1))
        out = own * (own_sum - total).exp().unsqueeze(-1)
        weights = (scores - total.unsqueeze(-1)).exp_()
        out = out + _ungrouped(_grouped(weights, key.shape[1]) @ prefix_value.to(weights.dtype), query)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, total)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, out, total = ctx.saved_tensors
        heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        by_query, by_key, by_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream, query, _repeated(key, repeats), _repeated(value, repeats), out, total, 0.0, True, scale=ctx.scale
        )
        weights = (_scores(query, prefix_key, ctx.scale) - total.unsqueeze(-1)).exp_()
        exact = weights.dtype
        flowing = upstream.to(exact)
        inner = (flowing * out.to(exact)).sum(-1, keepdim=True)
        flowing = _grouped(flowing, heads)
        weights = _grouped(weights, heads)
        by_prefix_value = (weights.mT @ flowing).sum(0)
        by_scores = weights * (flowing @ prefix_value.to(exact).mT - _grouped(inner, heads)) * ctx.scale
        by_prefix_key = (by_scores.mT @ _grouped(query, heads).to(exact)).sum(0)
        by_query = by_query + _ungrouped(by_scores @ prefix_key.to(exact), query).to(by_query.dtype)
        if repeats > 1:
            by_key = by_key.unflatten(1, (heads, repeats)).sum(2)
            by_value = by_value.unflatten(1, (heads, repeats)).sum(2)
        by_prefix_key, by_prefix_value = by_prefix_key.to(prefix_key.dtype), by_prefix_value.to(prefix_value.dtype)
        return by_query, by_key, by_value, by_prefix_key, by_prefix_value, None


def _scores(query: Tensor, prefix_key: Tensor, scale: float) -> Tensor:
    """(batch, heads, tokens, virtual tokens), at least in float32 as in torch's kernel."""
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = _grouped(query, prefix_key.shape[0]).to(exact)
    return _ungrouped(grouped @ prefix_key.to(exact).mT, query).mul_(scale)


def _grouped(states: Tensor, heads: int) -> Tensor:
    """(batch, heads of the queries, tokens, width) → (batch, key heads, heads that share one · tokens, width)."""
    return states.unflatten(1, (heads, -1)).flatten(2, 3)


def _ungrouped(states: Tensor, query: Tensor) -> Tensor:
    return states.reshape(query.shape[0], query.shape[1], query.shape[2], states.shape[-1])


def _repeated(states: Tensor, repeats: int) -> Tensor:
    """Each key head as often as there are query heads that share it."""
    return states.repeat_interleave(repeats, 1) if repeats > 1 else states


def turned(states: Tensor, cosine: Tensor, sine: Tensor, layout: tuple[int, bool]) -> Tensor:
    """`states` (…, virtual tokens, width) turned by rotary angles, `(x, y) → (x cos - y sin, y cos + x sin)`.

    `layout` is (where the turned part of the width starts, whether neighbours form a pair or the two halves of the
    part do). `cosine` and `sine` have half of that part's length.
    """
    start, neighbours = layout
    length = 2 * cosine.shape[-1]
    part = states[..., start : start + length]
    x, y = (part[..., 0::2], part[..., 1::2]) if neighbours else part.chunk(2, -1)
    x, y = x * cosine - y * sine, y * cosine + x * sine
    part = torch.stack([x, y], -1).flatten(-2) if neighbours else torch.cat([x, y], -1)
    if length == states.shape[-1]:
        return part
    return torch.cat([states[..., :start], part, states[..., start + length :]], -1)
