"""Two comparisons of logits: with the adapter and without it, and padded on the left and on the right."""

import math

from lora_kit import sharing
from lora_kit.checks.report import Check, failed, number, passed, skipped, warned
from lora_kit.checks.running import logits_of, tolerance
from lora_kit.checks.subject import Subject
from lora_kit.checks.tokens import pads_left
from lora_kit.checks.untouched import flags


def start(subject: Subject) -> Check:
    """A new adapter changes nothing yet; one that was loaded does."""
    name = "start"
    if not subject.adapted:
        return skipped(name, "there is no adapter")
    if subject.is_prompt:
        return skipped(name, "keys and values in front change the output from the start")
    if sharing.started_elsewhere(subject.model):
        return skipped(name, "PiSSA starts from a part of the base's weights")
    if any(getattr(module, "merged", False) is True for module in subject.base.modules()):
        return skipped(name, "the adapter is merged; taking it out would round the base")
    with_adapter = logits_of(subject)
    with flags(subject.model), subject.model.disable_adapter():
        without = logits_of(subject)
    if with_adapter is None or without is None:
        return skipped(name, "the model gives no logits")
    largest = float(without.abs().max())
    difference = float((with_adapter - without).abs().max()) / max(largest, 1e-30)
    if not math.isfinite(difference):
        return skipped(name, "logits are not finite, see weights and loss")
    blank, total = _blank(subject)
    if 0 < blank < total:
        return warned(
            name,
            f"{blank} of {total} LoRA layers are still at their start (B is zero), the others are trained: part of a "
            "file did not fit, or no token ever reached them",
            "model = load(path, base, train=True), which refuses a file that does not fit",
        )
    if total and blank == total and subject.config.inference_mode:
        return failed(
            name,
            f"loaded onto nothing: all {total} LoRA layers are at their start (B is zero), so this is the base alone",
            "model = load(path, base, train=True), which refuses a file that does not fit",
        )
    if difference <= tolerance(subject):
        said = f"gives the base's logits (largest difference {number(difference)} of the largest logit)"
        return passed(name, f"new, it {said}" if blank else f"it {said}")
    if total and blank == total:
        return failed(
            name,
            f"B is zero in all {total} LoRA layers, and still logits differ from the base's by {number(difference)} of "
            "the largest: something beside the adapter is not the base's",
            "model = adapt(base)",
        )
    return skipped(name, f"the adapter has been trained: it changes logits by {number(difference)} of the largest")


def _blank(subject: Subject) -> tuple[int, int]:
    """(LoRA layers one of whose two factors is zero, all of them); for embeddings that is A, elsewhere B."""
    name = subject.record.name
    blank = 0
    for layer in subject.lora_layers.values():
        factors = [
            holder[name]
            for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
            if name in (holder := getattr(layer, kind, {}))
        ]
        blank += any(not bool(getattr(factor, "weight", factor).detach().any()) for factor in factors)
    return blank, len(subject.lora_layers)


def padding_side(subject: Subject) -> Check:
    """Padding on the left gives what padding on the right gives, or positions are wrong."""
    import torch

    name = "padding side"
    lead = pads_left(subject)
    if lead is None:
        return passed(name, "0 rows are padded on the left, or positions are given")
    rows = [int(row) for row in lead.nonzero().flatten()[:2]]
    ids = subject.batch["input_ids"]
    chosen = {
        key: value[rows] if torch.is_tensor(value) and value.dim() and len(value) == len(ids) else value
        for key, value in subject.batch.items()
    }
    turned = dict(chosen)
    for key, value in chosen.items():
        if (
            torch.is_tensor(value)
            and value.shape == ids[rows].shape
            and not (key == "labels" and subject.encodes_and_decodes)
        ):
            turned[key] = torch.stack([row.roll(-int(lead[i])) for i, row in zip(rows, value, strict=True)])
    left, right = logits_of(subject, chosen), logits_of(subject, turned)
    if left is None or right is None:
        return skipped(name, "the model gives no logits")
    worst, largest = 0.0, float(right.abs().max())
    for at, i in enumerate(rows):
        skip = int(lead[i]) if left.dim() == 3 and left.shape[1] == ids.shape[1] else 0
        size = left[at].shape[0] - skip
        worst = max(worst, float((left[at][skip:] - right[at][:size]).abs().max()) / max(largest, 1e-30))
    count = int((lead > 0).sum())
    if worst > 10 * tolerance(subject):
        return failed(
            name,
            f"{count} of {len(ids)} rows are padded on the left, where this model counts positions from the padding: "
            f"logits are off by {number(worst)} of the largest",
            'tokenizer.padding_side = "right"',
        )
    return passed(name, f"{count} of {len(ids)} rows are padded on the left; logits are those of right padding")
