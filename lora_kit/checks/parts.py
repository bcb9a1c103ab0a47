"""A batch taken apart by rows, so that the weighted losses of its parts add up to the loss of the whole.

A model's loss is a mean over something: tokens that have a label, or rows. A part counts for as much of it as it has.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kit.adaptation import base_of, record_of
from lora_kit.checks.tokens import IGNORED
from lora_kit.errors import UnsupportedError
from lora_kit.types import Model

_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""What has a column for each token, and can lose those columns that are padding in every row."""
_STRETCHED = ("dynamic", "longrope")
"""Rotary positions that depend on the longest row of the batch."""


def main_of(batch: Mapping[str, Any]) -> Tensor:
    """The tensor whose rows are the batch's."""
    for name in ("input_ids", "inputs_embeds", "input_features", "input_values", "labels"):
        if torch.is_tensor(batch.get(name)) and batch[name].dim():
            return batch[name]
    for value in batch.values():
        if torch.is_tensor(value) and value.dim():
            return value
    raise UnsupportedError("the batch holds no tensor with rows")


def length_of(batch: Mapping[str, Any]) -> int:
    """Tokens of the longest row, padding not counted."""
    mask = batch.get("attention_mask")
    if torch.is_tensor(mask) and mask.dim() == 2:
        return int(mask.ne(0).sum(1).max())
    main = main_of(batch)
    return main.shape[1] if main.dim() > 1 else 1


def size_of(batch: Mapping[str, Any]) -> int:
    """Rows times columns, of input and, where there is a decoder's, of target: what memory grows with."""
    main, labels = main_of(batch), batch.get("labels")
    columns = main.shape[1] if main.dim() > 1 else 1
    if torch.is_tensor(labels) and labels.dim() == 2 and labels.shape != main.shape:
        columns += labels.shape[1]
    return main.shape[0] * columns


def targets_of(model: Model, batch: Mapping[str, Any]) -> Tensor:
    """(rows,) how many terms each row has in the mean that is this model's loss.

    Raises:
        UnsupportedError: where that is not known.
    """
    inner, task, labels = base_of(model), record_of(model).task, batch.get("labels")
    if task == "question-answering":
        return _of_answers(batch)
    if not torch.is_tensor(labels):
        raise UnsupportedError("the batch has no labels, so what its loss is a mean of is not known")
    if task == "classification":
        config: Any = inner.config
        counted = config.num_labels > 1 and not labels.is_floating_point() and labels.dim() == 1
        return labels.ne(IGNORED).long() if counted else torch.ones_like(labels[:, 0] if labels.dim() > 1 else labels)
    if task == "causal-lm":
        if torch.is_tensor(batch.get("shift_labels")):
            return batch["shift_labels"].ne(IGNORED).sum(1)
        return (labels if _has_tokens_before(model) else labels[:, 1:]).ne(IGNORED).sum(1)
    decodes = task in ("seq2seq-lm", "speech") and inner.config.is_encoder_decoder
    if decodes or task == "token-classification" or getattr(inner, "loss_type", None) == "ForMaskedLM":
        return labels.ne(IGNORED).sum(1)
    raise UnsupportedError(f"what the loss of {type(inner).__name__} is a mean of is not known")


def _of_answers(batch: Mapping[str, Any]) -> Tensor:
    """Each row once; an answer out of reach is left out of one of two means, which no single weight makes up for."""
    columns = main_of(batch).shape[1]
    ends: list[Any] = [batch.get("start_positions"), batch.get("end_positions")]
    if not all(torch.is_tensor(end) and end.dim() == 1 for end in ends):
        raise UnsupportedError("the batch has no start_positions and end_positions of one number a row")
    if any(bool((end < 0).any() or (end >= columns).any()) for end in ends):
        raise UnsupportedError("some answers lie beyond their row's end")
    return torch.ones_like(ends[0])


def _has_tokens_before(model: Model) -> bool:
    """Whether PEFT puts tokens of its own before a row, so that the row's first label is predicted too."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type.value == "PREFIX_TUNING":
        return False
    if config.peft_type.value == "CPT":
        raise UnsupportedError("context-aware prompt tuning has a loss of its own")
    return True


def check(batch: Mapping[str, Any]) -> int:
    """Number of rows, after making sure that everything in the batch can be cut between them."""
    rows = main_of(batch).shape[0]
    for name, value in batch.items():
        if torch.is_tensor(value):
            if value.dim() and value.shape[0] != rows:
                raise UnsupportedError(f"{name} is {tuple(value.shape)}, not one entry for each of the {rows} rows")
            if name == "position_ids" and value.dim() > 2:
                raise UnsupportedError("position_ids has more than one number for a token")
        elif isinstance(value, list | tuple):
            if len(value) != rows or any(torch.is_tensor(entry) for entry in value):
                raise UnsupportedError(f"{name} is a {type(value).__name__} of {len(value)}, with {rows} rows")
        elif value is not None and not isinstance(value, bool | int | float | str):
            raise UnsupportedError(f"{name} is a {type(value).__name__}, which cannot be cut between rows")
    return rows


def take(model: Model, batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Rows `start` to `stop` of a batch that `check` has passed, without columns that are padding in all of them."""

    def cut(value: Any) -> Any:
        rows = (torch.is_tensor(value) and value.dim()) or isinstance(value, list | tuple)
        return value[start:stop] if rows else value

    return _trim({name: cut(value) for name, value in batch.items()}, base_of(model))


def _trim(part: dict[str, Any], inner: Model) -> dict[str, Any]:
    """The part without padding at the end, where nothing but the mask has a say in it."""
    mask, ids, labels = part.get("attention_mask"), part.get("input_ids"), part.get("labels")
    if not torch.is_tensor(mask) or not torch.is_tensor(ids) or mask.dim() != 2 or mask.shape != ids.shape:
        return part
    if not torch.is_tensor(labels) or _depends_on_length(inner.config):
        return part
    columns = ids.shape[1]
    names = [n for n, v in part.items() if torch.is_tensor(v) and v.dim() > 1 and columns in v.shape[1:]]
    beside = labels.dim() == 2 and labels.shape == ids.shape and not inner.config.is_encoder_decoder
    known = {*_BY_TOKEN, "labels"}
    if any(name not in known or part[name].shape != ids.shape for name in names if beside or name != "labels"):
        return part
    used = mask.ne(0)
    if beside:
        used = used | labels.ne(IGNORED)
    longest = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else columns
    cut = [name for name in names if beside or name != "labels"]
    return part | {name: part[name][:, :longest] for name in cut}


def _depends_on_length(config: Any) -> bool:
    rotary = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rotary, *(value for value in rotary.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in _STRETCHED for kind in kinds)
