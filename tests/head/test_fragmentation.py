"""A head does not fragment a GPU's memory as the number of its active rows moves: in a model of torch's allocator."""

from __future__ import annotations

import json
import sys

import pytest

from tests.harness import running
from tests.harness.caching_allocator import CachingAllocator

MOST = 1.3  # reserved by allocated


def reserved(steps: int, *names: str) -> dict[str, float]:
    done = running.finish([sys.executable, "-m", "tests.harness.gpu_memory", str(steps), *names], seconds=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_rising_sample_rate_reserves_little_more_than_it_uses() -> None:
    found = reserved(24, "rising", "unnamed")
    assert found["rising"] <= MOST
    assert found["unnamed"] > 3, "the model shows what a rate does of which the head does not know the largest"


@pytest.mark.slow
def test_no_schedule_of_two_hundred_steps_reserves_much_more_than_it_uses() -> None:
    found = reserved(200, "constant", "rising", "falling", "in steps")
    assert max(found.values()) <= MOST, found


def test_the_model_divides_blocks_and_joins_them_again() -> None:
    allocator = CachingAllocator()
    mebibyte = 1 << 20
    first, second = allocator.allocate(30 * mebibyte), allocator.allocate(1000)
    assert (allocator.allocated, allocator.reserved) == (30 * mebibyte + 1024, 32 * mebibyte)
    allocator.release(first)
    parts = [allocator.allocate(10 * mebibyte) for _ in range(3)]
    assert allocator.reserved == 32 * mebibyte, "from the first block"
    for part in (parts[0], parts[2], parts[1]):
        allocator.release(part)
    whole = allocator.allocate(30 * mebibyte)
    assert allocator.reserved == 32 * mebibyte
    allocator.allocate(31 * mebibyte)
    assert allocator.reserved == 64 * mebibyte, "an even number of MiB"
    allocator.release(second)
    allocator.release(whole)
    assert allocator.allocated == 32 * mebibyte, "a mebibyte is too little to be split off"
    assert allocator.most_allocated == 62 * mebibyte + 1024
