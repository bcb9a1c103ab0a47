"""A prefix inside attention against plain torch, prefix concatenated by hand, in float64: every mask, every way in."""

import inspect
import types

import pytest
import torch
from references import prefix_attention
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from lora_kit.lean import prefix_attention as lean
from lora_kit.lean.watched import Watch

BATCH, HEADS, KEY_HEADS, TOKENS, WIDTH, PREFIX = 3, 6, 2, 13, 8, 5
# transformers' own eager functions take the softmax in float32
FLOAT32 = {"rtol": 1e-5, "atol": 5e-6}
NAMES = ("query", "key", "value", "prefix key", "prefix value")
INNER = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}


def causal(queries=TOKENS, keys=TOKENS):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def padded(left):
    """(batch, tokens), True for tokens; rows with 0, 2 and 5 of padding."""
    place = torch.arange(TOKENS)
    rows = [place >= n if left else place < TOKENS - n for n in (0, 2, 5)]
    return torch.stack(rows)


def sees_of(kind):
    """What a query may see of the tokens, (batch or 1, 1, queries, keys)."""
    place = torch.arange(TOKENS)
    row = torch.tensor([0] * 4 + [1] * 6 + [2] * 3)
    return {
        "causal": causal(),
        "all": torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool),
        "window": causal() & (place[:, None] - place < 4),
        "padding left": causal() & padded(True)[:, None, None],
        "padding right": causal() & padded(False)[:, None, None],
        "encoder padding": padded(False)[:, None, None].expand(-1, -1, TOKENS, -1),
        "packed": (causal() & (row[:, None] == row)),
    }[kind]


KINDS = ("causal", "all", "window", "padding left", "padding right", "encoder padding", "packed")


