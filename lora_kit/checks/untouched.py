"""A model that was run, nudged and asked for gradients, and afterwards is bit by bit what it was."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lora_kit import probe
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

CODES = 2**20
"""Integer buffers with more entries are taken for the codes of a quantized weight, which no forward changes."""


@contextmanager
def untouched(model: Model) -> Iterator[None]:
    """Put everything but the values of parameters back as it was: modes, flags, gradients, buffers, random states.

    Parameters are put back by who changes them (`kept`): a copy of the base is never made. Inside, there are no
    gradients, and hooks that run when one has been accumulated are away, because some of them step an optimizer.
    """
    with ExitStack() as stack:
        for keep in (_random_states, _config, _buffers, probe.unchanged, _storage, _gradients, flags):
            stack.enter_context(keep(model))
        _do_not_repack(model)
        yield


@contextmanager
def kept(parameters: "Iterable[torch.Tensor]") -> Iterator[None]:
    """Copies of these tensors are written back on the way out."""
    import torch

    before = [(p, p.detach().clone()) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def flags(model: Model) -> Iterator[None]:
    """`requires_grad` as before: PEFT sets it anew when an adapter is switched off and on."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextmanager
def _gradients(model: Model) -> Iterator[None]:
    before = [(p, p.grad) for p in model.parameters()]
    hooks = [(held, dict(held)) for p in model.parameters() if (held := p._post_accumulate_grad_hooks)]
    for parameter, _ in before:
        parameter.grad = None
    for held, _ in hooks:
        held.clear()
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
        for held, found in hooks:
            held.clear()
            held.update(found)


@contextmanager
def _buffers(model: Model) -> Iterator[None]:
    import torch

    before = [
        (buffer, buffer.clone())
        for buffer in model.buffers()
        if not buffer.is_meta and (buffer.is_floating_point() or buffer.numel() <= CODES)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def _storage(model: Model) -> Iterator[None]:
    """Where a forward gives a parameter another storage (bitsandbytes casts biases), or a module another parameter
    (PEFT's DoRA on quantized weights on a CPU), each gets its own back."""
    held = [(m._parameters, dict(m._parameters)) for m in model.modules()]
    before = [(p, p.data, dict(vars(p))) for p in model.parameters() if not p.is_meta]
    try:
        yield
    finally:
        for places, found in held:
            places.clear()
            places.update(found)
        for parameter, data, attributes in before:
            if parameter.data_ptr() != data.data_ptr() or parameter.dtype != data.dtype:
                parameter.data = data
            vars(parameter).clear()
            vars(parameter).update(attributes)


@contextmanager
def _config(model: Model) -> Iterator[None]:
    """transformers notes on a config what a first forward, or saving, found out (`problem_type`, `architectures`)."""
    own = vars(model.config) if hasattr(model, "config") and not isinstance(model.config, dict) else {}
    before = dict(own)
    try:
        yield
    finally:
        own.clear()
        own.update(before)


@contextmanager
def _random_states(model: Model) -> Iterator[None]:
    import torch

    kinds = {p.device.type for p in model.parameters()} - {"cpu", "meta"}
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with ExitStack() as stack:
        for kind in sorted(kinds) or ["cpu"]:
            places = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == kind})
            if kind == "cpu":
                stack.enter_context(torch.random.fork_rng([]))
            else:
                stack.enter_context(torch.random.fork_rng(places, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def _do_not_repack(model: Model) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, for good; not while they are checked.

    The flag lies on the modules, which `probe.unchanged` puts back.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
