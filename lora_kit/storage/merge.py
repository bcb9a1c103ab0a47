"""`merge`: adapter and 16-bit base become one plain model, and the rounding that costs is measured."""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import base as base_models
from lora_kit import sharing
from lora_kit.adaptation import record_of
from lora_kit.errors import CannotMergeError, OptionError
from lora_kit.messages import say
from lora_kit.storage import config as settings
from lora_kit.storage import stored, units
from lora_kit.storage.load import load
from lora_kit.storage.rounding import in_float32, merge_layers_, unloaded
from lora_kit.storage.save import save, save_with, write_tokenizer
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn


BOUND = 0.1
"""Largest share of the adapter's effect that a merge may cost."""


@dataclass(frozen=True)
class Merged:
    """Where the merged model is, and how far its logits are from the adapter's."""

    path: Path
    dtype: str
    """Dtype of the written weights: the base's own, or the one asked for."""
    drift: float
    """Mean |Δ logit| between the merged model and base + adapter, both on 16-bit base weights, computed in float32."""
    effect: float | None
    """Mean |Δ logit| between base + adapter and base alone; None for a model trained in full."""
    lost: dict[str, float]
    """Layer → share of its update that was rounded away."""

    @property
    def share(self) -> float | None:
        """Drift as a share of the adapter's effect."""
        return self.drift / self.effect if self.effect else None

    def __str__(self) -> str:
        line = f"merged into {self.path} ({self.dtype}): mean |Δ logit| {self.drift:.2g}"
        if self.share is not None:
            line += f" = {100 * self.share:.2g} % of the adapter's effect"
        if self.lost:
            worst = max(self.lost, key=lambda name: self.lost[name])
            line += f"; rounding took at most {100 * self.lost[worst]:.2g} % of a layer's update ({worst})"
        return line


def merge(
    model_or_path: "str | Path | nn.Module",
    out: str | Path,
    *,
    base: "str | Path | nn.Module | None" = None,
    dtype: str | None = None,
    bound: float = BOUND,
) -> Merged:
    """Write base + adapter as one plain model of transformers. The model handed in is not changed.

    The update is added to the base's 16-bit weights in float32 and rounded once, to the base's own dtype, layer by
    layer; never into quantized weights, where rounding can be larger than the whole adapter. On a quantized base the
    16-bit weights are read again from where it came from. Where one side of a pair of tied weights carries the adapter,
    the pair is untied and both are written. Then the merged model is measured against the adapter.

    Args:
        model_or_path: an adapted model, or the folder of a saved one.
        out: folder for the merged model.
        base: the 16-bit base, as a hub id, a path or a loaded model. None: what the adapter sits on, or was saved with.
        dtype: of the written weights: bfloat16, float16 or float32. None: the base's own.
        bound: largest drift of the logits, as a share of the adapter's effect, at which the result is still written.

    Returns:
        Where it was written, and the drift that was measured on a few sequences of random tokens and for each layer.

    Raises:
        CannotMergeError: a prefix, a quantized base whose 16-bit weights are not at hand, or a merge that would round
            away more than `bound`.
        OptionError: a value that is not accepted.
    """
    import torch

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise OptionError(
            f"dtype must be one of: float32, bfloat16, float16, or None for the base's own; got {dtype!r}."
        )
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0:
        raise OptionError(f"bound must be a share of at least 0, such as 0.1, got {bound!r}.")
    adapted, own, source = _adapted(model_or_path, base)
    target = own if dtype is None else getattr(torch, dtype)
    whole = not hasattr(adapted, "get_base_model")
    batch = _probe(adapted)
    with_adapter = _logits(adapted, batch)
    effect, lost = None, {}
    if not whole:
        _refuse_conflict(adapted)
        with adapted.disable_adapter():
            effect = float((with_adapter - _logits(adapted, batch)).abs().mean())
        sharing.untie(adapted)
        lost = merge_layers_(adapted, target if dtype is not None else None)
        merged = unloaded(adapted)
        heads = [path for path in record_of(adapted).heads if path]
        for path in heads:
            merged.get_submodule(path).to(target)
    else:
        merged = adapted
    if whole or dtype is not None:
        merged.to(target)
    drift = float((with_adapter - _logits(merged, batch)).abs().mean())
    for attribute in ("lora_kit_record", "peft_config"):
        merged.__dict__.pop(attribute, None)
    merged.config.dtype = target
    result = Merged(Path(out), str(target).removeprefix("torch."), drift, effect, lost)
    if result.share is not None and result.share > bound:
        raise CannotMergeError(
            f"merging in {result.dtype} would change the logits by {100 * result.share:.0f} % of the adapter's effect "
            f"(mean |Δ logit| {drift:.2g}), above the bound of {100 * bound:.2g} %: the update is small beside the "
            "weights' rounding step. Nothing was written. merge(..., dtype='float32') keeps it, or load(path, base) "
            "keeps the adapter separate."
        )
    save_with(merged, out, lambda staging: write_tokenizer(source, staging))
    say(str(result))
    return result


