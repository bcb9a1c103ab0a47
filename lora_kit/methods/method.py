"""What every method declares as data, and the two things that it can do."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lora_kit.base import GENERATING
from lora_kit.errors import OptionError, listing, nearest
from lora_kit.types import Model

if TYPE_CHECKING:
    pass

REFERENCE_PARAMETERS = 22.7e6


class Rate(NamedTuple):
    """A learning rate as a function of size: `at_reference × (22.7e6 / parameters) ** exponent`."""

    at_reference: float
    exponent: float


# the same for every method: what people type who come from other libraries
_SAME = {
    "load_in_4bit": "quantization='4bit'",
    "load_in_8bit": "quantization='8bit'",
    "torch_dtype": "dtype",
    "num_labels": "model_kwargs={'num_labels': …}",
    "device_map": "device",
    "adapter_name": "name",
    "task_type": "task",
    "low_memory": "lean='low-memory'",
}


@dataclass(frozen=True)
class Attached:
    """A model ready to train, with what the report says of it."""

    model: Model
    coverage: str
    share: float = 1.0
    """Share of the matmul weights that is trained or adapted, 0 to 1."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Weight → why it is neither."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the saved folder's manifest has to say beyond the options."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to fine-tune: a frozen dataclass of options, with its facts as class variables.

    A new method is one file beside this one and one entry in `METHODS`; comparison, command line, tests and the
    README's table iterate over that registry.
    """

    word: ClassVar[str]
    """How the method is called in `adapt(model, word)`."""
    paper: ClassVar[str]
    """Where it comes from."""
    summary: ClassVar[str]
    """What it trains, in one line."""
    mergeable: ClassVar[bool]
    """Whether the result can be written as a plain model."""
    quantizable: ClassVar[bool]
    """Whether it trains on an 8- or 4-bit base."""
    rate: ClassVar[Rate]
    """AdamW learning rate for classification and other tasks with a head of their own."""
    language_rate: ClassVar[Rate]
    """The same for language modelling."""
    head_factor: ClassVar[float]
    """How much faster a newly initialised head learns."""
    weight_decay: ClassVar[float]
    warmup: ClassVar[float]
    """Share of all steps over which the learning rate rises from zero."""

    also_called: ClassVar[dict[str, str]] = {}
    """Names that other libraries give to options, and ours."""

    @property
    @abstractmethod
    def size(self) -> str:
        """The size that was chosen, for tables: `"r 16"`, `"20 tokens"`."""

    @abstractmethod
    def check(self, model: Model, heads: list[str]) -> None:
        """Raise a `LoraKitError` if this method cannot do what was asked with this model (weights may be on `meta`)."""

    def check_quantization(self, bits: str) -> None:
        """Raise a `LoraKitError` if these options cannot work on a base in so many bits (`"8bit"` or `"4bit"`)."""
        return

    @abstractmethod
    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        """Wrap `model` in place, ready to train; `heads` are the paths of modules to train whole."""

    def start_from(self, texts: list[str]) -> "Method":
        """The same method, told a few texts of the task; methods that start from text make use of them."""
        return self

    @classmethod
    def learning_rate(cls, parameters: int, task: str | None = None, *, head: bool = False) -> float:
        """AdamW learning rate for a model of so many parameters and a task: larger models want smaller steps.

        The rates and exponents join what `benchmarks/learning_rates.py` finds on a 22.7 M encoder and a 0.26 M decoder
        with what holds for models of billions of parameters: full 1.7e-5 and LoRA 1.7e-4 at 8 B (ten times full's, as
        in "LoRA Without Regret", Schulman 2025), prefix 7e-3 at 3 B (5e-3 is the best row of PEFT's own comparison).
        """
        rate = cls.language_rate if task in GENERATING else cls.rate
        scaled = rate.at_reference * (REFERENCE_PARAMETERS / max(parameters, 1)) ** rate.exponent
        return float(f"{scaled * (cls.head_factor if head else 1):.2g}")

    def options(self) -> dict[str, Any]:
        """The option fields and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Method":
        """Build the option object from keywords; an unknown one is an error that lists the accepted ones."""
        accepted = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in accepted:
                takes = f"accepted: {listing(accepted, 40)}" if accepted else "it takes no options"
                hint = f" Here it is called {_SAME[key]}." if key in _SAME else nearest(key, accepted)
                if key in cls.also_called:
                    hint = f" Here it is called {cls.also_called[key]!r}."
                raise OptionError(f"unknown option {key!r} for method {cls.word!r}; {takes}.{hint}")
        return cls(**options)


def positive_integer(method: str, field: str, value: object) -> None:
    """Refuse anything but an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{method}: {field} must be an integer of at least 1, got {value!r}.")
