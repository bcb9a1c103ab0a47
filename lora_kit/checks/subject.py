"""What is checked: the model, its adapter, what is trained, and the batch, looked up once for all checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_kit.adaptation import Record, base_of, record_of
from lora_kit.base import GENERATING
from lora_kit.errors import OptionError
from lora_kit.methods import METHODS, Method, Native
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch


@dataclass
class Subject:
    """A model and a batch, with what the checks ask about them."""

    model: Model
    batch: dict[str, Any]
    record: Record
    optimizer: Any = None
    tokenizer: Any = None
    lr: float | None = None
    trained: "dict[str, torch.nn.Parameter]" = field(default_factory=dict)
    """Name → every parameter that wants a gradient."""
    flags: dict[int, bool] = field(default_factory=dict)
    """Id of every parameter → whether it wanted a gradient when `verify` was called."""

    @cached_property
    def base(self) -> Model:
        return base_of(self.model)

    @property
    def adapted(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.model, "get_base_model")

    @property
    def config(self) -> Any:
        """PEFT's config of the active adapter."""
        return self.model.peft_config[self.record.name]

    @property
    def method(self) -> type[Method]:
        return METHODS.get(self.record.method, Native)

    @property
    def is_prompt(self) -> bool:
        """Whether the adapter stands beside the weights: a prefix, virtual tokens."""
        return self.adapted and bool(self.config.is_prompt_learning)

    @property
    def generates(self) -> bool:
        """Whether the model predicts tokens."""
        return self.record.task in GENERATING

    @property
    def encodes_and_decodes(self) -> bool:
        return bool(getattr(self.model_config, "is_encoder_decoder", False))

    @property
    def model_config(self) -> Any:
        return getattr(self.base, "config", None)

    @property
    def text_config(self) -> Any:
        """The part of the model's config that speaks of tokens."""
        config = self.model_config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @cached_property
    def lora_layers(self) -> dict[str, Model]:
        """Path → PEFT's LoRA layer that carries the active adapter."""
        from peft.tuners.lora.layer import LoraLayer

        return {
            path: module
            for path, module in self.base.named_modules()
            if isinstance(module, LoraLayer) and self.record.name in module.r
        }

    @cached_property
    def saved(self) -> "dict[str, torch.Tensor]":
        """What is written to an adapter's file, by PEFT's names; the tensors are the model's own."""
        import warnings

        from peft.utils import get_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of the file is said again when it is written
            found = get_peft_model_state_dict(self.model, adapter_name=self.record.name, save_embedding_layers=False)
        return dict(found)

    def special(self, name: str) -> set[int]:
        """Ids of a special token (`"pad"`, `"eos"`, `"bos"`), by the tokenizer, else by the model's config."""
        found = getattr(self.tokenizer, f"{name}_token_id", None)
        if found is None:
            found = getattr(self.text_config, f"{name}_token_id", None)
        if found is None:
            return set()
        return {int(i) for i in found} if isinstance(found, list | tuple) else {int(found)}


def examine(model: Any, batch: Any, *, optimizer: Any, tokenizer: Any, lr: float | None) -> Subject:
    """Refuse what is no model, no batch or no optimizer; move the batch's tensors to the model's device."""
    import torch
    from accelerate.utils import extract_model_from_parallel
    from torch import nn

    if not isinstance(model, nn.Module):
        raise OptionError(
            f"verify takes a loaded model, got a {type(model).__name__}; load it first: model = adapt({model!r})."
        )
    if not isinstance(batch, Mapping) or not batch:
        raise OptionError(
            f"verify takes a batch as the model takes it, a dict of tensors with labels; got {_what(batch)}. "
            "For instance: batch = next(iter(dataloader))."
        )
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise OptionError(
            f"optimizer must be a torch optimizer, got a {type(optimizer).__name__}; write optimizer="
            "torch.optim.AdamW(param_groups(model)), or lr= for a learning rate alone."
        )
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < float("inf")):
        raise OptionError(f"lr must be a number above 0, got {lr!r}; for instance lr=1e-4.")
    if lr is not None and optimizer is not None:
        raise OptionError("give optimizer= or lr=, not both: the optimizer holds its own learning rates.")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    return Subject(
        model=model,
        batch=moved,
        record=record_of(model),
        optimizer=optimizer,
        tokenizer=tokenizer,
        lr=lr,
        trained={name: p for name, p in model.named_parameters() if p.requires_grad},
        flags={id(p): p.requires_grad for p in model.parameters()},
    )


def _what(value: object) -> str:
    return "an empty one" if isinstance(value, Mapping) else f"a {type(value).__name__}"
