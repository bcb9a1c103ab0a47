"""`merge`: adapter and 16-bit base become one plain model, and the rounding that costs is measured."""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import base as base_models
from lora_kit import sharing
from lora_kit.adaptation import record_of
from lora_kit.errors import CannotMergeError
from lora_kit.messages import say
from lora_kit.storage.load import load
from lora_kit.storage.save import save, write_tokenizer
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Merged:
    """Where the merged model is, and how far its logits are from the adapter's."""

    path: Path
    dtype: str
    """Dtype of the written weights: the base's own."""
    drift: float
    """Mean |Δ logit| between the merged model and base + adapter, both on 16-bit base weights."""
    effect: float | None
    """Mean |Δ logit| between base + adapter and base alone; None for a model trained in full."""

    @property
    def share(self) -> float | None:
        """Drift as a share of the adapter's effect."""
        return self.drift / self.effect if self.effect else None

    def __str__(self) -> str:
        line = f"merged into {self.path} ({self.dtype}): mean |Δ logit| {self.drift:.2g}"
        return line + (f" = {100 * self.share:.2g} % of the adapter's effect" if self.share is not None else "")


def merge(
    model_or_path: "str | Path | nn.Module", out: str | Path, *, base: "str | Path | nn.Module | None" = None
) -> Merged:
    """Write base + adapter as one plain model of transformers. The model handed in is not changed.

    The update is added to the base's 16-bit weights in float32 and rounded once, to the base's own dtype; never into
    quantized weights, where rounding can be larger than the whole adapter. On a quantized base the 16-bit weights
    are read again from where it came from.

    Args:
        model_or_path: an adapted model, or the folder of a saved one.
        out: folder for the merged model.
        base: the 16-bit base, as a hub id, a path or a loaded model. None: what the adapter sits on, or was saved with.

    Returns:
        Where it was written and the drift that was measured on a few sequences of random tokens.

    Raises:
        CannotMergeError: a prefix, or a quantized base whose 16-bit weights are not at hand.
    """
    adapted, dtype, source = _adapted_in_float32(model_or_path, base)
    whole = not hasattr(adapted, "get_base_model")
    batch = _probe(adapted)
    with_adapter = _logits(adapted, batch)
    effect = None
    if not whole:
        _refuse_conflict(adapted)
        with adapted.disable_adapter():
            effect = float((with_adapter - _logits(adapted, batch)).abs().mean())
        merged = adapted.merge_and_unload(safe_merge=True)
    else:
        merged = adapted
    # one rounding to the base's dtype; back in float32 only the rounding is left to measure
    merged = merged.to(dtype).float()
    drift = float((with_adapter - _logits(merged, batch)).abs().mean())
    merged.to(dtype)
    for attribute in ("lora_kit_record", "peft_config"):
        merged.__dict__.pop(attribute, None)
    folder = save(merged, out)
    write_tokenizer(source, folder)
    result = Merged(folder, str(dtype).removeprefix("torch."), drift, effect)
    say(str(result))
    return result


def _adapted_in_float32(model_or_path: Any, base: Any) -> "tuple[Model, torch.dtype, str | None]":
    """(the adapted model in float32 on the CPU, the dtype to write, where the base came from)."""
    import torch
    from torch import nn

    if isinstance(model_or_path, nn.Module):
        record = record_of(model_or_path)
        _refuse_prefix(record.method)
        dtype = getattr(torch, record.base_dtype)
        if base is None and record.quantization == "16bit":
            # what is in memory is the truth, whatever the files say
            twin = copy.deepcopy(model_or_path).cpu().float().eval()
            return twin, dtype, record.base
        if base is None and (
            record.base is None or (base_models.tokenizer_of(record.base) is None and not _is_there(record.base))
        ):
            raise CannotMergeError(
                f"the base is in {record.quantization} and its 16-bit weights are not at hand"
                + (f" ({record.base} cannot be read)" if record.base else "")
                + ". Give base=, a hub id, a path or a 16-bit model; or keep the adapter separate."
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

    if (folder / "adapter_config.json").exists():
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            _refuse_prefix("prefix")
    given = base
    if isinstance(base, nn.Module):
        record = record_of(base)
        if record.quantization != "16bit":
            raise CannotMergeError(f"the base given is in {record.quantization}; give a 16-bit one, or its id or path.")
        dtype = getattr(torch, record.base_dtype)
        given = copy.deepcopy(base).cpu().float()
        adapted = load(folder, given)
        return adapted, dtype, record.base
    adapted = load(folder, given, device="cpu")
    record = record_of(adapted)
    return adapted.float(), getattr(torch, record.base_dtype), record.base


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
    with torch.no_grad():
        output = model(**batch)
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output.start_logits
