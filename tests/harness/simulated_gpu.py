"""Simulated GPU: tensors claim ``cuda:0`` while their values lie on the CPU, and each wait of the host is recorded.

Tensors of a real device cannot be made in a CPU build of torch, so these are wrappers: to torch's C++ they are on a
device that torch lets Python define, to Python they are on ``cuda:0``. Every operation reaches :class:`SimulatedGpu`,
which computes it on the CPU and judges it as a GPU would: operands from two devices are an error, and a value that the
host asks for is a wait. Only a process of its own should use this: torch cannot take such a device back.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_DEVICE = "simulated"
_PACKAGE = "/partialfc/"

# The size of a result, or the result itself, is known to the device alone.
_WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}
_WAITING |= {"bincount", "_coalesce", "is_nonzero", "repeat_interleave"}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# Nothing runs on the device.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"}
_FREE |= {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "unbind",
    "squeeze",
}
_FREE |= {"squeeze", "unsqueeze", "as_strided", "_reshape_alias", "split_with_sizes", "diagonal", "_indices", "_values"}
_FREE |= {"_sparse_coo_tensor_with_dims_and_tensors", "_sparse_coo_tensor_unsafe", "_local_scalar_dense"}


class DeviceMismatch(RuntimeError):
    """An operation mixes tensors of the host and of the device."""


class GpuTensor(torch.Tensor):
    """A tensor on the simulated device; ``on_cpu`` holds its values."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> GpuTensor:
        dense = on_cpu if on_cpu.layout is torch.strided else torch.empty(on_cpu.shape, device="meta")
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.size(),
            strides=dense.stride(),
            storage_offset=dense.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(_DEVICE, 0),
        )
        made.on_cpu = on_cpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of `simulated_gpu()`")

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_sparse = property(lambda self: self.on_cpu.is_sparse)

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()

    sorted_rows = False

    def is_coalesced(self) -> bool:
        return self.sorted_rows  # autograd drops torch's own mark, on a GPU as on a CPU

    def coalesce(self) -> Tensor:
        _active().note_wait("coalesce")
        made = GpuTensor(self.on_cpu.coalesce())
        made.sorted_rows = True
        return made

    def _indices(self) -> Tensor:
        return GpuTensor(self.on_cpu._indices())

    def _values(self) -> Tensor:
        return GpuTensor(self.on_cpu._values())

    indices, values = _indices, _values

    def tolist(self) -> Any:
        _active().note_wait("tolist")
        return self.on_cpu.tolist()


