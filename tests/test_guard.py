"""A guarded run: the same numbers while nothing goes wrong, the same gradients in parts, a stop at the first NaN."""

import contextlib
import copy
import re
import warnings
import weakref

import datasets
import lean_models as models
import peft
import pytest
import tiny
import torch
import transformers
from transformers import Trainer, TrainingArguments

from lora_kit import adapt, base, load, param_groups, plan, training_defaults
from lora_kit.checks import parts
from lora_kit.checks.guard import guard
from lora_kit.errors import (
    NonFiniteError,
    NothingToTrainError,
    OptionError,
    OutOfMemoryError,
    StorageError,
    UnsupportedError,
)
from lora_kit.lean.optimizer import AdamW
from lora_kit.lean.rounding import stochastic_round
from lora_kit.storage import save as saving
from lora_kit.training.batching import Collator

SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB."


# ---- what is injected


@contextlib.contextmanager
def room_for(model, rows, where="forward", path="model.layers.0"):
    """Memory for so many rows at most; the failure comes in the forward or in the backward pass. Yields its count."""
    failures = []

    def fail(count):
        if count > rows:
            failures.append(count)
            raise torch.OutOfMemoryError(SHORT)

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if not model.training:
            return
        if where == "forward":
            fail(hidden.shape[0])
        elif hidden.requires_grad:
            hidden.register_hook(lambda gradient: fail(gradient.shape[0]))

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.get_submodule(path).register_forward_hook(hook)
    try:
        yield failures
    finally:
        handle.remove()