def tensors(*, heads=HEADS, key_heads=KEY_HEADS, queries=TOKENS, value_width=WIDTH, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [
        (BATCH, heads, queries, WIDTH),
        (BATCH, key_heads, TOKENS, WIDTH),
        (BATCH, key_heads, TOKENS, value_width),
        (key_heads, PREFIX, WIDTH),
        (key_heads, PREFIX, value_width),
    ]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def results(function, inputs, seed=3):
    """The output, and every gradient for an upstream gradient that differs everywhere."""
    for tensor in inputs:
        tensor.grad = None
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def module(heads=HEADS, key_heads=KEY_HEADS, **more):
    return types.SimpleNamespace(num_key_value_groups=heads // key_heads, training=True, **more)


def equal(found, expected, *, rtol=1e-9, atol=1e-9):
    for name, one, other in zip(("output", *NAMES), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def attended(kind, mask, where=None, **kwargs):
    def run(query, key, value, prefix_key, prefix_value):
        inner = INNER[kind]
        out, _ = lean.attend(
            inner, where or module(), query, key, value, mask, prefix_key, prefix_value, kind=kind, **kwargs
        )
        return out.transpose(1, 2)

    return run


def additive(sees):
    return torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["boolean", "additive", "eager"])
@pytest.mark.parametrize(("key_heads", "value_width"), [(2, WIDTH), (1, WIDTH), (6, 3)], ids=["GQA", "MQA", "MLA"])
def test_masks(kind, form, key_heads, value_width):
    sees = sees_of(kind)
    inputs = tensors(key_heads=key_heads, value_width=value_width)
    mask = sees if form == "boolean" else additive(sees)
    run = attended("eager" if form == "eager" else "sdpa", mask, module(key_heads=key_heads), scaling=0.3, dropout=0.0)
    expected = results(lambda *states: prefix_attention(*states, 0.3, sees), inputs)
    equal(results(run, inputs), expected, **(FLOAT32 if form == "eager" else {}))


@pytest.mark.parametrize(("key_heads", "value_width"), [(2, WIDTH), (1, WIDTH), (6, 3)], ids=["GQA", "MQA", "MLA"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_no_mask(is_causal, key_heads, value_width):
    """transformers leaves the mask out where a flag says as much; the prefix must not be counted as tokens then."""
    sees = causal() if is_causal else None
    inputs = tensors(key_heads=key_heads, value_width=value_width)
    where = module(key_heads=key_heads, is_causal=is_causal)
    expected = results(lambda *states: prefix_attention(*states, 0.3, sees), inputs)
    equal(results(attended("sdpa", None, where, scaling=0.3), inputs), expected)
    given = attended("sdpa", None, module(key_heads=key_heads), scaling=0.3, is_causal=is_causal)
    equal(results(given, inputs), expected)


def test_a_wrong_prefix_is_seen():
    """The comparison above can fail: a prefix that is one part in a thousand off, or one column late, is found."""
    inputs = tensors()
    expected = results(lambda *states: prefix_attention(*states, 0.3, causal()), inputs)
    run = attended("sdpa", None, module(), scaling=0.3)
    with pytest.raises(AssertionError, match="output"):
        equal(results(lambda q, k, v, pk, pv: run(q, k, v, 1.001 * pk, pv), inputs), expected)
    late = functional.pad(causal(), (PREFIX, 0), value=True).clone()
    late[..., PREFIX - 1] = False
    joined = [
        torch.cat([p[None].expand(BATCH, -1, -1, -1), x], 2) for p, x in zip(inputs[3:], inputs[1:3], strict=True)
    ]
    out, _ = sdpa_attention_forward(module(), inputs[0], *joined, late, scaling=0.3)
    assert not torch.allclose(out.transpose(1, 2), expected[0], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_two_parts(dtype):
    """The fast way for causal attention without a mask, against its slow twin in float64."""
    inputs = tensors(dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = results(lambda *states: prefix_attention(*states, WIDTH**-0.5, causal()), exact)
    found = results(lambda *states: lean.two_parts(*states, WIDTH**-0.5), inputs)
    close = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for name, one, other in zip(("output", *NAMES), found, expected, strict=True):
        assert one.dtype == dtype
        distance = float((one.double() - other).norm() / other.norm())
        assert distance <= close, (name, distance)
    if dtype == torch.bfloat16:  # no worse than the kernel with a mask
        slow = results(attended("sdpa", causal()), inputs)
        for one, two, other in zip(found, slow, expected, strict=True):
            assert (one.double() - other).norm() <= 1.5 * (two.double() - other).norm()


def test_two_parts_keeps_no_copies():
    """It keeps its inputs, its output and the log-sum-exp for the backward pass; no mask, no repeated heads."""
    inputs = tensors(dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = lean.two_parts(*inputs, 0.3)
    expected = sum(x.numel() for x in inputs) + out.numel() + BATCH * HEADS * TOKENS
    assert sum(x.numel() for x in kept) == expected


def test_lower_right():
    inputs = tensors()
    expected = results(lambda *states: prefix_attention(*states, 0.3, causal()), inputs)
    equal(results(lambda *states: lean.lower_right(*states, scale=0.3), inputs), expected)


@pytest.mark.skipif(
    "position_bias" not in inspect.signature(sdpa_attention_forward).parameters, reason="a later transformers has it"
)
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_position_bias(mask, is_causal):
    """T5's bias, as an argument beside the mask or added into it, is the tokens' alone."""
    inputs = tensors(key_heads=HEADS)
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    sees = sees_of("padding left") if is_causal else sees_of("encoder padding")
    if mask == "none":
        sees = causal() if is_causal else sees_of("all")
    given = {"none": None, "boolean": sees, "additive": additive(sees)}[mask]
    where = module(key_heads=HEADS, is_causal=is_causal)
    expected = results(lambda *states: prefix_attention(*states, 1.0, sees, bias), inputs)
    equal(results(attended("sdpa", given, where, scaling=1.0, position_bias=bias), inputs), expected)
    if mask != "none":
        equal(results(attended("eager", additive(sees) + bias, where, scaling=1.0), inputs), expected, **FLOAT32)


def test_decoding_and_static_caches():
    inputs = tensors(queries=1)
    expected = results(lambda *states: prefix_attention(*states, 0.3), inputs)
    equal(results(attended("sdpa", None, module(is_causal=True), scaling=0.3), inputs), expected)
    # a static cache is longer than what was read so far: the flag stands for the first 4 keys
    inputs = tensors(queries=4)
    sees = torch.zeros(4, TOKENS, dtype=torch.bool)
    sees[:, :4] = causal(4, 4)[0, 0]
    expected = results(lambda *states: prefix_attention(*states, 0.3, sees[None, None]), inputs)
    equal(results(attended("sdpa", None, module(is_causal=True), scaling=0.3), inputs), expected)


def test_a_mask_longer_than_the_keys_and_one_column():
    longer = functional.pad(additive(causal()), (0, 4))
    inputs = tensors()
    expected = results(lambda *states: prefix_attention(*states, 0.3, causal()), inputs)
    equal(results(attended("eager", longer, scaling=0.3), inputs), expected, **FLOAT32)
    rows = torch.ones(BATCH, 1, TOKENS, 1, dtype=torch.bool)
    expected = results(lambda *states: prefix_attention(*states, 0.3), inputs)
    equal(results(attended("sdpa", rows, scaling=0.3), inputs), expected)


def test_soft_cap_and_sinks_stay_the_inner_function_s():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks

    query, key, value, prefix_key, prefix_value = tensors(key_heads=HEADS)
    keys, values = lean.join(prefix_key, key), lean.join(prefix_value, value)
    mask = additive(causal())
    where = module(key_heads=HEADS, sinks=torch.randn(HEADS, dtype=torch.float64))
    for inner, more in ((capped, {"softcap": 2.0}), (with_sinks, {})):
        expected, _ = inner(where, query, keys, values, functional.pad(mask, (PREFIX, 0)), scaling=0.3, **more)
        found, _ = lean.attend(
            inner, where, query, key, value, mask, prefix_key, prefix_value, kind="eager", scaling=0.3, **more
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def flex(module, query, key, value, mask, scaling=None, **kwargs):
    """Flex attention as transformers calls it, uncompiled; torch has no backward pass of it on a CPU."""
    out = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["causal", "window", "padding left", "packed"])
def test_flex(kind, monkeypatch):
    """The block mask that flex attention takes is made again with the prefix in front."""
    monkeypatch.setitem(INNER, "flex_attention", flex)
    sees = sees_of(kind).expand(BATCH, -1, -1, -1)
    mask = create_block_mask(lambda b, h, q, k: sees[b, 0, q, k], BATCH, None, TOKENS, TOKENS, device="cpu")
    inputs = [tensor.detach() for tensor in tensors()]
    found = attended("flex_attention", mask, scaling=0.3)(*inputs)
    torch.testing.assert_close(found, prefix_attention(*inputs, 0.3, sees), **FLOAT32)


class Flash:
    """Stands in for transformers' flash attention: (batch, tokens) masks of ones for tokens, causal from the end."""

    def __call__(self, module, query, key, value, mask, scaling=None, **kwargs):
        queries, keys = query.shape[2], key.shape[2]
        sees = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
        if mask is not None:
            assert mask.shape == (query.shape[0], keys)
            sees = sees & mask.bool()[:, None, None]
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling)
        return out.transpose(1, 2), None


@pytest.mark.parametrize("kind", ["causal", "padding left", "padding right"])
def test_flash_contract(kind, monkeypatch):
    """What flash attention is handed: keys with the prefix, and a padding mask as long as they are."""
    monkeypatch.setitem(INNER, "flash_attention_2", Flash())
    sees = sees_of(kind)
    mask = None if kind == "causal" else padded(kind == "padding left").long()
    inputs = tensors()
    expected = prefix_attention(*inputs, 0.3, sees)
    found = attended("flash_attention_2", mask, scaling=0.3)(*inputs)
    kept = torch.ones(BATCH, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found.transpose(1, 2)[kept], expected.transpose(1, 2)[kept])


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"sliding_window": TOKENS}, "slide out of sight"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, *range(TOKENS - 4)]] * BATCH)}, "packed rows"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "packed rows"),
        ({"cache": object()}, "paged cache"),
    ],
)
def test_what_flash_attention_cannot_do(kwargs, says, monkeypatch):
    monkeypatch.setitem(INNER, "flash_attention_2", Flash())
    with pytest.raises(NotImplementedError, match=says):
        attended("flash_attention_2", None, scaling=0.3, **kwargs)(*tensors())


