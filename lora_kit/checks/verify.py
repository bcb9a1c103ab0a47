"""`verify`: proves, in seconds and before a long run, that a model will train, save and merge."""

from typing import TYPE_CHECKING, Any

from lora_kit.checks import labels, passes, rates, trained, weights
from lora_kit.checks.report import Check, Report, skipped
from lora_kit.checks.stored import save_and_load
from lora_kit.checks.subject import examine
from lora_kit.checks.untouched import untouched

if TYPE_CHECKING:
    from torch import nn

# what makes a forward pointless, or on a GPU fatal
_STOPPERS = ("token ids", "labels")


def verify(
    model: "nn.Module",
    batch: dict[str, Any],
    *,
    optimizer: Any = None,
    tokenizer: Any = None,
    lr: float | None = None,
) -> Report:
    """Look for what makes a fine-tuning run learn nothing, break, or lose what it learned. Nothing is changed.

    About ten forwards and one backward pass on the batch, and one save to a temporary folder. Weights, gradients,
    random states, modes and flags are afterwards bit by bit what they were; no optimizer step is taken. On top of what
    a training step needs, memory holds a copy of what an adapter trains, never one of the base.

    Args:
        model: from `adapt`, `load(..., train=True)`, plain PEFT or transformers, in any dtype.
        batch: one batch of training, as the model takes it, with labels. Tensors go to the model's device.
        optimizer: the one that will train. Its parameters and learning rates are looked at.
        tokenizer: says which tokens begin, end and pad a text, where the model's config does not.
        lr: learning rate, where there is no optimizer yet.

    Returns:
        A `Report`: `ok`, `failed`, `warned` and `passed` checks, each with the number that proves it and what to write
        instead. `print(report)` is a table, `report.raise_if_failed()` an error.

    Raises:
        OptionError: a model that is none, a batch that is no dict, an optimizer or a learning rate that is none.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lora_kit import adapt
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> ids = torch.randint(3, 64, (2, 8))
        >>> report = verify(adapt(LlamaForCausalLM(config), rank=4), {"input_ids": ids, "labels": ids})
        >>> report.ok, report["labels"].found
        (True, 'trained tokens in a row: median 7 of 8 (100 % of all)')
    """
    subject = examine(model, batch, optimizer=optimizer, tokenizer=tokenizer, lr=lr)
    checks: list[Check] = []
    with untouched(subject.model):
        checks += trained.of_model(subject)
        checks.append(weights.finite(subject))
        checks += rates.of_optimizer(subject)
        checks += labels.of_batch(subject)
        stopped = [check.name for check in checks if check.name in _STOPPERS and check.status == "failed"]
        if stopped:
            checks += [skipped(name, f"not run, see {stopped[0]}") for name in passes.NAMES]
        else:
            checks += passes.of_passes(subject)
        checks.append(save_and_load(subject))
        checks.append(weights.merge_drift(subject))
    return Report(tuple(checks))