@contextlib.contextmanager
def broken(model, switch, path="model.layers.1.mlp", value=float("nan")):
    """The output of one module is NaN while `switch` holds anything."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def hook(module, args, output):
        return output * value if switch and model.training else output

    handle = inner.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def batch(rows=5, length=14, seed=2):
    """Rows of very different lengths and numbers of labels; the last row has none."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, models.WORDS, (rows, length), generator=draw)
    lengths = [length, *torch.randint(3, length, (rows - 1,), generator=draw).tolist()]
    mask = torch.tensor([[1] * n + [0] * (length - n) for n in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, : length // 2] = -100
    labels[-1] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    return max(((found[n] - g).norm() / g.norm().clamp_min(1e-12)).item() for n, g in wanted.items())


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def made(method="lora", lean=True, architecture="llama", **options):
    if method == "prefix":
        options["num_virtual_tokens"] = 4
    return models.adapted(architecture, lean=lean, method=method, **options)


def adamw(model, lr=None, **options):
    return torch.optim.AdamW(param_groups(model, lr), **options)


def hooks_of(model, optimizer):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    count = sum(len(getattr(module, name)) for module in model.modules() for name in names)
    return count, len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


# ---- out of memory, in a loop


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_parts_have_the_gradient_of_the_whole(method, lean, where, capsys):
    """Two micro-batches a step; the second fails, at first whole and then in halves."""
    small, large = batch(2, seed=7), batch(5)
    small["labels"][-1] = small["input_ids"][-1]
    model = made(method, lean)
    optimizer = adamw(model)
    losses = []
    for part in (small, large):
        loss = model(**part).loss
        (loss / 2).backward()
        losses.append(loss.item())
    wanted, state = gradients(model), torch.get_rng_state()
    optimizer.zero_grad()
    rates = [group["lr"] for group in optimizer.param_groups]
    capsys.readouterr()
    with room_for(model, 2, where) as failures, guard(model, optimizer) as step:
        found = [step(small, scale=1 / 2).item(), step(large, scale=1 / 2).item()]
        assert distance(gradients(model), wanted) < 1e-5
        assert found == pytest.approx(losses, rel=1e-5)
        assert failures == [5, 3]
        assert torch.equal(torch.get_rng_state(), state)
        said = capsys.readouterr().err
        assert "out of memory at micro-batch 5 (longest sequence 14): using 2 + 1 + 2 from here" in said
        assert "effective batch still 5" in said
        optimizer.step()
        optimizer.zero_grad()
        step(large)
        assert failures == [5, 3], "a size that failed is split beforehand"
        optimizer.zero_grad()
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert "2 split for lack of memory" in capsys.readouterr().err


def test_the_equality_can_fail(monkeypatch):
    """Parts that count by rows, not by labels, are told apart from the whole."""
    monkeypatch.setattr(parts, "targets_of", lambda model, batch: torch.ones(len(batch["labels"]), dtype=torch.long))
    whole = batch(4)
    whole["labels"][-1] = whole["input_ids"][-1]
    model = made()
    model(**whole).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    with room_for(model, 2), guard(model, adamw(model)) as step:
        step(whole)
    assert distance(gradients(model), wanted) > 1e-3


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_parts_with_gradient_checkpointing(where):
    model = made(lean="low-memory")
    base.checkpoint(model.get_base_model())
    model.enable_input_require_grads()
    model(**batch()).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    with room_for(model, 3, where) as failures, guard(model, adamw(model)) as step:
        step(batch())
    assert failures and distance(gradients(model), wanted) < 1e-5


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_random_numbers_after_a_split(where):
    """With dropout the parts draw anew, but what follows a completed forward draws as ever."""
    model = made(dropout=0.2)
    torch.manual_seed(5)
    model(**batch()).loss.backward()
    state = torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(5)
    with room_for(model, 3, where), guard(model, adamw(model)) as step:
        step(batch())
    assert torch.equal(torch.get_rng_state(), state) == (where == "backward")


def test_earlier_micro_batches_are_run_again_as_they_were():
    """With dropout: the gradient of the first micro-batch, lost with the second's, comes back bit by bit."""
    model, first = made(dropout=0.2), batch(2, seed=7)
    first["labels"][-1] = first["input_ids"][-1]
    torch.manual_seed(5)
    model(**first).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    with room_for(model, 2, "backward"), guard(model, adamw(model)) as step:
        step(first)
        with pytest.raises(ZeroDivisionError), room_for_nothing_more(model):
            step(batch(5))
        assert same(gradients(model), wanted)


@contextlib.contextmanager
def room_for_nothing_more(model):
    """Stops the run where the second micro-batch begins again."""
    calls = []

    def hook(module, args, kwargs):
        calls.append(kwargs["input_ids"].shape[0])
        if len(calls) == 3:
            raise ZeroDivisionError

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        assert calls == [5, 2, 3]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("lean", [True, False])
def test_what_failed_is_freed_before_the_next_try(where, lean):
    """Activations of the failed try are gone when its parts begin, though somebody keeps the exception."""
    model, kept, alive, held = made(lean=lean), [], [], []
    own = model.forward

    def forward(*args, **kwargs):
        try:
            return own(*args, **kwargs)
        except RuntimeError as error:
            held.append(error)
            raise

    model.forward = forward

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if len(hidden) == 5:
            kept.append(weakref.ref(hidden))
        else:
            alive.append(any(reference() is not None for reference in kept))

    model.get_base_model().model.layers[0].register_forward_hook(hook)
    with room_for(model, 3, where, "model.layers.1" if where == "forward" else "model.layers.0"):
        with guard(model, adamw(model)) as step:
            step(batch())
    assert kept and alive and not any(alive) and bool(held) == (where == "forward")


@pytest.mark.parametrize("foreign", [False, True])
def test_gradients_that_were_there_before(foreign):
    """Zeros of `zero_grad(set_to_none=False)`, and gradients of somebody else's backward pass."""
    model = made()
    optimizer = adamw(model)
    model(**batch(3)).loss.backward()
    if not foreign:
        optimizer.zero_grad(set_to_none=False)
    before = gradients(model)
    model(**batch()).loss.backward()
    wanted = gradients(model)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.grad = before[name]
    with room_for(model, 3, "backward") as failures, guard(model, optimizer) as step:
        step(batch())
    assert failures and distance(gradients(model), wanted) < 1e-5


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
def test_parts_of_other_losses(family):
    """An encoder–decoder's labels are not shifted; a classifier's loss is a mean over rows."""
    model = adapt(tiny.build(family), "lora", rank=4)
    whole = tiny.batch(family, rows=5)
    if family != "bert":
        whole["labels"][0, :6] = -100
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model.eval()  # no dropout
    model(**whole).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    failures = []

    def hook(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            failures.append(1)
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    with guard(model, adamw(model)) as step:
        step(whole)
    handle.remove()
    assert failures and distance(gradients(model), wanted) < 1e-5


def test_prompts_of_peft_have_labels_for_every_token():
    """Before the row stand tokens of PEFT's, so that the first label counts too."""
    model = peft.get_peft_model(
        models.build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    whole = batch(4)
    whole["labels"][-1] = whole["input_ids"][-1]
    whole["labels"][1] = -100
    whole["labels"][1, 0] = 7
    model(**whole).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    with room_for(model, 2), guard(model, adamw(model)) as step:
        step(whole)
    assert distance(gradients(model), wanted) < 1e-5


def test_padding_is_cut_off_parts():
    model, whole = made(), batch()
    whole["attention_mask"][2:, 6:] = 0
    whole["labels"][2:, 6:] = -100
    assert parts.take(model, whole, 2, 5)["input_ids"].shape == (3, 6)
    assert parts.take(model, whole, 0, 2)["labels"].shape == (2, 14)
    labelled = {**whole, "labels": whole["input_ids"]}
    assert parts.take(model, labelled, 2, 5)["input_ids"].shape == (3, 14), "padding that has labels stays"
    other = {**whole, "spans": torch.zeros(5, 14)}
    assert parts.take(model, other, 2, 5)["input_ids"].shape == (3, 14), "what is not known is not cut"
    left = {**whole, "attention_mask": whole["attention_mask"].flip(1), "labels": whole["labels"].flip(1)}
    assert parts.take(model, left, 2, 5)["input_ids"].shape == (3, 14)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"position_ids": torch.zeros(3, 5, 14)}, "position_ids is"),
        ({"pixels": {"a": 1}}, "pixels is a dict"),
        ({"names": ["a"]}, "names is a list of 1, with 5 rows"),
    ],
)
def test_what_cannot_be_cut_is_named(more, words):
    model = made()
    optimizer, before = adamw(model), values(model)

    def hook(module, args, kwargs):
        raise torch.OutOfMemoryError(SHORT)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    with guard(model, optimizer) as step, pytest.raises(OutOfMemoryError, match=f"cannot be split .*{words}"):
        step({**batch(), **more})
    handle.remove()
    assert same(values(model), before) and not gradients(model)


