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
    of a bfloat16 weight are smaller than its rounding step and vanish without a trace.

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

    weights: Literal["float32", "keep"] = "float32"
    """`"float32"`: 16-bit weights are cast to float32 to be trained; `"keep"`: they stay as they are."""

    def __post_init__(self) -> None:
        if self.weights not in ("float32", "keep"):
            raise OptionError(f"full: weights must be 'float32' or 'keep', got {self.weights!r}.")

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

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        import torch

        sixteen_bit = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize == 2}
        model.requires_grad_(True)
        if not sixteen_bit:
            return Attached(model, "every weight")
        if self.weights == "keep":
            return Attached(model, f"every weight, in {'/'.join(sorted(sixteen_bit))} (small updates round away)")
        model.to(torch.float32)
        return Attached(model, f"every weight, cast from {'/'.join(sorted(sixteen_bit))} to float32 to be trained")
