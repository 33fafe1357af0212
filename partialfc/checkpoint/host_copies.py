"""Copies of tensors in host memory, pinned where they come from a GPU."""

from __future__ import annotations

import mmap
import weakref
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from partialfc.errors import CheckpointFailed
from partialfc.tracking.console import format_bytes

_ALIGNMENT = 64  # bytes, between the beginnings of tensors: a line of the processor's cache


class HostCopies:
    """Copies tensors into host memory that it keeps for the next time.

    All copies share one block, just as large as they need. torch's own pinned memory comes in powers of two for each
    tensor, up to twice of what is asked for.
    """

    def __init__(self) -> None:
        self._layout: tuple[Any, ...] = ()
        self._block: _Block | None = None
        self._copies: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of ``tensors``, valid until the next call. Copies from a GPU may still be under way.

        Raises:
            CheckpointFailed: the memory cannot be pinned.
        """
        pinned = any(tensor.device.type == "cuda" for tensor in tensors.values())
        layout = (pinned, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        if layout != self._layout:
            self.free()
            self._allocate(tensors, pinned)
            self._layout = layout
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        return dict(self._copies)

    def free(self) -> None:
        """Give the memory back, once no copy is referred to any more."""
        self._layout, self._copies = (), {}
        if self._block is not None:
            self._block.unpin()
            self._block = None

    def _allocate(self, tensors: dict[str, Tensor], pinned: bool) -> None:
        sizes = [-(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        starts = list(accumulate(sizes, initial=0))
        self._block = _Block(starts[-1], pinned)
        for (name, tensor), start in zip(tensors.items(), starts, strict=False):
            part = self._block.memory[start : start + tensor.numel() * tensor.itemsize]
            self._copies[name] = part.view(tensor.dtype).view(tensor.shape)


class _Block:
    """Bytes of host memory, pinned until :meth:`unpin` or the end of this object."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        plain = not (pinned and num_bytes)
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu") if plain else _unforked(num_bytes)
        #: Unpins at most once. The argument keeps the memory until then.
        self.unpin: Any = lambda: None
        if not plain:
            status = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), num_bytes, 0))
            if status:
                raise CheckpointFailed(
                    f"{format_bytes(num_bytes)} of host memory for a copy of the state cannot be pinned (CUDA error "
                    f"{status}); checkpoint.asynchronous=false does without the copy"
                )
            self.unpin = weakref.finalize(self, _unpin, self.memory)


def _unforked(num_bytes: int) -> Tensor:
    """Return memory that forked processes, such as a loader's, do not inherit: for each, pinned pages may be copied."""
    pages = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_DONTFORK"):
        pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
