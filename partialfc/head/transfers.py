"""Transfers of small tensors between host and device, for which neither waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def host_waits_for(device: torch.device) -> bool:
    """Return True if to read a number on ``device`` is to wait for the work queued before it."""
    return device.type == "cuda"


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` from the host to ``device`` without waiting; return them unchanged for a CPU."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait


class DeferredRead:
    """Copy of a tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.cpu()

    def read(self) -> list[Any]:
        """Return the values. Waits for the copy only, not for the work queued behind it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
