"""Stacks of matrices, as mixture-of-experts models hold them: packed into 8 or 4 bit, and with an adapter.

A stack is one parameter of shape (experts, ·, ·), so neither bitsandbytes nor PEFT can replace a module for it; the
weight of a linear layer with a forward of its own is treated the same way. Packed, the parameter holds bytes, and the
dense stack stands in its place while the module that owns it runs. Adapted, PEFT's `ParamWrapper` holds `A` and `B`,
and `W + (alpha / rank) · B A` stands in its place. Both ways an attribute of the one instance is covered for the time
of one forward; there is no parametrization. The dense stacks are made again for the backward pass, not kept for it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_kit import weightless
from lora_kit.errors import CannotMergeError, StorageError
from lora_kit.lean.layers import SETTINGS
from lora_kit.lean.low_rank_stack import LowRankStack
from lora_kit.lean.rebuilt import not_kept
from lora_kit.types import Model

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

PACKED = "lora_kit_packed"
_GUARDS = "lora_kit_guards"


class Packed:
    """How to get a dense stack back from its bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, bits: int):
        self.shape = shape
        self.dtype = dtype
        self.bits = bits


def is_packed(module: Model, name: str) -> bool:
    return name in module.__dict__.get(PACKED, {})


def packed_names(module: Model) -> list[str]:
    """The parameters of this module that are packed."""
    return list(module.__dict__.get(PACKED, {}))


def refuse_to_save(model: Model, *args: Any, **kwargs: Any) -> None:
    """Stands for `save_pretrained` of a base with packed stacks, for which transformers has no file format."""
    raise StorageError(
        f"this {type(model).__name__} holds quantized experts, which transformers' files have no place for. Save the "
        "adapter with lora_kit.save, or write a 16-bit model with lora_kit.merge."
    )


def shape_of(module: Model, name: str) -> tuple[int, ...] | None:
    """The shape of a packed stack, or None for a plain parameter."""
    packed = module.__dict__.get(PACKED, {}).get(name)
    return packed.shape if packed is not None else None


def pack_(module: Model, name: str, config: "BitsAndBytesConfig") -> None:
    """Replace a stack by its 8- or 4-bit bytes, in place.

    4 bit is bitsandbytes' NF4 (or FP4) over the whole stack, 8 bit is one scale per row of each matrix, absmax / 127.
    The matrix products run in the dtype that the stack had.
    """
    weight = module._parameters[name].data
    packed, scale = packed_form(weight, config)
    module._parameters[name] = packed
    register(module, name, Packed(tuple(weight.shape), weight.dtype, 4 if config.load_in_4bit else 8), scale)


def packed_form(weight: torch.Tensor, config: "BitsAndBytesConfig") -> tuple[nn.Parameter, torch.Tensor | None]:
    """(the parameter that holds the bytes, the scales of 8-bit rows)."""
    import bitsandbytes as bnb

    if weight.is_meta:
        return (weightless.four_bit(weight, config), None) if config.load_in_4bit else weightless.eight_bit_rows(weight)
    if config.load_in_4bit:
        made = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        return made.to(weight.device), None
    # in place of a float32 copy of the whole stack, one matrix at a time
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(*weight.shape[:-1], 1, dtype=torch.float32, device=weight.device)
    matrices = (weight, codes, scale) if weight.dim() == 3 else (weight[None], codes[None], scale[None])
    for matrix, code, step in zip(*matrices, strict=True):
        exact = matrix.float()
        step.copy_(exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127)
        code.copy_((exact / step).round_())
    return nn.Parameter(codes, requires_grad=False), scale


def register(module: Model, name: str, packed: Packed, scale: torch.Tensor | None) -> None:
    """Note that a parameter is packed, and have the dense stack stand in its place while the module runs."""
    if PACKED not in module.__dict__:
        module.__dict__[PACKED] = {}
        module.register_forward_pre_hook(_unpack_before)
        module.register_forward_hook(_drop_after, always_call=True)
    module.__dict__[PACKED][name] = packed
    if scale is not None:
        module.register_buffer(f"{name}_scale", scale, persistent=False)


def dense(module: Model, name: str) -> torch.Tensor:
    """The stack as a plain tensor, unpacked if need be; it carries no gradient."""
    weight = module._parameters[name]
    packed = module.__dict__.get(PACKED, {}).get(name)
    if packed is None:
        return weight
    with torch.no_grad():
        if packed.bits == 4:
            import bitsandbytes as bnb

            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).view(packed.shape)
        return (weight.data * module._buffers[f"{name}_scale"]).to(packed.dtype)


def _unpack_before(module: nn.Module, inputs: tuple) -> None:
    for name in module.__dict__[PACKED]:
        # an adapter may have put its sum there already
        if name not in module.__dict__:
            module.__dict__[name] = dense(module, name)
            guard = not_kept(module.__dict__[name], functools.partial(dense, module, name), module, name)
            guard.__enter__()
            module.__dict__.setdefault(_GUARDS, []).append(guard)


