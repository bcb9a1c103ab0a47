"""What operations take on a CPU while they run, beside what they return.

Products by oneDNN and attention take scratch space too, some ten to some hundred kilobytes whatever the model, which is
left out.
"""

import functools
from typing import Any

import torch

from lora_kit.memory.simulate import World, unpacked


def _cast_operands(args: tuple, kwargs: dict[str, Any]) -> int:
    """Operands of another dtype than the result's are copied whole before they are combined."""
    tensors = [value for value in args[:2] if isinstance(value, torch.Tensor)]
    if len(tensors) < 2 or tensors[0].dtype == tensors[1].dtype:
        return 0
    common = torch.result_type(*tensors)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common and t.dim())


CPU = World(
    workspaces={
        **{f"aten::{name}": _cast_operands for name in ("add", "add_", "sub", "mul", "mul_", "div")},
        "bitsandbytes::gemm_4bit": functools.partial(unpacked, a_scale=4),
    }
)