def test_a_row_that_does_not_fit():
    """Its length, the room, what to write instead, and the plan's number; gradients and random numbers are put back."""
    model = made()
    found = plan(models.build("llama").config, "lora", seq_len=16, device="cpu")
    state = torch.get_rng_state()
    with room_for(model, 0), guard(model, adamw(model), plan=found) as step:
        with pytest.raises(OutOfMemoryError) as error:
            step(batch())
    said = str(error.value)
    assert re.search(r"a single row \(longest sequence 14\); [\d.]+ [GM]iB of [\d.]+ GiB are free on cpu", said)
    for option in ("max_length below 14", 'quantization="4bit"', 'lean="low-memory"', "gradient checkpointing"):
        assert option in said
    assert "The plan: seq_len up to" in said
    assert not gradients(model) and torch.equal(torch.get_rng_state(), state)


def test_split_can_be_declined():
    model = made()
    with room_for(model, 2), guard(model, adamw(model), split=False) as step:
        with pytest.raises(OutOfMemoryError, match=r"5 rows, which is not split \(split=False\)"):
            step(batch())


def test_other_errors_pass():
    model = made()
    with guard(model, adamw(model)) as step, pytest.raises(ValueError, match=r"\w"):
        step({**batch(), "labels": torch.zeros(3, 3, dtype=torch.long)})


# ---- out of memory in the optimizer's first step


def short_of_states(optimizer, monkeypatch, times, after=3):
    """The making of states fails so many times, each time behind a few tensors."""
    real, calls = torch.zeros_like, []

    def zeros_like(tensor, *args, **kwargs):
        calls.append(1)
        if len(calls) > after and len(failed) < times:
            calls.clear()
            failed.append(1)
            raise torch.OutOfMemoryError(SHORT)
        return real(tensor, *args, **kwargs)

    failed = []
    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    return failed


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_states_are_made_again(method, options, monkeypatch):
    """Two groups, the second short of memory at first: the step is that of an undisturbed run, bit by bit."""

    def run(guarded):
        model = made(method)
        optimizer = adamw(model, **options)
        if len(optimizer.param_groups) == 1:
            group = optimizer.param_groups[0]
            group["params"], rest = group["params"][:2], group["params"][2:]
            optimizer.add_param_group({"params": rest, "lr": group["lr"]})
        failed = []
        if guarded:
            with guard(model, optimizer) as step:
                step(batch())
                with monkeypatch.context() as patch:
                    failed = short_of_states(optimizer, patch, 1)
                    optimizer.step()
        else:
            model(**batch()).loss.backward()
            optimizer.step()
        return values(model), [s["exp_avg_sq"] for s in optimizer.state.values()], failed

    wanted, squares, _ = run(False)
    found, others, failed = run(True)
    assert failed and same(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(squares, others, strict=True))


def test_states_that_never_fit(monkeypatch):
    model = made("full")
    optimizer = adamw(model)
    before = values(model)
    with guard(model, optimizer) as step:
        step(batch())
        with monkeypatch.context() as patch:
            failed = short_of_states(optimizer, patch, 2)
            with pytest.raises(OutOfMemoryError, match=r"the optimizer's states take .* MiB.*PagedAdamW8bit"):
                optimizer.step()
        assert len(failed) == 2 and not optimizer.state
        assert same(values(model), before)
        optimizer.step()  # once there is room
    assert not same(values(model), before)


def test_a_step_that_breaks_off(monkeypatch):
    model = made("full")
    optimizer = adamw(model, foreach=True)

    def sqrt(*args):
        raise torch.OutOfMemoryError(SHORT)

    monkeypatch.setattr(torch, "_foreach_sqrt", sqrt)
    with pytest.raises(OutOfMemoryError, match="some weights may be updated and others not"):
        with guard(model, optimizer) as step:
            step(batch())
            optimizer.step()
    assert hooks_of(model, optimizer)[1:] == (0, 0)


# ---- NaN, in a loop


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_loop_stops_at_the_step(method, tmp_path):
    model = made(method)
    optimizer, switch, before = adamw(model), [], None
    state = None
    with broken(model, switch), pytest.raises(NonFiniteError) as error:
        with guard(model, optimizer, output=tmp_path / "good") as step:
            for number in range(10):
                if number == 2:
                    switch.append(1)
                    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
                step(batch(3))
                optimizer.step()
                optimizer.zero_grad()
    said = str(error.value)
    assert said.startswith("step 3: loss is nan; first output that is not finite: model.layers.1.mlp (input max ")
    assert "float32). The step was not taken" in said and f"saved in {tmp_path / 'good'}" in said
    assert re.search(r"Usual cause: a learning rate that is too high: use lr=[\d.e-]+ \(now [\d.e-]+\)", said)
    assert same(values(model), before)
    left = optimizer.state_dict()["state"]
    assert all(torch.equal(left[k]["exp_avg"], state[k]["exp_avg"]) for k in state)
    assert (tmp_path / "good" / "lora_kit.json").exists()
    assert hooks_of(model, optimizer)[1:] == (0, 0)


def test_a_gradient_that_is_not_finite():
    """The loss is finite: the tensor nearest to the loss is named."""
    model = made("full", lean=False)
    inner = model.model.layers[1].mlp.down_proj.weight
    handle = inner.register_hook(lambda gradient: gradient * float("inf"))
    with guard(model, adamw(model)) as step:
        step(batch())
        with pytest.raises(NonFiniteError, match=r"finite, but 1 of \d+ gradients are not; .*layers.1.mlp.down_proj"):
            next(iter(step.watch.optimizer.param_groups))
            step.watch.optimizer.step()
    handle.remove()


