"""Heads that resume with more classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc import ConfigError, RowAdamW, RowSGD
from partialfc.checkpoint.class_table import check_class_table
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.data.dataset import TarDataset
from partialfc.errors import DataError
from partialfc.head.partition import ClassPartition
from tests.harness.checkpoints import made, train_a_little
from tests.harness.ranks import Ranks
from tests.harness.running import lines, run
from tests.harness.tasks import write_set, write_task


def _save(group: Any, folder: Path, classes: int, kind: Any) -> dict[str, torch.Tensor]:
    """Train and save; returns this rank's rows of everything per class, and the rest."""
    state = made(kind, classes=classes, process_group=group, sample_rate=1.0)
    train_a_little(state)
    tensors = state.tensors()
    save_checkpoint(folder / "step-00000003", tensors, {"step": 3, "samples": 21})
    return {name: getattr(value, "to_local", lambda value=value: value)() for name, value in tensors.items()}


def _grow(group: Any, folder: Path, classes: int, kind: Any) -> tuple[int, dict[str, torch.Tensor], list[float]]:
    """Load into a head of more classes; returns the number of old ones, the local rows, and losses that follow."""
    state = made(kind, classes=classes, process_group=group, sample_rate=1.0)
    before = state.load(folder / "step-00000003", grow=True)
    local = state.backbone.targets() | state._head_tensors()
    for key, value in state.head_optimizer.state[state.head.weight].items():
        local[f"head.optimizer.weight.{key}"] = value
    local = {name: value.clone() for name, value in local.items()}
    return before, local, train_a_little(state)


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
@pytest.mark.parametrize(("old", "new", "world_size"), [(5, 7, 3), (5, 7, 4), (5, 6, 1), (2, 9, 2), (11, 11, 3)])
def test_old_classes_keep_their_state_and_new_ones_start_afresh(
    ranks: Ranks, tmp_path: Path, kind: Any, old: int, new: int, world_size: int
) -> None:
    saved = ranks.run(4, _save, tmp_path, old, kind)
    results = ranks.run(world_size, _grow, tmp_path, new, kind)
    fresh = made(kind, classes=new).head
    per_class = {name for name, value in saved[0].items() if any(len(part) for part in [value.shape]) and _rows(name)}
    assert {"head.weight", "head.center_loss.centers"} < per_class
    assert len(per_class) > 2, "optimizer state, too"
    for name in per_class:
        before = torch.cat([part[name] for part in saved])
        after = torch.cat([local[name] for _, local, _ in results])
        assert len(before) == old
        assert len(after) == new
        assert torch.equal(after[:old], before), name
        expected = fresh.weight[old:] if name == "head.weight" else torch.zeros_like(after[old:])
        assert torch.equal(after[old:], expected), name
    for before_classes, local, _ in results:
        assert before_classes == old
        for name in saved[0].keys() - per_class:
            if not name.startswith("backbone_optimizer"):
                assert torch.equal(local[name], saved[0][name]), name
    alone = _grow(None, tmp_path, new, kind)
    for _, _, curve in results:
        assert curve == pytest.approx(alone[2], rel=1e-5), "and training continues the same at any world size"


def _rows(name: str) -> bool:
    return name.startswith(("head.weight", "head.center_loss.", "head.optimizer.weight.")) and not name.endswith("step")


def test_a_hundred_thousand_classes_grow_by_thirty_thousand(ranks: Ranks, tmp_path: Path) -> None:
    saved = torch.cat([part["head.weight"] for part in ranks.run(4, _save, tmp_path, 100_000, RowSGD)])
    results = ranks.run(3, _grow, tmp_path, 130_000, RowSGD)
    weight = torch.cat([local["head.weight"] for _, local, _ in results])
    assert torch.equal(weight[:100_000], saved)
    assert torch.equal(weight[100_000:], made(classes=130_000).head.weight[100_000:])
    sizes = [ClassPartition(130_000, 3).size(rank) for rank in range(3)]
    assert [len(local["head.weight"]) for _, local, _ in results] == sizes


