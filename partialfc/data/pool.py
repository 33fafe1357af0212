"""Pure functions applied to many tasks in a few processes, with results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from partialfc.errors import DataError


class Pool:
    """Context manager of worker processes; with one worker everything runs in this process.

    An error, or the end of this process, ends the workers at once, in the middle of their tasks.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None
        if self.workers > 1:
            # Nothing is sent: the workers see its end when this process closes it, or is killed.
            reader, self._lifeline = multiprocessing.Pipe(duplex=False)
            self._executor = ProcessPoolExecutor(
                self.workers, initializer=_begin_worker, initargs=(reader, self._lifeline)
            )

    def map(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield ``function(*task)`` for each task, in order. Only a few results wait at a time, to bound memory."""
        if self._executor is None:
            for task in tasks:
                yield function(*task)
            return
        running: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                running.append(self._executor.submit(function, *task))
                if len(running) > 4 * self.workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a worker process died; is the machine out of memory? Use fewer workers") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            if kind is not None:
                self._lifeline.close()
            self._executor.shutdown(cancel_futures=True)
            self._lifeline.close()


def _begin_worker(reader: Connection, lifeline: Connection) -> None:
    lifeline.close()  # this process's copy would keep it open
    # Signals often go to all processes of a group. What they mean is for the parent to say, with whom workers end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()


def _end_with_parent(reader: Connection) -> None:
    with suppress(EOFError, OSError):
        reader.recv_bytes()
    os._exit(1)
