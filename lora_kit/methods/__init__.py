"""The methods: option classes, the registry, and how a word or a PEFT config becomes an option object."""

from typing import Any

from lora_kit.errors import OptionError, listing, nearest
from lora_kit.methods.full import Full
from lora_kit.methods.lora import LoRA
from lora_kit.methods.method import Attached, Method
from lora_kit.methods.native import Native
from lora_kit.methods.prefix import Prefix

METHODS: dict[str, type[Method]] = {"full": Full, "lora": LoRA, "prefix": Prefix}

__all__ = ["METHODS", "Attached", "Full", "LoRA", "Method", "Native", "Prefix", "resolve", "word_of"]


def resolve(method: Any, options: dict[str, Any]) -> Method:
    """The option object for a word with options, an option object, or any `peft.PeftConfig`.

    Raises:
        OptionError: for an unknown word or option, and for options beside an object that already holds its own.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise OptionError(
                f"unknown method {method!r}; accepted: {listing(sorted(METHODS))}, an option object such as "
                f"LoRA(rank=32), or any peft.PeftConfig.{nearest(method, METHODS)}"
            )
        return METHODS[method].from_options(options)
    if isinstance(method, type) and issubclass(method, Method):
        raise OptionError(f"method is the class {method.__name__}; pass an object: {method.__name__}().")
    chosen = method if isinstance(method, Method) else Native.wrap(method)
    if options:
        raise OptionError(
            f"options {listing(options)} given beside {type(method).__name__}(...); "
            "put them inside the object, or name the method by its word."
        )
    return chosen


def word_of(config: Any) -> str:
    """The word of the method that a PEFT config belongs to; `"peft"` for those without an option class here."""
    return {"LORA": LoRA.word, "PREFIX_TUNING": Prefix.word}.get(config.peft_type.value, Native.word)
