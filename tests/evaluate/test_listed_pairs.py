"""Verification on listed pairs, against plain computations and scikit-learn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold

from partialfc.data.dataset import TarDataset
from partialfc.data.pairs import Pair, PairList, folds_in_order, write_pairs
from partialfc.errors import InvalidData
from partialfc.evaluate.listed_pairs import cosines_of_pairs, fold_accuracies, scores_of_pairs
from partialfc.evaluate.runner import describe_results
from partialfc.evaluate.sets import open_set
from partialfc.train.agreement import data_facts
from tests.harness.data_sets import write_samples
from tests.harness.ranks import Ranks
from tests.harness.running import lines, partialfc, run
from tests.harness.tasks import write_set, write_task


def _made(pairs: int, seed: int = 0) -> tuple[torch.Tensor, PairList]:
    """Embeddings of 40 classes, a fixed list of pairs of them, a third of them genuine."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 40, 300)
    centers = rng.normal(size=(40, 8))
    embeddings = torch.from_numpy(centers[labels] + 0.8 * rng.normal(size=(300, 8))).float()
    first = rng.integers(0, 300, pairs)
    partners = [np.flatnonzero(labels == labels[i]) if rng.random() < 0.33 else np.arange(300) for i in first]
    second = np.array([rng.choice(some) for some in partners])
    pair_list = PairList(first, second, labels[first] == labels[second], folds_in_order(pairs))
    return torch.nn.functional.normalize(embeddings), pair_list


def _insightface_accuracies(embeddings: np.ndarray, pairs: PairList) -> list[float]:
    """As written in InsightFace's evaluation: loops over folds and thresholds."""
    distances = np.square(embeddings[pairs.first] - embeddings[pairs.second]).sum(1)
    found = []
    for others, fold in KFold(10, shuffle=False).split(distances):
        on_others = [((distances[others] < t) == pairs.same[others]).mean() for t in np.arange(0, 4, 0.01)]
        best = np.arange(0, 4, 0.01)[int(np.argmax(on_others))]
        found.append(float(((distances[fold] < best) == pairs.same[fold]).mean()))
    return found


@pytest.mark.parametrize("pairs", [10, 137, 1000])
def test_accuracy_over_folds_is_that_of_insightface(pairs: int) -> None:
    embeddings, listed = _made(pairs)
    cosines = cosines_of_pairs(embeddings, listed)
    found = fold_accuracies(cosines, listed.same, listed.folds)
    assert found.tolist() == pytest.approx(_insightface_accuracies(embeddings.double().numpy(), listed))
    assert pairs < 1000 or 0.7 < found.mean() < 1, "neither chance nor perfect"


def test_folds_in_order_are_those_of_scikit_learn() -> None:
    for pairs in (10, 15, 6000, 7001):
        expected = np.empty(pairs, dtype=np.int64)
        for number, (_, part) in enumerate(KFold(10, shuffle=False).split(expected)):
            expected[part] = number
        assert np.array_equal(folds_in_order(pairs), expected)


def test_folds_of_unequal_size_each_use_the_threshold_of_the_others() -> None:
    cosines = np.array([0.9, 0.1, 0.4, 0.3, 0.35])
    same = np.array([True, False, True, False, False])
    folds = np.array([0, 0, 1, 1, 1])
    # On fold 0, any threshold between 0.1 and 0.9 is best: the strictest accepts only above 0.9 - 0.005. On fold 1 the
    # strictest best one lies between 0.35 and 0.4.
    assert fold_accuracies(cosines, same, folds).tolist() == pytest.approx([1.0, 2 / 3])


def test_rates_are_those_of_scikit_learn() -> None:
    embeddings, pairs = _made(3000)
    cosines = cosines_of_pairs(embeddings, pairs)
    scores = scores_of_pairs(cosines, pairs.same)
    far, tar, _ = roc_curve(pairs.same, cosines, drop_intermediate=False)
    for rate in (0.1, 0.01):
        assert scores.tar_at_far(rate)[0] == pytest.approx(tar[far <= rate].max(), abs=2e-3)


def _cosines(group: dist.ProcessGroup | None) -> np.ndarray:
    return cosines_of_pairs(*_made(20_000))


