from __future__ import annotations

import os
import signal
import tempfile

# Before torch is imported: tests run beside their own ranks, and on a CPU, whatever else this machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if not os.access(os.path.expanduser("~"), os.W_OK):  # several libraries keep something there
    os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import yaml

from tests.harness import warm
from tests.harness.ranks import Ranks
from tests.harness.tasks import write_task

# A shell starts what it puts into the background with SIGINT ignored, and the commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


hypothesis.settings.register_profile("tests", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a made-up task, beside its data."""
    folder = tmp_path_factory.mktemp("task")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(folder)))
    return config


@pytest.fixture
def short_task(tmp_path: Path) -> Path:
    """The config file of a task of one epoch without evaluations, for one test."""
    tree = write_task(tmp_path)
    tree["evaluation"] = {"sets": []}
    tree["optim"]["epochs"] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def pytest_unconfigure() -> None:
    warm.end_servers()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add what was skipped, and why, to the file that the environment names."""
    file = os.environ.get("SKIPPED")
    if file:
        reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
        with open(file, "a") as text:
            text.writelines(f"  {number} × {reason.removeprefix('Skipped: ')}\n" for reason, number in reasons.items())
