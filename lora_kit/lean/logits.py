"""Logits that are computed when somebody reads them.

`Logits` is a tensor that knows the hidden states and the head it would come from. A loss needs no more than these:
where `torch.nn.functional.cross_entropy` meets one, `linear_cross_entropy` answers in its place, whatever the model's
own code did in between (a shift by one token, a scale, a cap, a cast, a flattening). Any other operation gets the
tensor itself, computed at that moment, with its gradient. So a model's forward stays as it is written, and so does its
user's code.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from lora_kit.lean.linear_loss import Head, linear_cross_entropy
from lora_kit.lean.waiting import answer, asks, read

_CASTS = {
    torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.to,
    torch.Tensor.type,
}  # fmt: skip
# done to each entry by itself: they can wait until the entries are there
_ENTRYWISE = _CASTS | {
    torch.Tensor.contiguous, torch.Tensor.mul, torch.Tensor.div, torch.Tensor.true_divide, torch.Tensor.__mul__,
    torch.Tensor.__rmul__, torch.Tensor.__truediv__, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__,
    torch.Tensor.sub, torch.Tensor.__sub__, torch.Tensor.tanh, torch.mul, torch.div, torch.true_divide, torch.add,
    torch.sub, torch.tanh, torch.Tensor.clamp, torch.clamp,
}  # fmt: skip
_SHAPED = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten}


class Step(NamedTuple):
    """Something done to each entry of the logits."""

    run: Callable[[Tensor], Tensor]
    cast: bool
    """Whether it changes the dtype alone."""


class Logits(torch.Tensor):
    """(..., vocabulary) logits that do not exist yet; computed by the first operation that needs their values."""

    hidden: Tensor
    head: Head
    steps: tuple[Step, ...]
    sample: Tensor
    """(0, vocabulary): what an operation does to it, it does to the logits, and it costs nothing."""
    raw: torch.dtype
    """What the head gives, before any step."""
    found: Tensor | None

    @staticmethod
    def of(hidden: Tensor, head: Head) -> "Logits":
        """The logits of `hidden` (..., hidden size)."""
        with torch.no_grad():
            sample = head.run(hidden.detach().reshape(-1, hidden.shape[-1])[:0])
        return _lazily(hidden, head, (), sample, sample.dtype)

    def values(self) -> Tensor:
        """The logits themselves, with their gradient where one is wanted."""
        if self.found is None or (torch.is_grad_enabled() and not self.found.requires_grad):
            self.found = _steps(self.head.run(self.hidden), self.steps)
        return self.found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if asks(func):
            return answer(func, args, kwargs)
        if func in (torch.Tensor.retain_grad, torch.Tensor.register_hook):
            return _on_gradient(func, args)
        first = args[0] if args else None
        if isinstance(first, Logits) and func is functional.cross_entropy:
            found = _cross_entropy(first, *args[1:], **kwargs)
            if found is not None:
                return found
        # what is done without a graph must not get one later
        waits = torch.is_grad_enabled()
        if isinstance(first, Logits) and waits:
            found = None
            if func in _SHAPED:
                found = _shaped(first, func, args[1:], kwargs)
            elif func is torch.Tensor.__getitem__:
                found = _rows(first, args[1])
            elif func in (torch.Tensor.detach, torch.detach):
                with torch.no_grad():
                    return first.values().detach()
            if found is not None:
                return found
        if func in _ENTRYWISE and waits:
            found = _entrywise(func, args, kwargs)
            if found is not None:
                return found
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    # torch's stubs declare it as a plain function, though it has to be a class method
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # what goes past Python's operators, such as another autograd function: here without a graph, which is
        # `_Reached`'s
        with torch.no_grad():
            return func(*_computed(args), **_computed(kwargs or {}))


class _Reached(Function):
    """Ties the logits that do not exist to the graph, so that code which never asks Python differentiates right."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, steps: tuple, dtype: torch.dtype, *parameters: Tensor) -> Logits:
        ctx.head, ctx.steps = head, steps
        ctx.save_for_backward(hidden, *parameters)
        made: Logits = torch.Tensor._make_wrapper_subclass(
            Logits, (*hidden.shape[:-1], head.vocabulary), dtype=dtype, device=hidden.device
        )
        made.found = None
        return made

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> tuple:
        hidden, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_(needed[0])
            values = _steps(ctx.head.run(leaf), ctx.steps)
        wanted = [leaf] * needed[0] + [p for p, need in zip(parameters, needed[4:], strict=True) if need]
        found = iter(torch.autograd.grad(values, wanted, change, allow_unused=True))
        return tuple(next(found) if need else None for need in needed)


def _lazily(hidden: Tensor, head: Head, steps: tuple[Step, ...], sample: Tensor, raw: torch.dtype) -> Logits:
    made: Logits = _Reached.apply(hidden, head, steps, sample.dtype, *head.parameters)
    made.hidden, made.head, made.steps, made.sample, made.raw, made.found = hidden, head, steps, sample, raw, None
    return made


