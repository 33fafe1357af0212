"""W&B offline, beside a trainer: what the real client writes, over restarts, exports and `runs sync`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from partialfc.config import WandbConfig
from partialfc.tracking.metrics import read_metrics
from partialfc.tracking.wandb.run import WandbRun
from tests.harness.running import events, finish, lines
from tests.harness.wandb_log import Logged, assert_whole
from tests.harness.wandb_runs import KEY, LONGER, clients, environment, killed_after, partialfc, train
from tests.harness.wandb_server import Server


@pytest.fixture(scope="module")
def offline(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on two ranks, without a key."""
    folder = tmp_path_factory.mktemp("offline")
    more = ["tracking.wandb.mode=auto", "tracking.wandb.tags=[glyphs]", "tracking.wandb.group=g"]
    done = train(task, folder, *more, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_without_a_key_a_run_is_written_offline_and_says_how_to_send_it(offline: Path) -> None:
    output = (offline / "output.txt").read_text()
    said = [line for line in output.splitlines() if "W&B" in line]
    assert len(said) == 1
    assert said[0].endswith(f"W&B: offline; send it with: partialfc runs sync {offline}/run")
    logged = Logged(offline / "run")
    assert len(logged.files) == 1, "rank 0 alone"
    assert logged.ids == [(offline / "run" / "wandb" / "id.txt").read_text().strip()]
    assert (logged.project, logged.run.display_name, logged.run.run_group) == ("partialfc", "run", "g")
    assert list(logged.run.tags) == ["glyphs"]
    assert logged.exit_codes == [0]
    assert not clients(offline / "run")


def test_each_line_of_metrics_jsonl_is_a_row(offline: Path) -> None:
    logged = Logged(offline / "run")
    written = read_metrics(offline / "run" / "metrics.jsonl")
    assert len(logged.rows) == len(written) > 38
    for line, row in zip(written, logged.rows, strict=True):
        assert row["_timestamp"] == line["time"]
        if line["kind"] == "train":
            assert (row["step"], row["epoch"], row["samples"]) == (line["step"], line["epoch"], line["samples"])
            for key in ("loss", "target_cosine", "lr", "grad_norm", "active_rows", "skipped_steps", "samples_per_s"):
                assert row[f"train/{key}"] == line[key]
            for phase, seconds in line["seconds"].items():
                assert row[f"train/seconds/{phase}"] == seconds
        elif line["kind"] == "event":
            fields = {key: value for key, value in line.items() if key not in ("kind", "time", "event")}
            assert {key: row[f"event/{line['event']}/{key}"] for key in fields} == fields
    assert logged.step_metrics == {"*": "step"}
    assert logged.config["optim"] == yaml.safe_load((offline / "run" / "config.yaml").read_text())["optim"]


def test_evaluations_are_values_tables_and_a_curve(offline: Path) -> None:
    logged = Logged(offline / "run")
    written = lines(offline / "run", "evaluation")
    rows = [row for row in logged.rows if "evaluation/known/accuracy" in row]
    assert [row["step"] for row in rows] == [20, 36]
    media = next((offline / "run" / "wandb").glob("offline-run-*/files"))
    for line, row in zip(written, rows, strict=True):
        plain = line["results"]["plain"]
        assert row["evaluation/plain/tar_at_far/1e-3"] == plain["tar_at_far"]["0.001"]
        assert row["evaluation/plain/threshold/1e-2"] == plain["threshold"]["0.01"]
        assert row["evaluation/known/accuracy"] == line["results"]["known"]["accuracy"]
        table = json.loads((media / row["evaluation/results/path"]).read_text())
        found = {values[1]: dict(zip(table["columns"], values, strict=True)) for values in table["data"]}
        assert found["plain"]["tar_at_far/1e-3"] == plain["tar_at_far"]["0.001"]
        assert found["known"]["accuracy"] == line["results"]["known"]["accuracy"]
        assert found["plain"]["accuracy"] is None
        roc = json.loads((media / row["evaluation/roc_table/path"]).read_text())
        assert roc["columns"] == ["set", "FAR", "log10 FAR", "TAR"]
        assert 20 < len(roc["data"]) <= 200
        for far, tar in plain["tar_at_far"].items():  # the curve passes through the table's points
            below = [point[3] for point in roc["data"] if point[1] <= float(far)]
            assert tar - 0.03 <= below[-1] <= tar + 1e-8
    panel = logged.config["_wandb/visualize/evaluation/roc"]["panel_config"]
    assert panel["panelDefId"] == "wandb/line/v0"
    assert panel["fieldSettings"] == {"x": "log10 FAR", "y": "TAR", "stroke": "set"}
    best = max(line["results"]["plain"]["tar_at_far"]["0.001"] for line in written)
    assert logged.summary["best/plain/tar_at_far/1e-3"] == best
    assert logged.summary["evaluation/plain/tar_at_far/1e-3"] == written[-1]["results"]["plain"]["tar_at_far"]["0.001"]
    assert logged.summary["train/loss"] == lines(offline / "run", "train")[-1]["loss"]


def test_a_checkpoint_is_logged_as_a_reference_without_uploads(offline: Path) -> None:
    checkpoint = offline / "run" / "checkpoints" / "step-00000036"
    (artifact,) = [artifact for artifact in Logged(offline / "run").artifacts if artifact.type == "checkpoint"]
    assert json.loads(artifact.metadata)["step"] == 36
    assert set(artifact.aliases) == {"latest", "step-36"}
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(entries) == {path.name for path in checkpoint.iterdir()}
    for name, entry in entries.items():
        assert entry.ref == (checkpoint / name).as_uri()
        assert not entry.local_path, "nothing to upload"


def test_an_export_is_added_to_the_run_that_has_ended(offline: Path) -> None:
    before = len(Logged(offline / "run").rows)
    done = partialfc(offline, "export", f"{offline}/run", "--no-onnx")
    assert done.returncode == 0, done.stdout + done.stderr
    logged = Logged(offline / "run")
    assert len(logged.files) == 2
    assert len(set(logged.ids)) == 1
    assert [row["event/export/step"] for row in logged.rows[before:]] == [36]
    (artifact,) = [artifact for artifact in logged.artifacts if artifact.type == "export"]
    assert {entry.ref for entry in artifact.manifest.contents} >= {
        (offline / "run" / "export" / "backbone.safetensors").as_uri()
    }
    assert [row["_step"] for row in logged.rows] == list(range(len(logged.rows)))


@pytest.fixture(scope="module")
def restarted(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after a checkpoint and resumed, offline."""
    folder = tmp_path_factory.mktemp("restarted")
    killed_after(task, folder, 25, *LONGER, "tracking.wandb.mode=offline")
    done = train(task, folder, *LONGER, "tracking.wandb.mode=offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(events(folder / "run", "started")) == 2
    return folder


def test_a_restart_continues_the_same_run_and_steps_never_go_back(restarted: Path) -> None:
    logged = Logged(restarted / "run")
    assert len(logged.files) == 2
    assert len(set(logged.ids)) == 1
    assert logged.exit_codes == [1, 0]
    assert_whole(logged.rows, steps=72, attempts=2)


def test_sync_sends_all_attempts_in_order_and_once(restarted: Path) -> None:
    run = str(restarted / "run")
    done = partialfc(restarted, "runs", "sync", run)
    assert done.returncode == 1, "there is no key"
    assert done.stderr.startswith("error: W&B did not accept")
    server = Server()
    done = partialfc(restarted, "runs", "sync", run, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = server.history.values()
    assert_whole(rows, steps=72, attempts=2)
    (summary,) = server.summary.values()
    assert summary["step"] == 72
    requests = server.requests
    done = partialfc(restarted, "runs", "sync", run, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 0
    assert "nothing to send" in done.stdout
    assert server.requests == requests
    server.close()


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), ("preempted", 1), ("running", 1)])
def test_the_w_and_b_run_ends_as_state_json_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.5}\n")
    (tmp_path / "state.json").write_text(json.dumps({"state": state}))
    gone = {"kind": "event", "time": 1.0, "event": "checkpoint", "step": 3, "path": "checkpoints/step-00000003"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(gone) + "\n")
    WandbRun(tmp_path, WandbConfig(mode="offline", timeout=120)).close()
    logged = Logged(tmp_path)
    assert logged.exit_codes == [code]
    assert logged.preempting == (state == "preempted")
    assert len(logged.rows) == 1
    assert not logged.artifacts, "a checkpoint that is pruned already is no more than a row"


def test_the_trainer_never_imports_wandb(task: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from partialfc.config import load_config; from partialfc.train.main import train\n"
        "train(load_config(sys.argv[1], sys.argv[2:])); assert 'wandb' not in sys.modules\n"
    )
    for mode in ("disabled", "offline"):  # not even with it: another process does
        words = [sys.executable, "-c", program, str(task), f"run.dir={tmp_path}/{mode}", f"tracking.wandb.mode={mode}"]
        done = finish(words, env=environment(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / mode / "wandb").exists() == (mode == "offline")
