"""One training step, described once: the plan simulates it, `check` and the benchmarks run it.

The order is Trainer's: forward and backward for each micro-batch, then clipping, the optimizer's step, and gradients
set to None.
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lora_kit.adaptation import base_of
from lora_kit.errors import OptionError, UnsupportedError, listing, nearest
from lora_kit.lean.optimizer import AdamW
from lora_kit.types import Model

OPTIMIZERS: dict[str, Callable[[list[Any]], Any]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adamw_loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "adamw_stochastic": lambda parameters: AdamW(parameters),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, foreach=False),
    "adamw_8bit": lambda parameters: _eight_bit(parameters, paged=False),
    "paged_adamw_8bit": lambda parameters: _eight_bit(parameters, paged=True),
}
"""Name → optimizer over these parameters. `adamw` is what `finetune` and Trainer use: torch's, fused."""


def optimizer_for(method: Any, name: str) -> str:
    """`adamw_stochastic` in the place of `adamw` where the method's weights are rounded stochastically."""
    return "adamw_stochastic" if name == "adamw" and getattr(method, "weights", None) == "stochastic" else name


@dataclass(frozen=True)
class Step:
    """What a training step is fed and how it goes on."""

    batch_size: int = 1
    """Rows of a micro-batch."""
    seq_len: int = 1024
    """Tokens of a row; of the input and of the target each, for an encoder-decoder."""
    padding: bool = False
    """Whether rows are padded, so that a mask is handed in."""
    optimizer: str = "adamw"
    autocast: torch.dtype | None = None
    clip: float | None = 1.0
    """Largest norm of the gradient; None: no clipping."""
    accumulation: int = 1
    """Micro-batches whose gradients are added up before the optimizer's step."""
    keep_outputs: bool = False
    """Whether the model's outputs live until the step's end, as in a loop that holds them; Trainer lets go of them."""
    use_cache: bool = False
    """Whether the model keeps keys and values, which is transformers' default outside of Trainer."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"plan: {name} must be an integer of at least 1, got {value!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(
                f"plan: unknown optimizer {self.optimizer!r}; accepted: {listing(OPTIMIZERS)}."
                f"{nearest(str(self.optimizer), OPTIMIZERS)}"
            )


def batch_of(model: Model, task: str, step: Step) -> dict[str, Any]:
    """A micro-batch of the right shapes: rows full of tokens, all of them labelled; a short first row if padded."""
    config: Any = model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 100
    shape = step.batch_size, step.seq_len
    special = {v for k, v in vars(config).items() if k.endswith("_token_id") and isinstance(v, int)}
    plain = next((i for i in range(vocabulary - 1, 0, -1) if i not in special), 0)
    ids = torch.full(shape, plain)
    end = getattr(config, "eos_token_id", None)
    if task == "classification" and config.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end  # what these classifiers read the state of
    batch: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in inspect.signature(base_of(model).forward).parameters:
        batch["use_cache"] = step.use_cache
    if step.padding:
        mask = torch.ones_like(ids)
        mask[0, step.seq_len - max(1, step.seq_len // 8) :] = 0
        batch["attention_mask"] = mask
    if task in ("causal-lm", "seq2seq-lm", "token-classification"):
        batch["labels"] = torch.zeros_like(ids) if task == "token-classification" else ids.clone()
    elif task == "classification":
        batch["labels"] = torch.zeros(step.batch_size, dtype=torch.long)
    elif task == "question-answering":
        batch["start_positions"] = batch["end_positions"] = torch.zeros(step.batch_size, dtype=torch.long)
    else:
        raise UnsupportedError(f"plan knows no batch for task={task!r}: images and sound come in sizes of their own.")
    return batch


def trained(model: Model) -> list[Any]:
    """The parameters that an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def run(
    model: Model,
    batch: dict[str, Any],
    optimizer: Any,
    step: Step,
    note: Callable[[str], None] = lambda phase: None,
) -> None:
    """One step of training; `note` is told each phase as it begins."""
    for _ in range(step.accumulation):
        note("forward")
        with _autocast(batch, step):
            output = model(**batch)
            loss = output.loss / step.accumulation if step.accumulation > 1 else output.loss
        if not step.keep_outputs:
            del output
        note("backward")
        loss.backward()
    note("clip")
    if step.clip is not None:
        torch.nn.utils.clip_grad_norm_(trained(model), step.clip)
    note("optimizer")
    optimizer.step()
    note("log")
    optimizer.zero_grad()
    output = loss = None
    note("between")


def evaluate(model: Model, batch: dict[str, Any], step: Step) -> None:
    """A forward without gradients in evaluation mode, which gives whole logits."""
    model.eval()
    try:
        with torch.no_grad(), _autocast(batch, step):
            model(**batch)
    finally:
        model.train()


def generate(model: Model, batch: dict[str, Any], step: Step) -> None:
    """The whole row read at once, and one token more from its keys and values, as `model.generate` does."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base_of(model).forward).parameters else {}
    ids = batch["input_ids"]
    model.eval()
    try:
        with torch.no_grad(), _autocast(batch, step):
            cache = model(input_ids=ids, use_cache=True, **last).past_key_values
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    finally:
        model.train()


def settle(parameters: Iterable[Any], optimizer: Any) -> None:
    """Have the optimizer make its states now, by a step with gradients of zero; no value changes but the count."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def _autocast(batch: dict[str, Any], step: Step) -> Any:
    if step.autocast is None:
        return nullcontext()
    return torch.autocast(batch["input_ids"].device.type, dtype=step.autocast)


def _eight_bit(parameters: list[Any], *, paged: bool) -> Any:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, is_paged=paged)
