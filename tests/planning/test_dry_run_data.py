"""A dry run refuses data with which a run would not start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from partialfc.config import load_config
from partialfc.errors import InvalidData
from partialfc.planning.dry_run import dry_run
from tests.harness.tasks import write_task


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("train/index.json", Path.unlink, r"train is not a complete data set folder: index\.json is missing"),
        ("train/shard-000000.tar", Path.unlink, r"shard-000000\.tar is missing"),
        ("train/classes.jsonl", Path.unlink, r"classes\.jsonl is missing"),
        ("known", lambda folder: folder.rename(folder.with_name("moved")), r"known is not a complete data set folder"),
        ("verification/protocol.json", lambda path: path.write_text("{}"), "it names no protocol"),
    ],
)
def test_data_that_is_missing_or_damaged_is_refused(
    tmp_path: Path, file: str, spoil: Callable[[Path], object], words: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    spoil(tmp_path / file)
    with pytest.raises(InvalidData, match=words):
        dry_run(load_config(config), 1)


def test_sets_of_a_run_whose_data_come_later_are_named(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    later = ["data.train=/nowhere", "data.num_classes=5", "evaluation.sets=[/none]"]
    assert dry_run(load_config(config, later), 1)[-1] == "not there yet: data.train=/nowhere, evaluation.sets=/none"
