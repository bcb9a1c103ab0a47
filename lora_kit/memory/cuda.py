"""What a step keeps on a CUDA device, simulated where there is none.

Fake tensors live on the CPU, because torch without CUDA cannot have others. Three things differ there: attention (flash
kernels without a mask in 16 bit, memory-efficient ones else), dropout (a mask of bytes, not of floats), and 8-bit
products (integers all through). Kernels also take memory that torch's operations do not show; `WORKSPACES` holds what
is known of it. There are constants here, none of them a model's.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_kit.lean.device import planned_for
from lora_kit.memory.ledger import Workspace
from lora_kit.memory.simulate import World, unpacked
from lora_kit.types import Model

BLOCK = 512
"""Bytes to which torch's CUDA allocator rounds every request."""
CONTEXT = 550 * 2**20
"""Bytes of the CUDA context and the libraries' kernels, outside of what torch counts; 0.3 to 0.6 GiB by driver."""
WORKSPACE = 8_519_680
"""Bytes that cuBLAS gets from torch's allocator and keeps: 8.1 MiB a handle and stream; 32 MiB on Hopper cards."""
FRAGMENTS = 0.015
"""Share of what is allocated that the allocator loses to splitting, for rows of one length: with it and the context, a
published table of the longest contexts on cards of 16 to 80 GB comes out within 3 % (`benchmarks/outside.json`)."""


class Shapes(TorchFunctionMode):
    """Attention and dropout as CUDA's kernels would run and keep them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is functional.dropout:
            return dropout(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(args[0])
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """`loss.backward()` with this mode on, for layers that are run again; torch's own would take it away."""
        engine: Any = torch.autograd.Variable._execution_engine
        with self:
            engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's attention, by the kernel that it would choose on CUDA."""
    aten: Any = torch.ops.aten
    no_mask = attn_mask is None or type(attn_mask).__name__ == "CausalBias"
    width = query.shape[-1]
    if no_mask and query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and value.shape[-1] == width:
        lacking = -width % 8
        padded = [functional.pad(t, (0, lacking)) if lacking else t for t in (query, key, value)]
        found = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return found[..., :width] if lacking else found
    if enable_gqa and query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    bias = None if no_mask else _bias(attn_mask, query, key)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """What the kernel is given for a mask: numbers, rows aligned to 16, for every head."""
    if mask.dtype == torch.bool:
        nothing, out = query.new_zeros(()), query.new_full((), -math.inf)
        mask = torch.where(mask, nothing, out)
    lacking = -mask.shape[-1] % 16
    if lacking:
        mask = functional.pad(mask, (0, lacking))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that keeps a byte for each entry."""
    if not training or p == 0.0:
        return input
    return torch.ops.aten.native_dropout(input, p, True)[0]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _flash_backward(args: tuple, kwargs: dict[str, Any]) -> int:
    """Sums for the queries' gradient in float32, and the keys' and values' for every head where heads share them."""
    query, key = args[1], args[2]
    batch, heads, tokens, width = query.shape
    tokens, width = _up(tokens, 128), _up(width, 32 if width <= 128 else 64)
    size = 4 * batch * heads * tokens * (width + 1)
    if heads != key.shape[1]:
        size += 2 * batch * key.shape[2] * heads * query.shape[-1] * query.element_size()
    return size


WORKSPACES: dict[str, Workspace] = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    # unpacked for long inputs
    "bitsandbytes::gemm_4bit": functools.partial(unpacked, a_scale=8),
}


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    with planned_for("cuda"), Shapes():
        yield


def _prepare(model: Model) -> None:
    """Have 8-bit layers multiply integers, as bitsandbytes does on CUDA; without outliers, whose number is data's."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and "state" in vars(module):  # PEFT has a class of that name
            module.training = False
            module.state.threshold = 0.0


CUDA = World(BLOCK, WORKSPACE, WORKSPACES, _as_on_cuda, _prepare)
