"""`lora-kit plan`: every method on every base, with what fits a card."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kit.errors import LoraKitError, UnsupportedError
from lora_kit.memory.cards import size_of
from lora_kit.memory.check import Check, check
from lora_kit.memory.fit import Fit, fit
from lora_kit.memory.plan import plan
from lora_kit.memory.result import MemoryPlan, size
from lora_kit.methods import METHODS, resolve

BASES = ("16bit", "8bit", "4bit")


@dataclass(frozen=True)
class Line:
    """One method on one base."""

    method: str
    quantization: str
    plan: MemoryPlan | None
    fit: Fit | None = None
    check: Check | None = None
    reason: str = ""
    """Why there is no plan."""


@dataclass(frozen=True)
class Menu:
    """The lines, and what they were asked for. Printed, it is a table."""

    about: str
    card: int | None
    lines: tuple[Line, ...] = field(default_factory=tuple)

    def __str__(self) -> str:
        heads = ["method", "base", "peak", "needed", "loading"]
        heads += ["fits", "longest"] if self.card else []
        checked = any(line.check for line in self.lines)
        heads += ["measured", "error"] if checked else []
        rows = [heads]
        for line in self.lines:
            if line.plan is None:
                rows.append([line.method, line.quantization, line.reason])
                continue
            found = line.plan
            row = [line.method, line.quantization, size(found.peak), size(found.needed), size(found.phases["loading"])]
            if self.card and line.fit is not None:
                row += [
                    "yes" if found.needed <= self.card else "no",
                    f"{line.fit.largest:,}" if line.fit.largest else "–",
                ]
            if checked:
                row += [size(line.check.measured), f"{100 * line.check.error:+.2f} %"] if line.check else ["", ""]
            rows.append(row)
        whole = [row for row in rows if len(row) > 3]
        widths = [max(len(row[i]) for row in whole if len(row) > i) for i in range(len(heads))]
        table = []
        for row in rows:
            words = [word.ljust(width) for word, width in zip(row[:2], widths, strict=False)]
            if row in whole:
                words += [word.rjust(width) for word, width in zip(row[2:], widths[2:], strict=False)]
            else:
                words.append(row[2])
            table.append("  ".join(words).rstrip())
        return "\n".join([self.about, "", *table])


def menu(
    model: str,
    *,
    card: str | None = None,
    methods: Sequence[str] = tuple(METHODS),
    quantizations: Sequence[str] = BASES,
    task: str | None = None,
    batch_size: int = 1,
    seq_len: int = 1024,
    gradient_checkpointing: bool = False,
    low_memory: bool = False,
    optimizer: str = "adamw",
    dtype: str = "auto",
    device: str = "cuda",
    check_here: bool = False,
    **options: Any,
) -> Menu:
    """Predict the memory of training by each method on each base, from the model's config alone.

    Args:
        model: hub id, or path of a folder with a config.json.
        card: name or size of a graphics card, such as RTX 4090 or 12GB, to see what fits and the longest rows that do.
        methods: methods to plan for.
        quantizations: bases to plan for: 16bit, 8bit, 4bit.
        task: what the model is for, where the checkpoint does not say.
        batch_size: rows of a step.
        seq_len: tokens of a row.
        gradient_checkpointing: run layers again in the backward pass.
        low_memory: compute gated MLPs twice and keep less.
        optimizer: adamw, adamw_foreach, adamw_loop, sgd, adamw_8bit or paged_adamw_8bit.
        dtype: of the weights; auto is the config's.
        device: cuda or cpu: where the run will be.
        check_here: also run one step of each here, with random weights, and print the error.
        options: fields of the methods' option classes, such as `rank=32`; each method takes those that it has.

    Raises:
        OptionError: an unknown word, option, value or card.
    """
    room = None if card is None else size_of(card)
    lean = "low-memory" if low_memory else True
    lines = []
    fields = {word: METHODS[word].__dataclass_fields__ if word in METHODS else {} for word in methods}
    for word in methods:
        # an option that no method has is this one's, which refuses it
        own = {
            k: v for k, v in options.items() if k in fields[word] or not any(k in other for other in fields.values())
        }
        resolve(word, own)
        for bits in quantizations:
            try:
                made = plan(
                    model,
                    word,
                    quantization=None if bits == "16bit" else bits,
                    task=task,
                    batch_size=batch_size,
                    seq_len=seq_len,
                    gradient_checkpointing=gradient_checkpointing,
                    optimizer=optimizer,
                    dtype=dtype,
                    lean=lean,
                    device=device,
                    **own,
                )
            except UnsupportedError as error:
                lines.append(Line(word, bits, None, reason=_short(error)))
                continue
            longest = None if room is None else fit(made, room)
            lines.append(Line(word, bits, made, longest, check(made) if check_here else None))
    about = f"{model}: {batch_size} × {seq_len} tokens, {optimizer}"
    about += ", gradient checkpointing" if gradient_checkpointing else ""
    about += f", on {size(room)}" if room else ""
    return Menu(about, room, tuple(lines))


def _short(error: LoraKitError) -> str:
    return str(error).partition(": ")[2].partition(". ")[0][:90] or str(error)[:90]
