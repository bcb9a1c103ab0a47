"""A few forwards and one backward on the batch: what the model answers, what gets a gradient, where the loss goes."""

import math
from typing import Any

from lora_kit.checks.report import Check, failed, number, passed, skipped, warned
from lora_kit.checks.running import answer, as_in_training, given, loss_of
from lora_kit.checks.start import padding_side, start
from lora_kit.checks.subject import Subject
from lora_kit.checks.untouched import kept
from lora_kit.errors import listing

NAMES = ("forward", "start", "padding side", "gradients", "loss")
NUDGE = 0.01
"""Spread of what stands in for tensors that are zero: LoRA's A has no gradient as long as B is zero."""
MOVED = 2**30
"""Bytes of trained tensors that are moved along the gradient, at most: a copy of them is kept meanwhile."""
ALIKE = 3.0
"""How far the loss may move from what the gradient says, either way: rounding and curvature are in it too."""
FLOAT16_SCALE = 1024.0
"""As a GradScaler would: what is smaller than 6e-8 is zero in float16."""


def of_passes(subject: Subject) -> list[Check]:
    """The checks that run the model. What it raises is a failed check, and the others are skipped."""
    import torch

    done: list[Check] = []
    try:
        with as_in_training(subject):
            loss = loss_of(answer(subject, subject.batch))
            if loss is None:
                return _cut_short(done, _without_loss(subject))
            value = float(loss.detach())
            del loss
            done.append(passed("forward", f"{given(subject.batch)} → loss {number(value)}"))
            done.append(start(subject))
            done.append(padding_side(subject))
            if not math.isfinite(value):
                return _cut_short(done, _not_finite(subject, value))
            done += _gradients_and_loss(subject, value)
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        return _cut_short(
            done[:0],
            failed(
                "forward",
                f"out of memory: {first}; given: {given(subject.batch)}",
                f'print(plan(base, "{subject.record.method}")), or rows = batch_size // 2 with twice the accumulation',
            ),
        )
    except Exception as error:  # whatever a model raises that does not like its batch
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        return _cut_short(
            done[:0],
            failed(
                "forward",
                f"{type(error).__name__}: {lines[-1].strip()[:300]}; given: {given(subject.batch)}",
                _about_arguments(subject),
            ),
        )
    return done


def _gradients_and_loss(subject: Subject, value: float) -> list[Check]:
    """Both checks, from one backward pass."""
    import torch

    trained = subject.trained
    if not trained:
        return _cut_short([], skipped("gradients", "nothing is trained"))
    zeros = [p for p in trained.values() if not bool(p.detach().any())]
    sixteen = any(p.dtype == torch.float16 for p in subject.model.parameters())
    with kept(zeros):
        draw = torch.Generator(device=next(iter(trained.values())).device).manual_seed(0)
        with torch.no_grad():
            for p in zeros:
                noise = (
                    torch.randn(p.shape, generator=draw, device=p.device)
                    if p.device == draw.device
                    else torch.ones_like(p)
                )
                p.copy_(NUDGE * noise)
        scale = FLOAT16_SCALE if sixteen else 1.0
        loss = loss_of(answer(subject, subject.batch))
        if loss is None or not loss.requires_grad:
            return _cut_short([], _no_gradient(subject))
        (loss * scale).backward()
        del loss
        found = gradients(subject, scale)
        if found.status == "failed":
            return _cut_short([], found)
        return [found, _along(subject, value)]


def gradients(subject: Subject, scale: float) -> Check:
    """Every trained tensor that the forward uses has a gradient, finite and not zero; what is in `.grad`."""
    name, trained = "gradients", subject.trained
    bad, none, zero = [], [], []
    for path, p in trained.items():
        if p.grad is None:
            none.append(path)
            continue
        if scale != 1:
            p.grad /= scale
        if not bool(p.grad.isfinite().all()):
            bad.append(path)
        elif not bool(p.grad.any()):
            zero.append(path)
    if bad:
        return failed(
            name,
            f"{len(bad)} of {len(trained)} gradients are NaN or infinite, the first that of {bad[0]}",
            'adapt(path, dtype="bfloat16"), or another batch: verify(model, next(batches))',
        )
    idle = [*none, *zero]
    if not idle:
        return passed(name, f"{len(trained)} of {len(trained)} trained tensors have one")
    if len(none) == len(trained) or (none and _checkpoints(subject)):
        return _no_gradient(subject, len(none))
    if len(idle) == len(trained):
        return failed(
            name,
            f"all {len(trained)} gradients are exactly zero: the loss does not depend on what is trained",
            "model = adapt(base), and see what the forward detaches or multiplies by zero",
        )
    return warned(
        name,
        f"{len(idle)} of {len(trained)} trained tensors were not reached by this batch ({len(none)} without a "
        f"gradient, {len(zero)} with zero), such as {idle[0]}",
        "adapt(base, target_modules=...) without them, if no batch ever does: verify(model, another_batch)",
    )


