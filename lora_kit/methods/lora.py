"""LoRA: low-rank adapters on linear layers, by PEFT."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_kit.errors import OptionError, UnsupportedError, listing, nearest
from lora_kit.methods.method import Attached, Method, Rate, positive_integer
from lora_kit.targets import TOWERS
from lora_kit.types import Model

if TYPE_CHECKING:
    from lora_kit.targets import Choice


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
        "target_parameters": "target_modules",
        "init_lora_weights": "pissa",
        "loraplus_lr_ratio": "lora_plus",
        "trainable_token_indices": "new_tokens",
    }

    rank: int = 16
    """Rank of the update. A matrix with a smaller side gets that side's, where such are the exception."""
    alpha: float | None = None
    """Scale of the update is alpha / rank (alpha / √rank with `rslora`). None: twice the rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero while training."""
    target_modules: tuple[str, ...] | str | None = None
    """Which layers. None: every linear layer and expert stack but the output head and routers. Names such as
    `("q_proj", "v_proj")` or full paths, each of which must match; or one regular expression for the full path."""
    where: str = "language"
    """Which tower of a multimodal model: `"language"`, `"vision"`, `"audio"` or `"all"`."""
    experts: bool = True
    """Whether experts that a model holds as stacks of matrices, (experts, ·, ·), get one adapter each; and the few
    linear layers that work in a way of their own."""
    rslora: bool = False
    """Scale by alpha / √rank instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""
    pissa: bool = False
    """Start A and B from the largest singular values of W, and keep the rest of W as the base (Meng et al. 2024,
    https://arxiv.org/abs/2404.02948). Saved as an adapter of twice the rank on the unchanged base."""
    lora_plus: float = 1.0
    """How many times faster B learns than A, through `param_groups` (Hayou et al. 2024, which uses 16,
    https://arxiv.org/abs/2402.12354)."""
    new_tokens: tuple[int, ...] | None = None
    """Ids of tokens whose embeddings are trained too, these rows alone, and saved with the adapter."""

    def __post_init__(self) -> None:
        positive_integer("lora", "rank", self.rank)
        if self.alpha is not None and not self.alpha > 0:
            raise OptionError(
                f"lora: alpha must be above 0 (0 would switch the adapter off), got {self.alpha!r}. "
                f"alpha={2 * self.rank} is the default."
            )
        if not 0 <= self.dropout < 1:
            raise OptionError(f"lora: dropout must be at least 0 and below 1, got {self.dropout!r}.")
        if self.where not in TOWERS:
            raise OptionError(
                f"lora: unknown where {self.where!r}; accepted: {listing(TOWERS)}.{nearest(self.where, TOWERS)}"
            )
        for flag in ("experts", "rslora", "dora", "pissa"):
            if not isinstance(getattr(self, flag), bool):
                raise OptionError(f"lora: {flag} must be True or False, got {getattr(self, flag)!r}.")
        if not self.lora_plus > 0:
            raise OptionError(f"lora: lora_plus must be above 0, got {self.lora_plus!r}.")
        if self.dora and self.pissa:
            raise OptionError("lora: dora and pissa both set how the adapter starts; choose one.")
        if isinstance(self.target_modules, list | set):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.new_tokens is not None:
            object.__setattr__(self, "new_tokens", _token_ids(self.new_tokens))

    @property
    def size(self) -> str:
        return f"r {self.rank}"

    @property
    def alpha_value(self) -> float:
        """Alpha as it will be used."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def check(self, model: Model, heads: list[str]) -> None:
        from lora_kit import quantization

        choice = self._choose(model, heads)
        self._refuse_variants_on_stacks(choice.parameters)
        self._refuse_unknown_tokens(model)
        bits = quantization.of(model)
        if bits is not None:
            self.check_quantization(bits)

    def check_quantization(self, bits: str) -> None:
        if self.pissa:
            raise UnsupportedError(
                f"pissa on a {bits} base: it starts from the singular values of the 16-bit weights. Load the model "
                "without quantization, or leave pissa out."
            )

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        from peft import LoraConfig

        from lora_kit import sharing, targets
        from lora_kit.methods.native import wrap

        choice = self._choose(model, heads, try_out=True)
        # PEFT's patterns name a layer by its path, a parameter that is adapted by itself in full
        paths = {f"{path}.weight": path for path in choice.modules}
        capped = {paths.get(name, name): side for name, side in choice.capped.items()}
        config = LoraConfig(
            task_type=targets.peft_task(model, heads),
            r=self.rank,
            lora_alpha=self.alpha_value,
            rank_pattern=capped,
            # the same scale everywhere, whatever the rank
            alpha_pattern={name: self.alpha_value * self._scale(side) for name, side in capped.items()},
            lora_dropout=self.dropout,
            target_modules=sorted(choice.modules),
            target_parameters=list(choice.parameters) or None,
            exclude_modules=_caught_by_ending(model, choice.modules) or None,
            modules_to_save=sorted(heads) or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights="pissa" if self.pissa else True,
            trainable_token_indices=self._token_rows(model),
            # Conv1D (GPT-2) holds its matrix transposed
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in choice.modules.values()),
        )
        adapted = wrap(model, config, name, exactly=True)
        sharing.share_adapters(adapted, name)
        _confirm(adapted, {name: capped.get(name, self.rank) for name in (*choice.modules, *choice.parameters)})
        if self.pissa:
            sharing.remember_start(adapted, name)
        return Attached(adapted, choice.coverage(), choice.share(), dict(choice.skipped))

    def _scale(self, rank: int) -> float:
        """What alpha must be multiplied by at another rank for the update's scale to stay."""
        return (rank / self.rank) ** (0.5 if self.rslora else 1)

    def _choose(self, model: Model, heads: list[str], *, try_out: bool = False) -> "Choice":
        from lora_kit import targets

        return targets.choose(
            model,
            self.target_modules,
            heads,
            rank=self.rank,
            where=self.where,
            experts=self.experts,
            try_out=try_out,
        )

    def _refuse_variants_on_stacks(self, parameters: tuple[str, ...]) -> None:
        """The update of a stack is added to the weight before the product: what acts on inputs or norms cannot work."""
        variants = {"dropout": self.dropout, "dora": self.dora, "pissa": self.pissa}
        asked = [word for word, value in variants.items() if value]
        if parameters and asked:
            raise UnsupportedError(
                f"{asked[0]}={variants[asked[0]]!r} does not work on {parameters[0]!r}, which is adapted as a whole "
                f"parameter. Leave {asked[0]} out, or leave such weights out with experts=False or target_modules."
            )

    def _refuse_unknown_tokens(self, model: Model) -> None:
        if self.new_tokens is None:
            return
        rows = model.get_input_embeddings().weight.shape[0]
        beyond = [i for i in self.new_tokens if i >= rows]
        if beyond:
            raise OptionError(
                f"new_tokens names the id {beyond[0]}, but the model has {rows} embeddings (ids 0 to {rows - 1}). Load "
                "the model and make room first: model.resize_token_embeddings(len(tokenizer))."
            )
        output = _own_output(model)
        if output is not None and getattr(output, "bias", None) is not None:
            raise UnsupportedError(
                f"new_tokens on {type(model).__name__}: its output head has a bias, which PEFT's token adapter would "
                "drop. Train the embeddings whole instead: peft.LoraConfig(modules_to_save=[...])."
            )

    def _token_rows(self, model: Model) -> "dict[str, list[int]] | None":
        """Path of the embeddings, and of an output head with weights of its own → rows to train."""
        if self.new_tokens is None:
            return None
        trained = [model.get_input_embeddings(), _own_output(model)]
        return {path: list(self.new_tokens) for path, module in model.named_modules() if module in trained and path}


def _own_output(model: Model) -> Model:
    """The output head of a language model, unless it is tied to the input embeddings."""
    from lora_kit.structure import output_embeddings

    output = output_embeddings(model)
    if output is None or output.weight is model.get_input_embeddings().weight:
        return None
    return output


def _token_ids(given: object) -> tuple[int, ...]:
    ids = tuple(given) if isinstance(given, list | tuple | set | range) else (given,)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise OptionError(
                f"lora: new_tokens takes ids of tokens, got {i!r}. For words: tokenizer.add_tokens(words), then "
                "new_tokens=tokenizer.convert_tokens_to_ids(words)."
            )
    if not ids:
        raise OptionError("lora: new_tokens is empty; leave it out, or give ids of tokens.")
    return tuple(sorted(set(ids)))


def _caught_by_ending(model: Model, chosen: Iterable[str]) -> list[str]:
    """Modules that PEFT would adapt because their path ends like a chosen one's."""
    wanted = set(chosen)
    caught = []
    for path, _ in model.named_modules():
        pieces = path.split(".")
        if path not in wanted and any(".".join(pieces[i:]) in wanted for i in range(1, len(pieces))):
            caught.append(path)
    return caught


def _confirm(adapted: Model, wanted: dict[str, int]) -> None:
    """Every chosen weight carries an adapter of its rank now, and no other does."""
    from peft.tuners.lora.layer import LoraLayer

    from lora_kit.stacks import AdaptedParameter

    found: dict[str, int] = {}
    for path, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            clean = path.replace(".base_layer", "")
            own = f"{clean}.{layer.parameter_name}" if isinstance(layer, AdaptedParameter) else clean
            found[own] = next(iter(layer.r.values()))
    if found != wanted:
        more = sorted(f"{name} (rank {rank})" for name, rank in found.items() if wanted.get(name) != rank)
        less = sorted(f"{name} (rank {rank})" for name, rank in wanted.items() if found.get(name) != rank)
        raise UnsupportedError(
            f"PEFT adapted {listing(more or ['nothing'], 3)} besides, and left out {listing(less or ['nothing'], 3)}. "
            "Name the layers with target_modules=."
        )
