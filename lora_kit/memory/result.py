"""What a plan says: bytes by kind and by part of the step, and what a card has to do with them."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_kit.errors import UnsupportedError
from lora_kit.memory.collector import uncollected
from lora_kit.messages import quiet

if TYPE_CHECKING:
    from lora_kit.memory.blueprint import Axis, Blueprint
    from lora_kit.memory.fit import Fit
    from lora_kit.memory.step import Step

NAMES = {
    "weights": "weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "temporaries": "temporaries",
    "data": "batch",
    "workspace": "kernels' workspace",
    "libraries": "cuBLAS",
}


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step takes, in bytes. Printed, it is a table."""

    peak: int
    """Most bytes allocated at any moment of a step; on CUDA what `torch.cuda.max_memory_allocated` counts."""
    reserved: tuple[int, int]
    """What torch's CUDA allocator takes from the device for that: at best, and in a model of it without luck."""
    needed: int
    """What the device must have: `reserved` at its lower end, and on CUDA the context."""
    at: str
    """When the peak is, and the operation that runs then."""
    breakdown: dict[str, int]
    """What is alive then: kind → bytes."""
    phases: dict[str, int]
    """Peak of each part of the step: loading, forward, loss, backward, optimizer, and between steps."""
    settings: dict[str, Any]
    """What was planned for."""
    _blueprint: "Blueprint" = field(repr=False, compare=False, kw_only=True)
    _axes: "tuple[Axis, ...]" = field(repr=False, compare=False, kw_only=True)
    _step: "Step" = field(repr=False, compare=False, kw_only=True)

    @functools.cached_property
    def evaluation(self) -> int:
        """Peak bytes of evaluating the same batch between two steps: no gradients, but whole logits."""
        from lora_kit.memory.step import evaluate

        return self._peak_of(evaluate) + self.breakdown.get("optimizer", 0)

    @functools.cached_property
    def generation(self) -> int:
        """Peak bytes of generating from rows of `seq_len` tokens, keys and values kept, without an optimizer.

        Raises:
            UnsupportedError: for anything but a causal language model.
        """
        from lora_kit.memory.step import generate

        if self.settings["task"] != "causal-lm":
            raise UnsupportedError(
                f"generation is planned for causal language models; this is {self.settings['task']!r}."
            )
        return self._peak_of(generate)

    def _peak_of(self, instead: Any) -> int:
        from lora_kit.memory.simulate import at_depth

        world = world_of(self.settings["device"])
        with uncollected(), quiet("bitsandbytes.autograd._functions"):
            trace = at_depth(
                self._blueprint, self._axes, self._step, self.settings["lean"], world=world, instead=instead
            )
        return trace.peak[1].bytes

    def fits(self, card: str | int) -> bool:
        """Whether a card, by name (`"RTX 4090"`), size (`"12GB"`) or bytes, has room for it."""
        from lora_kit.memory.cards import size_of

        return self.needed <= size_of(card)

    def fit(self, card: str | int, largest: str = "seq_len") -> "Fit":
        """The largest `"seq_len"`, `"batch_size"` or `"rank"` that the card has room for, the rest as planned."""
        from lora_kit.memory.fit import fit

        return fit(self, card, largest)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for programs."""
        return {
            "peak": self.peak,
            "reserved": list(self.reserved),
            "needed": self.needed,
            "at": self.at,
            "breakdown": dict(self.breakdown),
            "phases": dict(self.phases),
            "settings": {key: value if _plain(value) else str(value) for key, value in self.settings.items()},
        }

    def __str__(self) -> str:
        s = self.settings
        what = f"{s['model']}, {s['method']} ({s['size']}), {s['quantization']} base"
        how = f"{s['batch_size']} × {s['seq_len']} tokens, {s['optimizer']}"
        how += f", lean={s['lean']!r}" if s["lean"] is not True else ""
        how += ", gradient checkpointing" if s["gradient_checkpointing"] else ""
        rows = [("peak allocated", self.peak)]
        rows += [(f"  {NAMES.get(k, k)}", v) for k, v in sorted(self.breakdown.items(), key=lambda kv: -kv[1])]
        lines = [what, how, ""]
        lines += [f"{name:<28}{size(value):>12}" for name, value in rows]
        lines.append(f"{'at':<28}{self.at}")
        low, high = (size(value) for value in self.reserved)
        if s["device"] == "cuda":
            lines.append(f"{'reserved':<28}{low} to {high}")
            lines.append(f"{'needed on the card':<28}{size(self.needed):>12}")
        lines.append(f"{'loading':<28}{size(self.phases['loading']):>12}")
        return "\n".join(lines)


def size(count: float) -> str:
    """`"7.42 GiB"`."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def world_of(device: str) -> Any:
    from lora_kit.memory.cpu import CPU
    from lora_kit.memory.cuda import CUDA

    return CUDA if device == "cuda" else CPU
