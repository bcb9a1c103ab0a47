"""What `verify` found: one line a check, with the number that proves it and the line of code to write."""

import textwrap
from dataclasses import dataclass
from typing import Literal

from lora_kit.errors import (
    DataError,
    LoraKitError,
    NonFiniteError,
    NothingToTrainError,
    OptionError,
    UnsupportedError,
    listing,
    nearest,
)

Status = Literal["passed", "warned", "failed", "skipped"]
MARKS: dict[str, str] = {"passed": "✓", "warned": "!", "failed": "✗", "skipped": "–"}
WIDTH = 116

# what a failed check is as an exception; every other one is an UnsupportedError
_ERRORS: dict[str, type[LoraKitError]] = {
    "trainable": NothingToTrainError,
    "weights": NonFiniteError,
    "loss": NonFiniteError,
    "token ids": DataError,
    "labels": DataError,
    "padding": DataError,
    "forward": DataError,
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    """What was seen, with its number."""
    remedy: str = ""
    """What to write instead; empty where nothing is to be done."""

    def __str__(self) -> str:
        indent = " " * 19
        text = textwrap.fill(
            f"{MARKS[self.status]} {self.name:<16} {self.found}",
            WIDTH,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        if self.status in ("warned", "failed"):
            said = textwrap.fill(
                f"→ {self.remedy}", WIDTH - 19, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
            )
            text += "\n" + textwrap.indent(said, indent)
        return text


@dataclass(frozen=True)
class Report:
    """All checks of one `verify`, in the order in which they were made. Printed, it is a table.

    Example:
        >>> report = Report((Check("mode", "passed", "training"), Check("labels", "skipped", "no batch")))
        >>> report.ok
        True
        >>> print(report)
        1 passed, 1 skipped: nothing stands against training
        ✓ mode             training
        – labels           no batch
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> tuple[Check, ...]:
        return self._of("passed")

    @property
    def warned(self) -> tuple[Check, ...]:
        return self._of("warned")

    @property
    def failed(self) -> tuple[Check, ...]:
        return self._of("failed")

    @property
    def skipped(self) -> tuple[Check, ...]:
        return self._of("skipped")

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        names = [check.name for check in self.checks]
        raise OptionError(f"no check is called {name!r}; there are: {listing(names, 30)}.{nearest(name, names)}")

    def __str__(self) -> str:
        counts = ", ".join(f"{len(found)} {status}" for status in MARKS if (found := self._of(status)))
        if self.failed:
            verdict = "do not train yet"
        else:
            verdict = (
                "training will work, with what the warnings say" if self.warned else "nothing stands against training"
            )
        return "\n".join([f"{counts}: {verdict}", *map(str, self.checks)])

    def raise_if_failed(self) -> None:
        """Raise unless `ok`, with all that failed.

        Raises:
            LoraKitError: of the class that fits the first failure, such as `DataError` for labels and
                `NothingToTrainError` where every parameter is frozen.
        """
        if self.ok:
            return
        failed = [f"{check.name}: {check.found}. {check.remedy}" for check in self.failed]
        raise _ERRORS.get(self.failed[0].name, UnsupportedError)("; ".join(failed))

    def _of(self, status: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == status)


def passed(name: str, found: str) -> Check:
    return Check(name, "passed", found)


def skipped(name: str, found: str) -> Check:
    return Check(name, "skipped", found)


def warned(name: str, found: str, remedy: str) -> Check:
    return Check(name, "warned", found, remedy)


def failed(name: str, found: str, remedy: str) -> Check:
    return Check(name, "failed", found, remedy)


def number(value: float) -> str:
    """A number as short as it can be said: `0.0123`, `4.91`, `1e-07`."""
    return f"{value:.3g}"


def many(count: int, word: str) -> str:
    """`"1 label"`, `"4 labels"`."""
    return f"{count:,} {word}" + "s" * (count != 1)


def share(value: float) -> str:
    """A share of 1 in per cent: `0.0 %`, `0.03 %`, `87 %`."""
    return f"{100 * value:.2g} %" if value < 0.995 else "100 %"
