"""Fixtures of the tests with W&B."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.wandb_runs import Run, environment, online
from tests.harness.wandb_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def run(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Run:
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    for key, value in environment(tmp_path, **online(server)).items():
        monkeypatch.setenv(key, value)
    return Run(tmp_path, server)