def _drop_after(module: nn.Module, inputs: tuple, output: Any) -> None:
    for guard in reversed(module.__dict__.pop(_GUARDS, [])):
        guard.__exit__(None, None, None)
    for name in module.__dict__[PACKED]:
        module.__dict__.pop(name, None)


@contextmanager
def shown(model: Model) -> Iterator[None]:
    """Let packed stacks look like dense ones, by shape and dtype, while PEFT measures them."""
    covered = []
    for module in model.modules():
        for name, packed in module.__dict__.get(PACKED, {}).items():
            device = module._parameters[name].device
            # one element seen as many: takes no memory
            module.__dict__[name] = torch.empty(1, dtype=packed.dtype, device=device).expand(packed.shape)
            covered.append((module, name))
    try:
        yield
    finally:
        for module, name in covered:
            module.__dict__.pop(name, None)


class AdaptedParameter(ParamWrapper):
    """PEFT's adapter of one parameter, without a parametrization: `W + scaling · B A` for the time of the forward.

    Same parameters, same files, same numbers as `ParamWrapper`, but it works on packed stacks (where PEFT 0.21 leaves
    its parametrization behind) and forms the sum once per forward instead of twice.
    """

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters or () if name in self.lora_A]
        layer = self.get_base_layer()
        if not names:
            yield
            return
        if self._stays_apart(names):
            with self._apart(layer, names[0]):
                yield
            return

        def summed() -> torch.Tensor:
            weight = dense(layer, self.parameter_name)
            for name in names:
                weight = self._sum(weight, name)
            return weight

        layer.__dict__[self.parameter_name] = weight = summed()
        try:
            with not_kept(weight, summed, layer, self.parameter_name):
                del weight
                yield
        finally:
            layer.__dict__.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if is_packed(self.get_base_layer(), self.parameter_name):
            raise CannotMergeError(
                f"{self.parameter_name!r} is quantized, and an update merged into quantized weights can round away. "
                "Use lora_kit.merge(model, out), which goes to the 16-bit base."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _stays_apart(self, names: list[str]) -> bool:
        """Whether the lean step is on, and the update can be kept beside the weight instead of added to it."""
        on = self.__dict__.get(SETTINGS, False) and torch.is_grad_enabled() and len(names) == 1
        return on and not torch.compiler.is_compiling()

    def _sum_was_needed(self) -> None:
        """The model does something else with its stack than multiply by it: from the next step on it gets the sum."""
        self.__dict__[SETTINGS] = False

    @contextmanager
    def _apart(self, layer: Model, name: str) -> Iterator[None]:
        make = functools.partial(dense, layer, self.parameter_name)
        weight = make()
        left, right = self._factors(weight.shape, name)
        layer.__dict__[self.parameter_name] = LowRankStack.of(
            weight, left, right, self.scaling[name], self._sum_was_needed
        )
        packed = is_packed(layer, self.parameter_name)
        guard = not_kept(weight, make, layer, self.parameter_name) if packed else nullcontext()
        del weight, left, right
        try:
            with guard:
                yield
        finally:
            layer.__dict__.pop(self.parameter_name, None)

    def _factors(self, shape: tuple[int, ...], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the update is the product of: (..., shape[-2], rank) and (..., rank, shape[-1])."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if len(shape) == 2:
            return b, a
        rank, count = self.r[name], shape[0]
        a = a.reshape(count, rank, -1)  # (experts, rank, in)
        b = b.reshape(-1, rank, count).permute(2, 0, 1)  # (experts, out, rank)
        if shape[1] == b.shape[1] and shape[2] == a.shape[2] and self._out_comes_first():
            return b, a
        return a.transpose(1, 2), b.transpose(1, 2)

    def _sum(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """`W + scaling · B A`, in the dtype of W; (experts, ·, ·) or, for a single matrix, (out, in)."""
        left, right = (factor.to(weight.dtype) for factor in self._factors(weight.shape, name))
        with torch.autocast(weight.device.type, enabled=False):
            add = torch.addmm if weight.dim() == 2 else torch.baddbmm
            return add(weight, left, right, alpha=self.scaling[name])

    def _out_comes_first(self) -> bool:
        """Whether PEFT took the stack for (experts, out, in); older versions know (experts, in, out) only."""
        return bool(getattr(self, "_did_swap_in_out_features", False))


def adapt_parameters_(model: Model) -> None:
    """Turn PEFT's parameter adapters of this model, in place, into ours."""
    for module in model.modules():
        if type(module) is ParamWrapper:
            module.__class__ = AdaptedParameter


def merged_with_its_twin(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Stands for `merge` of a layer whose weight and adapter are another layer's too: that one merges them."""
    from peft.tuners.tuners_utils import check_adapters_to_merge

    layer.merged_adapters.extend(check_adapters_to_merge(layer, adapter_names))


def unmerged_with_its_twin(layer: Any) -> None:
    layer.merged_adapters.clear()
