"""All collectives of a step.

A training step of the head does three: ``gather`` (the packed batch), ``sum`` (per-sample statistics) and
``start_reduce_scatter`` (the embeddings' gradient); a loss with unbounded logits adds one ``maximum``. Their sizes
depend on the batch, never on the number of classes. Without a process group all of them are the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.errors import ConfigError, RankLost

# torch 2.13 renamed these two and warns about the old names, the only ones in torch 2.11.
_OLD_NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}


def _torch(name: str) -> Callable[..., Any]:
    return getattr(dist, name if hasattr(dist, name) else _OLD_NAMES[name])


class Collectives:
    """The ranks that share a head, and the collectives between them.

    The group belongs to torch.distributed, up to ``destroy_process_group``. A reference that outlives that, as in a
    head that is a script's variable, would keep the threads of a Gloo group, which can abort a process as it ends.

    Args:
        group: the process group; default: the default group if there is one, else a single process.

    Raises:
        RankLost: from every collective that fails because another rank is gone or silent.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        if group is None and initialized:
            group = dist.group.WORLD
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        if self.rank < 0:
            raise ConfigError("this process is not a member of the head's process group")
        self._group = None if group is None else ref(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Collectives:
        return self  # a copied head belongs to the same ranks; a process group cannot be copied

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None for a single process.

        Raises:
            ConfigError: it has been destroyed.
        """
        if self._group is None:
            return None
        group = self._group()
        if group is None or not dist.is_initialized():
            raise ConfigError(
                f"rank {self.rank} of {self.world_size}: the process group of this head has been destroyed; use the "
                "head before destroy_process_group(), or make a new head in a new group"
            )
        return group

    def check_group(self) -> None:
        """Raise ConfigError if the process group was made after this object: every rank would train alone."""
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                "this head was made before torch.distributed.init_process_group, so it is not sharded; make it "
                "afterwards, or pass process_group="
            )

    @property
    def distributed(self) -> bool:
        """True if there is a process group, of any size."""
        return self._group is not None

    def gather(self, message: Tensor) -> Tensor:
        """Return the messages of all ranks, [world_size, len(message)], in rank order."""
        if self.group is None:
            return message[None]
        gathered = torch.empty(self.world_size * len(message), dtype=message.dtype, device=message.device)
        self._run("all-gather of the batch", _torch("all_gather_single"), gathered, message, group=self.group)
        return gathered.view(self.world_size, len(message))

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over ranks, in place, and return them."""
        if self.group is not None:
            self._run("all-reduce of sums", dist.all_reduce, values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Take the maximum of ``values`` over ranks, in place, and return it."""
        if self.group is not None:
            self._run("all-reduce of maxima", dist.all_reduce, values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def start_reduce_scatter(self, values: Tensor) -> Callable[[], Tensor]:
        """Start summing ``values [world_size·n, …]`` over ranks; the returned function waits for this rank's [n, …]."""
        if self.group is None:
            return lambda: values
        share = torch.empty_like(values[: len(values) // self.world_size])
        name = "reduce-scatter of the embeddings' gradient"
        work = self._run(name, _torch("reduce_scatter_single"), share, values, group=self.group, async_op=True)

        def wait() -> Tensor:
            self._run(name, work.wait)
            return share

        return wait

    def _run(self, name: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:  # raised by torch when a peer is gone or the group's timeout has passed
            raise RankLost(
                f"rank {self.rank} of {self.world_size}: the {name} failed; another rank has died, hangs or cannot be "
                f"reached ({type(error).__name__}: {error})"
            ) from error
