"""Dense weights that are made again in the backward pass instead of being kept for it.

A matrix product keeps its weight to pass the gradient on. Where the weight is itself made for the occasion (from packed
bytes, or as the sum of a weight and a low-rank update) keeping it costs as much as never having packed it: one dense
copy a layer, all at once. Made again from what is there anyway, only one owner's copies are alive at a time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_alive = threading.local()


class _View(NamedTuple):
    """What is kept instead of a tensor: which part of the dense weight it was, and how to make that again."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    make: Callable[[], torch.Tensor]


@contextmanager
def not_kept(dense: torch.Tensor, make: Callable[[], torch.Tensor], owner: object, name: str) -> Iterator[None]:
    """Inside, autograd keeps `dense`, and any view of it, as a note; the backward pass calls `make` for it.

    Args:
        dense: the weight as it is used inside.
        make: gives the same values again; called without gradients.
        owner: what the weight belongs to. Weights of one owner live together, those of the one before are dropped.
        name: the weight's name within its owner.

    Where someone else's hooks are at work (activation checkpointing, which keeps nothing inside anyway) or under
    `torch.compile` nothing is done.
    """
    place = dense.untyped_storage()._cdata  # told apart by the storage itself: one without data has no address
    known, outside = _hooks_outside()
    foreign = not known or (outside is not None and outside[1] is not _unpack)
    if not torch.is_grad_enabled() or dense.is_meta or foreign or torch.compiler.is_compiling():
        yield
        return

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.device == dense_device and tensor.untyped_storage()._cdata == place:
            offset = int(tensor.storage_offset())
            return _View(tuple(tensor.shape), tensor.stride(), offset, lambda: _one_owner(owner, name, make))
        return outside[0](tensor) if outside is not None else tensor

    dense_device = dense.device
    del dense
    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _hooks_outside() -> tuple[bool, Any]:
    """(whether torch says, the innermost hooks that are at work or None)."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is not None, ask(True) if ask is not None else None


def _unpack(kept: Any) -> torch.Tensor:
    return kept.make().as_strided(kept.size, kept.stride, kept.offset) if isinstance(kept, _View) else kept


def _one_owner(owner: object, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The owner's weight, made once for its part of the backward pass."""
    if getattr(_alive, "owner", None) is not owner:
        _alive.owner, _alive.weights = owner, {}
        try:
            torch.autograd.Variable._execution_engine.queue_callback(_drop)
        except RuntimeError:  # read outside a backward pass: nobody to tell us when it ends
            with torch.no_grad():
                _drop()
                return make()
    if name not in _alive.weights:
        with torch.no_grad():
            _alive.weights[name] = make()
    return _alive.weights[name]


def _drop() -> None:
    _alive.owner, _alive.weights = None, {}
