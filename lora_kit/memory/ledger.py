"""Every storage from its birth to its death: how many bytes are alive, what they are for, and when they are the most.

It works on real tensors, whose bytes it counts as an allocator would, and on fake ones, which have sizes and no memory.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Phase = tuple[Any, ...]
Key = tuple[Phase, str, int]
"""Phase, operation, how often the operation had run in that phase by then."""
Workspace = Callable[[tuple, dict[str, Any]], int]
"""(args, kwargs) of an operation → bytes that it takes while it runs and gives back."""


@dataclass
class Moment:
    """What is alive when most is."""

    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Kind of tensor → bytes."""
    operation: str = ""


class Ledger(TorchDispatchMode):
    """Counts each storage once, from the first operation that returns it until it is freed.

    `live` and `peak` are bytes. `kind` is what storages are from now on, `block` what sizes are rounded up to.
    `moments` holds what was alive at most while each operation of a phase ran, if `detailed`, else in all.
    """

    def __init__(
        self,
        existing: Iterable[torch.Tensor] = (),
        *,
        block: int = 1,
        workspaces: Mapping[str, Workspace] | None = None,
        detailed: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.workspaces, self.detailed = block, workspaces or {}, detailed
        self.live = 0
        self.kind = "activations"
        self.phase: Phase = ()
        self.moments: dict[Key, Moment] = {}
        self.events: list[tuple[int, int]] | None = None
        """(number of the storage, its bytes, or 0 where it is freed), in order, once this is a list."""
        self._kinds: dict[str, int] = {}
        self._entries: dict[int, list[Any]] = {}  # storage → [bytes, kind, number]
        self._operation = ""
        self._key: Key = ((), "", 0)
        self._runs: dict[tuple[Phase, str], int] = {}
        self._count = 0
        for tensor in existing:
            self.add(tensor, "existing")

    @property
    def peak(self) -> int:
        """Most bytes alive at any moment so far."""
        return max((moment.bytes for moment in self.moments.values()), default=0)

    def add(self, tensor: torch.Tensor, kind: str | None = None, *, count: bool = True) -> None:
        """Count a tensor's storage, unless it is known; with `count=False` it is known from now on, as 0 bytes.

        With a `kind` a known one is renamed, and counted if it was not.
        """
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            if kind is not None:
                self._rename(key, kind, storage.nbytes())
            return
        size = self._rounded(storage.nbytes()) if count else 0
        kind = kind or self.kind
        self._count += 1
        self._entries[key] = [size, kind, self._count]
        if self.events is not None and size:
            self.events.append((self._count, size))
        weakref.finalize(storage, self._remove, key)
        self.live += size
        self._kinds[kind] = self._kinds.get(kind, 0) + size
        self._note(0)

    def _rounded(self, size: int) -> int:
        return -(-size // self.block) * self.block

    def hold(self, size: int, kind: str) -> None:
        """Count bytes that are nobody's tensor and stay."""
        self.live += size
        self._kinds[kind] = self._kinds.get(kind, 0) + size

    def mark(self) -> None:
        """Note what is alive now, as the beginning of the phase."""
        self._key = self.phase, "", 0
        self._note(0)

    def start_events(self) -> None:
        """Note from now on what is allocated and freed in `events`, what is alive first."""
        self.events = [(number, size) for size, _, number in self._entries.values() if size]

    def _rename(self, key: int, kind: str, actual: int) -> None:
        counted, before, number = self._entries[key]
        size = counted or self._rounded(actual)
        self.live += size - counted
        self._kinds[before] -= counted
        self._kinds[kind] = self._kinds.get(kind, 0) + size
        self._entries[key] = [size, kind, number]

    def _remove(self, key: int) -> None:
        size, kind, number = self._entries.pop(key, (0, self.kind, 0))
        self.live -= size
        self._kinds[kind] = self._kinds.get(kind, 0) - size
        if self.events is not None and size:
            self.events.append((number, 0))

    def _note(self, workspace: int) -> None:
        moment = self.moments.setdefault(self._key, Moment())
        if self.live + workspace > moment.bytes:
            moment.bytes = self.live + workspace
            moment.kinds = {kind: size for kind, size in self._kinds.items() if size}
            moment.operation = self._operation
            if workspace:
                moment.kinds["workspace"] = workspace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # what comes in and is not known was alive before, and was not named as part of the step
        for tensor in tensors_in(args):
            self.add(tensor, count=False)
        if kwargs:
            for tensor in tensors_in(kwargs.values()):
                self.add(tensor, count=False)
        result = self.run(func, args, kwargs)
        self._operation = func._schema.name
        if self.detailed:
            run = self.phase, self._operation
            self._runs[run] = self._runs.get(run, 0) + 1
            self._key = *run, self._runs[run]
        for tensor in tensors_in((result,)):
            self.add(tensor)
        if self._operation in self.workspaces:
            self._note(self.workspaces[self._operation](args, kwargs))
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
