"""Worker processes: results in order, and an end with their parent or with an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partialfc.data.pool import Pool
from partialfc.errors import DataError


def square(number: int) -> int:
    time.sleep(0.01 if number % 3 else 0)
    return number * number


def wait_or_fail(folder: Path, number: int) -> None:
    """Fail, once another worker is in the middle of its task."""
    if number:
        (folder / f"{os.getpid()}").touch()
        time.sleep(600)
    while not list(folder.iterdir()):
        time.sleep(0.01)
    raise DataError("the first task fails")


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    with Pool(workers) as pool:
        assert list(pool.map(square, [(i,) for i in range(40)])) == [i * i for i in range(40)]


def test_an_error_ends_the_other_workers_in_the_middle_of_their_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the first task fails"), Pool(2) as pool:
        list(pool.map(wait_or_fail, [(tmp_path, 0), (tmp_path, 1)]))
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_worker_that_dies_is_an_error() -> None:
    with pytest.raises(DataError, match="a worker process died"), Pool(2) as pool:
        list(pool.map(die, [(0,), (1,)]))


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = f"""if True:
        from pathlib import Path
        from partialfc.data.pool import Pool
        from tests.data.test_pool import wait_or_fail
        with Pool(2) as pool:
            list(pool.map(wait_or_fail, [(Path({str(tmp_path)!r}), 1), (Path({str(tmp_path)!r}), 2)]))
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    while process.poll() is None and len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # ends when no worker is left that could write there
