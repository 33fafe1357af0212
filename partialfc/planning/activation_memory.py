"""Activation memory of a training step, measured without computing it."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_activation_bytes(
    module: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    fake: bool = True,
) -> int:
    """Return the most bytes that forward and backward hold at once besides parameters, gradients, buffers and images.

    With fake tensors every operation propagates its shapes as on a CPU, without numbers, whatever the size. Workspaces
    of convolution libraries and fragmentation of an allocator come on top.

    Args:
        module: on any device, for instance "meta". Its tensors are replaced.
        shape: shape of the batch of images.
        dtype: dtype of the parameters.
        autocast: dtype of autocast; its copies of the parameters count, too.
        fake: if false, really compute.

    Raises:
        RuntimeError, ValueError: the module cannot compute this batch, or with fake tensors its forward pass depends on
            values.
    """
    module.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        module.to_empty(device="cpu")
        images = torch.zeros(shape, dtype=dtype if autocast is None else torch.float32)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        with _LiveBytes([*module.parameters(), *module.buffers(), *gradients, images]) as live:
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                embeddings = module(images)
            embeddings.sum().backward()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages created within, until they are freed, except ``known`` ones."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
