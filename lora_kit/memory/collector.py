"""Python's garbage collector, held for a while."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is looked for; what reference counts free is freed.

    A simulation must not depend on the moment of a collection, and importing the libraries is a quarter faster so.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