# attention as older models write it: (query, key, value, added to the scores) → (batch, heads, tokens, width)
def by_matmul(query, key, value, mask):
    scores = torch.matmul(query, key.transpose(-1, -2)) / 2.5 + mask
    return torch.matmul(torch.nn.Dropout(0.0)(torch.nn.Softmax(dim=-1)(scores)), value)


def by_flat_bmm(query, key, value, mask):
    flat = [x.flatten(0, 1) for x in (query * 0.4, key, value)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    scores = (scores.view(*query.shape[:2], *scores.shape[1:]) + mask).flatten(0, 1)
    return torch.bmm(functional.softmax(scores, dim=-1), flat[2]).view_as(query)


def by_baddbmm(query, key, value, mask):
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    bias = torch.zeros(flat[0].shape[0], query.shape[2], key.shape[2], dtype=query.dtype)
    scores = bias.baddbmm(batch1=flat[0], batch2=flat[1].mT, beta=1.0, alpha=0.4).view(*query.shape[:3], -1) + mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float64).flatten(0, 1)
    return (weights @ flat[2]).view_as(query)


def by_einsum(query, key, value, mask):
    query, key, value = (x.permute(2, 0, 1, 3) for x in (query, key, value))  # tokens, batch, heads, width
    scores = torch.einsum("ibnd,jbnd->bnij", query, key) * 0.4 + mask
    return torch.einsum("bnij,jbnd->ibnd", scores.softmax(dim=3), value).permute(1, 2, 0, 3)


