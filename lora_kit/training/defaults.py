"""The method's own learning rate, weight decay and warm-up, so that one training script serves every method."""

from typing import TYPE_CHECKING, Any

from lora_kit.adaptation import base_of, record_of
from lora_kit.errors import NothingToTrainError, OptionError
from lora_kit.methods import METHODS, Method, Native
from lora_kit.types import Model

if TYPE_CHECKING:
    pass


def _method_of(model: Model) -> type[Method]:
    return METHODS.get(record_of(model).method, Native)


def _rates(model: Model, lr: float | None) -> tuple[float, float]:
    """(learning rate, learning rate of heads); a rate given by the caller keeps the method's ratio between them."""
    if lr is not None and not lr > 0:
        raise OptionError(f"lr must be above 0, got {lr!r}.")
    method, record = _method_of(model), record_of(model)
    rate = method.learning_rate(record.parameters, record.task)
    head = method.learning_rate(record.parameters, record.task, head=True)
    return (rate, head) if lr is None else (lr, lr * head / rate)


def param_groups(model: Model, lr: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups that carry the method's learning rate and weight decay.

    Args:
        model: from `adapt`, `load`, or plain PEFT.
        lr: learning rate to use instead of the method's own; heads keep their ratio to it.

    Returns:
        Groups for any torch optimizer: `params`, `lr`, `weight_decay`, and a `name` for logs.

    Raises:
        NothingToTrainError: nothing in the model is trainable.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lora_kit import adapt
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> optimizer = torch.optim.AdamW(param_groups(adapt(LlamaForCausalLM(config), rank=4)))
        >>> optimizer.param_groups[0]["name"], optimizer.param_groups[0]["weight_decay"]
        ('adapter', 0.0)
    """
    record, method = record_of(model), _method_of(model)
    rate, head_rate = _rates(model, lr)
    faster = float(record.options.get("lora_plus", 1.0))
    in_heads = {id(p) for path in record.heads for p in base_of(model).get_submodule(path).parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, step, decay = "adapter", rate, method.weight_decay
        if id(parameter) in in_heads:
            key, step, decay = "head", head_rate, 0.0
        elif method.word == "full":
            # biases and norms are not pulled towards zero
            key, decay = ("weights", decay) if parameter.dim() >= 2 else ("biases and norms", 0.0)
        elif faster != 1.0 and ".lora_B." in name:
            key, step = "adapter B", rate * faster  # LoRA+
        group = {"params": [], "lr": step, "weight_decay": decay, "name": key}
        groups.setdefault(key, group)["params"].append(parameter)
    if not groups:
        frozen = sum(1 for _ in model.parameters())
        raise NothingToTrainError(
            f"nothing in this model is trainable: all {frozen} tensors are frozen. Call adapt(model, ...), or "
            "load(path, ..., train=True) to go on."
        )
    return list(groups.values())


def training_defaults(model: Model) -> dict[str, Any]:
    """Fields of `transformers.TrainingArguments` with the method's learning rate, weight decay and warm-up.

    Pass your own on top: `TrainingArguments(**{**training_defaults(model), "learning_rate": 1e-4}, output_dir="out")`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lora_kit import adapt
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> sorted(training_defaults(adapt(LlamaForCausalLM(config), rank=4)))
        ['bf16', 'learning_rate', 'lr_scheduler_type', 'max_grad_norm', 'warmup_steps', 'weight_decay']
    """
    record, method = record_of(model), _method_of(model)
    rate, _ = _rates(model, None)
    return {
        "learning_rate": rate,
        "weight_decay": method.weight_decay,
        # a number below 1 is a share of all steps
        "warmup_steps": method.warmup,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        # float32 weights of a bfloat16 model: compute in bfloat16 as before, update in float32
        "bf16": record.method == "full" and record.base_dtype == "bfloat16" and _has(model, "float32"),
    }


def _has(model: Model, dtype: str) -> bool:
    return any(str(p.dtype) == f"torch.{dtype}" for p in model.parameters())
