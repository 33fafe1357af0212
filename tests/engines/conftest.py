"""Fixtures of the tests of engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.harness.engine_runs import LINEAR
from tests.harness.tasks import write_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a made-up task with a linear backbone, without evaluations."""
    folder = tmp_path_factory.mktemp("task")
    tree = write_task(folder)
    tree["model"]["name"] = LINEAR
    tree["evaluation"] = {}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config