def test_a_weight_and_a_row_that_are_not_finite(tmp_path):
    model = made("full", lean=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    optimizer = adamw(model)
    with guard(model, optimizer, output=tmp_path) as step:
        step(batch())
        with pytest.raises(
            NonFiniteError, match=r"q_proj, whose parameter 'weight' is not finite itself.*they hold NaN"
        ):
            optimizer.step()
    model = made()
    embedded = model.get_input_embeddings()(batch()["input_ids"]).detach()
    embedded[2, 1, 3] = float("inf")
    optimizer = adamw(model)
    with guard(model, optimizer) as step:
        step({"inputs_embeds": embedded, "labels": batch()["labels"]})
        with pytest.raises(NonFiniteError, match=r"inputs_embeds of row 2 holds infinities.*leave it out"):
            optimizer.step()


def test_float16_overflow_is_named():
    model = made(lean=False, dtype=torch.float16)
    optimizer = torch.optim.AdamW(param_groups(model))
    with broken(model, [1], value=1e6), guard(model, optimizer) as step:
        step(batch())
        with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp \(.*float16\).*65504: load.*dtype='bfloat16'"):
            optimizer.step()


def test_large_gradients_are_not_nan():
    """A norm overflows long before the gradients do."""
    model = made()
    optimizer = adamw(model)
    with guard(model, optimizer) as step:
        step(batch(), scale=1e25)
        optimizer.step()


def test_a_scaler_passes_over_overflows():
    """Gradients that overflow at a large scale are the scaler's business; at a scale below 1, or in the loss, not."""
    model = made()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with guard(model, optimizer, scaler=scaler) as step:
        before = values(model)
        step(batch(), scale=1e4)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert same(values(model), before) and scaler.get_scale() == 2.0**126
        switch = [1]
        with broken(model, switch), pytest.raises(NonFiniteError, match="loss is nan"):
            step(batch())
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    handle = next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
    optimizer.zero_grad()
    with guard(model, optimizer, scaler=scaler) as step, pytest.raises(NonFiniteError, match="gradients are not"):
        step(batch())
    handle.remove()


# ---- micro-batches without labels


def test_no_labelled_token(capsys):
    model = made()
    optimizer = adamw(model)
    whole, none = batch(), {**batch(), "labels": torch.full((5, 14), -100)}
    none["labels"][:, 0] = 5  # nobody predicts the first token
    model(**whole).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    before = values(model)
    with guard(model, optimizer) as step:
        assert step(none).isnan() and not gradients(model)
        optimizer.step()
        assert same(values(model), before) and not optimizer.state
        step(whole)
        step(none)
        assert same(gradients(model), wanted)
    said = capsys.readouterr().err
    assert "micro-batch 1 has no labelled token: skipped (1 so far)" in said
    assert said.count("labelled token: skipped (") == 1
    assert "guard: of the micro-batches 2 without a labelled token, skipped" in said


# ---- the same numbers


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_clean_loop_is_the_same(method, capsys):
    def run(guarded):
        torch.manual_seed(0)
        model = made(method, **({"dropout": 0.1} if method == "lora" else {}))
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
        hooks = hooks_of(model, optimizer)
        with guard(model, optimizer) if guarded else contextlib.nullcontext() as step:
            for number in range(4):
                for half in (batch(3, seed=number), batch(2, seed=10 + number)):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = step(half, scale=0.5) if guarded else model(**half).loss
                    if not guarded:
                        (loss * 0.5).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        assert hooks_of(model, optimizer) == hooks
        return values(model), torch.get_rng_state(), loss.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = run(False)
        capsys.readouterr()
        watched = run(True)
    assert same(watched[0], plain[0]) and torch.equal(watched[1], plain[1]) and torch.equal(watched[2], plain[2])
    assert "guard" not in capsys.readouterr().err


# ---- Trainer


def data(count=16, length=14):
    rows = []
    for number in range(count):
        row = batch(2, length, seed=100 + number)
        size = int(row["attention_mask"][0].sum()) - number % 5
        rows.append({"input_ids": row["input_ids"][0, :size].tolist(), "labels": row["labels"][0, :size].tolist()})
    return rows


class Notes(transformers.TrainerCallback):
    """Gradients, learning rates and random states at each step."""

    def __init__(self):
        self.gradients, self.rates, self.states = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(gradients(model))

    def on_optimizer_step(self, args, state, control, lr_scheduler, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr())
        self.states.append(torch.get_rng_state())


def trainer_of(model, folder, callbacks=(), rows=None, cls=Trainer, accumulation=2, **arguments):
    given = {"max_steps": 3, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    given |= {"per_device_train_batch_size": 4, "use_cpu": True, "max_grad_norm": 0.0, "learning_rate": 1e-3}
    given |= {"gradient_accumulation_steps": accumulation, "dataloader_pin_memory": False} | arguments
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **given),
        train_dataset=rows or data(),
        data_collator=Collator(0),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(("where", "lean"), [("forward", True), ("backward", False)])
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_trainer_in_parts(method, lean, where, tmp_path, capsys):
    """Accumulation, `num_items_in_batch`; the steps, rates, random states and gradients of a run with room enough."""
    notes = Notes(), Notes()
    torch.manual_seed(0)
    trainer_of(made(method, lean), tmp_path, [notes[0]]).train()
    model = made(method, lean)
    trainer = guard(trainer_of(model, tmp_path, [notes[1]]))
    capsys.readouterr()
    with room_for(model, 2, where) as failures:
        trainer.train()
    assert failures == [4] or failures == [4, 4], failures  # a smaller size may fail once more
    assert trainer.state.global_step == 3 and notes[0].rates == notes[1].rates
    assert all(torch.equal(a, b) for a, b in zip(notes[0].states, notes[1].states, strict=True))
    assert distance(notes[1].gradients[0], notes[0].gradients[0]) < 1e-5
    assert distance(notes[1].gradients[2], notes[0].gradients[2]) < 1e-2  # after steps of Adam, which divides by noise
    assert "using 2 x 2 from here; effective batch still 4" in capsys.readouterr().err


def test_trainer_in_parts_without_a_count(tmp_path):
    """A classifier takes no `num_items_in_batch`: its micro-batches are means, divided by their number."""
    rows = [{"input_ids": row["input_ids"], "labels": number % 3} for number, row in enumerate(data())]
    notes = Notes(), Notes()
    for note in notes:
        torch.manual_seed(0)
        model = made(architecture="bert")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = guard(trainer_of(model, tmp_path, [note], rows, max_steps=1))
        with room_for(model, 3 if note is notes[1] else 99, path="bert.encoder.layer.0"):
            trainer.train()
    assert distance(notes[1].gradients[0], notes[0].gradients[0]) < 1e-5


def test_trainer_with_label_smoothing_in_parts(tmp_path):
    notes = Notes(), Notes()
    for note in notes:
        model = made(lean=False)
        trainer = guard(trainer_of(model, tmp_path, [note], max_steps=1, label_smoothing_factor=0.1))
        with room_for(model, 2 if note is notes[1] else 99):
            trainer.train()
    assert distance(notes[1].gradients[0], notes[0].gradients[0]) < 1e-5


@pytest.mark.parametrize("form", ["guard(trainer)", "callback"])
def test_trainer_is_the_same(form, tmp_path, capsys):
    def run(guarded):
        torch.manual_seed(0)
        model = made(dropout=0.1)
        callbacks = [guard()] if guarded and form == "callback" else []
        trainer = trainer_of(model, tmp_path, callbacks, max_grad_norm=1.0)
        if guarded and form != "callback":
            assert guard(trainer) is trainer
        trainer.train()
        assert hooks_of(model, trainer.optimizer.optimizer)[1:] == (0, 0)
        assert "lora_kit" not in trainer.optimizer.step.__code__.co_filename
        assert "compute_loss" not in vars(trainer)
        return values(model), [log["loss"] for log in trainer.state.log_history if "loss" in log]

    plain, watched = run(False), run(True)
    assert same(watched[0], plain[0]) and watched[1] == plain[1]


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT 0.18, of a base that was built here
@pytest.mark.parametrize(("form", "clip"), [("guard(trainer)", 1.0), ("callback", 1.0), ("callback", 0.0)])
def test_trainer_stops_at_the_step(form, clip, tmp_path):
    model, switch, kept = made(), [], []

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                switch.append(1)
                kept.append(values(model))

    callbacks = [Break()] + [guard()] * (form == "callback")
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 10, "max_grad_norm": clip}
    trainer = trainer_of(model, tmp_path, callbacks, **arguments)
    trainer = guard(trainer) if form != "callback" else trainer
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with broken(model, switch), pytest.raises(NonFiniteError) as error:
        trainer.train()
    said = str(error.value)
    assert said.startswith("step 3: loss is nan; first output that is not finite: model.layers.1.mlp (input max ")
    assert f"last checkpoint: {tmp_path / 'checkpoint-2'}" in said and trainer.state.global_step == 2
    assert same(values(model), kept[0])
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert hooks_of(model, trainer.optimizer.optimizer)[1:] == (0, 0)


