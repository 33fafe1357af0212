"""The memory of a network's training step, found without doing it."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_of_a_step(
    module: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    fake: bool = True,
) -> int:
    """The most bytes that forward and backward of a batch hold at once, besides parameters, gradients, buffers, images.

    With fake tensors every operation runs with its shapes and without its numbers, as on a CPU, whatever the size. The
    workspaces of convolution libraries and the fragments of an allocator come on top.

    Args:
        module: on any device, "meta" for instance. Its tensors are replaced.
        shape: of the batch.
        dtype: of the parameters.
        autocast: what to compute in besides. Its copies of the parameters count, too.
        fake: false really computes.

    Raises:
        RuntimeError, ValueError: the module cannot compute that; with fake tensors a forward pass that looks at values
            cannot be followed.
    """
    module.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        module.to_empty(device="cpu")
        images = torch.zeros(shape, dtype=dtype if autocast is None else torch.float32)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        with LiveBytes([*module.parameters(), *module.buffers(), *gradients, images]) as live:
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                embeddings = module(images)
            embeddings.sum().backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the memory of tensors that are made within, from birth to death."""

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
                weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())
        return result

    def _died(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
