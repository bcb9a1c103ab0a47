"""LoRA: low-rank adapters on linear layers, by PEFT."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_kit.errors import OptionError
from lora_kit.methods.method import Attached, Method, Rate, positive_integer
from lora_kit.types import Model

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class LoRA(Method):
    """Train a low-rank update of every linear layer; the base stays frozen.

    `y = W x + (alpha / rank) · B A x`, with A of shape (rank, in) and B of shape (out, rank), B starting at zero, so
    that training starts from the base model exactly (Hu et al. 2021).

    Example:
        >>> LoRA(rank=8).alpha_value
        16
    """

    word: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    summary: ClassVar[str] = "a low-rank update of every linear layer"
    mergeable: ClassVar[bool] = True
    quantizable: ClassVar[bool] = True
    rate: ClassVar[Rate] = Rate(1e-3, 0.3)
    language_rate: ClassVar[Rate] = Rate(1e-3, 0.3)
    head_factor: ClassVar[float] = 5.0
    weight_decay: ClassVar[float] = 0.0
    warmup: ClassVar[float] = 0.1
    also_called: ClassVar[dict[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_dora": "dora",
        "use_rslora": "rslora",
        "targets": "target_modules",
    }

    rank: int = 16
    """Rank of the update; at most the smaller side of each adapted matrix."""
    alpha: float | None = None
    """Scale of the update is alpha / rank (alpha / √rank with `rslora`). None: twice the rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero while training."""
    target_modules: tuple[str, ...] | str | None = None
    """Which layers. None: every linear layer but the output head and routers. Names such as `("q_proj", "v_proj")`
    or full paths, each of which must match; or one regular expression for the full path."""
    rslora: bool = False
    """Scale by alpha / √rank instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

    def __post_init__(self) -> None:
        positive_integer("lora", "rank", self.rank)
        if self.alpha is not None and not self.alpha > 0:
            raise OptionError(f"lora: alpha must be above 0 (0 would switch the adapter off), got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"lora: dropout must be at least 0 and below 1, got {self.dropout!r}.")
        if isinstance(self.target_modules, list | set):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def size(self) -> str:
        return f"r {self.rank}"

    @property
    def alpha_value(self) -> float:
        """Alpha as it will be used."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def check(self, model: Model, heads: list[str]) -> None:
        from lora_kit import targets

        targets.choose(model, self.target_modules, heads, rank=self.rank)

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        from peft import LoraConfig

        from lora_kit import targets
        from lora_kit.methods.native import wrap

        choice = targets.choose(model, self.target_modules, heads, rank=self.rank)
        config = LoraConfig(
            task_type=targets.peft_task(model),
            r=self.rank,
            lora_alpha=self.alpha_value,
            lora_dropout=self.dropout,
            target_modules=sorted(choice.modules),
            modules_to_save=sorted(heads) or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            # Conv1D (GPT-2) holds its matrix transposed
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in choice.modules.values()),
        )
        return Attached(wrap(model, config, name), choice.coverage())
