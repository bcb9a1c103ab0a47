"""The largest run that a card has room for, and the ways to make room."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_kit.errors import OptionError, listing, nearest
from lora_kit.memory.cards import size_of
from lora_kit.memory.plan import made, positions
from lora_kit.memory.result import MemoryPlan, size

STEPS = {"seq_len": 64, "batch_size": 1, "rank": 1}
"""What can be searched for, and by how much it grows."""


@dataclass(frozen=True)
class Fit:
    """The largest value that fits, and its plan."""

    name: str
    """What was searched for: `"seq_len"`, `"batch_size"` or `"rank"`."""
    largest: int
    """0 where nothing fits."""
    card: int
    """Bytes of the card."""
    plan: MemoryPlan | None
    """Of the run with that value."""
    limit: str = "the card"
    """What ends it: the card, or the model's positions."""

    def __str__(self) -> str:
        if self.plan is None:
            return f"no {self.name} fits {size(self.card)}"
        return (
            f"{self.name} up to {self.largest:,} on {size(self.card)} ({self.limit}); {size(self.plan.needed)} needed"
        )


def fit(plan: MemoryPlan, card: str | int, largest: str = "seq_len", *, step: int | None = None) -> Fit:
    """The largest `seq_len`, `batch_size` or `rank` whose plan needs no more than the card has.

    The answer is exact: it was simulated and fits, one step more (64 tokens, one row, one rank) was simulated and does
    not.

    Args:
        plan: what else the run is.
        card: name, size or bytes.
        largest: what to search for.
        step: the step to search by, instead of 64 tokens, one row or one rank.
    """
    if largest not in STEPS:
        raise OptionError(f"fit: unknown {largest!r}; accepted: {listing(STEPS)}.{nearest(str(largest), STEPS)}")
    if largest == "rank" and plan.settings["method"] != "lora":
        raise OptionError(f"fit: largest='rank' is for LoRA; this plan is of {plan.settings['method']!r}.")
    room, unit = size_of(card), step or STEPS[largest]
    known: dict[int, MemoryPlan] = {}

    def at(count: int) -> MemoryPlan:
        if count not in known:
            known[count] = _changed(plan, largest, count * unit)
        return known[count]

    most = _most(plan, largest) // unit
    count = _search(lambda n: at(n).needed, room, max(1, min(8, most)), most)
    if count == 0:
        return Fit(largest, 0, room, None)
    limit = "the model's positions" if largest == "seq_len" and count == most else "the card"
    return Fit(largest, count * unit, room, at(count), limit)


def _search(needs: Callable[[int], int], room: int, start: int, most: int) -> int:
    """The largest count of at most `most` that needs no more than `room`; by secants, then one by one."""
    if most < 1 or needs(1) > room:
        return 0
    low, high = 1, 0  # fits; does not
    guess = start
    while high - low != 1:
        guess = min(max(guess, low + 1), most)
        if high:
            guess = min(guess, high - 1)
        if guess <= low:
            return low  # nothing above is allowed
        if needs(guess) <= room:
            low = guess
        else:
            high = guess
        if low == most:
            return low
        a, b = (low, high) if high else (max(1, low // 2), low)
        slope = (needs(b) - needs(a)) / (b - a) if b > a else 0
        guess = int(a + (room - needs(a)) / slope) if slope > 0 else 2 * low
        if not high:
            guess = min(guess, 16 * low)
    return low


def _most(plan: MemoryPlan, name: str) -> int:
    if name == "batch_size":
        return 2**16
    config = plan._blueprint.config
    if name == "rank":
        return int(getattr(config.get_text_config(), "hidden_size", 2**12))
    return positions(config) or 2**20


def _changed(plan: MemoryPlan, name: str, value: int) -> MemoryPlan:
    blueprint, step, settings = plan._blueprint, plan._step, dict(plan.settings)
    if name == "rank":
        method: Any = dataclasses.replace(blueprint.method, rank=value)  # type: ignore[call-arg]  # it is LoRA
        blueprint = dataclasses.replace(blueprint, method=method)
        settings["size"] = method.size
    else:
        changed: dict[str, Any] = {name: value}
        step = dataclasses.replace(step, **changed)
        settings[name] = value
    return made(blueprint, plan._axes, step, settings)
