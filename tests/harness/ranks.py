"""Real ranks for the tests: processes with gloo between them, kept for the whole session.

A test sends a module-level function to the first ``world_size`` of them, which call it with the group that they form.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

MOST_RANKS = 4


@dataclass
class Outcome:
    """What a rank's call returned or raised."""

    value: Any = None
    error: BaseException | None = None
    where: str = ""


def _serve(rank: int, init_file: str, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=MOST_RANKS,
        timeout=timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST_RANKS + 1)}
    while (call := connection.recv()) is not None:
        function, world_size, arguments = call
        try:
            outcome = Outcome(function(groups[world_size], *arguments))
        except BaseException as error:
            outcome = Outcome(error=error, where=traceback.format_exc())
        try:
            connection.send(outcome)
        except Exception as error:  # the result cannot be pickled
            connection.send(Outcome(error=RuntimeError(f"{outcome} cannot be sent: {error}")))
    dist.destroy_process_group()


class Ranks:
    """A pool of ranks; see the module's text."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._connections, self._processes = [], []
        for rank in range(MOST_RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, f"{self._folder.name}/init", there), daemon=True)
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 90
    ) -> list[Any]:
        """What ``function(group, *arguments)`` did on each of ``world_size`` ranks, errors included."""
        used = self._connections[:world_size]
        for connection in used:
            connection.send((function, world_size, arguments))
        for rank, connection in enumerate(used):
            if not connection.poll(seconds):
                raise TimeoutError(f"rank {rank} has not answered within {seconds} s: {function.__name__}")
        return [connection.recv() for connection in used]

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function`` returned on each rank; raises what one of them raised."""
        outcomes = self.outcomes(world_size, function, *arguments)
        for outcome in outcomes:
            if outcome.error is not None:
                raise AssertionError(outcome.where) from outcome.error
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
