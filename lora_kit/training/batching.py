"""Batches: rows of like length together, padding that no loss and no attention sees."""

from dataclasses import dataclass
from typing import Any

from lora_kit.training.data import IGNORED, Row


@dataclass(frozen=True)
class Collator:
    """Rows to a batch: `input_ids` and `attention_mask` of shape (batch, longest), `labels` beside them.

    The mask comes from the rows' lengths and padded labels are ignored, whatever the padding token is: a tokenizer
    whose padding is its end token still teaches the model to stop.
    """

    padding: int
    """Token id to fill up with; any will do."""

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        import torch

        batch = {
            "input_ids": _fill([row["input_ids"] for row in rows], self.padding),
            "attention_mask": _fill([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], list):
            batch["labels"] = _fill(labels, IGNORED)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch


def _fill(rows: list[list[int]], value: int) -> Any:
    """(batch, longest) tensor, short rows filled up at the end."""
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding token, else its end token, else 0: masked anyway."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def sort_for_measuring(rows: list[Row]) -> list[Row]:
    """Longest first: the least padding, and a batch that does not fit fails at once."""
    return sorted(rows, key=lambda row: -row["length"])
