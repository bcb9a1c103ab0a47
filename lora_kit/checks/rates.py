"""The optimizer: whether it holds what is trained, at which learning rate, and whether the updates survive rounding."""

from typing import Any

from lora_kit.adaptation import base_of
from lora_kit.checks.report import Check, failed, number, passed, share, skipped, warned
from lora_kit.checks.subject import Subject
from lora_kit.errors import listing
from lora_kit.methods import Native

FAR = 5.05
"""Times off the method's own learning rate from which on it is worth a word; a head at its adapter's rate is 5 off."""
WRONG = 100.0
SAMPLES = 100_000
"""How many weights, in all, the arithmetic of an update is tried on."""


def of_optimizer(subject: Subject) -> list[Check]:
    return [held(subject), learning_rate(subject), precision(subject)]


def held(subject: Subject) -> Check:
    """Every trained tensor is in the optimizer; one that was built before `adapt` holds others."""
    name = "optimizer"
    if subject.optimizer is None:
        return skipped(name, "none was given: verify(model, batch, optimizer=optimizer)")
    inside = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
    missing = [path for path, p in subject.trained.items() if id(p) not in inside]
    if missing:
        return failed(
            name,
            f"{len(missing)} of {len(subject.trained)} trained tensors are not in it ({listing(missing, 1)})"
            + (": it was built for another model, or before adapt()" if len(missing) == len(subject.trained) else ""),
            "optimizer = torch.optim.AdamW(param_groups(model))",
        )
    idle = len(inside) - len(subject.trained)
    return passed(
        name, f"holds all {len(inside) - idle} trained tensors" + (f", and {idle} frozen ones" if idle else "")
    )


def learning_rate(subject: Subject) -> Check:
    """The learning rate against the method's own for a model of this size."""
    name = "learning rate"
    pairs = _rates(subject)
    if pairs is None:
        return skipped(name, "none was given: verify(model, batch, optimizer=optimizer), or lr=1e-4")
    if subject.optimizer is not None and "adam" not in type(subject.optimizer).__name__.lower():
        return skipped(name, f"{type(subject.optimizer).__name__}; what is known are rates of Adam's kind")
    if any(rate == 0 for rate, _ in pairs):
        return failed(
            name, f"a learning rate of 0 for {sum(r == 0 for r, _ in pairs)} of {len(pairs)} groups", _groups(subject)
        )
    if subject.method is Native:
        return skipped(name, f"no rate of its own is known for {type(subject.config).__name__}")
    rate, own = max(pairs, key=lambda pair: _off(*pair))
    times = _off(rate, own)
    found = f"{number(rate)}, the method's own here is {number(own)}"
    if times > FAR:
        found += f": {times:.0f} times {'more' if rate > own else 'less'}"
        return (failed if times >= WRONG else warned)(name, found, _groups(subject))
    return passed(name, found)


def _groups(subject: Subject) -> str:
    return "optimizer = torch.optim.AdamW(param_groups(model))"


def _off(rate: float, own: float) -> float:
    return max(rate / own, own / rate) if rate and own else float("inf")


def _rates(subject: Subject) -> list[tuple[float, float]] | None:
    """(learning rate, the method's own) for each group that trains something; None where nothing was given."""
    record, method = subject.record, subject.method
    own = {
        kind: method.learning_rate(record.parameters, record.task, head=kind == "head") for kind in ("adapter", "head")
    }
    own["B"] = own["adapter"] * float(record.options.get("lora_plus", 1.0))
    if subject.lr is not None:
        return [(float(subject.lr), own["adapter"])]
    if subject.optimizer is None:
        return None
    kinds = _kinds(subject)
    pairs = []
    for group in subject.optimizer.param_groups:
        here = {kinds[id(p)] for p in group["params"] if id(p) in kinds}
        # a schedule that rises from zero has set the rate to zero, and noted where it goes
        rate = float(group.get("initial_lr", group["lr"]))
        if here:
            pairs.append((rate, min((own[kind] for kind in here), key=lambda value: _off(rate, value))))
    return pairs or None


def _kinds(subject: Subject) -> dict[int, str]:
    base = base_of(subject.model)
    found = {id(p): "B" if ".lora_B." in path else "adapter" for path, p in subject.trained.items()}
    for path in subject.record.heads:
        found |= {id(p): "head" for p in base.get_submodule(path).parameters() if id(p) in found}
    return found


def precision(subject: Subject) -> Check:
    """Trained in a dtype in which the optimizer's updates survive."""
    import torch

    name = "precision"
    by_dtype: dict[torch.dtype, list[str]] = {}
    for path, p in subject.trained.items():
        by_dtype.setdefault(p.dtype, []).append(path)
    remedy = (
        "for p in model.parameters(): if p.requires_grad: p.data = p.data.float()"
        if subject.adapted
        else 'adapt(model, "full"), which trains float32 weights'
    )
    half = by_dtype.get(torch.float16, [])
    if half:
        return failed(
            name,
            f"{len(half)} of {len(subject.trained)} trained tensors are float16 ({listing(half, 1)}): a GradScaler "
            "refuses them, and without one small gradients are zero",
            remedy,
        )
    short = by_dtype.get(torch.bfloat16, [])
    if not short:
        kinds = listing(str(dtype).removeprefix("torch.") for dtype in by_dtype)
        return passed(name, f"all {len(subject.trained)} trained tensors are {kinds or 'none'}")
    rates = _rate_of_each(subject)
    lost, tried = _lost([(subject.trained[path], rates[path]) for path in short])
    rate = max(rates[path] for path in short)
    found = (
        f"{share(lost / max(tried, 1))} of the first updates are lost to rounding: {len(short)} trained tensors are "
        f"bfloat16, learning rate {number(rate)}"
    )
    if lost > 0.01 * tried:
        return (failed if lost > 0.5 * tried else warned)(name, found, remedy)
    return passed(name, found)


def _rate_of_each(subject: Subject) -> dict[str, float]:
    """Learning rate of every trained tensor: the optimizer's, the one given, or the method's own."""
    record = subject.record
    own = subject.lr or subject.method.learning_rate(record.parameters, record.task)
    groups = subject.optimizer.param_groups if subject.optimizer is not None else []
    given = {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    return {path: given.get(id(p), own) for path, p in subject.trained.items()}


def _lost(tensors: "list[tuple[Any, float]]") -> tuple[int, int]:
    """(updates that round away, updates tried): Adam's first step is about the learning rate, up or down."""
    import torch

    lost = tried = 0
    total = sum(tensor.numel() for tensor, _ in tensors)
    stride = max(1, total // SAMPLES)
    for tensor, rate in tensors:
        weights = tensor.detach().reshape(-1)[::stride]
        signs = torch.ones_like(weights, dtype=torch.float32)
        signs[1::2] = -1
        moved = (weights.float() + rate * signs).to(weights.dtype)
        lost += int((moved == weights).sum())
        tried += weights.numel()
    return lost, tried
