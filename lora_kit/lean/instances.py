"""Another forward for one instance of a module, in a way that survives copying, pickling and replication.

The instance's class becomes a subclass of the one it had, of the same name. A function set on the instance would stay
bound to it: a deep copy, an unpickled model and the replicas of `DataParallel` would call the original's weights.
"""

from typing import Any

from torch import nn

_ORIGINAL, _MIXIN = "_lora_kit_original", "_lora_kit_mixin"
_made: dict[tuple[type, type], type] = {}


def swap(module: nn.Module, mixin: type) -> None:
    """Put the methods of `mixin` before those of this module's class, in place."""
    module.__class__ = _class(mixin, type(module))


def restore(module: nn.Module) -> bool:
    """Give the module its own class back, in place; whether it had another."""
    original = original_class(module)
    if original is type(module):
        return False
    module.__class__ = original
    return True


def original_class(module: nn.Module) -> type:
    """The class that the module was made with."""
    cls = type(module)
    while _ORIGINAL in vars(cls):
        cls = vars(cls)[_ORIGINAL]
    return cls


def _class(mixin: type, cls: type) -> type:
    if (mixin, cls) not in _made:
        content = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce,
            _ORIGINAL: cls,
            _MIXIN: mixin,
        }
        wrapped = getattr(mixin, "wrapped", None)
        if wrapped is not None:
            content |= wrapped(cls)
        _made[mixin, cls] = type(cls)(cls.__name__, (mixin, cls), content)
    return _made[mixin, cls]


def _reduce(module: nn.Module, protocol: int) -> Any:
    """For `pickle` and `copy`: the class of its own is made again where it is read."""
    mixins, cls = [], type(module)
    while _ORIGINAL in vars(cls):
        mixins.append(vars(cls)[_MIXIN])
        cls = vars(cls)[_ORIGINAL]
    if not mixins:  # somebody made a subclass of ours, and knows how
        return object.__reduce_ex__(module, protocol)
    state = module.__getstate__() if hasattr(module, "__getstate__") else dict(vars(module))
    return _rebuilt, (cls, *reversed(mixins)), state


def _rebuilt(cls: type, *mixins: type) -> Any:
    for mixin in mixins:
        cls = _class(mixin, cls)
    return object.__new__(cls)
