"""Copies of the state in host memory: exact, no larger than need be, and pinned as long as they are used."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc.checkpoint.host_copies import HostCopies
from partialfc.errors import CheckpointFailed


@dataclass
class StandIn:
    """CUDA's runtime, as far as it pins memory."""

    status: int = 0
    pinned: dict[int, int] = field(default_factory=dict)  # bytes by address
    unpinned: list[int] = field(default_factory=list)

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 0
        assert address not in self.pinned
        if not self.status:
            self.pinned[address] = num_bytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        self.unpinned.append(address)
        return 0


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def state(rows: int = 1000, on_gpu: bool = True) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {
        "weight": torch.randn(rows, 33),
        "momentum": torch.randn(rows, 33).bfloat16(),
        "steps": torch.arange(rows, dtype=torch.int32),
        "empty": torch.empty(0, 5),
        "step": torch.tensor(7),
        "flags": torch.rand(rows - 7) < 0.5,
    }
    return {name: value.as_subclass(OnGpu) for name, value in tensors.items()} if on_gpu else tensors


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: stand_in)
    return stand_in


def same(copies: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    return list(copies) == list(tensors) and all(
        type(copies[name]) is Tensor
        and copies[name].dtype is value.dtype
        and torch.equal(copies[name], value.as_subclass(Tensor))
        for name, value in tensors.items()
    )


@pytest.mark.parametrize("on_gpu", [False, True])
def test_copies_equal_their_tensors_and_share_memory_for_the_next(cuda: StandIn, on_gpu: bool) -> None:
    holder, first, second = HostCopies(), state(on_gpu=on_gpu), state(on_gpu=on_gpu)
    copies = holder.take(first)
    assert same(copies, first)
    addresses = [copy.data_ptr() for copy in copies.values()]
    copies = holder.take(second)
    assert same(copies, second)
    assert [copy.data_ptr() for copy in copies.values()] == addresses
    assert len(cuda.pinned) == on_gpu


def test_pinned_memory_is_as_large_as_the_state(cuda: StandIn) -> None:
    tensors = state(rows=40_000)  # the weight has 5.3 MB: as a power of two, 8.4 MB
    holder = HostCopies()
    holder.take(tensors)
    (num_bytes,) = cuda.pinned.values()
    needed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert needed <= num_bytes <= needed + 64 * len(tensors)


def test_another_state_takes_the_place_of_the_last_and_the_end_of_all_unpins(cuda: StandIn) -> None:
    holder = HostCopies()
    holder.take(state())
    (first,) = cuda.pinned
    tensors = state(rows=2000)
    assert same(holder.take(tensors), tensors)
    assert cuda.unpinned == [first]
    assert len(cuda.pinned) == 1
    holder.free()
    assert not cuda.pinned
    holder.take(state())
    del holder
    gc.collect()
    assert not cuda.pinned
    assert len(cuda.unpinned) == 3


def test_memory_that_cannot_be_pinned_ends_in_one_clear_line(cuda: StandIn) -> None:
    cuda.status = 2
    with pytest.raises(CheckpointFailed, match=r"cannot be pinned \(CUDA error 2\); checkpoint.asynchronous=false"):
        HostCopies().take(state())
    assert not cuda.unpinned
