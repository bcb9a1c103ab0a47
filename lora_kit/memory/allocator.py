"""What torch's CUDA allocator reserves for a sequence of requests: a model of its pools, splits and merges."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK = 512
SMALL = 2**20
"""Requests up to here come from segments of 2 MiB."""
SEGMENT = 2 * 2**20
MIDDLE = 10 * 2**20
"""Requests below this come from segments of 20 MiB, larger ones from segments of their own, in steps of 2 MiB."""
MIDDLE_SEGMENT = 20 * 2**20

Place = tuple[int, int]
"""(segment, offset)."""


@dataclass
class CachingAllocator:
    """Best fit within two pools; a block is split where enough is left, and merged with free neighbours."""

    reserved: int = 0
    allocated: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    _free: tuple[list[tuple[int, Place]], list[tuple[int, Place]]] = field(default_factory=lambda: ([], []))
    _sizes: dict[Place, int] = field(default_factory=dict)
    """Free blocks by where they begin."""
    _ends: dict[Place, Place] = field(default_factory=dict)
    """Where a free block ends → where it begins."""
    _used: dict[int, tuple[int, Place, int]] = field(default_factory=dict)
    _segments: int = 0

    def allocate(self, number: int, size: int) -> None:
        """A request of so many bytes, to be freed by its number."""
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        pool = 0 if size <= SMALL else 1
        free = self._free[pool]
        index = bisect.bisect_left(free, (size, (-1, -1)))
        if index < len(free):
            found, place = free[index]
            self._take(pool, found, place)
        else:
            found = SEGMENT if pool == 0 else MIDDLE_SEGMENT if size < MIDDLE else -(-size // SEGMENT) * SEGMENT
            self._segments += 1
            place = self._segments, 0
            self.reserved += found
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        left = found - size
        if left >= BLOCK if pool == 0 else left > SMALL:
            self._give(pool, left, (place[0], place[1] + size))
        else:
            size = found
        self._used[number] = size, place, pool
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, number: int) -> None:
        """Give a request's block back."""
        size, (segment, offset), pool = self._used.pop(number)
        self.allocated -= size
        behind = self._sizes.get((segment, offset + size))
        if behind is not None:
            self._take(pool, behind, (segment, offset + size))
            size += behind
        before = self._ends.get((segment, offset))
        if before is not None:
            found = self._sizes[before]
            self._take(pool, found, before)
            offset, size = before[1], size + found
        self._give(pool, size, (segment, offset))

    def _give(self, pool: int, size: int, place: Place) -> None:
        bisect.insort(self._free[pool], (size, place))
        self._sizes[place] = size
        self._ends[place[0], place[1] + size] = place

    def _take(self, pool: int, size: int, place: Place) -> None:
        del self._free[pool][bisect.bisect_left(self._free[pool], (size, place))]
        del self._sizes[place], self._ends[place[0], place[1] + size]


def replay(events: Iterable[tuple[int, int]]) -> CachingAllocator:
    """(number, bytes, or 0 to free) in order, as a ledger notes them."""
    allocator = CachingAllocator()
    for number, size in events:
        if size:
            allocator.allocate(number, size)
        else:
            allocator.free(number)
    return allocator
