"""The mathematics of the lean step beside plain torch: values and every gradient, odd shapes, uneven upstream."""

import functools

import pytest
import references
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from lora_kit.lean import elementwise, layers, recomputed, rms_norm
from lora_kit.lean.linear_loss import Head, linear_cross_entropy
from lora_kit.lean.logits import Logits
from lora_kit.lean.lora_linear import Source, lora_linear
from lora_kit.lean.low_rank_stack import LowRankStack

EXACT = 1e-12


def uneven(y):
    """A sum whose gradient differs from entry to entry, and in sign."""
    weights = torch.linspace(-1.3, 2.1, y.numel(), dtype=torch.float64).sin().view(y.shape)
    return (y.double() * weights).sum()


def gradients(result, inputs):
    """Of `uneven(result)`; inputs that are not differentiated give None."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(uneven(result), wanted, allow_unused=True)


def same(found, wanted, tolerance=EXACT):
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        if not a.numel():
            continue
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30), (a - b).abs().max() / b.abs().max()


def draw(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


# --- LoRA linear


def base_of(kind, dtype=torch.float64):
    """A frozen map of 11 to 7, and its dense weight (7, 11) and bias."""
    weight, bias = draw(7, 11, dtype=dtype, grad=False), draw(7, dtype=dtype, grad=False)
    if kind == "linear":
        module = nn.Linear(11, 7, dtype=dtype)
        module.weight.data, module.bias.data = weight, bias
    elif kind == "conv1d":
        module = Conv1D(7, 11).to(dtype)
        module.weight.data, module.bias.data = weight.T.contiguous(), bias
    return module.requires_grad_(False), weight, bias


INPUTS = {
    "two": lambda: draw(5, 11),
    "three": lambda: draw(3, 5, 11),
    "four": lambda: draw(2, 3, 1, 11),
    "transposed": lambda: draw(11, 5).T,
    "strided": lambda: draw(3, 5, 22)[..., ::2],
    "expanded": lambda: draw(1, 5, 11).expand(3, 5, 11),
    "one row": lambda: draw(1, 11),
    "no rows": lambda: draw(0, 11),
}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", INPUTS)
def test_lora_linear(kind, shape):
    module, weight, bias = base_of(kind)
    x, a, b = INPUTS[shape](), draw(3, 11), draw(7, 3)
    if (kind, shape) == ("conv1d", "expanded"):
        x = x.contiguous()  # transformers' Conv1D takes no other
    found = lora_linear(x, a, b, layers.map_of(module), 1.7)
    wanted = references.lora_linear(x, weight, bias, a, b, 1.7)
    same([found], [wanted])
    same(gradients(found, (x, a, b)), gradients(wanted, (x, a, b)))


@pytest.mark.parametrize("quiet", ["x", "a", "b", "xa"])
def test_what_wants_no_gradient_gets_none(quiet):
    module, weight, bias = base_of("linear")
    tensors = {"x": draw(5, 11), "a": draw(3, 11), "b": draw(7, 3)}
    for name in quiet:
        tensors[name].requires_grad_(False)
    x, a, b = tensors.values()
    found = lora_linear(x, a, b, layers.map_of(module), 0.5)
    same(gradients(found, (x, a, b)), gradients(references.lora_linear(x, weight, bias, a, b, 0.5), (x, a, b)))


def test_trained_biases():
    module, weight, _ = base_of("linear")
    x, a, b, more = draw(3, 5, 11), draw(3, 11), draw(7, 3), draw(7, seed=5)
    bias = module.bias.requires_grad_(True)
    found = lora_linear(x, a, b, layers.map_of(module), 1.7, bias=bias, lora_bias=more)
    wanted = references.lora_linear(x, weight, bias, a, b, 1.7) + 1.7 * more
    same([found], [wanted])
    same(gradients(found, (x, a, b, bias, more)), gradients(wanted, (x, a, b, bias, more)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_draws_the_mask_twice(share):
    """The draws are torch's own: one seed gives one mask, here and in `nn.Dropout`."""
    module, weight, bias = base_of("linear")
    x, a, b = draw(3, 5, 11), draw(3, 11), draw(7, 3)
    torch.manual_seed(7)
    found = lora_linear(x, a, b, layers.map_of(module), 1.7, dropout=share)
    after = torch.rand(3)
    torch.manual_seed(7)
    wanted = functional.linear(x, weight, bias) + 1.7 * (functional.dropout(x, share) @ a.T @ b.T)
    assert torch.equal(after, torch.rand(3))
    same([found], [wanted])
    state = torch.get_rng_state()
    same(gradients(found, (x, a, b)), gradients(wanted, (x, a, b)))
    assert torch.equal(state, torch.get_rng_state()), "the backward pass draws from a generator of its own"
    torch.manual_seed(8)
    other = lora_linear(x, a, b, layers.map_of(module), 1.7, dropout=share)
    assert not torch.allclose(other, wanted)


