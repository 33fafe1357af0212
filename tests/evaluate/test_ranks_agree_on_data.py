"""Ranks whose copies of the data differ: all of them refuse, none waits for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from partialfc.config import load_config
from partialfc.data.dataset import TarDataset
from partialfc.errors import InvalidData
from partialfc.evaluate.runner import Evaluation
from partialfc.runtime.collectives import run_alike
from tests.harness.data_sets import write_samples
from tests.harness.ranks import Ranks
from tests.harness.tasks import write_set, write_task


def _open(group: Any, folders: list[Path]) -> int:
    return run_alike(lambda: TarDataset(folders[dist.get_rank()]).num_samples)


def test_what_one_rank_cannot_open_all_refuse_with_its_words(ranks: Ranks, tmp_path: Path) -> None:
    folders = [write_samples(tmp_path / f"node{rank}", [0, 1, 2]) for rank in range(4)]
    assert ranks.run(4, _open, folders) == [3] * 4
    (folders[2] / "shard-000000.tar").unlink()
    for outcome in ranks.outcomes(4, _open, folders):
        assert isinstance(outcome.error, InvalidData)
        assert str(outcome.error) == f"rank 2: {folders[2]}: shard shard-000000.tar is missing"
    for outcome in ranks.outcomes(4, _open, [tmp_path / "nowhere"] * 4):
        assert str(outcome.error).startswith(f"{tmp_path}/nowhere is not a complete data set folder: index.json is ")


def _match(group: Any, config: Path, tables: list[Path]) -> list[list[int]]:
    evaluation = Evaluation(load_config(config))
    evaluation.match_classes(37, tables[dist.get_rank()])
    return [found.class_ids.tolist() for found in evaluation.sets if found.class_ids is not None]


def test_all_ranks_take_the_names_that_the_first_one_reads(ranks: Ranks, tmp_path: Path) -> None:
    tree = write_task(tmp_path)
    write_set(tmp_path / "some", 30, 1, seed=1, first_picture=7)
    tree["evaluation"]["sets"] += [str(tmp_path / "some")]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    here, nowhere = tmp_path / "train" / "classes.jsonl", tmp_path / "nowhere"
    expected = [list(range(37)), list(range(7, 37))]
    assert ranks.run(4, _match, config, [here, nowhere, nowhere, nowhere]) == [expected] * 4
    for outcome in ranks.outcomes(4, _match, config, [nowhere, here, here, here]):
        assert isinstance(outcome.error, InvalidData)
        assert "nowhere cannot be read" in str(outcome.error)
