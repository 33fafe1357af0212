"""Real ranks for the tests: processes with gloo between them, kept for the whole session.

A test sends a module-level function to the first ``world_size`` of them, which call it with the group that they form.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import current_process
from multiprocessing.connection import Client, Listener
from typing import Any

import torch
import torch.distributed as dist

from tests.harness.running import begin

MOST_RANKS = 4


@dataclass
class Outcome:
    """Result or exception of a rank's call."""

    value: Any = None
    error: BaseException | None = None
    where: str = ""


def serve(rank: int, folder: str, key: str) -> None:
    """Be a rank of the pool that keeps its files in a folder; tensors come and go in shared memory, by the key."""
    current_process().authkey = bytes.fromhex(key)
    connection = Client(f"{folder}/{rank}")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=MOST_RANKS,
        timeout=timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST_RANKS + 1)}
    while (path := connection.recv()) is not None:
        sys.path[:] = path  # where the function that comes next is found
        call = connection.recv()
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
        self._folder = tempfile.TemporaryDirectory()
        self._connections, self._processes = [], []
        for rank in range(MOST_RANKS):
            words = rank, self._folder.name, bytes(current_process().authkey).hex()
            code = f"from tests.harness.ranks import serve; serve{words}"
            with Listener(f"{self._folder.name}/{rank}") as listener:
                self._processes.append(begin([sys.executable, "-c", code]))
                self._connections.append(listener.accept())

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 90
    ) -> list[Any]:
        """Return the outcome of ``function(group, *arguments)`` on each of ``world_size`` ranks, errors included."""
        used = self._connections[:world_size]
        for connection in used:
            connection.send(sys.path)
            connection.send((function, world_size, arguments))
        for rank, connection in enumerate(used):
            if not connection.poll(seconds):
                raise TimeoutError(f"rank {rank} has not answered within {seconds} s: {function.__name__}")
        return [connection.recv() for connection in used]

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results of ``function`` by rank; raise AssertionError if it failed on one."""
        outcomes = self.outcomes(world_size, function, *arguments)
        for outcome in outcomes:
            if outcome.error is not None:
                raise AssertionError(outcome.where) from outcome.error
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._folder.cleanup()
