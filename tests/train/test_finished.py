"""Starts in the folder of a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from partialfc.config import parse_config
from partialfc.errors import ConfigError
from partialfc.train.finished import finished_before


def test_a_finished_run_whose_config_lacks_a_key_is_still_this_run(tmp_path: Path) -> None:
    tree = {"data": {"train": "x"}, "run": {"dir": str(tmp_path)}}
    config = parse_config(tree)
    assert not finished_before(config), "nothing is there"
    (tmp_path / "state.json").write_text('{"state": "finished"}')
    written = config.model_dump(mode="json")
    del written["optim"]["spike"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert finished_before(config)
    other = parse_config(tree | {"optim": {"lr": 0.3}})
    with pytest.raises(ConfigError, match="holds a finished run of a different config"):
        finished_before(other)
    assert not finished_before(other, force=True)
