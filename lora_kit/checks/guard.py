"""`guard`: a run that stops at the first NaN, survives a lack of memory, and says what nobody else says."""

from pathlib import Path
from typing import Any

from lora_kit.errors import OptionError

_FORMS = (
    "guard(trainer) for transformers' or TRL's Trainer, Trainer(callbacks=[guard()]), or in a loop of your own "
    "with guard(model, optimizer) as step: loss = step(batch)"
)


def guard(
    *watched: Any, plan: Any = None, output: str | Path | None = None, split: bool = True, scaler: Any = None
) -> Any:
    """Watch a training run. What it computes stays the same, bit for bit, as long as nothing goes wrong.

    Three forms:

    - `guard(trainer)` changes this one trainer (its `training_step`, and one callback more) and returns it.
    - `Trainer(callbacks=[guard()])` does everything but going on after a lack of memory and passing over micro-batches
      without labels.
    - `with guard(model, optimizer) as step:` in a loop of one's own; `step(batch, scale=1.0)` is forward and backward
      of a micro-batch and returns its loss, detached. `scale=1/4` is for four micro-batches a step. The rest of the
      loop stays: `optimizer.step()`, a scheduler's, `optimizer.zero_grad()`.

    What is watched:

    - NaN and infinities, in the loss and in the gradients, before each step of the optimizer: the step is not taken and
      `NonFiniteError` names the module where they begin. On a GPU this reads one number a step, and whether a
      micro-batch has labels at all where these lie on the GPU.
    - Micro-batches without a labelled token, whose mean is NaN: passed over and counted. `step` returns NaN for them;
      in Trainer they add nothing to the step's loss, and a step that has no other is left out of the logged mean.
    - Memory: a micro-batch that does not fit runs in parts by rows, each with its share of the loss, so that the
      gradient is that of the whole (dropout is drawn anew; a loss that balances experts is that of the parts). Sizes
      that failed are split beforehand from then on. The optimizer sees the same batches. States that do not fit in the
      optimizer's first step are taken back (torch's Adam and AdamW).
    - Updates that 16-bit weights lose to rounding, a learning rate far from the method's own, and the plan's error: a
      line each.

    Args:
        watched: nothing, a trainer, or a model and its optimizer (accelerate's are looked through).
        plan: a `MemoryPlan`: after the second step one line compares its peak with the measured one. On CUDA that
            resets torch's peak statistics; on the CPU the second step is slow.
        output: folder to save the last good state in where a run is stopped.
        split: False to fail where a micro-batch does not fit.
        scaler: in a loop of one's own with float16 autocast: the `torch.amp.GradScaler`; `step` scales the loss by it.

    Returns:
        The trainer, a callback, or a context. On exit, also by an exception, every hook is off again.

    Raises:
        OptionError: none of the three forms, a plan for another device, an optimizer of another model.
        NothingToTrainError: no parameter is trainable.
        UnsupportedError: a quantized base without an adapter, or float16 weights under a GradScaler.
        NonFiniteError: while training, before the step.
        OutOfMemoryError: while training, where one row alone does not fit.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lora_kit import adapt, param_groups
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = adapt(LlamaForCausalLM(config), "lora", rank=4)
        >>> optimizer = torch.optim.AdamW(param_groups(model))
        >>> ids = torch.arange(12).reshape(2, 6)
        >>> with guard(model, optimizer) as step:
        ...     for _ in range(2):
        ...         loss = step({"input_ids": ids, "labels": ids})
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> bool(loss.isfinite())
        True
    """
    import torch
    from transformers import Trainer

    from lora_kit.checks.in_trainer import GuardCallback, attach
    from lora_kit.checks.loop import Loop

    _check(plan, output, split)
    if scaler is not None and len(watched) != 2:
        raise OptionError("scaler= is for a loop of your own; Trainer has its scaler itself (fp16=True).")
    if not watched:
        return GuardCallback(plan=plan, output=output)
    if len(watched) == 1 and isinstance(watched[0], Trainer):
        return attach(watched[0], plan=plan, output=output, split=split)
    if len(watched) == 2 and isinstance(watched[0], torch.nn.Module) and hasattr(watched[1], "param_groups"):
        return Loop(*watched, plan=plan, output=output, split=split, scaler=scaler)
    given = ", ".join(type(each).__name__ for each in watched)
    raise OptionError(f"guard({given}): accepted are {_FORMS}.")


def _check(plan: Any, output: Any, split: Any) -> None:
    from lora_kit.memory.result import MemoryPlan

    if plan is not None and not isinstance(plan, MemoryPlan):
        raise OptionError(f"plan must be what plan(model, ...) returns, got a {type(plan).__name__}.")
    if output is not None and (not isinstance(output, str | Path) or Path(output).is_file()):
        raise OptionError(f"output must be the path of a folder, got {output!r}.")
    if not isinstance(split, bool):
        raise OptionError(f"split must be True or False, got {split!r}.")
