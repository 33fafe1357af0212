"""Reading a small tensor later, so that the host need not wait for the device now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredRead:
    """A copy of a tensor that is on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values.cpu()

    def read(self) -> list[Any]:
        """Return the values. Waits for the copy only, not for the work queued behind it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
