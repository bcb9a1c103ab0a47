"""Which kind of device a tensor is on, or is to be thought on while a step for another device is simulated."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_planned: ContextVar[str | None] = ContextVar("planned device", default=None)


def kind_of(tensor: Tensor) -> str:
    """`"cpu"`, `"cuda"` and so on."""
    return _planned.get() or tensor.device.type


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor like any other, or a simulated one, and of no class with ideas of its own."""
    kind = type(tensor)
    return kind in (Tensor, nn.Parameter) or kind.__module__ == "torch._subclasses.fake_tensor"


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, what is chosen by the kind of device is chosen for this one."""
    token = _planned.set(kind)
    try:
        yield
    finally:
        _planned.reset(token)
