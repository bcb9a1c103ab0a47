"""A plan against one real step on this machine."""

import copy
from dataclasses import dataclass
from typing import Any

from lora_kit.adaptation import adapt
from lora_kit.errors import OptionError
from lora_kit.memory.result import MemoryPlan, size


@dataclass(frozen=True)
class Check:
    """What was planned and what was measured, in bytes."""

    planned: int
    measured: int

    @property
    def error(self) -> float:
        """planned / measured − 1."""
        return self.planned / self.measured - 1

    def __str__(self) -> str:
        return f"planned {size(self.planned)}, measured {size(self.measured)}: {100 * self.error:+.2f} %"


def check(plan: MemoryPlan) -> Check:
    """Run the planned step here, on a model with random weights, and compare the peaks.

    On the CPU the live bytes of all tensors are measured, on CUDA `torch.cuda.max_memory_allocated`.

    Raises:
        OptionError: for a plan for CUDA on a machine without.
    """
    from lora_kit.memory import step as steps
    from lora_kit.memory.tracker import PeakBytes, resident_tensors

    model, batch, optimizer, step = ready(plan)
    steps.run(model, batch, optimizer, step)
    inputs = [value for value in batch.values() if hasattr(value, "untyped_storage")]
    with PeakBytes(plan.settings["device"], [*resident_tensors(model, optimizer), *inputs]) as memory:
        steps.run(model, batch, optimizer, step)
    return Check(plan.peak, memory.peak)


def ready(plan: MemoryPlan) -> tuple[Any, dict[str, Any], Any, Any]:
    """(model, batch, optimizer, step) as planned, with random weights, on the planned device."""
    import torch

    from lora_kit import base
    from lora_kit.memory import step as steps

    blueprint, step, device = plan._blueprint, plan._step, plan.settings["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "the plan is for CUDA, and this torch sees no CUDA device; plan(..., device='cpu') to check it here."
        )
    with torch.device(device):
        build = base.builder(blueprint.config, blueprint.task)
        model: Any = build(copy.deepcopy(blueprint.config), dtype=blueprint.dtype, **dict(blueprint.extra))
    if blueprint.checkpointing:
        base.checkpoint(model)
    model = adapt(model, blueprint.method, quantization=blueprint.bits, lean=plan.settings["lean"])
    if blueprint.checkpointing and blueprint.method.word != "full":
        model.enable_input_require_grads()
    optimizer = steps.OPTIMIZERS[step.optimizer](steps.trained(model))
    batch = steps.batch_of(model, blueprint.task, step)
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    steps.settle(steps.trained(model), optimizer)
    return model, batch, optimizer, step