def _steps(values: Tensor, steps: tuple[Step, ...]) -> Tensor:
    for step in steps:
        values = step.run(values)
    return values


def _computed(given: Any) -> Any:
    """The same arguments with logits that exist."""
    return read(given, Logits, Logits.values)


def _entrywise(func: Any, args: tuple, kwargs: dict) -> "Logits | None":
    """The operation, noted for later; None where it is not one that can wait."""
    everything = (*args, *kwargs.values())
    places = [i for i, value in enumerate(args) if isinstance(value, Logits)]
    if len(places) != 1 or any(isinstance(value, Logits) for value in kwargs.values()):
        return None
    place = places[0]
    logits: Logits = args[place]
    for value in everything:
        if torch.is_tensor(value) and value is not logits:
            wide = value.dim() > 0 and value.numel() == value.shape[-1] == logits.shape[-1]
            if value.requires_grad or not (value.numel() == 1 or wide):
                return None
            if value.dim() > 1:  # of shape (1, vocabulary): as good as (vocabulary,)
                args = tuple(v.reshape(-1) if v is value else v for v in args)

    def step(values: Tensor) -> Tensor:
        return func(*args[:place], values, *args[place + 1 :], **kwargs)

    if func is torch.Tensor.type and len(everything) < 2:
        return None  # asks for the type's name
    with torch.no_grad():
        sample = step(logits.sample)
    if not torch.is_tensor(sample) or sample.shape != logits.sample.shape or sample.device != logits.sample.device:
        return None
    if sample is logits.sample:
        return logits
    steps = (*logits.steps, Step(step, func in _CASTS))
    return _lazily(logits.hidden, logits.head, steps, sample, logits.raw)


def _shaped(logits: Logits, func: Any, args: tuple, kwargs: dict) -> "Logits | None":
    """Another shape of the rows; None where the vocabulary's dimension is touched."""
    if func in (torch.Tensor.flatten, torch.flatten):
        start = kwargs.get("start_dim", args[0] if args else 0) % logits.dim()
        end = kwargs.get("end_dim", args[1] if len(args) > 1 else -1) % logits.dim()
        if end == logits.dim() - 1:
            return None
        hidden = logits.hidden.flatten(start, end)
    else:
        given = kwargs.get("shape", args[0] if args and isinstance(args[0], list | tuple) else args)
        rows = logits.numel() // logits.shape[-1]
        if not given or isinstance(given, torch.dtype) or not all(isinstance(n, int) for n in given):
            return None
        last = logits.shape[-1]
        if given[-1] == -1:
            if math.prod(given[:-1]) != rows:
                return None
        elif given[-1] != last:
            return None
        hidden = logits.hidden.reshape(*given[:-1], logits.hidden.shape[-1])
    return _lazily(hidden, logits.head, logits.steps, logits.sample, logits.raw)


def _rows(logits: Logits, index: Any) -> "Logits | None":
    """Some of the rows; None where the index reaches into the vocabulary."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is None for part in parts):
        return None
    spans = sum(part.dim() if torch.is_tensor(part) and part.dtype == torch.bool else 1 for part in parts)
    reaches = spans >= logits.dim() or any(part is Ellipsis for part in parts)
    if reaches and not _everything(parts[-1]):
        return None
    # hidden states have as many dimensions, and all of the last one is taken
    return _lazily(logits.hidden[index], logits.head, logits.steps, logits.sample, logits.raw)


def _on_gradient(func: Any, args: tuple) -> Any:
    """The loss does not come by these logits, so that it leaves no gradient on them."""
    if str(getattr(args[-1], "__module__", "")).startswith("torch.distributed"):
        return answer(func, args, {})  # it asks to be told when the backward pass begins
    raise RuntimeError(
        f"{func.__name__} on the logits of a lean training step: its loss is computed from the hidden states, so no "
        "gradient of it reaches the logits. Switch the lean step off: lora_kit.lean.switch.disable(model)."
    )


def _everything(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _cross_entropy(
    logits: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The loss from the hidden states; None for what only whole logits can answer."""
    if logits.dim() != 2 or target.dim() != 1 or target.is_floating_point() or weight is not None:
        return None
    if logits.shape[0] != target.shape[0]:
        return None  # torch refuses it
    if size_average is not None or reduce is not None or (reduction == "none" and logits.head.parameters):
        return None
    steps, head = logits.steps, logits.head
    # a cast to float32 is what the loss does in any case
    widened = logits.sample.dtype == torch.promote_types(logits.raw, torch.float32)
    if steps and not (widened and all(step.cast for step in steps)):
        head = dataclasses.replace(head, post=lambda values: _steps(values, steps))
    return linear_cross_entropy(
        logits.hidden,
        head,
        target,
        ignore_index=ignore_index,
        reduction=reduction,  # type: ignore[arg-type]  # torch refuses other words where it is asked for them
        label_smoothing=label_smoothing,
        z_loss=head.z_loss,
    )
