"""Pure functions applied to many tasks in a few processes, with results in the order of the tasks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from partialfc.errors import DataError


class Pool:
    """Context manager of worker processes; with one worker everything runs in this process."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._executor = ProcessPoolExecutor(self.workers) if self.workers > 1 else None

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
            self._executor.shutdown(cancel_futures=True)
