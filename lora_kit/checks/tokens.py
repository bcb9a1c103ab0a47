"""What can be said of a batch's tokens before the model sees them: ids, positions, padding, first tokens.

On a GPU an id out of range is a device assert, after which the process is of no more use: these checks come first.
"""

from typing import TYPE_CHECKING, Any

from lora_kit.checks.report import Check, failed, many, passed, skipped, warned
from lora_kit.checks.subject import Subject
from lora_kit.errors import listing

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of what is not trained."""


def token_ids(subject: Subject) -> Check:
    """Ids that have an embedding, positions that have one, and an attention mask where there is padding."""
    batch, base = subject.batch, subject.base
    ids: Any = batch.get("input_ids")
    for key, value in batch.items():
        if key != "labels" and isinstance(value, list | tuple):
            return failed(
                "token ids",
                f"{key} is a {type(value).__name__} of {len(value)}, not a tensor",
                f"batch[{key!r}] = torch.tensor(batch[{key!r}])",
            )
    if not are_ids(ids):
        return skipped("token ids", "the batch has no input_ids of two dimensions")
    limits: dict[str, int | None] = {
        "input_ids": _rows(base.get_input_embeddings()) or getattr(subject.text_config, "vocab_size", None)
    }
    limits["decoder_input_ids"] = limits["input_ids"]
    limits["token_type_ids"] = getattr(subject.text_config, "type_vocab_size", None) or None
    for key, limit in limits.items():
        if key in batch and limit is not None and batch[key].numel():
            found = out_of_range(batch[key], limit)
            if found is not None:
                row, value, count = found
                return failed(
                    "token ids",
                    f"{key} has {many(count, 'id')} outside 0 to {limit - 1}, the first of them {value} in row {row}",
                    "make room for new tokens before adapt(): model.resize_token_embeddings(len(tokenizer))"
                    if key != "token_type_ids"
                    else f'batch.pop("{key}")',
                )
    length, places = ids.shape[1], _positions(base)
    if places is not None and length > places:
        return failed(
            "token ids",
            f"rows of {length} tokens, the model has {places} positions",
            f"tokenizer(texts, truncation=True, max_length={places})",
        )
    if "attention_mask" not in batch and "position_ids" not in batch:
        padded = [row for row in range(len(ids)) if padded_by(ids[row], subject.special("pad"), subject.special("eos"))]
        if padded:
            return warned(
                "token ids",
                f"no attention_mask, but {len(padded)} of {len(ids)} rows end in padding, which attention will see",
                'batch["attention_mask"] = tokenizer(texts, padding=True, return_tensors="pt")["attention_mask"]',
            )
    return passed("token ids", f"{ids.shape[0]} rows of {length}, ids {int(ids.min())} to {int(ids.max())}")


def start_of_text(subject: Subject) -> Check:
    """Not two start tokens, which come of tokenizing text from a chat template as if it were plain."""
    name = "start of text"
    ids: Any = subject.batch.get("input_ids")
    bos = subject.special("bos")
    if not bos or not are_ids(ids):
        return skipped(name, "no start token is known")
    mask: Any = subject.batch.get("attention_mask")
    twice = 0
    for i, row in enumerate(ids):
        seen = row[mask[i] != 0] if mask is not None and mask.shape == ids.shape else row
        # without a mask a start token that is the padding token too may be padding
        if mask is None and bos & subject.special("pad"):
            continue
        twice += len(seen) > 1 and int(seen[0]) in bos and int(seen[1]) in bos
    if twice:
        token = listing(sorted(bos))
        return warned(
            name,
            f"{twice} of {len(ids)} rows start with the start token {token} twice",
            "tokenizer(text, add_special_tokens=False) where text comes from a chat template",
        )
    return passed(name, f"0 of {len(ids)} rows start with token {listing(sorted(bos))} twice")


def pads_left(subject: Subject) -> "torch.Tensor | None":
    """How many positions each row is padded by on the left, where some row is and no positions are given."""
    ids: Any = subject.batch.get("input_ids")
    mask: Any = subject.batch.get("attention_mask")
    if not are_ids(ids) or mask is None or mask.shape != ids.shape or "position_ids" in subject.batch:
        return None
    lead = (mask.cumsum(1) == 0).sum(1)
    return lead if bool(lead.any()) and bool((lead < mask.shape[1]).all()) else None


def padded_by(row: "torch.Tensor", pad: set[int], eos: set[int]) -> int:
    """Length of the padding at the end of a row; one token alone may be the end of the text."""
    values = row.tolist()
    count = 0
    while count < len(values) and values[-1 - count] in pad:
        count += 1
    return max(count - 1, 0) if pad & eos else count


def are_ids(value: Any) -> bool:
    import torch

    return torch.is_tensor(value) and value.dim() == 2 and not value.is_floating_point()


def out_of_range(ids: "torch.Tensor", limit: int, *, ignored: bool = False) -> tuple[int, int, int] | None:
    """(row, value, how many) of what is not in 0 to limit - 1."""
    wrong = (ids < 0) | (ids >= limit)
    if ignored:
        wrong &= ids != IGNORED
    if not bool(wrong.any()):
        return None
    first = wrong.nonzero()[0]
    return int(first[0]), int(ids[tuple(first)]), int(wrong.sum())


def _rows(embedding: Any) -> int | None:
    found = getattr(embedding, "num_embeddings", None)
    if found is None:
        weight = getattr(embedding, "weight", None)
        found = weight.shape[0] if weight is not None and weight.dim() == 2 else None
    return found


def _positions(base: Any) -> int | None:
    """How many positions a model with a learned embedding of them has; None for rotations, biases and the like."""
    from torch import nn

    tables = [
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]
    ]
    limit = getattr(base.config, "max_position_embeddings", None)
    # some tables begin with a few rows of another use
    sizes = [m.num_embeddings for _, m in tables if isinstance(limit, int) and limit <= m.num_embeddings <= limit + 8]
    return min([*sizes, limit]) if sizes and limit is not None else None
