"""Full fine-tuning: every weight is trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_kit.errors import OptionError, UnsupportedError
from lora_kit.methods.method import Attached, Method, Rate
from lora_kit.types import Model

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Full(Method):
    """Train every weight of the model.

    The weights are trained in float32 unless told otherwise: at the small learning rates of fine-tuning most updates
    of a bfloat16 weight are smaller than its rounding step and vanish without a trace. Where float32 does not fit (16
    bytes a parameter with AdamW's states and gradients), `weights="stochastic"` trains in bfloat16 (8 bytes) with
    `lora_kit.lean.optimizer.AdamW`, whose updates arrive on average.

    Example:
        >>> Full().weights
        'float32'
    """

    word: ClassVar[str] = "full"
    paper: ClassVar[str] = "https://arxiv.org/abs/1810.04805"
    summary: ClassVar[str] = "every weight"
    mergeable: ClassVar[bool] = True
    quantizable: ClassVar[bool] = False
    rate: ClassVar[Rate] = Rate(1e-4, 0.3)
    language_rate: ClassVar[Rate] = Rate(2.6e-4, 0.46)
    head_factor: ClassVar[float] = 10.0
    weight_decay: ClassVar[float] = 0.01
    warmup: ClassVar[float] = 0.1

    weights: Literal["float32", "stochastic", "keep"] = "float32"
    """`"float32"`: 16-bit weights are cast to float32 to be trained; `"stochastic"`: they are trained in bfloat16 by
    `lora_kit.lean.optimizer.AdamW`, which rounds each update up or down by chance so that none is lost on average;
    `"keep"`: they stay as they are, for any optimizer."""

    def __post_init__(self) -> None:
        if self.weights not in ("float32", "stochastic", "keep"):
            raise OptionError(f"full: weights must be 'float32', 'stochastic' or 'keep', got {self.weights!r}.")

    @property
    def size(self) -> str:
        return "all"

    def check(self, model: Model, heads: list[str]) -> None:
        from lora_kit import quantization

        bits = quantization.of(model)
        if bits is not None:
            raise UnsupportedError(
                f"method 'full' on a {bits} base: its quantized matrices hold integers and cannot be trained. "
                "Use method='lora' or 'prefix', or load the model without quantization."
            )
        other = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"bfloat16", "float32"}
        if self.weights == "stochastic" and other:
            raise UnsupportedError(
                f"full with weights='stochastic' is for bfloat16 weights, this model's are {'/'.join(sorted(other))}; "
                "load it with dtype='bfloat16', or leave weights out to train in float32."
            )

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        import torch

        sixteen_bit = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize == 2}
        model.requires_grad_(True)
        if not sixteen_bit:
            return Attached(model, "every weight")
        if self.weights == "keep":
            return Attached(model, f"every weight, in {'/'.join(sorted(sixteen_bit))} (small updates round away)")
        if self.weights == "stochastic":
            gib = sum(p.numel() for p in model.parameters()) / 2**30
            return Attached(
                model,
                "every weight, in bfloat16, updates rounded stochastically; needs lora_kit.lean.optimizer.AdamW "
                f"(weights, gradients and states: {8 * gib:,.2f} GiB, {16 * gib:,.2f} GiB in float32)",
            )
        model.to(torch.float32)
        return Attached(model, f"every weight, cast from {'/'.join(sorted(sixteen_bit))} to float32 to be trained")
