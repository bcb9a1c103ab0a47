"""`adapt(model, "auto", memory="12GB")`: the least that must be given up for a run to fit."""

from dataclasses import dataclass
from typing import Any

from lora_kit.errors import OptionError, UnsupportedError, listing, nearest
from lora_kit.memory.cards import size_of
from lora_kit.memory.plan import plan
from lora_kit.memory.result import MemoryPlan, size

# (base, lean, gradient checkpointing), from the fastest to the smallest; 8 bit is slower than 4 and larger
WAYS: tuple[tuple[str | None, bool | str, bool], ...] = (
    (None, True, False),
    (None, "low-memory", False),
    (None, True, True),
    ("4bit", True, False),
    ("4bit", "low-memory", False),
    ("4bit", True, True),
)


@dataclass(frozen=True)
class Auto:
    """What was chosen, and why."""

    quantization: str | None
    lean: bool | str
    gradient_checkpointing: bool
    plan: MemoryPlan
    why: str


def choose(
    model: Any,
    memory: str | int | None,
    *,
    task: str | None = None,
    dtype: Any = "auto",
    device: str = "cuda",
    model_kwargs: dict[str, Any] | None = None,
    quantized: bool = False,
    **options: Any,
) -> Auto:
    """The first of `WAYS` that fits, for LoRA on rows of `seq_len` tokens (1024), `batch_size` (1) at a time.

    Raises:
        OptionError: without `memory`, or for another option.
        UnsupportedError: where none fits; it says what would.
    """
    if memory is None:
        raise OptionError("method 'auto' needs memory=, such as memory='12GB' or memory='RTX 4090'.")
    for key in options:
        if key not in ("seq_len", "batch_size"):
            raise OptionError(
                f"unknown option {key!r} for method 'auto'; accepted: batch_size, seq_len."
                f"{nearest(key, ('batch_size', 'seq_len'))} To set the adapter's own, name the method."
            )
    room = size_of(memory)
    refused: list[str] = []
    last = None
    for quantization, lean, checkpointing in WAYS:
        if quantized and quantization is not None:
            continue
        last = plan(
            model,
            "lora",
            quantization=quantization,
            task=task,
            dtype=dtype,
            lean=lean,
            gradient_checkpointing=checkpointing,
            device=device,
            model_kwargs=model_kwargs,
            **options,
        )
        way = spoken(quantization, lean, checkpointing)
        if last.needed <= room:
            before = f"; {listing(refused)}" if refused else ""
            why = f"auto: LoRA, {way}, needs {size(last.needed)} of {size(room)}{before}"
            return Auto(quantization, lean, checkpointing, last, why)
        refused.append(f"{way} would need {size(last.needed)}")
    found = last.fit(memory) if last is not None else None
    instead = f"seq_len={found.largest} would fit that way" if found is not None and found.largest else "no length fits"
    raise UnsupportedError(f"no way to train this model in {size(room)}: {listing(refused)}; {instead}.")


def spoken(quantization: str | None, lean: bool | str, checkpointing: bool) -> str:
    """`"4bit, low-memory, checkpointing"`."""
    parts = [quantization or "16bit"] + ["low-memory"] * (lean == "low-memory") + ["checkpointing"] * checkpointing
    return ", ".join(parts)
