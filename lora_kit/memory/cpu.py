"""What operations take on a CPU while they run, beside what they return.

Products by oneDNN and attention take scratch space too, some ten to some hundred kilobytes whatever the model, which is
left out.
"""

import math
from typing import Any

import torch

from lora_kit.memory.simulate import World


def _cast_operands(args: tuple, kwargs: dict[str, Any]) -> int:
    """Operands of another dtype than the result's are copied whole before they are combined."""
    tensors = [value for value in args[:2] if isinstance(value, torch.Tensor)]
    if len(tensors) < 2 or tensors[0].dtype == tensors[1].dtype:
        return 0
    common = torch.result_type(*tensors)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common and t.dim())


def _unpacked(args: tuple, kwargs: dict[str, Any]) -> int:
    """The matrix of a 4-bit product in 16 bit, and its scales where they are packed again."""
    x, shape = args[0], args[2]
    entries = math.prod(shape)
    return entries * x.element_size() + (4 * entries // 64 if kwargs.get("absmax_8bit") is not None else 0)


CPU = World(
    workspaces={
        **{f"aten::{name}": _cast_operands for name in ("add", "add_", "sub", "mul", "mul_", "div")},
        "bitsandbytes::gemm_4bit": _unpacked,
    }
)
