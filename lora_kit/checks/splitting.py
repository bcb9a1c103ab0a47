"""Micro-batches that run in parts where memory does not suffice, with the gradient of the whole.

A micro-batch that fails is run again in parts. What it had added to the gradients is taken back without a copy of
them: they are set to what they were when the optimizer last stepped, and the step's earlier micro-batches run again,
each with the random numbers that it had. That costs time once, when a size fails for the first time, and no memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kit.checks import parts, shortage
from lora_kit.checks.randomness import Randomness
from lora_kit.errors import LoraKitError, UnsupportedError
from lora_kit.messages import say
from lora_kit.types import Model


@dataclass(frozen=True)
class Part:
    """Rows of a micro-batch, and their share of its loss."""

    batch: Mapping[str, Any]
    weight: float = 1.0
    start: int = 0
    stop: int | None = None
    """None: the whole micro-batch, as it came."""

    @property
    def size(self) -> int:
        return parts.size_of(self.batch)


@dataclass
class Forward:
    """One run of the model, with what it takes to run it again."""

    batch: Mapping[str, Any]
    randomness: Randomness
    autocast: tuple[bool, torch.dtype]
    loss: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], device: torch.device) -> "Forward":
        """To be made before the model runs."""
        kind = device.type
        # what hangs on a graph would keep it alive until the step's end
        kept = {name: value.detach() if torch.is_tensor(value) else value for name, value in batch.items()}
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(kept, Randomness.now(device), autocast)


@dataclass
class Micro:
    """A micro-batch of the present step."""

    batch: Mapping[str, Any]
    run: Callable[[Part, "Micro"], Tensor]
    randomness: Randomness
    parts: list[Part]
    forwards: list[Forward] = field(default_factory=list)
    after: Randomness | None = None
    """As the forward of the whole left the generators."""

    def begin(self, batch: Mapping[str, Any]) -> None:
        """To be called before the model runs."""
        self.forwards.append(Forward.of(batch, self.randomness.device))

    def end(self, loss: Tensor) -> None:
        """To be called when the forward is through."""
        self.forwards[-1].loss = loss.detach()
        if len(self.parts) == 1:
            self.after = Randomness.now(self.randomness.device)


class Splitter:
    """Runs micro-batches; remembers what size failed.

    `run` of a micro-batch is called with a part of it: forward and backward, and the loss times the part's weight.
    """

    def __init__(self, model: Model, device: torch.device, why_not: str | None, plan: Any = None) -> None:
        self.model, self.device, self.why_not, self.plan = model, device, why_not, plan
        self.limit: int | None = None
        """The smallest size that failed."""
        self.micros: list[Micro] = []
        """Micro-batches since the optimizer's last step."""
        self.split = 0
        """How many micro-batches ran in parts."""
        self._before: list[Tensor | None] = []

    def begin_step(self) -> None:
        """Forget the micro-batches of the last step."""
        self.micros.clear()
        self._before = []

    def run(self, batch: Mapping[str, Any], run: Callable[[Part, Micro], Tensor]) -> Tensor:
        """Forward and backward of a micro-batch; returns its loss.

        Raises:
            OutOfMemoryError: it does not fit and cannot be made smaller.
        """
        if not self.micros:
            self._before = self._gradients()
        here = Micro(batch, run, Randomness.now(self.device), [Part(batch)])
        if self.limit is not None and self.why_not is None:
            here.parts = self._beforehand(here)
        self.micros.append(here)
        pending, failures = [here], 0
        while True:
            found = self._attempt(pending, again=failures > 0)
            if not isinstance(found, Failure):
                break
            failures += 1
            shortage.give_back()
            self._take_back()
            try:
                found.micro.parts = self._smaller(found.micro, found.number)
            except LoraKitError:
                found.micro.randomness.restore()
                self.begin_step()
                raise
            pending = self.micros
        if failures:
            self._say(here)
            if here.after is not None:
                here.after.restore()
        self.split += len(here.parts) > 1
        return found

    def _attempt(self, micros: list[Micro], *, again: bool) -> "Tensor | Failure":
        """The loss of the last of them, or where it failed."""
        total: Any = None
        for micro in micros:
            if again:
                micro.randomness.restore()
            micro.forwards.clear()
            total = None
            for number, part in enumerate(micro.parts):
                try:
                    loss = micro.run(part, micro)
                except RuntimeError as error:
                    if not shortage.is_shortage(error):
                        raise
                    shortage.let_go(error)
                    return Failure(micro, number)
                total = loss if total is None else total + loss
        return total

    # ---- parts

    def _smaller(self, micro: Micro, number: int) -> list[Part]:
        """Parts of a micro-batch whose part `number` was too large."""
        failed = micro.parts[number]
        length = parts.length_of(failed.batch)
        rows = parts.main_of(failed.batch).shape[0]
        if rows == 1 or self.why_not is not None:
            why = "a single row" if rows == 1 else f"a micro-batch of {rows} rows, which is not split ({self.why_not})"
            raise shortage.one_row(self.model, self.device, length, self.plan, why)
        self.limit = min(failed.size, self.limit or failed.size)
        try:
            return self._cut(micro, micro.parts)
        except UnsupportedError as error:
            why = f"a micro-batch of {rows} rows, which cannot be split ({error})"
            raise shortage.one_row(self.model, self.device, length, self.plan, why) from None

    def _beforehand(self, micro: Micro) -> list[Part]:
        try:
            return self._cut(micro, micro.parts)
        except UnsupportedError:
            return micro.parts  # perhaps it fits; if not, `_smaller` says why it stays whole

    def _cut(self, micro: Micro, whole: list[Part]) -> list[Part]:
        """The same rows in parts below the limit, as far as rows can be parted."""
        if all(part.size < (self.limit or 0) for part in whole):
            return whole
        rows = parts.check(micro.batch)
        targets = parts.targets_of(self.model, micro.batch).tolist()
        spans = [(part.start, rows if part.stop is None else part.stop) for part in whole]
        found: list[Part] = []
        while spans:
            start, stop = spans.pop(0)
            weight = sum(targets[start:stop]) / sum(targets)
            part = Part(parts.take(self.model, micro.batch, start, stop), weight, start, stop)
            if part.stop == rows and start == 0:
                part = Part(micro.batch)
            if part.size >= (self.limit or 0) and stop - start > 1:
                middle = (start + stop + 1) // 2
                spans = [(start, middle), (middle, stop), *spans]
            elif weight:  # rows without a label have no loss, and a mean over nothing would be NaN
                found.append(part)
        return found

    def _say(self, micro: Micro) -> None:
        if len(micro.parts) < 2:
            return
        rows = parts.main_of(micro.batch).shape[0]
        counts = [parts.main_of(part.batch).shape[0] for part in micro.parts]
        cut = f"{len(counts)} x {counts[0]}" if len(set(counts)) == 1 else " + ".join(map(str, counts))
        say(
            f"out of memory at micro-batch {rows} (longest sequence {parts.length_of(micro.batch)}): using {cut} from "
            f"here; effective batch still {rows}"
        )

    # ---- gradients

    def _trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor | None]:
        """What to go back to: None, or a copy of gradients that were there before the step's first micro-batch.

        After `zero_grad()` there are none, and nothing is copied; zeros left by `zero_grad(set_to_none=False)` are
        known by their norm and kept as a number.
        """
        found = [p.grad for p in self._trained()]
        present = [grad for grad in found if grad is not None]
        if not present or self.why_not is not None:
            return []
        if not bool(torch.nn.utils.get_total_norm(present)):
            return [None if grad is None else grad.new_zeros(()) for grad in found]
        return [None if grad is None else grad.clone() for grad in found]

    def _take_back(self) -> None:
        trained = self._trained()
        for parameter, before in zip(trained, self._before or [None] * len(trained), strict=True):
            if before is None or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.copy_(before)


@dataclass(frozen=True)
class Failure:
    """Part `number` of a micro-batch did not fit."""

    micro: Micro
    number: int
