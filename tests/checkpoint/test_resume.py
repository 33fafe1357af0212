"""Checkpoints that load anywhere: killed runs that go on at another world size, damaged and hostile files."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from partialfc import ConfigError, RowAdamW, RowSGD
from partialfc.checkpoint.config_diff import config_changes
from partialfc.checkpoint.folders import latest_valid, prune, set_aside, step_folders
from partialfc.checkpoint.manifest import read_manifest, verify
from partialfc.checkpoint.reader import CheckedReader, _IndexUnpickler
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.errors import CheckpointFailed, DamagedCheckpoint
from tests.harness.checkpoints import Hostile, made, train_a_little
from tests.harness.ranks import Ranks
from tests.harness.running import command, lines, partialfc, run, started, wait_until

STEPS, EVERY, KILLED_AFTER = 36, 10, 20
# A learning rate at which rounding, which differs between world sizes, does not grow: the nearest sub-center is a jump.
SETTINGS = [f"checkpoint.every={EVERY}", "checkpoint.keep_last=5", "evaluation.every=0", "optim.lr=0.02"]
STATEFUL = [
    "head.loss={name: subcenter, sub_centers: 2, loss: {name: curricularface, scale: 16, margin: 0.1}}",
    "optim.unsampled_rows=decayed",
]


@pytest.fixture(scope="module")
def whole(task: Path) -> list[dict[str, Any]]:
    """The train lines of a run that nobody interrupts."""
    folder = task.parent / "whole"
    done = run(task, 2, f"run.dir={folder}", *SETTINGS, *STATEFUL)
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(folder, "train")


def kill_after(config: Path, ranks: int, folder: Path, step: int) -> None:
    """Start a run and kill all of its processes once the checkpoint of ``step`` is there."""
    with started(command(config, ranks, f"run.dir={folder}", *SETTINGS, *STATEFUL), None) as process:
        wait_until((folder / "checkpoints" / f"step-{step:08d}").exists, of=process)


@pytest.fixture(scope="module")
def killed(task: Path) -> dict[int, Path]:
    """Run folders of runs on 1, 2 and 3 ranks that were killed after a checkpoint."""
    folders = {}
    for ranks in (1, 2, 3):
        folders[ranks] = task.parent / f"killed{ranks}"
        kill_after(task, ranks if ranks > 1 else 0, folders[ranks], KILLED_AFTER)
    return folders


QUICK = {(1, 3), (2, 1), (2, 2), (3, 2), (3, 4)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(before, after, marks=() if (before, after) in QUICK else pytest.mark.slow)
        for before in (1, 2, 3)
        for after in (1, 2, 3, 4)
    ],
)
def test_a_killed_run_goes_on_at_any_world_size_as_if_nothing_had_happened(
    task: Path, whole: list[dict[str, Any]], killed: dict[int, Path], before: int, after: int
) -> None:
    folder = task.parent / f"killed{before}on{after}"
    shutil.copytree(killed[before], folder)
    for path in step_folders(folder / "checkpoints"):
        if int(path.name[5:]) > KILLED_AFTER:  # the kill came late
            shutil.rmtree(path)
    done = run(task, after if after > 1 else 0, f"run.dir={folder}", *SETTINGS, *STATEFUL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step-{KILLED_AFTER:08d}, written on {before} ranks" in done.stdout
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1)), "no step lost or twice"
    assert [line["samples"] for line in train] == [line["samples"] for line in whole]
    for mine, other in zip(train, whole, strict=True):
        for key in ("loss", "softmax_loss", "center_loss", "target_cosine"):
            tolerance = {"rel": 1e-5} if before == after == 2 else {"rel": 1e-4, "abs": 1e-5}  # as `whole`, or not
            assert mine[key] == pytest.approx(other[key], **tolerance), (mine["step"], key)
        assert (mine["active_rows"], mine["lr"]) == (other["active_rows"], other["lr"])
    started = [line["step"] for line in lines(folder, "event") if line["event"] == "started"]
    assert started == [0, KILLED_AFTER]
    assert json.loads((folder / "state.json").read_text())["attempt"] == 2


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(task: Path, killed: dict[int, Path]) -> None:
    folder = task.parent / "damaged"
    shutil.copytree(killed[2], folder)
    newest = folder / "checkpoints" / f"step-{KILLED_AFTER:08d}"
    for path in step_folders(folder / "checkpoints"):
        if int(path.name[5:]) > KILLED_AFTER:
            shutil.rmtree(path)
    victim = sorted(newest.glob("*.distcp"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    done = run(task, 2, f"run.dir={folder}", *SETTINGS, *STATEFUL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{victim.name} was modified (digest mismatch)" in done.stdout
    assert "resuming from step 10 (" in done.stdout
    assert [line["step"] for line in lines(folder, "event") if line["event"] == "started"] == [0, 10]
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, STEPS + 1))


def test_damaged_or_unwanted_checkpoints_push_no_whole_one_out(task: Path, killed: dict[int, Path]) -> None:
    folder = task.parent / "aside"
    shutil.copytree(killed[1], folder)
    checkpoints = folder / "checkpoints"
    for path in step_folders(checkpoints)[:-1]:  # all but step 10
        (path / ".metadata").write_bytes(b"")
    damaged = {path.name for path in step_folders(checkpoints)[:-1]}
    settings = [f"run.dir={folder}", *SETTINGS, *STATEFUL, "checkpoint.keep_last=1", "checkpoint.every=7"]
    done = run(task, 0, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"aside-1-step-{KILLED_AFTER:08d}" in done.stdout
    written = [line["step"] for line in lines(folder, "event") if line["event"] == "checkpoint"]
    assert written[-4:] == [21, 28, 35, STEPS]
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {f"step-{STEPS:08d}"} | {f"aside-1-{name}" for name in damaged}
    (checkpoints / f"step-{STEPS:08d}" / "manifest.json").write_text("")
    refused = run(task, 0, *settings, "--force", "optim.epochs=4")  # else it has finished before
    assert refused.returncode != 0
    assert "all checkpoints in" in refused.stderr
    assert lines(folder, "train")[-1]["step"] == STEPS, "nothing is lost of the run that was"
    anew = run(task, 0, *settings, "checkpoint.resume=never", "--force")
    assert anew.returncode == 0, anew.stdout + anew.stderr
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, STEPS + 1))
    found = latest_valid(checkpoints)
    assert found is not None
    assert found[1]["step"] == STEPS
    names |= {f"aside-1-step-{STEPS:08d}"}
    assert {path.name for path in checkpoints.iterdir()} == names


def test_a_changed_config_is_explained(task: Path, killed: dict[int, Path]) -> None:
    folder = task.parent / "changed"
    shutil.copytree(killed[2], folder)
    settings = [f"run.dir={folder}", *SETTINGS, *STATEFUL]
    refused = run(task, 2, *settings, "optim.lr=0.01")
    assert refused.returncode != 0
    assert "optim.lr: 0.02 before, 0.01 now (needs --force)" in refused.stderr
    impossible = run(task, 0, *settings, "model.embedding_dim=16", "--force")
    assert impossible.returncode == 2
    assert "model.embedding_dim: 32 before, 16 now (impossible)" in impossible.stderr
    assert "choose another run.dir" in impossible.stderr
    forced = run(task, 0, *settings, "optim.lr=0.01", "tracking.log_every=2", "--force")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert "tracking.log_every: 1 before, 2 now (harmless)" in forced.stdout


def test_changes_are_judged_by_the_longest_prefix() -> None:
    before = {"run": {"dir": "a", "seed": 1}, "head": {"loss": {"name": "arcface", "margin": 0.5}}, "optim": {"lr": 1}}
    now = {"run": {"dir": "b", "seed": 2}, "head": {"loss": {"name": "arcface"}}, "optim": {"lr": 1}}
    severities = {change.key: change.severity for change in config_changes(before, now)}
    assert severities == {"run.dir": "harmless", "run.seed": "needs --force", "head.loss.margin": "needs --force"}
    centers = {"head": {"center_loss": {"weight": 0.1}}}
    for before, now, severity in (
        (centers, {"head": {"center_loss": None}}, "impossible"),
        ({"head": {"center_loss": None}}, centers, "impossible"),
        (centers, {"head": {"center_loss": {"weight": 0.2}}}, "needs --force"),
    ):
        assert [change.severity for change in config_changes(before, now)] == [severity]


def test_a_precision_as_exact_is_harmless_and_fast_is_not() -> None:
    for before, now, verdict in (
        (None, "exact", "harmless"),
        ("exact", "highest", "harmless"),
        ("exact", "fast", "needs --force"),
        ("fast", None, "needs --force"),
    ):
        old, new = ({"head": {"matmul_precision": precision}} for precision in (before, now))
        assert [change.severity for change in config_changes(old, new)] == [verdict]
    assert not config_changes({"head": {}}, {"head": {"matmul_precision": None}}), "0.1 did not have the key"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
def test_everything_is_back_after_loading(tmp_path: Path, kind: Any) -> None:
    state = made(kind)
    train_a_little(state)
    save_checkpoint(tmp_path / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    found = latest_valid(tmp_path)
    assert found is not None
    other = made(kind, start=2)
    other.load(found[0])
    for name, value in state.tensors().items():
        loaded = other.tensors()[name]
        assert torch.equal(loaded, value), name
        assert loaded.dtype == value.dtype
    assert train_a_little(other) == train_a_little(state)


def test_another_head_or_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    state = made()
    train_a_little(state)
    save_checkpoint(tmp_path / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    for options, words in (
        ({"classes": 12}, r"head.weight has shape \[11, 8\] there and \[12, 8\] in this run"),
        ({"center_loss": None}, "holds head.center_loss.centers, which this run does not have"),
    ):
        with pytest.raises(ConfigError, match=words):
            made(**options).load(tmp_path / "step-00000003")


@pytest.mark.parametrize("attempts", [100, pytest.param(1000, marks=pytest.mark.slow)])  # on each file
def test_no_random_damage_is_ever_loaded(tmp_path: Path, attempts: int) -> None:
    state = made()
    train_a_little(state)
    table = tmp_path / "classes.jsonl"
    table.write_text("".join(json.dumps({"id": label, "name": f"class {label}"}) + "\n" for label in range(11)))
    checkpoint = tmp_path / "all" / "step-00000003"
    save_checkpoint(checkpoint, state.tensors(), {"step": 3, "samples": 21, "data_digest": "a1b2"}, (table,))
    files = {path: path.read_bytes() for path in sorted(checkpoint.iterdir())}
    manifest = read_manifest(checkpoint)
    rng = np.random.default_rng(0)
    for path, content in files.items():
        for attempt in range(attempts):  # some three bytes of the file in each
            damaged = bytearray(content)
            if attempt % 10 == 0:
                damaged = damaged[: int(rng.integers(0, len(damaged)))]
            else:
                for place in rng.integers(0, len(damaged), size=1 + attempt % 6):
                    damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                # White space may change in a manifest, or a letter and back again: what it says may not.
                assert verify(checkpoint) == manifest, f"{path.name}, attempt {attempt}"
            except DamagedCheckpoint:
                assert damaged != content
        path.write_bytes(content)
    for path, content in files.items():  # several thousand bytes in every file at once
        path.write_bytes(bytes(rng.integers(0, 256, size=len(content), dtype=np.uint8)))
    assert latest_valid(checkpoint.parent) is None
    for path, content in files.items():
        path.write_bytes(content)
    assert latest_valid(checkpoint.parent) == (checkpoint, manifest)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "cannot be read"),
        ("{}", "is not a checkpoint's manifest"),
        (
            '{"format": 1, "step": 3, "samples": 21, "files": {".metadata": {"bytes": 1, "sha256": ""}}}',
            "digest mismatch",
        ),
    ],
)
def test_what_is_no_manifest_is_reported(tmp_path: Path, content: str, words: str) -> None:
    checkpoint = tmp_path / "step-00000003"
    save_checkpoint(checkpoint, made().tensors(), {"step": 3, "samples": 21})
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=words):
        read_manifest(checkpoint)


def test_what_lies_beside_checkpoints_does_not_matter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-00000003", made().tensors(), {"step": 3, "samples": 21})
    for name in ("step-²", "step-new", "step-00000009.bak", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    (tmp_path / "step-00000007").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000003"]


def test_a_hostile_index_is_not_executed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000003"
    state = made()
    save_checkpoint(checkpoint, state.tensors(), {"step": 3, "samples": 21})
    for content in (pickle.dumps(Hostile(f"touch {tmp_path}/owned")), b"\x80\x04cposix\nsystem\n.", b"", b"garbage"):
        (checkpoint / ".metadata").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=r"\.metadata cannot be read"):
            CheckedReader(checkpoint).read_metadata()
        with pytest.raises(DamagedCheckpoint):
            state.load(checkpoint)
    assert not (tmp_path / "owned").exists()


def test_an_index_cannot_change_what_the_process_is_made_of(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000003"
    save_checkpoint(checkpoint, made().tensors(), {"step": 3, "samples": 21})
    # The class, (None, {"name": "../../secret"}), and the instruction to fill the one with the other.
    attributes = b"N}\x8c\x04name\x8c\x0c../../secrets\x86b."
    for kind in (b"cpathlib\nPosixPath\n", b"ctorch.distributed.checkpoint.metadata\nMetadata\n"):
        (checkpoint / ".metadata").write_bytes(b"\x80\x04" + kind + attributes)
        with pytest.raises(DamagedCheckpoint, match="must not be given attributes"):
            CheckedReader(checkpoint).read_metadata()
    assert Path("a/b").name == "b"


MOMENTUM = "head.optimizer.weight.momentum_buffer"


def _set(attribute: str, value: Any) -> Any:
    """An edit of an index: what one of its tensors, or the place of one, says of itself."""

    def edit(metadata: Any) -> None:
        place = next(place for index, place in metadata.storage_data.items() if index.fqn == MOMENTUM)
        tensor = metadata.state_dict_metadata[MOMENTUM]
        setattr(place if hasattr(place, attribute) else tensor, attribute, value)

    return edit


def _drop_places(metadata: Any) -> None:
    metadata.storage_data = {}


def _hold_an_object(metadata: Any) -> None:
    metadata.state_dict_metadata["head.weight"] = BytesStorageMetadata()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("relative_path", "../../secret"), "points outside the folder"),
        (_set("relative_path", "/etc/passwd"), "points outside the folder"),
        (_set("relative_path", "__7_0.distcp"), "points to __7_0.distcp, which the manifest does not list"),
        (_set("relative_path", 3), "is not a checkpoint's index"),
        (_set("offset", -1), "does not say where"),
        (_set("length", 1 << 60), f"promises more of {MOMENTUM} than the files hold"),
        (_set("chunks", []), f"does not hold the whole of {MOMENTUM}"),
        (_set("chunks", [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([5, 8]))]), "does not hold the whole"),
        (_set("size", torch.Size([10**9, 10**9])), "does not hold the whole"),
        (_set("size", torch.Size([11, 10**12])), "does not hold the whole"),
        (_drop_places, "than the files hold"),
        (_hold_an_object, "holds head.weight, which is not a tensor"),
        (lambda metadata: setattr(metadata, "storage_data", [1]), "is not a checkpoint's index"),
    ],
)
def test_an_index_is_refused_unless_each_tensor_lies_in_the_listed_files(tmp_path: Path, edit: Any, words: str) -> None:
    checkpoint = tmp_path / "step-00000003"
    state = made()
    train_a_little(state)
    save_checkpoint(checkpoint, state.tensors(), {"step": 3, "samples": 21})
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    edit(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match=words):
        made().load(checkpoint)


def test_tensors_of_another_optimizer_or_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    state = made()
    train_a_little(state)
    tensors = state.tensors()
    save_checkpoint(tmp_path / "step-00000003", tensors | {MOMENTUM: torch.zeros(11, 9)}, {"step": 3, "samples": 21})
    with pytest.raises(ConfigError, match=r"is of another optimizer: .*momentum_buffer has shape \[11, 9\] there"):
        made().load(tmp_path / "step-00000003")
    save_checkpoint(tmp_path / "step-00000004", tensors, {"step": 4, "samples": 21})
    (data,) = (tmp_path / "step-00000004").glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match="step-00000004 cannot be read: "):
        made().load(tmp_path / "step-00000004")


def test_old_checkpoints_are_removed_but_the_last_and_the_milestones(tmp_path: Path) -> None:
    def write(step: int) -> None:
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")

    for step in (10, 20, 30, 40, 50, 60):
        write(step)
    assert [path.name for path in prune(tmp_path, keep_last=2, keep_every=20)] == ["step-00000030", "step-00000010"]
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [60, 50, 40, 20]
    (tmp_path / "step-00000060" / "manifest.json").unlink()  # not whole: does not count as one of the last
    prune(tmp_path, keep_last=1, keep_every=0)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [60, 50]
    assert not list(tmp_path.glob(".*")), "nothing half removed is left"


def test_what_is_set_aside_counts_no_more_and_is_not_lost(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("")
    (tmp_path / "aside-1-step-00000020").mkdir()
    places = [path.name for path in set_aside(tmp_path, 10)]
    assert places == ["aside-1-step-00000030", "aside-2-step-00000020"]
    (tmp_path / "step-00000015").mkdir()
    (tmp_path / "step-00000015" / "manifest.json").write_text("")
    assert [path.name for path in prune(tmp_path, keep_last=1, keep_every=0)] == ["step-00000010"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000015", "aside-1-step-00000020", *places}


def _save(group: Any, folder: Path, classes: int) -> list[float]:
    state = made(classes=classes, process_group=group)
    train_a_little(state)
    save_checkpoint(folder / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    return train_a_little(state)


def _load(group: Any, folder: Path, classes: int) -> list[float]:
    found = latest_valid(folder)
    assert found is not None
    state = made(start=8, classes=classes, process_group=group)
    state.load(found[0])
    return train_a_little(state)


@pytest.mark.parametrize("classes", [11, 2])
def test_uneven_and_empty_shards_load_at_another_world_size(ranks: Ranks, tmp_path: Path, classes: int) -> None:
    # All four ranks of the pool take part: torch's checkpoint works on the default group.
    curves = ranks.run(4, _save, tmp_path, classes)
    for again in ranks.run(4, _load, tmp_path, classes):
        assert again == pytest.approx(curves[0], rel=1e-6)
    alone = made(start=8, classes=classes)
    alone.load(tmp_path / "step-00000003")
    assert train_a_little(alone) == pytest.approx(curves[0], rel=1e-5)


def test_a_checkpoint_tells_what_is_in_it(killed: dict[int, Path]) -> None:
    checkpoint = killed[3] / "checkpoints" / f"step-{KILLED_AFTER:08d}"
    done = partialfc("checkpoint", "inspect", checkpoint)
    assert done.returncode == 0, done.stderr
    for words in (
        f"step {KILLED_AFTER}, ",
        "written on 3 ranks",
        "37 classes",
        "all digests match",
        "head.weight  [37, 2, 32] float32, in 3 parts",
        "head.loss.base.state  [1] float64",
    ):
        assert words in done.stdout
    empty = partialfc("checkpoint", "inspect", killed[3])
    assert empty.returncode == 1
    assert "manifest.json cannot be read" in empty.stderr


def _save_until_full(group: Any, folder: Path) -> list[str]:
    found = []
    state = made(classes=4000, process_group=group, sample_rate=1.0)
    for step in range(1, 6):
        train_a_little(state, 1)
        try:
            save_checkpoint(folder / f"step-{step:08d}", state.tensors(), {"step": step, "samples": 0})
            found.append("written")
        except CheckpointFailed as error:
            found.append(str(error))
    newest = latest_valid(folder)
    assert newest is not None
    made(start=3, classes=4000, process_group=group, sample_rate=1.0).load(newest[0])
    return found


def test_a_full_disk_costs_no_checkpoint_and_no_rank_hangs(ranks: Ranks, small_disk: Path) -> None:
    results = ranks.run(4, _save_until_full, small_disk)
    assert results[0][0] == "written"
    assert "No space left on device" in results[0][-1]
    for result in results:
        assert result == results[0], "the same on every rank"
    assert not list(small_disk.glob(".*")), "what could not be finished makes room again"


def test_training_goes_on_when_the_disk_is_full(task: Path, small_disk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    (small_disk / "ballast").write_bytes(bytes(800_000))
    done = run(task, 2, f"run.dir={folder}", *SETTINGS, "optim.epochs=2")
    assert done.returncode != 0, "without the last checkpoint a run is not finished"
    failures = [line for line in lines(folder, "event") if line["event"] == "checkpoint_failed"]
    assert [line["step"] for line in failures] == [10, 20]
    assert "training continues without it" in done.stdout
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, 25))
    assert json.loads((folder / "state.json").read_text())["state"] == "failed"
    (small_disk / "ballast").unlink()


@pytest.mark.slow
def test_twenty_kills_while_saving_never_cost_the_last_checkpoint(task: Path) -> None:
    folder, undisturbed = task.parent / "twenty", task.parent / "undisturbed"
    rng = np.random.default_rng(3)
    # Saving brings decayed rows up to date, which rounds: a run to compare with must save as often.
    always = ["checkpoint.every=1", "evaluation.every=0", *STATEFUL]
    assert run(task, 2, f"run.dir={undisturbed}", *always).returncode == 0
    whole = lines(undisturbed, "train")
    settings = [f"run.dir={folder}", *always]
    for kill in range(20):
        with started(command(task, 2, *settings), None) as process:
            before = {path.name for path in step_folders(folder / "checkpoints")} if folder.exists() else set()
            deadline = time.monotonic() + 90
            while process.poll() is None and time.monotonic() < deadline:
                now = {path.name for path in step_folders(folder / "checkpoints")} if folder.exists() else set()
                if now - before:  # it is saving after every step from here on
                    break
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.15)))
        assert latest_valid(folder / "checkpoints") is not None, kill
        if lines(folder, "train")[-1]["step"] >= STEPS - 2:
            break
    done = run(task, 2, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    for mine, other in zip(train, whole, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


class ByGetattr:
    """Pickles as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


def test_an_index_that_an_older_python_has_written_is_read() -> None:
    kind = metadata._MEM_FORMAT_ENCODING
    content = pickle.dumps(ByGetattr(kind, kind.TORCH_CONTIGUOUS_FORMAT.name))
    assert _IndexUnpickler(io.BytesIO(content)).load() is kind.TORCH_CONTIGUOUS_FORMAT
    for hostile in (ByGetattr(pathlib.PurePosixPath, "__subclasses__"), ByGetattr(metadata.Metadata, "__init__")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            _IndexUnpickler(io.BytesIO(pickle.dumps(hostile))).load()
