"""Attention with dropout in one step beside torch's own: values, every gradient, the same draws, fewer bytes kept."""

import lean_models as models
import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from lora_kit import adapt
from lora_kit.lean import dropped_attention
from lora_kit.lean.dropped_attention import Instead, attention, can_attend
from lora_kit.lean.switch import enable

BATCH, HEADS, WIDTH, VALUES = 3, 2, 7, 5
LENGTHS = ((13, 13), (5, 9), (21, 21), (3, 33))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def states(queries, keys, dtype=torch.float64):
    """Queries and keys with the heads of a token side by side, as models have them; values in another layout."""
    generator = torch.Generator().manual_seed(queries + keys)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = draw(BATCH, queries, HEADS, WIDTH).transpose(1, 2), draw(BATCH, keys, HEADS, WIDTH).transpose(1, 2)
    return [t.requires_grad_() for t in (query, key, draw(BATCH, HEADS, keys, VALUES))]


def masks(queries, keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    seen = torch.rand(BATCH, 1, queries, keys, generator=generator) > 0.3
    seen[1, :, 2] = False  # a query that sees nothing
    bias = torch.randn(seen.shape, generator=generator).to(dtype)
    return {
        "none": None,
        "boolean": seen,
        "added": bias.masked_fill(~seen, -torch.inf),
        "added, finite": bias.masked_fill(~seen, torch.finfo(dtype).min),
        "of each head": torch.rand(BATCH, HEADS, queries, keys, generator=generator) > 0.5,
        "of no row": seen[0, 0],
        "of keys": torch.rand(BATCH, 1, 1, keys, generator=generator) > 0.2,
    }


def run(function, given, mask=None, *, dropout=0.3, causal=False, scale=None):
    """The result, the gradients for an uneven upstream, and a number drawn afterwards."""
    torch.manual_seed(5)
    found = function(*given, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    upstream = torch.linspace(-1.3, 2.1, found.numel(), dtype=torch.float64).sin().view(found.shape)
    return [found, *torch.autograd.grad((found.double() * upstream).sum(), given), torch.rand(1)]


def distances(found, wanted):
    assert [t.dtype for t in found] == [t.dtype for t in wanted] and [t.shape for t in found] == [
        t.shape for t in wanted
    ]
    return [((a - b).double().norm() / b.double().norm()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("mask", masks(5, 9))
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_gradients_and_draws(dtype, lengths, mask):
    given, mask = states(*lengths, dtype), masks(*lengths, dtype)[mask]
    for causal in (False, True) if mask is None else (False,):
        settings = {"causal": causal, "scale": 0.4 if causal else None}
        assert can_attend(*given, mask, 0.3, causal)
        found = run(attention, given, mask, **settings)
        wanted = run(scaled_dot_product_attention, given, mask, **settings)
        assert max(distances(found, wanted)) <= TOLERANCES[dtype]
        assert found[-1] == wanted[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sixteen_bit_is_as_near_to_the_truth(lengths, dtype):
    given, mask = states(*lengths, dtype), masks(*lengths)["boolean"]
    truth = run(scaled_dot_product_attention, [t.detach().double().requires_grad_() for t in given], mask)
    ours, theirs = run(attention, given, mask), run(scaled_dot_product_attention, given, mask)
    for found, other, right in zip(ours[:-1], theirs[:-1], truth[:-1], strict=True):
        assert found.dtype == dtype
        assert (found.double() - right).norm() <= 1.2 * (other.double() - right).norm()


def test_autocast():
    """Queries, keys and values are rounded, the products between are not; no less where the backward runs inside."""
    given = states(13, 13, torch.float32)

    def cast(function):
        def run_it(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args, **kwargs)

        return run_it

    found, wanted = run(cast(attention), given), run(cast(scaled_dot_product_attention), given)
    assert found[0].dtype == torch.bfloat16 and max(distances(found, wanted)) <= 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        again = run(attention, given)
    assert max(distances(again, found)) == 0


@pytest.mark.parametrize("wanting", range(3))
def test_what_wants_no_gradient_gets_none(wanting):
    """One of the three at a time is differentiated."""
    given = [t.detach().requires_grad_(i == wanting) for i, t in enumerate(states(13, 13))]
    found, wanted = (
        torch.autograd.grad(function(*given, dropout_p=0.3).square().sum(), given[wanting])
        for function in (drawn(attention), drawn(scaled_dot_product_attention))
    )
    assert max(distances(found, wanted)) <= 1e-12


def drawn(function):
    def same_draws(*args, **kwargs):
        torch.manual_seed(5)
        return function(*args, **kwargs)

    return same_draws


@pytest.mark.parametrize("shape", [(BATCH, 1, 13, 13), (1, HEADS, 13, 13), (13, 13), (BATCH, 1, 1, 13)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_bias_that_is_trained(dtype, shape):
    """As T5's, one for each head, with the padding in it."""
    given = states(13, 13, dtype)
    bias = torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=dtype).cos().view(shape)
    bias = bias.masked_fill(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.2, -torch.inf)
    bias.requires_grad_()
    found, wanted = (
        torch.autograd.grad(drawn(function)(*given, bias, 0.3).cos().sum(), (*given, bias))
        for function in (attention, scaled_dot_product_attention)
    )
    assert max(distances(found, wanted)) <= TOLERANCES[dtype]


def kept_bytes(function, given, mask):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        function(*given, mask, 0.3)
    return sum(kept.values())


def test_five_bytes_a_pair():
    """The weights in float32 and a byte for the mask; queries, keys and values lie there anyway."""
    tokens = 40
    given, mask = states(tokens, tokens, torch.bfloat16), masks(tokens, tokens)["boolean"]
    pairs = BATCH * HEADS * tokens**2
    own = sum(t.untyped_storage().nbytes() for t in given)
    ours = kept_bytes(attention, given, mask) - own
    assert 5 * pairs <= ours <= 5 * pairs + 8 * BATCH * tokens
    assert kept_bytes(scaled_dot_product_attention, given, mask) >= 12 * pairs


def test_torch_keeps_what_is_not_ours():
    query, key, value = states(13, 13)
    assert can_attend(query, key, value, None, 0.3)
    for arguments in (
        (query, key, value, None, 0.0),
        (query, key, value, None, 1.0),
        (query, key, value, masks(13, 13)["boolean"], 0.3, True),
        (query, key[:, :1], value[:, :1], None, 0.3, False, None, True),
        (query[0], key[0], value[0], None, 0.3),
        (query.to("meta"), key.to("meta"), value.to("meta"), None, 0.3),
        (*(t.detach() for t in (query, key, value)), None, 0.3),
        (query.float(), key, value, None, 0.3),
        (query[:, :, :0], key, value, None, 0.3),
        (query, key, value, torch.ones(13, 14, dtype=torch.bool), 0.3),
        (query, key, value, torch.ones(2, 1, 13, 13, dtype=torch.bool), 0.3),
    ):
        assert not can_attend(*arguments)
    with Instead():
        found = scaled_dot_product_attention(query, key, value)
        assert torch.equal(found, scaled_dot_product_attention(query=query, key=key, value=value, dropout_p=0.0))
        assert "_Attention" in type(scaled_dot_product_attention(query, key, value, dropout_p=0.3).grad_fn).__name__


def test_planted_errors_are_seen(monkeypatch):
    """A softmax whose gradient lacks the sum, a mask that is not drawn again, a factor that is a little off."""
    given = states(13, 13)
    right = run(scaled_dot_product_attention, given)
    with monkeypatch.context() as patch:
        patch.setattr(dropped_attention, "_softmax_backward", lambda upstream, weights: upstream * weights)
        assert max(distances(run(attention, given), right)) > 1e-3
    with monkeypatch.context() as patch:
        plain = dropped_attention._bias
        patch.setattr(dropped_attention, "_bias", lambda mask, dtype, kept: plain(mask, dtype, kept * (1 + 1e-10)))
        assert max(distances(run(attention, given), right)) > 1e-12
    assert max(distances(run(attention, given, dropout=0.3000001), right)) > 1e-12


# --- in models


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=models.WORDS, dim=48, hidden_dim=80, n_layers=2, n_heads=4, pad_token_id=0, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=models.WORDS,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        attention_dropout=0.2,
        pad_token_id=0,
    )
    return transformers.BartForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=models.WORDS, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


OTHERS = {"distilbert": (distilbert, "bert"), "bart": (bart, "llama"), "t5": (t5, "llama")}
COUNTS = {"distilbert": 2, "bart": 6, "t5": 6}


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name, method):
    """Masks, cross attention, a prefix in front: the same loss and gradients as without the lean step."""
    make, like = OTHERS[name]
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        base = make()
        model = adapt(base, method, lean=lean)
        if lean:
            report = enable(model)
            # T5 wrote its attention out by hand once
            assert len(report.attention) == (COUNTS[name] if base._supports_sdpa else 0)
        found.append(models.step(model, models.batch(like)))
    assert models.overall(found[1], found[0]) <= 2e-6
    assert abs(found[1][0] - found[0][0]) <= 2e-6 * found[0][0]


def test_models_without_dropout_or_with_another_attention_are_left():
    assert not enable(models.adapted("llama", lean=False)).attention
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    eager = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    assert not enable(adapt(eager, "lora", lean=False)).attention


def test_evaluation_is_torchs_own():
    model = models.adapted("bert", lean=True).eval()
    names, pending = set(), [model(**models.batch("bert")).logits.grad_fn]
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [step for step, _ in node.next_functions if step is not None]
    assert not any("_Attention" in name for name in names)


def test_the_modules_keep_their_signature():
    import inspect

    model = models.build("bert")
    before = {
        path: inspect.signature(m.forward) for path, m in model.named_modules() if "Attention" in type(m).__name__
    }
    enable(model)
    assert before == {path: inspect.signature(model.get_submodule(path).forward) for path in before}
