"""Every error that lora_kit raises on purpose, and the two phrases their messages share.

A message names the input, its value, what is accepted and the fix. It is raised before any work is done, so
the model that was handed in is untouched.
"""

import difflib
from collections.abc import Iterable


class LoraKitError(Exception):
    """Base of every error raised on purpose."""


class OptionError(LoraKitError, ValueError):
    """A word, an option or a value that is not accepted."""


class TargetError(OptionError):
    """A target module that matches nothing, or cannot carry an adapter."""


class UnsupportedError(LoraKitError):
    """A combination of model, method and quantization that cannot work."""


class AlreadyAdaptedError(LoraKitError):
    """The model already carries an adapter."""


class DataError(LoraKitError, ValueError):
    """Data whose format or columns are not understood."""


class MissingPackageError(LoraKitError, ImportError):
    """An optional package is needed for what was asked."""


class StorageError(LoraKitError):
    """A folder that cannot be written, or does not hold what it should."""


class AdapterMismatchError(StorageError):
    """The file's tensors are not the ones that this model expects."""


class WrongBaseError(AdapterMismatchError):
    """The adapter was trained on another base."""


class CannotMergeError(StorageError):
    """The adapter cannot be added to 16-bit weights."""


class ResumeError(StorageError):
    """A checkpoint that a run cannot go on from."""


class NonFiniteError(LoraKitError):
    """A loss, a gradient or a weight that is NaN or infinite."""


class OutOfMemoryError(LoraKitError):
    """One sequence alone does not fit in the device's memory."""


class NothingToTrainError(UnsupportedError):
    """No parameter of the model is trainable."""


def nearest(word: str, accepted: Iterable[str]) -> str:
    """`" Did you mean 'rank'?"` where something accepted is spelled alike, else an empty string."""
    close = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def listing(items: Iterable[object], limit: int = 12) -> str:
    """`"a, b, c"`, cut after `limit` items with the number that was left out."""
    words = [str(item) for item in items]
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
