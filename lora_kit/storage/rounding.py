"""What a merge rounds away: one rounding a weight, counted, and logits that show nothing but that."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_kit.types import Model

if TYPE_CHECKING:
    import torch


def merge_layers_(adapted: Model, dtype: "torch.dtype | None") -> dict[str, float]:
    """Merge every adapter into its layer, in place; layer → share of its update that rounding took.

    One layer at a time: its weights in float32, the update added, rounded once to `dtype` (None: the layer's own). A
    share is `Σ |rounded − exact| / Σ |update|`.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    shares: dict[str, float] = {}
    with torch.no_grad():
        for path, layer in adapted.named_modules():
            if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "merge"):
                continue
            weights = layer.get_base_layer().named_parameters(recurse=False)
            kept = {name: weight.detach().clone() for name, weight in weights}
            layer.float()
            layer.merge(safe_merge=True)
            lost = update = 0.0
            for name, weight in layer.get_base_layer().named_parameters(recurse=False):
                if name not in kept:
                    continue
                before, exact = kept[name], weight.detach()
                target = (dtype or before.dtype) if before.is_floating_point() else before.dtype
                weight.data = exact.to(target)
                lost += float((weight.detach().float() - exact).abs().sum())
                update += float((exact - before.float()).abs().sum())
            if update:
                shares[path.removeprefix("base_model.model.")] = lost / update
    return shares


@contextmanager
def in_float32(model: Model) -> Iterator[None]:
    """Every module computes in float32, one at a time: its 16-bit weights are cast when it is called, and put back.

    The values are those of the 16-bit weights; only the products are exact, so that two such forwards differ by their
    weights alone, where 16-bit forwards differ by their own noise.
    """
    handles = []

    def cast(module: Any, *_: Any) -> None:
        kept = module.__dict__.setdefault("_lora_kit_16_bit", [])
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize == 2:
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def restore(module: Any, *_: Any) -> None:
        for tensor, data in module.__dict__.pop("_lora_kit_16_bit", []):
            tensor.data = data

    for module in model.modules():
        if any(
            t is not None and t.dtype.itemsize == 2 for t in [*module._parameters.values(), *module._buffers.values()]
        ):
            handles.append(module.register_forward_pre_hook(cast))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            restore(module)


def unloaded(adapted: Model) -> Model:
    """The plain model out of PEFT's wrapping, with trained heads in their places, after its layers were merged."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="All adapters are already merged|Already following adapters", module="peft"
        )
        return adapted.merge_and_unload()