@dataclass
class SimulatedGpu(TorchDispatchMode):
    """Computes for the device and keeps the record: how many waits and launches, and where."""

    waits: Counter[str] = field(default_factory=Counter)  # by place: "head/message.py:119 (_to_copy)"
    event_waits: Counter[str] = field(default_factory=Counter)  # for an event of the past only
    launches: Counter[str] = field(default_factory=Counter)  # operations that run something on the device, by place

    def __post_init__(self) -> None:
        super().__init__()

    def note_wait(self, what: str) -> None:
        self.waits[f"{_place()} ({what})"] += 1

    def forget(self) -> None:
        """Begin to count anew."""
        for counter in (self.waits, self.event_waits, self.launches):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        target = kwargs.get("device")
        to_gpu = target is not None and torch.device(target).type in ("cuda", _DEVICE)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_gpu = [value for value in tensors if isinstance(value, GpuTensor)]
        pinned = bool(kwargs.pop("pin_memory", False))
        if not on_gpu and not to_gpu:
            result = func(*args, **kwargs)
            if pinned:
                result.pinned = True
            return result
        if name == "_to_copy":
            return self._copy_to(func, args[0], to_gpu, target is not None, kwargs)
        if name == "copy_":
            return self._copy_into(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        self._judge(name, args, tensors)
        if to_gpu:
            kwargs["device"] = torch.device("cpu")
        mutated = func._schema.is_mutable
        result = _on_cpu(func, *tree_map(_value_of, args), **tree_map(_value_of, kwargs))
        if name not in _FREE:
            self.launches[_place()] += 1
        if not func._schema.returns:
            return None
        if mutated:  # hand back the wrapper of what was changed
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(lambda value: GpuTensor(value) if isinstance(value, Tensor) else value, result)

    def _judge(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Note a wait; raise for operands from both sides."""
        if name in _WAITING:
            self.note_wait(name)
        host = [value for value in tensors if not isinstance(value, GpuTensor)]
        if name in _INDEXING:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note_wait(f"{name} by a mask")
                elif index is not None and not isinstance(index, GpuTensor):
                    self.note_wait(f"{name} by an index from the host")
            if len(args) > 2 and not isinstance(args[2], GpuTensor):
                self.note_wait(f"{name} of a number")
            host = []
        # Numbers of no dimension are arguments of a kernel.
        if any(value.dim() for value in host):
            raise DeviceMismatch(f"{name} of tensors on {[str(value.device) for value in tensors]}, at {_place()}")

    def _copy_to(self, func: Any, source: Tensor, to_gpu: bool, moved: bool, kwargs: dict[str, Any]) -> Tensor:
        waits_not = kwargs.pop("non_blocking", False)
        kwargs.pop("device", None)
        copy = func(_value_of(source), **kwargs)
        if isinstance(source, GpuTensor) and (to_gpu or not moved):
            self.launches[_place()] += 1
            return GpuTensor(copy)
        if not to_gpu:
            self.note_wait("copy to the host")
            return copy
        if not (waits_not and getattr(source, "pinned", False)):
            self.note_wait("copy from pageable memory")
        return GpuTensor(copy)

    def _copy_into(self, target: Tensor, source: Tensor, waits_not: bool) -> Tensor:
        _value_of(target).copy_(_value_of(source))
        if isinstance(target, GpuTensor) and isinstance(source, GpuTensor):
            self.launches[_place()] += 1
        elif not (waits_not and getattr(source if isinstance(target, GpuTensor) else target, "pinned", False)):
            self.note_wait("copy_ between host and device")
        return target


class _Event:
    """Waits for a copy of the past, not for the work queued behind it: counted apart."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        _active().event_waits[_place()] += 1


_gpus: list[SimulatedGpu] = []


def _active() -> SimulatedGpu:
    return _gpus[-1]


def to_gpu(tensor: Tensor) -> Tensor:
    """Return a copy on the simulated device."""
    return GpuTensor(tensor.detach().clone())


def to_cpu(tensor: Tensor) -> Tensor:
    """Return the values, without a wait on record."""
    return _value_of(tensor.detach())


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Let ``device="cuda"`` mean the simulated device within this block, on this thread."""
    if not hasattr(torch, _DEVICE):
        backend_registration._setup_privateuseone_for_python_backend(_DEVICE)  # type: ignore[attr-defined]
    gpu = SimulatedGpu()
    _gpus.append(gpu)
    make = torch.tensor

    def make_tensor(data: Any, *, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        made: Tensor = make(data, device="cpu", **options)
        return made if device is None else made.to(device)

    def pin(tensor: Any) -> Any:
        copy = tensor.clone()
        copy.pinned = True
        return copy

    try:
        with (
            patch.object(torch, "tensor", make_tensor),
            patch.object(torch.Tensor, "pin_memory", pin),
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            patch.object(torch.cuda, "Event", _Event),
            patch.object(torch.cuda, "current_stream", lambda device=None: None),
            patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            torch.autograd.set_multithreading_enabled(False),
            gpu,
        ):
            yield gpu
    finally:
        _gpus.pop()


def _value_of(value: Any) -> Any:
    return value.on_cpu if isinstance(value, GpuTensor) else value


def _on_cpu(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the CPU, which has no product of 16-bit matrices into float32."""
    if "dtype" in func._overloadname.split("_") and func._schema.name in ("aten::mm", "aten::addmm"):
        *matrices, dtype = args
        plain: Callable[..., Any] = torch.mm if len(matrices) == 2 else torch.addmm
        return plain(*(matrix.to(dtype) for matrix in matrices), **kwargs)
    return func(*args, **kwargs)


def _place() -> str:
    """Return the innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if _PACKAGE in path and "/tests/" not in path and "site-packages" not in path:
            return f"{path.rsplit(_PACKAGE, 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
