"""What a quantized weight is made of, without its values: for models on `meta`, whose memory is to be known beforehand.

Sizes and dtypes are bitsandbytes' own: codes of half a byte or one, a scale for each block of 64 (or each row), which
double quantization packs again by 256.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

BLOCK = 64
NESTED_BLOCK = 256


def four_bit(weight: torch.Tensor, config: "BitsAndBytesConfig") -> Any:
    """bitsandbytes' 4-bit parameter for a weight on `meta`."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    nested, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    storage = config.bnb_4bit_quant_storage
    blocks = -(-weight.numel() // BLOCK)
    codes = -(-weight.numel() // (2 * storage.itemsize))
    packed = torch.empty(codes, 1, dtype=storage, device="meta")
    common = {"shape": weight.shape, "code": _empty(16), "blocksize": BLOCK, "quant_type": kind, "dtype": weight.dtype}
    if nested:
        inner = QuantState(
            absmax=_empty(-(-blocks // NESTED_BLOCK)), code=_empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state = QuantState(absmax=_empty(blocks, torch.uint8), offset=_empty(), state2=inner, **common)
    else:
        state = QuantState(absmax=_empty(blocks), **common)
    return bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=storage,
        bnb_quantized=True,
    )


def eight_bit(weight: torch.Tensor) -> Any:
    """bitsandbytes' 8-bit parameter for a weight (out, in) on `meta`."""
    import bitsandbytes as bnb

    codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
    return bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=_empty(weight.shape[0]))


def eight_bit_rows(weight: torch.Tensor) -> tuple[nn.Parameter, torch.Tensor]:
    """(codes, scales) of a stack of matrices on `meta`, one scale a row."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
    return nn.Parameter(codes, requires_grad=False), torch.empty(*weight.shape[:-1], 1, device="meta")


def _empty(size: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(() if size is None else (size,), dtype=dtype, device="meta")
