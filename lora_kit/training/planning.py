"""The plan of a run that is about to begin, for the very batches of its second step, to be compared with it."""

from typing import TYPE_CHECKING, Any

from lora_kit.adaptation import record_of
from lora_kit.errors import OptionError
from lora_kit.memory.plan import plan
from lora_kit.memory.result import MemoryPlan

if TYPE_CHECKING:
    from lora_kit.methods import Method


def planned_for(
    trainer: Any, path: str, method: "Method", quantization: Any, dtype: Any, model_kwargs: Any
) -> MemoryPlan:
    """What the second optimizer step of this trainer will take: the first makes the optimizer's states.

    Raises:
        OptionError: for packed rows, of which a plan knows nothing.
        UnsupportedError: a model whose step cannot be simulated.
    """
    import torch

    args = trainer.args
    accumulation = args.gradient_accumulation_steps
    with torch.random.fork_rng([]):
        batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2 * accumulation), strict=False)]
    if any("position_ids" in batch for batch in batches):
        raise OptionError("plan=True with packing: rows that are packed cannot be planned; pass packing=False.")
    second = batches[accumulation:] or batches
    largest = max(second, key=lambda batch: batch["input_ids"].numel())
    rows, length = largest["input_ids"].shape
    return plan(
        path,
        method,
        quantization=quantization,
        task=record_of(trainer.model).task,
        batch_size=rows,
        seq_len=length,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        dtype=dtype,
        autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        padding=not bool(largest["attention_mask"].all()),
        accumulation=accumulation,
        clip=args.max_grad_norm or None,
        device=next(trainer.model.parameters()).device.type,
        model_kwargs=model_kwargs,
    )