def test_the_input_is_not_kept_where_it_can_be_made_again():
    module, weight, bias = base_of("linear")
    f, a, b = draw(3, 5, 11), draw(3, 11), draw(7, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        h, source = recomputed.recomputed(torch.tanh, f, (), random=False)
        found = lora_linear(h, a, b, layers.map_of(module), 1.7, source=source)
    assert h.data_ptr() not in kept
    wanted = references.lora_linear(f.tanh(), weight, bias, a, b, 1.7)
    same(gradients(found, (f, a, b)), gradients(wanted, (f, a, b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_keeps_no_copy(dtype):
    """float32 adapters on a 16-bit base: the input is kept as it came, and gradients come in float32."""
    module, weight, bias = base_of("linear", dtype)
    x, a, b = draw(3, 5, 11, dtype=dtype), draw(3, 11, dtype=torch.float32), draw(7, 3, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = lora_linear(x, a, b, layers.map_of(module), 1.7)
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() == x.data_ptr()) == x.numel() * 2
    assert sum(t.numel() for t in kept) == x.numel() + 15 * 3 + a.numel() + b.numel()
    assert found.dtype == dtype
    wanted = references.lora_linear(x.double(), weight.double(), bias.double(), a.double(), b.double(), 1.7)
    ours, exact = gradients(found, (x, a, b)), gradients(wanted, (x, a, b))
    assert [g.dtype for g in ours] == [dtype, torch.float32, torch.float32]
    for g, w in zip(ours, exact, strict=True):
        assert (g.double() - w.double()).norm() < 0.02 * w.double().norm()


def test_autocast():
    """A float32 base under autocast: the products run in bfloat16, the gradients come back in float32."""
    module, weight, bias = base_of("linear", torch.float32)
    x, a, b = (draw(*shape, dtype=torch.float32) for shape in ((3, 5, 11), (3, 11), (7, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        found = lora_linear(x, a, b, layers.map_of(module), 1.7)
        wanted = functional.linear(x, weight, bias) + 1.7 * functional.linear(functional.linear(x, a), b)
    assert found.dtype == torch.bfloat16
    for g, w in zip(gradients(found, (x, a, b)), gradients(wanted, (x, a, b)), strict=True):
        assert g.dtype == w.dtype == torch.float32 and (g - w).norm() < 0.02 * w.norm()


def test_the_result_may_be_changed_in_place():
    """As some attentions do with their scores and masks."""
    module, weight, bias = base_of("linear")
    x, a, b = draw(3, 5, 11), draw(3, 11), draw(7, 3)
    found = lora_linear(x, a, b, layers.map_of(module), 1.7).mul_(3)[:, 1:].add_(1)
    wanted = references.lora_linear(x, weight, bias, a, b, 1.7).mul(3)[:, 1:].add(1)
    same(gradients(found, (x, a, b)), gradients(wanted, (x, a, b)))


def test_second_derivatives_are_refused():
    module, _, _ = base_of("linear")
    x, a, b = draw(5, 11), draw(3, 11), draw(7, 3)
    y = lora_linear(x, a, b, layers.map_of(module), 1.7)
    (g,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad|twice"):
        g.sum().backward()


# --- elementwise

ACTS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("block", [2**19, 20])
def test_gated(act, block, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", {"cpu": block})
    act = ACT2FN[act]
    g, u = draw(3, 5, 11), draw(3, 5, 11, seed=9)
    same([elementwise.gated(g, u, act)], [act(g) * u])
    same(gradients(elementwise.gated(g, u, act), (g, u)), gradients(act(g) * u, (g, u)))
    for quiet in (g, u):
        quiet.requires_grad_(False)
        same(gradients(elementwise.gated(g, u, act), (g, u)), gradients(act(g) * u, (g, u)))
        quiet.requires_grad_(True)
    both = draw(3, 5, 22)
    halves = both.chunk(2, -1)
    same(gradients(elementwise.gated(*halves, act), (both,)), gradients(act(halves[0]) * halves[1], (both,)))


@pytest.mark.parametrize("act", ACTS)
def test_activation(act):
    act, f = ACT2FN[act], draw(3, 5, 11)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found, _ = recomputed.recomputed(act, f, (), random=False)
    assert [t.data_ptr() for t in kept] == [f.data_ptr()]
    same([found], [act(f)])
    same(gradients(found, (f,)), gradients(act(f), (f,)))


@pytest.mark.parametrize("random", [False, True])
def test_recomputed(random):
    """Only the input is kept, and the layer behind gets the result from the same second run."""
    weight, behind, x = draw(6, 11), draw(4, 6), draw(5, 11)
    runs = []

    def run(x):
        runs.append(None)
        return functional.dropout((x @ weight.T).tanh(), 0.4 if random else 0.0)

    torch.manual_seed(4)
    h, source = recomputed.recomputed(run, x, (weight,), random=random)
    found = lora_linear(h, behind[:2], draw(3, 2), layers.map_of(nn.Linear(6, 3).double().requires_grad_(False)), 1.0)
    assert found.shape == (5, 3) and len(runs) == 1
    torch.manual_seed(4)
    wanted = run(x)
    same([h], [wanted])
    state = torch.get_rng_state()
    assert torch.equal(source.make(*source.kept), wanted)
    same(gradients(h, (x, weight)), gradients(wanted, (x, weight)))
    assert torch.equal(state, torch.get_rng_state())
    assert len(runs) == 3, "once forward, once in the slow twin, once for both readers"


# --- RMSNorm


def llama_norm(x, weight, eps):
    exact = x.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemma_norm(x, weight, eps):
    exact = x.float()
    scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written", ["llama", "gemma", "llama, float32 weight"])
def test_rms_norm(dtype, written):
    x = draw(3, 5, 11, dtype=dtype)
    weight = draw(11, dtype=torch.float32 if "float32" in written else dtype, grad=False)
    gemma = written == "gemma"
    slow = functools.partial(gemma_norm if gemma else llama_norm, weight=weight, eps=1e-5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = rms_norm.rms_norm(x, weight, 1e-5, from_one=gemma, rounds_first=not gemma)
    assert torch.equal(found, slow(x))
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * x.numel() + 4 * 15 + weight.nbytes
    exact = x.detach().double().requires_grad_()
    truth = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight.double() + gemma)
    (right,) = gradients(truth, (exact,))
    (ours,), (theirs,) = gradients(found, (x,)), gradients(slow(x), (x,))
    step = 2 ** (-8 if dtype == torch.bfloat16 else -11)
    assert ours.dtype == dtype and (ours.double() - right).norm() <= 1.05 * (theirs.double() - right).norm() + step / 50
    assert (ours.double() - right).norm() <= step * right.norm()


# --- the loss

WORDS = 23


def slow_loss(hidden, head, target, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """The twin of `linear_cross_entropy`, with all logits at once."""
    logits = head.run(hidden)
    logits = logits if head.post is None else head.post(logits)
    loss = functional.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        kept = target != ignore_index
        squares = z_loss * logits.logsumexp(1).square() * kept
        loss = loss + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / kept.sum()}[reduction]
    return loss


def heads():
    weight, bias = draw(WORDS, 11), draw(WORDS)
    frozen, plain = weight.detach(), bias.detach()
    return {
        "frozen": Head(lambda x: functional.linear(x, frozen), WORDS, frozen),
        "with bias": Head(lambda x: functional.linear(x, frozen, plain), WORDS, frozen, plain),
        "capped": Head(lambda x: functional.linear(x, frozen), WORDS, frozen, post=lambda z: (z / 3).tanh() * 3),
        "scaled": Head(lambda x: functional.linear(x, frozen), WORDS, frozen, post=lambda z: z * 0.3),
        "trained": Head(lambda x: functional.linear(x, weight, bias), WORDS, parameters=(weight, bias)),
        "trained, capped": Head(
            lambda x: functional.linear(x, weight), WORDS, parameters=(weight,), post=lambda z: (z / 3).tanh() * 3
        ),
    }


@pytest.mark.parametrize("name", heads())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"label_smoothing": 0.1, "z_loss": 0.01}]
)
def test_linear_cross_entropy(name, reduction, settings):
    head, hidden = heads()[name], draw(150, 11)
    target = torch.randint(WORDS, (150,), generator=torch.Generator().manual_seed(0))
    target[[0, 1, 17, 149]] = -100
    if reduction == "none" and head.parameters:
        with pytest.raises(ValueError, match="frozen head"):
            linear_cross_entropy(hidden, head, target, reduction=reduction)
        return
    # one byte: the narrowest chunks, of 64 rows
    for chunk_bytes in (1, None):
        found = linear_cross_entropy(hidden, head, target, reduction=reduction, chunk_bytes=chunk_bytes, **settings)
        wanted = slow_loss(hidden, head, target, reduction=reduction, **settings)
        same([found], [wanted])
        inputs = (hidden, *head.parameters)
        same(gradients(found, inputs), gradients(wanted, inputs))


def test_no_labels_no_rows_no_gradient():
    for rows in (7, 0):
        head, hidden = heads()["frozen"], draw(rows, 11)
        target = torch.full((rows,), -100)
        assert linear_cross_entropy(hidden, head, target).isnan()
        assert linear_cross_entropy(hidden, head, target, reduction="sum") == 0
        found = linear_cross_entropy(hidden, head, target)
        assert not torch.autograd.grad(found, hidden)[0].any()
    with torch.no_grad():
        assert not linear_cross_entropy(draw(7, 11), head, torch.arange(7)).requires_grad
    # the labels of rows that are ignored may be anything
    assert linear_cross_entropy(draw(2, 11), head, torch.tensor([99, 1]), ignore_index=99).isfinite()


def test_half_precision_sums_in_float32():
    """bfloat16 hidden states and head: the loss is that of float32 log-probabilities, to the rounding of the logits."""
    weight, hidden = draw(WORDS, 11, dtype=torch.bfloat16, grad=False), draw(300, 11, dtype=torch.bfloat16)
    target = torch.randint(WORDS, (300,), generator=torch.Generator().manual_seed(0))
    head = Head(lambda x: functional.linear(x, weight), WORDS, weight)
    found = linear_cross_entropy(hidden, head, target, chunk_bytes=1)
    wanted = functional.cross_entropy(functional.linear(hidden, weight).float(), target)
    assert found.dtype == torch.float32 and (found - wanted).abs() < 1e-6 * wanted
    ours, theirs = gradients(found, (hidden,))[0], gradients(wanted, (hidden,))[0]
    assert ours.dtype == torch.bfloat16 and (ours - theirs).float().norm() < 4e-3 * theirs.float().norm()


# --- logits that wait


def lazy(name="with bias", *shape):
    hidden = draw(*(shape or (3, 7)), 11)
    head = heads()[name]
    return hidden, head, Logits.of(hidden, head)


SHIFTS = {
    "Llama": lambda z: z.float()[..., :-1, :].contiguous().view(-1, WORDS),
    "view to the rest": lambda z: z[:, :-1].contiguous().view(18, -1),
    "flatten": lambda z: z[:, :-1, :].flatten(0, 1),
    "reshape": lambda z: torch.reshape(z[..., :-1, :], (-1, WORDS)),
    "capped": lambda z: (torch.tanh(z / 5.0) * 5.0)[:, :-1].reshape(-1, z.size(-1)),
    "scaled": lambda z: (0.25 * z)[..., :-1, :].reshape(-1, z.shape[-1]),
    "bias of its own": lambda z: (z + torch.linspace(0, 1, WORDS).view(1, -1))[:, :-1].reshape(-1, WORDS),
    "picked by a mask": lambda z: z[:, :-1][torch.ones(3, 6, dtype=torch.bool)],
    "rows by number": lambda z: z.view(-1, WORDS)[torch.tensor([i for i in range(21) if i % 7 != 6])],
}


@pytest.mark.parametrize("way", SHIFTS)
@pytest.mark.parametrize("name", ["with bias", "trained"])
def test_the_loss_meets_waiting_logits(way, name, monkeypatch):
    hidden, head, logits = lazy(name)
    target = torch.arange(18) % WORDS
    target[4] = -100
    monkeypatch.setattr(Logits, "values", lambda self: pytest.fail("computed"))
    found = functional.cross_entropy(SHIFTS[way](logits), target)
    wanted = functional.cross_entropy(SHIFTS[way](head.run(hidden)).double(), target)
    tolerance = 1e-6 if way == "Llama" else EXACT  # it casts to float32
    inputs = (hidden, *head.parameters)
    assert (found - wanted).abs() <= tolerance * wanted
    same(gradients(found, inputs), gradients(wanted, inputs), 10 * tolerance)


READS = {
    "argmax": lambda z: z.argmax(-1).double(),
    "log-probabilities": lambda z: z.log_softmax(-1),
    "a slice of the vocabulary": lambda z: z[..., 2:9],
    "one word": lambda z: z[..., 3],
    "transposed": lambda z: z.transpose(1, 2),
    "stacked": lambda z: torch.stack([z, z]),
    "in place": lambda z: z.mul_(2),
    "class weights": lambda z: functional.cross_entropy(
        z.view(-1, WORDS), torch.arange(21), weight=torch.ones(WORDS).double()
    ),
    "probabilities as targets": lambda z: functional.cross_entropy(
        z.view(-1, WORDS), torch.full((21, WORDS), 1 / WORDS).double()
    ),
    "a function that is not its own derivative": lambda z: _Straight.apply(z),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "a list": lambda z: torch.tensor(z.tolist()).double(),
    "unbound": lambda z: next(iter(z)),
    "joined": lambda z: torch.cat([z[:, :2], z[:, 5:]], 1),
    "einsum": lambda z: torch.einsum("bsv,bsv->bs", z, z),
    "a new axis": lambda z: z[:, None],
    "data": lambda z: z.data * 2,
    "matrices turned": lambda z: z.mT * 2,
}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("name", ["with bias", "trained"])
def test_reading_computes_them(way, name):
    hidden, head, logits = lazy(name)
    found, wanted = READS[way](logits), READS[way](head.run(hidden))
    assert type(found) is torch.Tensor
    same([found], [wanted])
    if wanted.requires_grad:
        inputs = (hidden, *head.parameters)
        same(gradients(found, inputs), gradients(wanted, inputs))


def test_what_they_say_of_themselves_computes_nothing(monkeypatch):
    hidden, _, logits = lazy()
    monkeypatch.setattr(Logits, "values", lambda self: pytest.fail("computed"))
    assert logits.shape == (3, 7, WORDS) and logits.dtype == torch.float64 and logits.device == hidden.device
    assert logits.requires_grad and logits.dim() == 3 and logits.numel() == 3 * 7 * WORDS and len(logits) == 3
    assert logits.size(-1) == WORDS and logits.is_floating_point() and isinstance(logits, torch.Tensor)
    assert logits.float().dtype == torch.float32 and logits.to(torch.bfloat16).dtype == torch.bfloat16
    assert logits.double() is logits and logits[0].shape == (7, WORDS)


def test_reading_without_gradients_and_then_with():
    hidden, head, logits = lazy()
    with torch.no_grad():
        assert not logits.argmax(-1).requires_grad and not (logits + 1 + logits).requires_grad
    same(gradients(logits * logits, (hidden,)), gradients(head.run(hidden).square(), (hidden,)))
    assert not logits.detach().requires_grad


def test_gradients_of_the_loss_do_not_pass_by():
    _, _, logits = lazy()
    for ask in (logits.retain_grad, lambda: logits.register_hook(print)):
        with pytest.raises(RuntimeError, match="Switch the lean step off"):
            ask()


# --- stacks of matrices whose update stays apart

IDS, ENDS = torch.tensor([2, 0, 0, 1]), torch.tensor([4, 4, 9], dtype=torch.int32)
USES = {
    "one by linear": lambda w: functional.linear(draw(6, 11, grad=False), w[1]),
    "one by linear, with bias": lambda w: functional.linear(
        draw(6, 11, grad=False), w[torch.tensor(2)], draw(7, grad=False)
    ),
    "one by product": lambda w: draw(6, 11, grad=False) @ w[0].T,
    "one, turned": lambda w: draw(6, 7, grad=False).matmul(w[0]) + draw(6, 7, grad=False) @ w[1].t().mT,
    "all": lambda w: torch.bmm(draw(3, 6, 11, grad=False), w.transpose(1, 2)),
    "all, turned": lambda w: draw(3, 6, 7, grad=False) @ w,
    "some, from the left": lambda w: torch.bmm(w[IDS], draw(4, 11, 1, grad=False)),
}
OTHER_USES = {
    "a part of each": lambda w: w[:, 2:5] * 2,
    "flat": lambda w: draw(5, 11, grad=False) @ w.view(-1, 11).T,
    "einsum": lambda w: torch.einsum("tk,eok->teo", draw(5, 11, grad=False), w),
    "halves": lambda w: torch.cat([part.sigmoid() for part in w.chunk(2, 2)], 2),
    "a function that is not its own derivative": lambda w: _Straight.apply(w),
    "data": lambda w: w.data * 2 + w.sum() * 0,
    "one, changed": lambda w: functional.linear(draw(6, 11, grad=False), w[0] * 2),
}


def stack():
    """Three matrices (7, 11), a factor of each side, and a way to see whether the sum was asked for."""
    base, left, right = draw(3, 7, 11, grad=False), draw(3, 7, 2), draw(3, 2, 11)
    asked = []
    return (
        LowRankStack.of(base, left, right, 1.7, lambda: asked.append(True)),
        base + 1.7 * left @ right,
        left,
        right,
        asked,
    )


@pytest.mark.parametrize("use", [*USES, *OTHER_USES])
def test_low_rank_stack(use):
    apart, whole, left, right, asked = stack()
    do = {**USES, **OTHER_USES}[use]
    found, wanted = do(apart), do(whole)
    assert type(found) is torch.Tensor and bool(asked) == (use in OTHER_USES)
    same([found], [wanted])
    same(gradients(found, (left, right)), gradients(wanted, (left, right)))


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_stack_in_groups(rank, dtype):
    """Rows sorted by expert, a group of none among them; ranks that the kernel would not take."""
    grouped = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    base, x = draw(3, 24, 16, dtype=dtype, grad=False), draw(9, 16, dtype=dtype)
    left, right = draw(3, 24, rank, dtype=torch.float32), draw(3, rank, 16, dtype=torch.float32)
    apart = LowRankStack.of(base, left, right, 1.7, lambda: pytest.fail("the sum was formed"))
    found = grouped(x, apart.transpose(-2, -1), offs=ENDS)
    exact = (base.double() + 1.7 * left.double() @ right.double()).mT
    wanted = torch.cat([x[:4].double() @ exact[0], x[4:].double() @ exact[2]])
    inputs = (x, left, right)
    step = 2e-6 if dtype == torch.float32 else 2e-2
    ours = gradients(found, inputs)
    for g, w in zip((found, *ours), (wanted, *gradients(wanted, inputs)), strict=True):
        assert (g.double() - w.double()).norm() <= step * w.double().norm()
    assert found.dtype == dtype and not ours[1][1].any(), "no row, no gradient"


def test_an_update_keeps_no_copies():
    base, left, right = draw(3, 7, 11, dtype=torch.bfloat16, grad=False), draw(3, 7, 2), draw(3, 2, 11)
    apart = LowRankStack.of(base, left, right, 1.7, lambda: None)
    x = draw(6, 11, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.linear(x, apart[1])
    mine = {t.untyped_storage().data_ptr() for t in (x, base, left, right)}
    assert all(t.untyped_storage().data_ptr() in mine for t in kept) and kept


# --- every tolerance above can fail


def test_planted_errors_are_seen(monkeypatch):
    module, weight, bias = base_of("linear")
    x, a, b = draw(3, 5, 11), draw(3, 11), draw(7, 3)
    wanted = gradients(references.lora_linear(x, weight, bias, a, b, 1.7), (x, a, b))
    for changed in (
        lambda: lora_linear(x, a, b, layers.map_of(module), 1.7 * (1 + 1e-10)),
        lambda: lora_linear(x, a, b * (1 + 1e-10), layers.map_of(module), 1.7),
        lambda: lora_linear(x, a, b, layers.map_of(module), 1.7, source=Source(lambda x: x * (1 + 1e-10), (x,))),
    ):
        with pytest.raises(AssertionError):
            same(gradients(changed(), (x, a, b)), wanted)
    g, u = draw(3, 5, 11), draw(3, 5, 11, seed=9)
    with pytest.raises(AssertionError):
        same(gradients(elementwise.gated(g, u * (1 + 1e-10), torch.tanh), (g, u)), gradients(g.tanh() * u, (g, u)))
    head, hidden, target = heads()["frozen"], draw(150, 11), torch.arange(150) % WORDS
    right = gradients(slow_loss(hidden, head, target, label_smoothing=0.1), (hidden,))
    for settings in ({"label_smoothing": 0.1 + 1e-10}, {"label_smoothing": 0.1, "z_loss": 1e-10}):
        with pytest.raises(AssertionError):
            same(gradients(linear_cross_entropy(hidden, head, target, **settings), (hidden,)), right)
