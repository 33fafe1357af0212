"""Model of torch's caching allocator for GPUs, without expandable segments, fed with the allocations of a CPU.

It keeps what it has taken from the device, in segments, and hands out the smallest free block that is large enough; the
rest of a block is split off, and free neighbours in a segment join again. All sizes are scaled down, as are those of a
test.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(eq=False)
class _Block:
    size: int
    small: bool
    free: bool = True
    before: _Block | None = None  # in the same segment
    after: _Block | None = None
    number: int = field(default_factory=count().__next__)

    @property
    def rank(self) -> tuple[int, int]:
        return self.size, self.number


class CachingAllocator:
    """Counts bytes: ``allocated``, ``reserved`` and the largest of each.

    Args:
        scale: by which torch's constants are divided.
    """

    def __init__(self, scale: int = 1) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self._unit = max(1, 512 // scale)
        self._small, self._small_segment = (1 << 20) // scale, (2 << 20) // scale
        self._medium, self._medium_segment, self._round = (10 << 20) // scale, (20 << 20) // scale, (2 << 20) // scale
        self._free: dict[bool, list[tuple[tuple[int, int], _Block]]] = {True: [], False: []}

    def allocate(self, num_bytes: int) -> _Block:
        size = max(1, -(-num_bytes // self._unit)) * self._unit
        small = size <= self._small
        blocks = self._free[small]
        place = bisect_left(blocks, ((size, 0),))  # type: ignore[type-var]
        block = blocks.pop(place)[1] if place < len(blocks) else self._segment(size, small)
        block.free = False
        if block.size - size >= self._unit if small else block.size - size > self._small:
            rest = _Block(block.size - size, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def release(self, block: _Block) -> None:
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._free[block.small].remove((other.rank, other))
                block.size += other.size
                if other is block.before:
                    block.before = other.before
                    if other.before is not None:
                        other.before.after = block
                else:
                    block.after = other.after
                    if other.after is not None:
                        other.after.before = block
        self._put(block)

    def _put(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.rank, block))  # type: ignore[type-var]

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            taken = self._small_segment
        elif size < self._medium:
            taken = self._medium_segment
        else:
            taken = -(-size // self._round) * self._round
        self.reserved += taken
        self.most_reserved = max(self.most_reserved, self.reserved)
        return _Block(taken, small)


@contextmanager
def following(allocator: CachingAllocator) -> Iterator[None]:
    """Repeat with ``allocator`` what this block allocates and releases; at its end, release the rest."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield
    blocks: dict[int, _Block] = {}
    for _, address, num_bytes in sorted(_allocations(profiled)):
        if num_bytes > 0:
            blocks[address] = allocator.allocate(num_bytes)
        elif address in blocks:
            allocator.release(blocks.pop(address))


def _allocations(profiled: Any) -> Iterator[tuple[int, int, int]]:
    """Yield (time, address, bytes) of each event, bytes < 0 where memory is released."""
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        kind, fields = event.typed
        if "Allocation" in str(kind):
            yield event.start_time_ns, fields.ptr, fields.alloc_size
