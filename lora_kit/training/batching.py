"""Batches: rows of like length together, padding that no loss and no attention sees."""

import random
from collections.abc import Iterator
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


class LengthGroups:
    """A sampler that puts rows of like length into the same batch, and the batches in random order.

    Sorting within large groups alone, as transformers' own sampler does, also sorts time: training sees long rows, then
    ever shorter ones. Here the order of batches is drawn anew, with one exception: the batch with the longest row comes
    first, so that a step which does not fit in memory fails at once.
    """

    GROUP = 50
    """Batches that are sorted together, at most: enough for little padding, few enough to keep rows mixed. A small
    set is cut into four groups at least, or the same rows would meet in the same batches at every pass."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each pass over the rows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        shuffle.shuffle(order)
        if len(order) % self.batch_size:
            # one batch will not be full, and it stays last: keep the longest row out of it
            longest = max(order, key=lambda i: self.lengths[i])
            order.remove(longest)
            order.insert(0, longest)
        size = self.batch_size * max(1, min(self.GROUP, len(order) // (4 * self.batch_size)))
        batches = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=lambda i: -self.lengths[i])
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        # a batch that is not full must stay last: the loader cuts the sequence every batch_size rows
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        shuffle.shuffle(whole)
        whole.sort(key=lambda batch: max(self.lengths[i] for i in batch) != max(self.lengths))
        return (i for batch in whole + rest for i in batch)


def trainer_class() -> Any:
    """transformers' `Trainer` with `LengthGroups` as its sampler."""
    from transformers import Trainer

    class GroupedTrainer(Trainer):
        """`Trainer`; only the order of rows is ours."""

        def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroups:
            rows = self.train_dataset if train_dataset is None else train_dataset
            return LengthGroups([row["length"] for row in rows], self.args.train_batch_size, self.args.seed)

    return GroupedTrainer