def by_nested_einsum(query, key, value, mask):
    scores = torch.einsum("bsij, bsjk -> bsik", (query * 0.4, key.transpose(2, 3))) + mask
    return torch.einsum("bsij,bsjk->bsik", torch.softmax(scores, -1), value)


def by_fused(query, key, value, mask):
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4)


def with_content_and_place(query, key, value, mask):
    """Two products of one shape: the prefix stands beside the keys, not beside the places."""
    place = torch.linspace(-1, 1, key.numel(), dtype=key.dtype).view_as(key)
    scores = torch.matmul(query, key.mT) + torch.matmul(query, place.mT)
    return torch.matmul((scores * 0.4 + mask).softmax(-1), value)


HAND_WRITTEN = (by_matmul, by_flat_bmm, by_baddbmm, by_einsum, by_nested_einsum, by_fused, with_content_and_place)


@pytest.mark.parametrize("written", HAND_WRITTEN)
@pytest.mark.parametrize("kind", ["causal", "padding left", "encoder padding"])
def test_written_out_by_hand(written, kind):
    sees = sees_of(kind)
    mask = additive(sees)
    inputs = tensors(key_heads=HEADS)
    if written is with_content_and_place:
        place = torch.linspace(-1, 1, inputs[1].numel(), dtype=torch.float64).view_as(inputs[1])

    def run(query, key, value, prefix_key, prefix_value):
        scale = 0.4 if written not in (by_flat_bmm, by_nested_einsum, by_baddbmm) else 1.0
        with Watch(lambda call: (prefix_key, prefix_value, scale) if call == 0 else None) as watch:
            out = written(query, key, value, mask)
        assert watch.count == 1
        return out

    def truth(query, *states):
        added = 0.4 * query @ place.mT if written is with_content_and_place else None
        return prefix_attention(query, *states, 0.4, sees, added)

    equal(results(run, inputs), results(truth, inputs))


def test_dropout_takes_the_prefix_along():
    """With everything dropped nothing is left of the prefix either."""
    query, key, value, prefix_key, prefix_value = tensors(key_heads=HEADS)
    with Watch(lambda call: (prefix_key, prefix_value, 1.0)):
        weights = torch.matmul(query, key.mT).softmax(-1)
        out = torch.matmul(functional.dropout(weights, 1.0, training=True), value)
    assert not out.any()


@pytest.mark.parametrize("layout", [(0, False), (0, True), (2, False), (2, True)])
def test_turned_is_a_rotation_of_pairs(layout):
    """`(x + iy) · exp(i angle)`, pair by pair."""
    start, neighbours = layout
    states = torch.randn(2, 5, 10 if start else 8, dtype=torch.float64)
    angles = torch.linspace(0.1, 2, 4, dtype=torch.float64)
    part = states[..., start : start + 8]
    x, y = (part[..., 0::2], part[..., 1::2]) if neighbours else (part[..., :4], part[..., 4:])
    wanted = torch.complex(x, y) * torch.polar(torch.ones_like(angles), angles)
    found = lean.turned(states, angles.cos(), angles.sin(), layout)
    assert torch.equal(found[..., :start], states[..., :start])
    part = found[..., start : start + 8]
    x, y = (part[..., 0::2], part[..., 1::2]) if neighbours else (part[..., :4], part[..., 4:])
    torch.testing.assert_close(torch.complex(x, y), wanted)


def test_a_causal_flag_given_by_place():
    """torch counts it from the first key, also where there are more keys than queries."""
    inputs = tensors(queries=4, key_heads=HEADS)
    sees = torch.ones(4, TOKENS, dtype=torch.bool).tril()[None, None]

    def run(query, key, value, prefix_key, prefix_value):
        with Watch(lambda call: (prefix_key, prefix_value, 1.0)):
            return functional.scaled_dot_product_attention(query, key, value, None, 0.0, True)

    equal(results(run, inputs), results(lambda *states: prefix_attention(*states, WIDTH**-0.5, sees), inputs))