def _no_gradient(subject: Subject, none: int | None = None) -> Check:
    count = len(subject.trained) if none is None else none
    if _checkpoints(subject):
        return failed(
            "gradients",
            f"{count} of {len(subject.trained)} trained tensors get no gradient: checkpointing passes none on from "
            "embeddings that are frozen",
            'model.enable_input_require_grads(), or gradient_checkpointing_kwargs={"use_reentrant": False}',
        )
    return failed(
        "gradients",
        f"{count} of {len(subject.trained)} trained tensors get no gradient from this loss",
        "model = adapt(base): the forward runs under no_grad or detaches, or goes around the adapters",
    )


def _checkpoints(subject: Subject) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in subject.model.modules())


def _along(subject: Subject, value: float) -> Check:
    """The loss falls when what is trained moves a little against the gradient.

    Measured on both sides of where the weights are, so that neither curvature nor dropout, which is drawn the same way
    each time, has a part in it.
    """
    import torch

    chosen: list[torch.nn.Parameter] = []
    room = MOVED
    for p in sorted((p for p in subject.trained.values() if p.grad is not None), key=lambda p: p.numel()):
        room -= p.numel() * p.element_size()
        if room < 0 and chosen:
            break
        chosen.append(p)
    pull: dict[int, Any] = {id(p): p.grad for p in chosen}
    for p in subject.trained.values():
        p.grad = None
    steepness = math.fsum(float(pull[id(p)].float().square().sum()) for p in chosen)
    size = math.sqrt(math.fsum(float(p.detach().float().square().sum()) for p in chosen))
    wanted = 0.05 * max(abs(value), 0.1)
    step = min(wanted / (2 * steepness), 0.05 * max(size, 1.0) / math.sqrt(steepness))
    seen = []
    for factor in (1.0, 0.1, 10.0):
        ahead, behind = (_loss_at(subject, chosen, pull, sign * factor * step) for sign in (1, -1))
        measured, predicted = (ahead[0] - behind[0]) / 2, (ahead[1] - behind[1]) / 2
        if predicted == 0:
            return skipped("loss", f"{number(value)}; steps small enough to tell are lost to rounding, see precision")
        if predicted / ALIKE < measured < ALIKE * predicted:
            said = f"{number(value)}; a step against the gradient lowers it by {number(measured)}"
            return passed("loss", f"{said}, predicted {number(predicted)}")
        seen.append((measured, predicted))
    if not any(measured for measured, _ in seen):
        return failed(
            "loss",
            f"stays at {number(value)} to the last bit wherever {len(chosen)} trained tensors move: "
            "it does not see them",
            "model = adapt(base)",
        )
    falls = any(measured > 0 for measured, _ in seen)
    steps = ", ".join(f"{number(measured)} instead of {number(predicted)}" for measured, predicted in seen)
    return (warned if falls else failed)(
        "loss",
        f"{number(value)}; steps against the gradient lower it by {steps}: the gradient is not the loss's",
        "lora_kit.lean.switch.disable(model), and verify(model, batch) again",
    )


def _loss_at(subject: Subject, chosen: list[Any], pull: dict[int, Any], step: float) -> tuple[float, float]:
    """(the loss `step` times the gradient further on, what the gradient says of the way that was really gone)."""
    import torch

    way = 0.0
    with kept(chosen):
        with torch.no_grad():
            for p in chosen:
                before = p.detach().to(torch.float32, copy=True)
                p.copy_(before + step * pull[id(p)].float())
                way += float(((p.detach().float() - before) * pull[id(p)].float()).sum())
        loss = loss_of(answer(subject, subject.batch))
        return (float("nan") if loss is None else float(loss.detach())), way


def _without_loss(subject: Subject) -> Check:
    return failed(
        "forward",
        f"{type(subject.base).__name__} gave no loss; given: {given(subject.batch)}",
        'batch["labels"] = labels, by the name that the model has for them',
    )


def _not_finite(subject: Subject, value: float) -> Check:
    dtype = subject.record.base_dtype
    overflow = "; float16 overflows above 65504" if dtype == "float16" else ""
    return failed(
        "loss",
        f"the loss of this batch is {value} ({dtype} base){overflow}",
        'adapt(path, dtype="bfloat16")'
        if overflow
        else "model = adapt(path), from files that are whole, or another batch: verify(model, next(batches))",
    )


def _about_arguments(subject: Subject) -> str:
    import inspect

    takes = inspect.signature(subject.base.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    strange = [key for key in subject.batch if key not in takes]
    if strange and not open_ended:
        return f"batch.pop({strange[0]!r})"
    return f"model(**batch) must run: {type(subject.base).__name__} takes {listing(takes, 6)}"


def _cut_short(done: list[Check], last: Check) -> list[Check]:
    """These checks, the one that stops them, and the rest as skipped."""
    checks = [*done, last]
    names = {check.name for check in checks}
    first = NAMES.index(checks[0].name)
    return checks + [skipped(n, f"not run, see {last.name}") for n in NAMES[first:] if n not in names]
