"""Batches: rows of like length together, padding that no loss and no attention sees, or no padding at all."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_kit.adaptation import base_of
from lora_kit.training.data import IGNORED, Row
from lora_kit.types import Model


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


@dataclass(frozen=True)
class Packer:
    """Rows to one long row without padding: `input_ids`, `labels` and `position_ids` of shape (1, tokens).

    Positions begin anew with each row. Where attention has kernels for rows of any length (flash attention) each row
    costs what it costs alone; elsewhere transformers builds a mask that keeps rows apart, and attention costs the
    square of all of them together. The loss is that of the padded batch: the same tokens have labels.
    """

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        import torch

        ids = [token for row in rows for token in row["input_ids"]]
        positions = [place for row in rows for place in range(len(row["input_ids"]))]
        # the first token of a row is nobody's next one
        labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        # with a cache at hand transformers takes positions that begin anew for nothing special
        return {key: torch.tensor([value]) for key, value in batch.items()} | {"use_cache": False}


def can_pack(model: Model) -> bool:
    """Whether packed rows give this model the logits that each row gives alone; asked of two short rows.

    Not where positions cannot be given (ALiBi, T5's buckets), and not where a state runs on from row to row (Mamba).
    """
    import torch

    from lora_kit import probe

    base = base_of(model)
    vocabulary = min(100, getattr(base.config.get_text_config(), "vocab_size", 100))
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (5, 9)]
    batch = Packer()([{"input_ids": row, "labels": row} for row in ids])
    del batch["labels"]
    device = next(model.parameters()).device
    moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    try:
        with probe.trial(base), torch.no_grad():
            packed = model(**moved).logits[0]
            alone = torch.cat([model(input_ids=torch.tensor([row], device=device)).logits[0] for row in ids])
    except Exception:  # whatever a model raises that takes no positions
        return False
    if packed.shape != alone.shape:
        return False
    exact = packed.dtype == torch.float32 and not any(p.dtype.itemsize < 4 for p in base.parameters())
    return bool((packed - alone).abs().max() <= (1e-3 if exact else 5e-2) * alone.abs().max())


def has_rows_of_any_length(model: Model) -> bool:
    """Whether this model's attention has kernels for packed rows of any length."""
    return "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


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


def trainer_class(packer: Packer | None = None) -> Any:
    """transformers' `Trainer` with `LengthGroups` as its sampler, or with batches packed by `packer`."""
    from transformers import Trainer

    class BatchingTrainer(Trainer):
        """`Trainer`; only which rows share a step, and how, is ours."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if packer is not None:  # nothing is padded, so any rows may meet
                return super()._get_train_sampler(train_dataset)
            rows = self.train_dataset if train_dataset is None else train_dataset
            return LengthGroups([row["length"] for row in rows], self.args.train_batch_size, self.args.seed)

        def get_train_dataloader(self) -> Any:
            # transformers sets it where no checker looks
            padder = self.data_collator  # type: ignore[has-type]
            self.data_collator = packer or padder
            try:
                return super().get_train_dataloader()
            finally:
                self.data_collator = padder

    return BatchingTrainer
