"""The one channel on which lora_kit speaks unasked: single lines, to the log or to standard error."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("lora_kit")


def say(line: str) -> None:
    """Tell the user one line.

    It goes to the logger `lora_kit` where logging has been set up to show it, else to standard error. To silence
    it: `logging.getLogger("lora_kit").setLevel("ERROR")`. In a distributed run only the first process speaks.
    """
    if os.environ.get("RANK", "0") not in ("0", ""):
        return
    if logger.level > logging.INFO:
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(line)
    else:
        print(f"lora_kit: {line}", file=sys.stderr)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep other packages' loggers from repeating themselves while we call them; undone on the way out."""
    others = [other for name in names if _nothing not in (other := logging.getLogger(name)).filters]
    for other in others:
        other.addFilter(_nothing)
    try:
        yield
    finally:
        for other in others:
            other.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