@pytest.mark.parametrize("form", ["guard(trainer)", "callback"])
def test_trainer_names_a_gradient(form, tmp_path):
    model = made("full", lean=False)
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer = trainer_of(model, tmp_path, [guard()] if form == "callback" else [], max_grad_norm=1.0)
    wanted = "cannot be told after clipping" if form == "callback" else "1 of .* are not; .*layers.1.mlp.down_proj"
    with pytest.raises(NonFiniteError, match=f"step 1: loss is .*, finite, but .*{wanted}"):
        (trainer if form == "callback" else guard(trainer)).train()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("form", ["guard(trainer)", "callback"])
def test_trainer_without_labels(form, accumulation, tmp_path, capsys):
    """One micro-batch of four without any label: no part of a step's loss, and never a loss of 0."""
    rows = data(4 * 4)
    for row in rows[4:8]:
        row["labels"] = [-100] * len(row["labels"])

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)

    model = made()
    arguments = {"max_steps": 4 // accumulation, "cls": InOrder, "accumulation": accumulation}
    trainer = trainer_of(model, tmp_path, [guard()] if form == "callback" else [], rows, **arguments)
    trainer = trainer if form == "callback" else guard(trainer)
    trainer.train()
    assert trainer.state.global_step == 4 // accumulation
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(loss == loss for loss in losses)
    if form != "callback":
        assert "micro-batch 2 has no labelled token: skipped (1 so far)" in capsys.readouterr().err
        # one step alone in its log line: Trainer shows the mean of no step, which is 0, but adds nothing to the total
        assert losses[0] > 1


def test_trainer_of_states_that_break_off(tmp_path, monkeypatch):
    model = made()
    trainer = guard(trainer_of(model, tmp_path, optim="adamw_torch_fused"))

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError(SHORT)

    monkeypatch.setattr(torch, "_fused_adamw_", short)
    with pytest.raises(OutOfMemoryError, match="some weights may be updated"):
        trainer.train()
    assert hooks_of(model, trainer.optimizer.optimizer)[1:] == (0, 0)


def test_trainer_of_states_that_never_fit(tmp_path, monkeypatch):
    model = made()
    trainer, before = guard(trainer_of(model, tmp_path)), values(model)
    short_of_states(None, monkeypatch, 2)
    with pytest.raises(OutOfMemoryError, match="the optimizer's states take"):
        trainer.train()
    assert same(values(model), before) and hooks_of(model, trainer.optimizer.optimizer)[1:] == (0, 0)


def test_trainer_makes_states_again(tmp_path, monkeypatch):
    runs = []
    for short in (False, True):
        model = made()
        torch.manual_seed(0)
        trainer = guard(trainer_of(model, tmp_path, max_steps=2))
        with monkeypatch.context() as patch:
            failed = short_of_states(None, patch, 1) if short else []
            trainer.train()
        runs.append(values(model))
    assert failed and same(*runs)


def test_trainer_with_a_loss_of_its_own_is_not_split(tmp_path):
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    model = made()
    with (
        room_for(model, 2),
        pytest.raises(OutOfMemoryError, match=r"is not split \(Own has a compute_loss of its own\)"),
    ):
        guard(trainer_of(model, tmp_path, cls=Own)).train()


def test_sft_trainer_in_parts(tmp_path):
    trl = pytest.importorskip("trl")
    fields = trl.SFTConfig.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    notes, found = (Notes(), Notes()), []
    for note in notes:
        torch.manual_seed(0)
        model = made()
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                **{checkpointing: False},
                bf16=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                max_grad_norm=0.0,
            ),
            train_dataset=datasets.Dataset.from_list(data()),
            data_collator=Collator(0),
            processing_class=tiny.tokenizer(),
            callbacks=[note],
        )
        with room_for(model, 2 if note is notes[1] else 99) as failures:
            guard(trainer).train()
        found.append(len(failures))
    assert found[0] == 0 and found[1] > 0
    assert distance(notes[1].gradients[0], notes[0].gradients[0]) < 1e-5