def test_a_head_grows_only_on_request_and_never_shrinks(tmp_path: Path) -> None:
    _save(None, tmp_path, 5, RowSGD)
    with pytest.raises(ConfigError, match=r"head.weight has shape \[5, 8\] there and \[7, 8\] in this run"):
        made(classes=7).load(tmp_path / "step-00000003")
    with pytest.raises(ConfigError, match=r"head.weight has shape \[5, 8\] there and \[4, 8\] in this run"):
        made(classes=4).load(tmp_path / "step-00000003", grow=True)


# --- class tables -----------------------------------------------------------------------------------------------------


def _table(path: Path, names: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "name": name}) + "\n" for i, name in enumerate(names)))
    return path


@given(st.lists(st.text(max_size=5), unique=True, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_table_may_only_get_longer(tmp_path_factory: pytest.TempPathFactory, names: list[str], data: Any) -> None:
    folder = tmp_path_factory.mktemp("tables")
    other = data.draw(st.one_of(st.permutations(names), st.just(names[:-1]), st.just([*names, "one more"])))
    before, now = _table(folder / "before", names), _table(folder / "now", list(other))
    if other[: len(names)] == names:
        assert check_class_table(before, now, may_grow=True) == len(other) - len(names)
        if len(other) > len(names):
            with pytest.raises(ConfigError, match=r"checkpoint.grow=true adds them"):
                check_class_table(before, now, may_grow=False)
    else:
        with pytest.raises(ConfigError, match="Trained rows belong to ids"):
            check_class_table(before, now, may_grow=True)


def test_a_class_that_has_moved_is_named_with_its_new_id(tmp_path: Path) -> None:
    before = _table(tmp_path / "before", ["ann", "bob", "cleo"])
    with pytest.raises(ConfigError, match=r"class 1 was 'bob' .* is 'abe' now \(now id 2\)"):
        check_class_table(before, _table(tmp_path / "now", ["ann", "abe", "bob", "cleo"]), may_grow=True)
    with pytest.raises(ConfigError, match=r"class 2 was 'cleo' .* is missing now"):
        check_class_table(before, _table(tmp_path / "now", ["ann", "bob"]), may_grow=True)
    for content in ("no json\n", '{"id": 1, "name": "x"}\n', '{"id": 0}\n', "[]\n"):
        (tmp_path / "now").write_text(content)
        with pytest.raises(DataError, match="now"):
            check_class_table(before, tmp_path / "now", may_grow=True)


# --- the trainer ------------------------------------------------------------------------------------------------------

SETTINGS = ["checkpoint.every=10", "evaluation.every=0", "evaluation.sets=[]", "head.sample_rate=1.0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished run on 37 classes, beside a set of these and 13 more."""
    folder = tmp_path_factory.mktemp("task")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(folder)))
    write_set(folder / "more", 50, 6, seed=1)
    write_set(folder / "others", 50, 6, seed=1, first_picture=3)
    done = run(config, 3, *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return config


@pytest.mark.parametrize("how", [pytest.param("random", marks=pytest.mark.slow), "embedding"])
def test_a_finished_run_continues_with_more_classes_on_fewer_ranks(trained: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.parent / "run", folder)
    more = [f"run.dir={folder}", f"data.train={trained.parent / 'more'}", *SETTINGS]
    grow = [*more, "checkpoint.grow=true", f"checkpoint.grow_init={how}"]
    refused = run(trained, 0, *more, "--force", "optim.epochs=4")
    assert refused.returncode == 2
    assert "has 13 more classes than the checkpoint" in refused.stderr
    assert "checkpoint.grow=true" in refused.stderr
    short = run(trained, 0, *grow, "optim.epochs=2", "--force")
    assert short.returncode == 2
    assert "the checkpoint is at step 36" in short.stderr
    assert "raise optim.epochs to continue" in short.stderr
    done = run(trained, 2, *grow, "optim.epochs=4", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grown from 37 to 50 classes" in done.stdout
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, 61)), "15 steps an epoch of 50 × 6 samples"
    assert train[-1]["samples"] == 3 * 37 * 6 + (60 - 36) * 20
    again = run(trained, 3, *grow, "optim.epochs=4.2", "--force")  # once grown it is a run like any other
    assert again.returncode == 0, again.stdout + again.stderr
    assert "grown from" not in again.stdout
    assert lines(folder, "train")[-1]["samples"] == train[-1]["samples"] + 3 * 20
    if how == "embedding":
        assert "embedding new classes  78/78" in done.stdout


def test_shifted_ids_are_refused_even_where_the_number_fits(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.parent / "run", folder)
    settings = [f"run.dir={folder}", f"data.train={trained.parent / 'others'}", "checkpoint.grow=true", *SETTINGS]
    for ranks in (0, 2):
        done = run(trained, ranks, *settings, "--force", "optim.epochs=4")
        assert done.returncode != 0
        assert "class 0 was 'class 0' when the checkpoint was written, and is 'class 3' now" in done.stderr


def _mean_start(group: Any, config_file: Path, sub_centers: int | None) -> list[tuple[torch.Tensor, ...]]:
    from partialfc import CenterLoss, PartialFC, losses
    from partialfc.checkpoint.grow import start_at_mean_embeddings
    from partialfc.config import load_config
    from partialfc.models import GlyphNet
    from partialfc.runtime.process import ProcessContext

    dataset = TarDataset(config_file.parent / "more")
    config = load_config(config_file, ["evaluation.batch_size=7"])
    loss: Any = losses.ArcFace() if sub_centers is None else losses.SubCenter(losses.ArcFace(), sub_centers)
    head = PartialFC(50, 32, loss, center_loss=CenterLoss(), process_group=group)
    torch.manual_seed(0)
    backbone = GlyphNet(32, 1, 16).eval()
    drawn = head.weight.detach().clone()
    process = ProcessContext(head.collectives.rank, head.collectives.world_size, torch.device("cpu"), None)
    start_at_mean_embeddings(config, process, dataset, backbone, head, 37)
    return [(drawn, head.weight.detach(), head.center_loss.centers)]


@pytest.mark.parametrize("sub_centers", [None, 2])
def test_new_classes_point_at_the_mean_of_their_samples(
    ranks: Ranks, trained: Path, monkeypatch: pytest.MonkeyPatch, sub_centers: int | None
) -> None:
    from partialfc.data.loader import LoaderSettings, evaluation_batches
    from partialfc.models import GlyphNet

    dataset = TarDataset(trained.parent / "more")
    torch.manual_seed(0)
    backbone = GlyphNet(32, 1, 16).eval()
    settings = LoaderSettings(image_size=16, channels=1)
    batches = evaluation_batches(dataset, settings, batch_size=300)
    with torch.no_grad():
        embeddings = torch.cat([backbone(images) for _, images in batches])
    labels = torch.from_numpy(dataset.labels)
    raw = torch.stack([embeddings[labels == label].mean(0) for label in range(50)])
    unit = torch.nn.functional.normalize(embeddings)
    direction = torch.nn.functional.normalize(torch.stack([unit[labels == label].mean(0) for label in range(50)]))
    for world_size in (1, 3):
        parts = [part for result in ranks.run(world_size, _mean_start, trained, sub_centers) for part in result]
        drawn, weight, centers = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if sub_centers:
            assert torch.equal(weight[:, 1], drawn[:, 1])
            drawn, weight = drawn[:, 0], weight[:, 0]
        assert torch.equal(weight[:37], drawn[:37])
        assert not centers[:37].any()
        torch.testing.assert_close(weight[37:], direction[37:] * drawn[37:].norm(dim=1, keepdim=True))
        torch.testing.assert_close(centers[37:], raw[37:])
