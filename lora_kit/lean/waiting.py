"""What tensors have in common that stand for values which are not there yet (`logits`, `low_rank_stack`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# answered by what a tensor says of itself; no values are needed
_ASKED = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement,
    torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.element_size, torch.Tensor.get_device,
    torch.Tensor.is_floating_point, torch.is_floating_point, torch.numel, torch.is_tensor, torch.Tensor.__len__,
}  # fmt: skip

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a property, which the stubs have as a tensor


def asks(func: Any) -> bool:
    """Whether an operation asks for shape, dtype, place or another property."""
    return (getattr(func, "__name__", "") == "__get__" and func != _DATA) or func in _ASKED


def answer(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the tensor as it stands."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def read(given: Any, kind: type, values: Callable[[Any], Tensor]) -> Any:
    """The same arguments with values in the place of tensors of this kind."""
    if isinstance(given, kind):
        return values(given)
    if isinstance(given, dict):
        return {key: read(value, kind, values) for key, value in given.items()}
    if isinstance(given, list | tuple):
        made = [read(value, kind, values) for value in given]
        return type(given)(*made) if hasattr(given, "_fields") else type(given)(made)
    return given