# ---- what is worth a line


def moved_nowhere(model, steps, run):
    """Share of the entries whose gradient was not zero and that ended where they began."""
    before = values(model)
    seen = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in before.items()}

    def note():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[name] |= parameter.grad != 0

    run(note)
    still = sum(((values(model)[n] == v) & seen[n]).sum().item() for n, v in before.items())
    return still / sum(s.sum().item() for s in seen.values())


def bf16_loop(model, optimizer, steps=20, guarded=True):
    def run(note):
        with guard(model, optimizer) if guarded else contextlib.nullcontext() as step:
            for number in range(steps):
                step(tiny.batch("llama", seed=number))
                note()
                optimizer.step()
                optimizer.zero_grad()

    return moved_nowhere(model, steps, run)


def test_full_fine_tuning_of_bfloat16_moves_the_weights(capsys, tmp_path):
    """At 1e-5, 20 steps: as transformers does it most updates are lost, as adapt does it less than one in a hundred."""
    plain = adapt(tiny.build("llama", dtype=torch.bfloat16), "full", weights="keep")
    lost = bf16_loop(plain, adamw(plain, 1e-5))
    assert lost > 0.6
    said = capsys.readouterr().err
    assert re.search(
        r"\d\d % of the updates are lost to rounding \(lr 1e-05 in bfloat16\): adapt\(model, .full.\)", said
    )

    model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full")
    assert bf16_loop(model, adamw(model, 1e-5)) < 0.01
    assert "lost to rounding" not in capsys.readouterr().err

    model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full")
    arguments = {"max_steps": 20, **training_defaults(model), "learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    seen = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}

    class Seen(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for name, parameter in model.named_parameters():
                seen[name] |= parameter.grad != 0

    before = values(model)
    trainer = guard(trainer_of(model, tmp_path, [Seen()], accumulation=1, **arguments))
    trainer.train()
    still = sum(((p == before[n]) & seen[n]).sum().item() for n, p in model.named_parameters())
    assert still / sum(s.sum().item() for s in seen.values()) < 0.01


def test_rounding_is_said_at_the_end_of_a_short_run(capsys):
    model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full", weights="keep")
    bf16_loop(model, adamw(model, 1e-5), steps=3)
    assert capsys.readouterr().err.count("lost to rounding") == 1


def test_learning_rate_far_off(capsys):
    model = made()
    own = param_groups(model)[0]["lr"]
    for rate, words in ((own / 10, "10 times below"), (own * 7, "7 times above"), (own * 3, None)):
        optimizer = adamw(model, rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # warm-up from zero
        capsys.readouterr()
        with guard(model, optimizer) as step:
            for _ in range(2):
                step(batch())
                optimizer.step()
                scheduler.step()
        said = capsys.readouterr().err
        assert (words in said and f"{own:g}, lora's own" in said) if words else "learning rate" not in said


def test_plan_against_measurement(capsys, tmp_path):
    found = plan(models.build("llama").config, "lora", rank=5, batch_size=3, seq_len=32, device="cpu", clip=None)
    ids = torch.randint(2, models.WORDS, (3, 32))
    model = made()
    optimizer = adamw(model, fused=True)
    with guard(model, optimizer, plan=found) as step:
        for _ in range(4):
            step({"input_ids": ids, "labels": ids})
            optimizer.step()
            optimizer.zero_grad()
    said = re.findall(r"planned ([\d.]+) MiB, measured ([\d.]+) MiB: [+-]([\d.]+) %", capsys.readouterr().err)
    assert len(said) == 1 and float(said[0][2]) < 5
    trainer = trainer_of(made(), tmp_path, accumulation=1, max_steps=4)
    guard(trainer, plan=found).train()
    assert len(re.findall("planned .* measured", capsys.readouterr().err)) == 1


# ---- stochastic rounding


def test_rounding_is_unbiased():
    torch.manual_seed(0)
    x = torch.randn(500) * torch.logspace(-6, 6, 500)
    mean = sum(stochastic_round(x).double() for _ in range(4000)) / 4000
    step = x.abs() * 2**-7
    assert ((mean - x).abs() / step).max() < 0.05  # 5 standard errors of a coin
    assert ((x.bfloat16().double() - x).abs() / step).max() > 0.2
    both = torch.stack([stochastic_round(x).float() for _ in range(50)])
    assert all(len(both[:, i].unique()) <= 2 for i in range(500))
    torch.manual_seed(1)
    first = stochastic_round(x)
    torch.manual_seed(1)
    assert torch.equal(first, stochastic_round(x))
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf")])
    assert torch.equal(stochastic_round(exact).float(), exact)
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(nan).isnan().all()
    with pytest.raises(TypeError, match="float32"):
        stochastic_round(x.double())


def test_stochastic_updates_arrive():
    """What the weights moved is what float32 arithmetic on the same gradients would have moved them, within 1 %."""
    model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full", weights="stochastic")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before = {n: v.float() for n, v in values(model).items()}
    shadow = {n: torch.nn.Parameter(v.clone()) for n, v in before.items()}
    optimizer = AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    exact = torch.optim.AdamW(shadow.values(), lr=1e-5, weight_decay=0.0)
    torch.manual_seed(0)
    with guard(model, optimizer) as step:
        for number in range(20):
            step(tiny.batch("llama", rows=8, length=30, seed=number))
            for name, parameter in model.named_parameters():
                shadow[name].grad = parameter.grad.float()
            optimizer.step()
            exact.step()
            optimizer.zero_grad()
    wanted = torch.cat([(shadow[n].detach() - v).flatten() for n, v in before.items()])
    found = torch.cat([(values(model)[n].float() - v).flatten() for n, v in before.items()])
    assert abs((found @ wanted / (wanted @ wanted)).item() - 1) < 0.01


def test_stochastic_training_keeps_up_with_float32(capsys):
    """80 steps at 2e-4: where plain bfloat16 stays behind, stochastic rounding ends where float32 does."""
    ends = {}
    for weights in ("float32", "stochastic", "keep"):
        model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full", weights=weights)
        kind = AdamW if weights == "stochastic" else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=2e-4)
        torch.manual_seed(0)
        with guard(model, optimizer) as step:
            for _ in range(80):
                loss = step(tiny.batch("llama"))
                optimizer.step()
                optimizer.zero_grad()
        ends[weights] = loss.item()
    said = capsys.readouterr().err
    assert said.count("lost to rounding") == 1  # the plain one
    assert abs(ends["stochastic"] - ends["float32"]) < 0.05
    assert ends["keep"] > ends["float32"] + 0.3


def test_stochastic_optimizer():
    """8 bytes a parameter; float32 tensors are torch's, bit by bit; large and transposed tensors; what it declines."""
    weight = torch.nn.Parameter(torch.randn(50, 7).bfloat16())
    other = torch.nn.Parameter(torch.randn(6))
    plain = torch.nn.Parameter(other.detach().clone())
    optimizer, torchs = AdamW([weight, other], lr=1e-2), torch.optim.AdamW([plain], lr=1e-2)
    for _ in range(3):
        weight.grad, other.grad = torch.ones_like(weight), torch.arange(6.0)
        plain.grad = torch.arange(6.0)
        optimizer.step()
        torchs.step()
    assert torch.equal(other, plain)
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16 and state["step"] == 3
    again = AdamW([weight, other], lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    turned = torch.nn.Parameter(torch.ones(40, 30).bfloat16().t())
    turned.grad = torch.ones_like(turned)
    AdamW([turned], lr=0.125, weight_decay=0.0).step()
    assert turned.detach().float().mean().item() == pytest.approx(0.875, abs=1e-3)
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW([weight], amsgrad=True)


def test_the_second_moment_is_not_frozen():
    """Each step takes a thousandth of it away, less than rounding to the nearest would notice."""
    weight = torch.nn.Parameter(torch.ones(500).bfloat16())
    optimizer = AdamW([weight], lr=1e-3)
    torch.manual_seed(0)
    for number in range(700):
        weight.grad = torch.full_like(weight, 30.0 if number == 0 else 0.0)
        optimizer.step()
    wanted = 0.001 * 30.0**2 * 0.999**699
    assert optimizer.state[weight]["exp_avg_sq"].float().mean().item() == pytest.approx(wanted, rel=0.02)


def test_stochastic_pieces(monkeypatch):
    """A tensor that is updated in pieces moves as one that is not, on average."""
    from lora_kit.lean import optimizer as module

    means = []
    for piece in (2**22, 1000):
        monkeypatch.setattr(module, "PIECE", piece)
        weight = torch.nn.Parameter(torch.ones(100, 101).bfloat16())
        torch.manual_seed(0)
        optimizer = AdamW([weight], lr=1e-3, weight_decay=0.0)
        for _ in range(5):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        means.append(weight.detach().float().mean().item())
    assert means == pytest.approx([0.995, 0.995], abs=1e-4)


def test_stochastic_weights_in_plans_and_reports(capsys, tmp_path):
    config = tiny.build("llama").config
    stochastic = plan(config, "full", weights="stochastic", dtype="bfloat16", seq_len=4, device="cpu")
    whole = plan(config, "full", dtype="bfloat16", seq_len=4, device="cpu")
    assert stochastic.settings["optimizer"] == "adamw_stochastic" and stochastic.peak < whole.peak
    from lora_kit.memory.check import check

    assert abs(check(stochastic).error) < 0.02
    capsys.readouterr()
    model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full", weights="stochastic")
    said = capsys.readouterr().err
    assert "in bfloat16, updates rounded stochastically; needs lora_kit.lean.optimizer.AdamW (weights, " in said
    assert training_defaults(model)["bf16"] is False
    loaded = load(saving.save(model, tmp_path / "m"), train=True)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with pytest.raises(UnsupportedError, match="stochastic' is for bfloat16 weights, this model's are float16"):
        adapt(tiny.build("llama", dtype=torch.float16), "full", weights="stochastic")
    with pytest.raises(OptionError, match="'float32', 'stochastic' or 'keep', got 'nearest'"):
        adapt(tiny.build("llama"), "full", weights="nearest")


# ---- misuse


def test_wrong_arguments(tmp_path):
    model = made()
    optimizer = adamw(model)
    forms = r"guard\(trainer\).*callbacks=\[guard\(\)\].*with guard\(model, optimizer\) as step"
    for wrong in ((model,), (optimizer, model), (1, 2, 3), ("trainer",)):
        with pytest.raises(OptionError, match=forms):
            guard(*wrong)
    with pytest.raises(OptionError, match=r"plan must be what plan\(model, ...\) returns, got a dict"):
        guard(model, optimizer, plan={})
    with pytest.raises(OptionError, match="split must be True or False"):
        guard(model, optimizer, split=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="output must be the path of a folder"):
        guard(model, optimizer, output=tmp_path / "file")
    with pytest.raises(OptionError, match="scaler= is for a loop"):
        guard(scaler=1)
    with pytest.raises(OptionError, match="the optimizer holds none of this model's"):
        guard(model, adamw(made()))
    with pytest.raises(OptionError, match="the plan is for cuda, the model is on cpu"):
        guard(model, optimizer, plan=plan(models.build("llama").config, "lora", seq_len=8))
    with pytest.raises(OptionError, match="is a context"):
        guard(model, optimizer)(batch())
    with guard(model, optimizer) as step:
        with pytest.raises(OptionError, match="takes a batch as a dictionary, got a list"):
            step([1])
        with pytest.raises(OptionError, match="the model returned no loss"):
            step({"input_ids": batch()["input_ids"]})
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(NothingToTrainError):
        guard(model, optimizer)
    trainer = guard(trainer_of(made(), tmp_path))
    with pytest.raises(OptionError, match="guarded already"):
        guard(trainer)


@pytest.mark.filterwarnings("ignore:_check_is_size")  # bitsandbytes 0.48 beside torch 2.13
def test_models_that_cannot_learn():
    """A quantized base without an adapter, and float16 weights under a scaler."""
    from lora_kit import quantization

    model = tiny.build("llama", dtype=torch.bfloat16)
    quantization.quantize_(model, quantization.resolve("4bit"), [])
    rest = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(UnsupportedError, match="the base is in 4bit: its matrices hold integers"):
        guard(model, torch.optim.AdamW(rest))
    half = adapt(tiny.build("llama", dtype=torch.float16), "full", weights="keep")
    with pytest.raises(UnsupportedError, match=r"under a GradScaler: 'model.embed"):
        guard(half, torch.optim.AdamW(half.parameters()), scaler=torch.amp.GradScaler("cpu"))


def test_a_state_that_cannot_be_saved_is_said(monkeypatch, tmp_path):
    def refuse(*args):
        raise StorageError("the disk is full")

    monkeypatch.setattr(saving, "save", refuse)
    model = made()
    optimizer = adamw(model)
    with broken(model, [1]), guard(model, optimizer, output=tmp_path) as step:
        step(batch())
        with pytest.raises(NonFiniteError, match="saving them failed: the disk is full"):
            optimizer.step()


def test_accelerate():
    """accelerate's wrapped optimizer is looked through; its accumulation is the loop's own `scale` here."""
    accelerate = pytest.importorskip("accelerate")
    model = made()
    optimizer = adamw(model)
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    before = values(model)
    with room_for(model, 3), guard(prepared, wrapped) as step:
        step(batch())
        wrapped.step()
        wrapped.zero_grad()
    assert not same(values(model), before)
    switch = [1]
    with broken(model, switch), guard(prepared, wrapped) as step:
        step(batch())
        with pytest.raises(NonFiniteError, match="step 1"):
            wrapped.step()