def _adapted(model_or_path: Any, base: Any) -> "tuple[Model, torch.dtype, str | None]":
    """(the adapted model on 16-bit weights, ours to change, on the CPU; the base's dtype; where the base came from)."""
    import torch
    from torch import nn

    if isinstance(model_or_path, nn.Module):
        record = record_of(model_or_path)
        _refuse_prefix(record.method)
        dtype = getattr(torch, record.base_dtype)
        if base is None and record.quantization == "16bit":
            # what is in memory is the truth, whatever the files say
            return copy.deepcopy(model_or_path).cpu().eval(), dtype, record.base
        if base is None and (
            record.base is None or (base_models.tokenizer_of(record.base) is None and not _is_there(record.base))
        ):
            raise CannotMergeError(
                f"the base is in {record.quantization} and its 16-bit weights are not at hand"
                + (f" ({record.base} cannot be read)" if record.base else "")
                + ". Give merge(model, out, base=...) a hub id, a path or a 16-bit model; or keep the adapter separate."
            )
        with tempfile.TemporaryDirectory() as folder:
            save(model_or_path, folder)
            return _from_folder(Path(folder), base or record.base)
    folder_path = Path(model_or_path)
    return _from_folder(folder_path, base)


def _is_there(path: str) -> bool:
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        return False
    return True


def _from_folder(folder: Path, base: Any) -> "tuple[Model, torch.dtype, str | None]":
    import torch
    from torch import nn

    root = units.current(folder)
    if (root / settings.NAME).exists() and settings.read(root, stored.read(root)).is_prompt_learning:
        _refuse_prefix("prefix")
    if isinstance(base, nn.Module):
        record = record_of(base)
        if record.quantization != "16bit":
            raise CannotMergeError(f"the base given is in {record.quantization}; give a 16-bit one, or its id or path.")
        dtype = getattr(torch, record.base_dtype)
        return load(folder, copy.deepcopy(base).cpu()), dtype, record.base
    adapted = load(folder, base, device="cpu")
    record = record_of(adapted)
    return adapted, getattr(torch, record.base_dtype), record.base


def _refuse_prefix(method: str) -> None:
    if method == "prefix":
        raise CannotMergeError(
            "a prefix cannot be merged: its keys and values stand beside the weights, not in them. Keep the folder "
            "that save() wrote and load it with load(path, base=...)."
        )


def _refuse_conflict(adapted: Model) -> None:
    pair = sharing.conflict(adapted, record_of(adapted).name)
    if pair is not None:
        raise CannotMergeError(
            f"{pair[0]} and {pair[1]} share one weight in the base but carry different adapters, so no merged weight "
            "can be right for both. Keep the adapter separate; adapters that lora_kit makes are one a weight."
        )


def _probe(model: Model) -> dict[str, Any]:
    """Two sequences of random tokens: (2, 24)."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (2, 24), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and "classification" not in (record_of(model).task or ""):
        batch["decoder_input_ids"] = ids
    return batch


def _logits(model: Model, batch: dict[str, Any]) -> "torch.Tensor":
    import torch

    model.eval()
    with torch.no_grad(), in_float32(model):
        output = model(**batch)
    logits = getattr(output, "logits", None)
    return (logits if logits is not None else output.start_logits).float()