def test_four_ranks_find_the_cosines_that_one_finds(ranks: Ranks) -> None:
    embeddings, pairs = _made(20_000)
    expected = (embeddings.double()[pairs.first] * embeddings.double()[pairs.second]).sum(1)
    alone = _cosines(None)
    assert alone == pytest.approx(expected.numpy(), abs=1e-12)
    for found in ranks.run(4, _cosines):
        assert np.array_equal(found, alone)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'first'"),
        ("first,second\n", "no column 'same'"),
        ("first,second,same,flod\n", "unknown name 'flod'; did you mean 'fold'?"),
        ("first,second,same,same\n", "a column is named twice"),
        ("first,second,same\n", "has no genuine pairs"),
        ("first,second,same\ns0000,s0001,1\n", "has no impostor pairs"),
        ("first,second,same\ns0000,s0001,0\n", "has no genuine pairs"),
        ("first,second,same\ns0000,s0009,0\n", r"pair 1: no sample has the key 's0009'"),
        ("first,second,same\ns0000,s0001\n", "line 2 has 2 columns, and 3 in the header"),
        ("first,second,same\ns0000,s0001,yes\n", "line 2: 'same' must be 1 or 0, got 'yes'"),
        ("first,second,same,fold\ns0000,s0001,1,-1\n", "line 2: 'fold' must be a number from 0"),
        ("first,second,same,fold\ns0000,s0001,1,²\n", "line 2: 'fold' must be a number from 0"),
        ('first,second,same\n"s0000,s0001,1\n', "not CSV"),
        ("first,second,same\n" + "s" * 9000 + ",s0001,1\n", "line 2 is longer than 8,192 bytes"),
        ("first,second,same\n\udcff,s0001,1\n", "line 2 is not UTF-8"),
    ],
)
def test_a_list_that_is_malformed_is_refused_when_its_set_is_opened(tmp_path: Path, text: str, words: str) -> None:
    write_samples(tmp_path / "set", [0, 1, 2])
    (tmp_path / "set" / "pairs.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InvalidData, match=words) as refused:
        open_set(tmp_path / "set")
    assert "pairs.csv" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_set_has_protocols_or_pairs_but_not_both(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", [0, 1, 2])
    write_pairs(tmp_path / "set", [Pair("s0000", "s0001", True, 4), Pair("s0000", "s0002", False, 7)])
    found = open_set(tmp_path / "set").pairs
    assert found is not None
    assert found.folds.tolist() == [0, 1], "counted without gaps"
    (tmp_path / "set" / "protocol.json").write_text("{}")
    with pytest.raises(InvalidData, match=r"has both protocol\.json and pairs\.csv"):
        open_set(tmp_path / "set")


def test_ranks_whose_lists_differ_see_it_before_the_first_step(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", [0, 1, 2])
    found = []
    for same in (True, False):
        write_pairs(tmp_path / "set", [Pair("s0000", "s0001", same, 0)])
        found.append(data_facts("evaluation.sets[0]", TarDataset(tmp_path / "set")))
    different = [key for key in found[0] if found[0][key] != found[1][key]]
    assert different == ["evaluation.sets[0]: pairs.csv"]


def test_a_key_of_two_samples_is_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", [0, 1], samples_per_shard=1)
    (tmp_path / "set" / "shard-000001.tar").write_bytes((tmp_path / "set" / "shard-000000.tar").read_bytes())
    write_pairs(tmp_path / "set", [Pair("s0000", "s0001", True, 0)])
    with pytest.raises(InvalidData, match="two samples have the key 's0000'"):
        open_set(tmp_path / "set")


def test_results_of_pairs_read_like_those_of_other_sets() -> None:
    found = {"accuracy": 0.9983, "fold_deviation": 0.0021, "folds": 10, "tar_at_far": {"0.01": 0.75}}
    few = {**found, "tar_at_far": {}, "impostor_pairs": 20}
    assert describe_results({"lfw": found, "few": few}) == [
        "lfw: accuracy 0.9983 ± 0.0021 over 10 folds  TAR 0.7500 at FAR 0.01",
        "few: accuracy 0.9983 ± 0.0021 over 10 folds  no TAR: 20 impostor pairs are too few for FAR 0.01",
    ]


def test_a_run_evaluates_listed_pairs_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    tree = write_task(tmp_path)
    write_set(tmp_path / "lfw", 12, 6, seed=3, first_picture=500)
    keys = TarDataset(tmp_path / "lfw").keys
    labels = TarDataset(tmp_path / "lfw").labels
    rng = np.random.default_rng(2)
    chosen = rng.integers(0, len(keys), (300, 2))
    pairs = [Pair(keys[i], keys[j], bool(labels[i] == labels[j]), n // 30) for n, (i, j) in enumerate(chosen)]
    write_pairs(tmp_path / "lfw", pairs)
    tree["evaluation"] = {"sets": [str(tmp_path / "lfw")]}
    tree["optim"]["epochs"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    done = run(tmp_path / "config.yaml", 0)
    assert done.returncode == 0, done.stderr
    alone = lines(tmp_path / "run", "evaluation")[-1]["results"]["lfw"]
    assert (alone["genuine_pairs"], alone["folds"]) == (sum(pair.same for pair in pairs), 10)
    assert re.search(r"^  lfw: accuracy +0\.9\d+  \(10 folds\)$", done.stdout, re.MULTILINE)
    together = partialfc("evaluate", tmp_path / "run", ranks=2)
    assert f"lfw: accuracy {alone['accuracy']:.4f} ± {alone['fold_deviation']:.4f} over 10 folds" in together.stdout
    (file,) = (tmp_path / "run" / "evaluation").glob("step-*.json")
    found = json.loads(file.read_text())["lfw"]
    for name, value in alone.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
