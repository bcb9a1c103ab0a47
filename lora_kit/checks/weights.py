"""The numbers in the weights: all finite, and what of the update would be left after merging."""

from typing import TYPE_CHECKING, Any

from lora_kit import sharing
from lora_kit.checks.report import Check, failed, many, passed, share, skipped, warned
from lora_kit.checks.subject import Subject
from lora_kit.errors import listing
from lora_kit.methods import Native

if TYPE_CHECKING:
    import torch

CHUNK = 2**24
"""Entries that are looked at together: the answer to each takes a byte."""
LAYERS = 8
"""How many layers a merge is tried on."""


def finite(subject: Subject) -> Check:
    """No weight is NaN or infinite, in the base or in the adapter."""
    name = "weights"
    bad, entries = [], 0
    for path, p in subject.model.named_parameters():
        for tensor in _numbers(p):
            entries += tensor.numel()
            if any(not bool(chunk.isfinite().all()) for chunk in tensor.detach().reshape(-1).split(CHUNK)):
                bad.append(path)
                break
    if bad:
        mine = [path for path in bad if path in subject.trained]
        return failed(
            name,
            f"{many(len(bad), 'tensor')} with NaN or infinite numbers: {listing(bad, 3)}",
            "model = load(last_good_folder, base, train=True)"
            if mine
            else "model = adapt(path), from files that are whole",
        )
    return passed(name, f"{entries:,} numbers, all finite")


def _numbers(parameter: Any) -> "list[torch.Tensor]":
    """The parameter, or of quantized codes the scales, which are what can be NaN."""
    if parameter.is_meta:
        return []
    if parameter.is_floating_point():
        return [parameter]
    state = getattr(parameter, "quant_state", None)
    scales = [getattr(state, "absmax", None), getattr(getattr(state, "state2", None), "absmax", None)]
    scales.append(getattr(parameter, "SCB", None))
    return [scale for scale in scales if scale is not None and scale.is_floating_point()]


def merge_drift(subject: Subject) -> Check:
    """How much of the update would be rounded away in the base's dtype."""
    import torch

    name, record = "merge", subject.record
    if subject.is_prompt:
        return skipped(name, "what stands in front of the keys is not merged")
    if not subject.adapted:
        return skipped(name, "a whole model is saved, not merged")
    if record.quantization != "16bit":
        where = f" of {record.base}" if record.base else "; give merge(model, out, base=...)"
        return skipped(name, f"merge() goes back to the 16-bit files{where}")
    layers = {
        path: layer
        for path, layer in subject.lora_layers.items()
        if not layer.lora_variant and not hasattr(layer, "parameter_name") and not layer.merged
    }
    if subject.method is Native or not layers or sharing.started_elsewhere(subject.model):
        return skipped(name, "measured by merge() itself")
    lost = size = 0.0
    paths = list(layers)[:: max(1, len(layers) // LAYERS)][:LAYERS]
    for path in paths:
        layer = layers[path]
        weight = layer.get_base_layer().weight
        with torch.no_grad():
            update = layer.get_delta_weight(record.name).float()
            exact = weight.float() + update
            lost += float((exact.to(weight.dtype).float() - exact).abs().sum())
            size += float(update.abs().sum())
    if not size:
        return skipped(name, "the adapter is new: there is nothing to merge yet")
    part = lost / size
    found = f"{share(part)} of the update would be rounded away in {record.base_dtype} ({len(paths)} layers tried)"
    if part > 0.1:
        return warned(name, found, "keep the adapter apart: save(model, path); model = load(path, base)")
    return passed(name, found)
