"""W&B beside a run: with the real client, offline and against servers on loopback ports, good and bad ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from partialfc.config import WandbConfig
from partialfc.errors import MissingDependency
from partialfc.evaluate.verification import Scores
from partialfc.runs.lock import FolderLock
from partialfc.runs.summary import read_metrics
from partialfc.tracking.wandb import rows as wandb_rows
from partialfc.tracking.wandb.rows import Lines, Notes, Sent
from partialfc.tracking.wandb.run import WandbRun, require_wandb, run_id
from tests.harness.running import ENVIRONMENT, command, lines
from tests.harness.tasks import write_task
from tests.harness.wandb_log import Logged, assert_whole
from tests.harness.wandb_server import Server

KEY = "5ec2e7" * 6 + "abcd"  # 40 characters, as a real one
DEAD = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(folder)))
    return config


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Nothing of the user's, and no way to any server but the named one."""
    clean = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("WANDB_")}
    (folder / "home").mkdir(exist_ok=True)
    return clean | {"HOME": str(folder / "home"), "WANDB_BASE_URL": DEAD} | more


def train(task: Path, folder: Path, *overrides: str, ranks: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Train in ``folder/run``. All of the output is kept in ``folder``, to be searched."""
    done = subprocess.run(
        command(task, ranks, f"run.dir={folder}/run", *overrides),
        capture_output=True,
        text=True,
        env=environment(folder, **env),
        timeout=120,
        check=False,
    )
    with (folder / "output.txt").open("a") as file:
        file.write(done.stdout + done.stderr)
    return done


def partialfc(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "partialfc", *arguments],
        capture_output=True,
        text=True,
        env=environment(folder, **env),
        timeout=120,
        check=False,
    )


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def followers(folder: Path) -> list[int]:
    """The processes of W&B that belong to a run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and "partialfc.tracking.wandb." in words:
            found.append(int(path.parent.name))
    return found


def client_of(folder: Path) -> int:
    """The process id of the one client; there may be none for a moment."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in followers(folder) if b"wandb_client" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return len(found) == 1

    wait_for(there, "there is no client")
    return found[0]


def processes(folder: Path) -> list[int]:
    """All processes that have to do with a run folder; W&B's service knows it by its environment only."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            known = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if str(folder).encode() in known and int(path.name) != os.getpid():
                found.append(int(path.name))
    return found


def kill(folder: Path, *signals: signal.Signals) -> None:
    """Send signals to every process of W&B's, one after the other."""
    for number in signals:
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def warnings_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if "WARNING" in line or "Traceback" in line]


# --- offline ----------------------------------------------------------------------------------------------------------


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
    assert not followers(offline / "run")


def test_all_of_metrics_jsonl_is_there_one_row_a_line(offline: Path) -> None:
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


def test_a_checkpoint_is_a_reference_that_nobody_reads(offline: Path) -> None:
    checkpoint = offline / "run" / "checkpoints" / "step-00000036"
    (artifact,) = [artifact for artifact in Logged(offline / "run").artifacts if artifact.type == "checkpoint"]
    assert json.loads(artifact.metadata)["step"] == 36
    assert set(artifact.aliases) == {"latest", "step-36"}
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(entries) == {path.name for path in checkpoint.iterdir()}
    for name, entry in entries.items():
        assert entry.ref == (checkpoint / name).as_uri()
        assert not entry.local_path, "nothing to upload"


def test_an_export_is_told_to_the_run_that_has_ended(offline: Path) -> None:
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


# --- restarts ---------------------------------------------------------------------------------------------------------


def killed_after(task: Path, folder: Path, rows: int, *overrides: str, **env: str) -> None:
    """Begin a run and kill it, and it alone, when so many train lines are written; its follower then ends by itself."""
    process = subprocess.Popen(
        command(task, 0, f"run.dir={folder}/run", *overrides),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(folder, **env),
    )
    metrics = folder / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(lines(folder / "run", "train")) >= rows, "the run does not begin")
    process.kill()
    process.wait()
    wait_for(lambda: not followers(folder / "run"), "its follower goes on without it")


LONGER = ["optim.epochs=6", "checkpoint.every=15", "evaluation.every=40"]  # 72 steps


@pytest.fixture(scope="module")
def restarted(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after a checkpoint and went on, offline."""
    folder = tmp_path_factory.mktemp("restarted")
    killed_after(task, folder, 25, *LONGER, "tracking.wandb.mode=offline")
    done = train(task, folder, *LONGER, "tracking.wandb.mode=offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stdout
    return folder


def test_a_restart_goes_on_with_the_same_run_and_steps_never_go_back(restarted: Path) -> None:
    logged = Logged(restarted / "run")
    assert len(logged.files) == 2
    assert len(set(logged.ids)) == 1
    assert logged.exit_codes == [1, 0]
    assert_whole(logged.rows, steps=72, attempts=2)


def test_sync_sends_the_attempts_in_their_order_and_only_once(restarted: Path) -> None:
    run = str(restarted / "run")
    done = partialfc(restarted, "runs", "sync", run)
    assert done.returncode == 1, "there is no key"
    assert done.stderr.startswith("error: W&B has not taken")
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
def test_a_run_ends_in_w_and_b_as_its_state_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.5}\n")
    (tmp_path / "state.json").write_text(json.dumps({"state": state}))
    gone = {"kind": "event", "time": 1.0, "event": "checkpoint", "step": 3, "path": "checkpoints/step-00000003"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(gone) + "\n")
    WandbRun(tmp_path, WandbConfig(mode="offline")).close()
    logged = Logged(tmp_path)
    assert logged.exit_codes == [code]
    assert logged.preempting == (state == "preempted")
    assert len(logged.rows) == 1
    assert not logged.artifacts, "a checkpoint that is pruned already is no more than a row"


# --- online -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_online_a_killed_run_goes_on_in_the_server_as_one_run(task: Path, tmp_path: Path, server: Server) -> None:
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    killed_after(task, tmp_path, 25, *LONGER, "tracking.wandb.mode=auto", **online)
    done = train(task, tmp_path, *LONGER, "tracking.wandb.mode=auto", **online)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not warnings_of(done.stdout + done.stderr)
    assert server.keys == {KEY}
    ((run, rows),) = server.history.items()
    assert run == (tmp_path / "run" / "wandb" / "id.txt").read_text().strip()
    assert_whole(rows, steps=72, attempts=2)
    assert [end["code"] for end in server.exits] == [1, 0]
    assert server.config[run]["optim"]["value"]["epochs"] == 6.0
    assert server.summary[run]["best/plain/tar_at_far/1e-2"] > 0
    assert {artifact["artifactTypeName"] for artifact in server.artifacts} == {"checkpoint", "run_table"}
    assert not any("safetensors" in name or "distcp" in name for name in server.uploaded)
    assert not list((tmp_path / "run" / "wandb").glob("offline-*"))
    done = partialfc(tmp_path, "runs", "sync", str(tmp_path / "run"), **online)
    assert "nothing to send" in done.stdout
    check_key_is_nowhere(tmp_path)


def check_key_is_nowhere(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_server_that_stops_in_mid_run_loses_nothing_and_is_said_once(task: Path, tmp_path: Path) -> None:
    server = Server()
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    process = subprocess.Popen(
        command(task, 0, f"run.dir={tmp_path}/run", *LONGER, "tracking.wandb.mode=online", "tracking.wandb.timeout=4"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tmp_path, **online),
    )
    wait_for(lambda: server.runs, "the run does not reach the server")
    server.behaviour = "failing"
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(warnings_of(output)) == 1, output
    assert "can be sent later" in output
    assert len(lines(tmp_path / "run", "train")) == 72
    server.behaviour = "well"
    done = partialfc(tmp_path, "runs", "sync", str(tmp_path / "run"), **online)
    assert done.returncode == 0, done.stdout + done.stderr
    ((_, rows),) = server.history.items()
    assert_whole(rows, steps=72, attempts=1)
    server.close()


@pytest.mark.parametrize("trouble", ["dead", "failing", "silent"])
def test_a_server_in_trouble_costs_the_training_nothing_and_is_said_once(
    task: Path, tmp_path: Path, trouble: str
) -> None:
    server = Server(trouble) if trouble != "dead" else None
    more = ["tracking.wandb.mode=online", "tracking.wandb.timeout=2"]
    url = server.url if server else DEAD
    done = train(task, tmp_path, *more, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert len(warnings_of(output)) == 1, output
    assert f"can be sent later: partialfc runs sync {tmp_path}/run" in output
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 37))
    logged = Logged(tmp_path / "run")
    assert len(logged.rows) == len(read_metrics(tmp_path / "run" / "metrics.jsonl")), "all of it, offline"
    # A client that has come as far as to begin a run of its own has ended it as failed; the one that follows has not.
    assert logged.exit_codes[-1] == 0
    assert not followers(tmp_path / "run")
    check_key_is_nowhere(tmp_path)
    if server:
        assert server.requests
        server.behaviour = "failing"  # lets its threads end
        server.close()


def test_a_client_that_dies_is_followed_by_another_one(task: Path, tmp_path: Path, server: Server) -> None:
    process = subprocess.Popen(
        command(task, 0, f"run.dir={tmp_path}/run", *LONGER, "tracking.wandb.mode=online"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url),
    )
    sent = tmp_path / "run" / "wandb" / "sent.txt"
    wait_for(lambda: sent.exists() and sent.read_text(), "nothing is sent")
    os.kill(client_of(tmp_path / "run"), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert not warnings_of(output), output
    ((_, rows),) = server.history.items()
    assert_whole(rows, steps=72, attempts=1)
    assert server.exits[-1]["code"] == 0
    assert not followers(tmp_path / "run")


def test_without_w_and_b_its_client_is_never_loaded(task: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from partialfc.config import load_config; from partialfc.train.main import train\n"
        "train(load_config(sys.argv[1], sys.argv[2:])); assert 'wandb' not in sys.modules\n"
    )
    for mode in ("disabled", "offline"):  # not even with it: another process does
        done = subprocess.run(
            [sys.executable, "-c", program, str(task), f"run.dir={tmp_path}/{mode}", f"tracking.wandb.mode={mode}"],
            capture_output=True,
            text=True,
            env=environment(tmp_path),
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / mode / "wandb").exists() == (mode == "offline")


# --- without a trainer: what an attempt leaves, and the next one or `runs sync` makes of it ---------------------------


class Run:
    """A run folder in which this process plays the trainer. ``followed`` begins to send it, as an attempt does."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.path, self.server, self._step = folder / "run", server, 0
        self.path.mkdir()
        (self.path / "config.yaml").write_text("optim: {lr: 0.5}\n")
        self.metrics = self.path / "metrics.jsonl"
        self.metrics.touch()
        self.ends("running")

    def ends(self, state: str) -> None:
        (self.path / "state.json").write_text(json.dumps({"state": state}))

    def followed(self, mode: Literal["online", "offline"] = "online") -> WandbRun:
        return WandbRun(self.path, WandbConfig(mode=mode, timeout=3))

    def train(self, steps: int) -> None:
        with self.metrics.open("a") as file:
            for _ in range(steps):
                self._step += 1
                file.write(json.dumps({"kind": "train", "time": 1.0, "step": self._step, "loss": 0.5}) + "\n")

    def wait_until_sent(self) -> None:
        """Until W&B's client has every line; its server need not have it."""
        notes = self.path / "wandb" / "sent.txt"
        wait_for(lambda: notes.exists() and f" train {self._step}\n" in notes.read_text(), "not sent")

    def wait_until_taken(self) -> None:
        wait_for(lambda: self.steps() and self.steps()[-1] == self._step, "the server does not get it")

    def steps(self) -> list[int]:
        """The steps that the server has, in its order."""
        for rows in self.server.history.values():
            assert [row["_step"] for row in rows] == list(range(len(rows)))
        return [row["step"] for rows in self.server.history.values() for row in rows]

    def sync(self) -> subprocess.CompletedProcess[str]:
        return partialfc(self.path.parent, "runs", "sync", str(self.path), **online(self.server))


def online(server: Server) -> dict[str, str]:
    return {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}


@pytest.fixture
def run(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Run:
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    for key, value in environment(tmp_path, **online(server)).items():
        monkeypatch.setenv(key, value)
    return Run(tmp_path, server)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_sync_leaves_a_run_alone_that_is_going_on(run: Run, mode: Literal["online", "offline"]) -> None:
    attempt = run.followed(mode)
    run.train(3)
    run.wait_until_sent()
    done = run.sync()
    assert done.returncode == 1
    assert "is being sent by another process" in done.stderr
    assert not run.server.exits, "W&B takes the run for ended"
    run.train(4)
    run.ends("finished")
    attempt.close()
    done = run.sync()
    assert done.returncode == 0, done.stderr
    assert ("nothing to send" in done.stdout) == (mode == "online")
    assert run.steps() == list(range(1, 8))
    assert [end["code"] for end in run.server.exits] == [0]


def test_sync_leaves_a_run_alone_whose_follower_was_killed(run: Run) -> None:
    attempt = run.followed("offline")
    run.train(3)
    run.wait_until_sent()
    kill(run.path, signal.SIGKILL)
    lock = FolderLock(run.path, 0)  # as the trainer, which goes on
    done = run.sync()
    assert done.returncode == 1
    assert "the run is going on; sync it when it has ended" in done.stderr
    lock.release()
    attempt.close()
    run.train(4)
    run.ends("finished")
    done = run.sync()
    assert done.returncode == 0, done.stderr
    assert run.steps() == list(range(1, 8))
    assert "nothing to send" in run.sync().stdout


def test_an_online_attempt_sends_first_what_those_before_have_kept(run: Run) -> None:
    run.server.behaviour = "failing"
    attempt = run.followed()
    run.train(5)
    attempt.close()
    assert list(run.path.glob("wandb/offline-run-*"))
    run.server.behaviour = "well"
    attempt = run.followed()
    run.train(5)
    run.ends("finished")
    attempt.close()
    assert run.steps() == list(range(1, 11))
    assert "nothing to send" in run.sync().stdout


def test_what_was_lost_with_the_connection_or_a_killed_client_comes_again(run: Run) -> None:
    attempt = run.followed()
    run.train(5)
    run.wait_until_taken()
    run.server.behaviour = "failing"
    run.train(5)
    run.wait_until_sent()
    kill(run.path, signal.SIGKILL)
    attempt.close()
    assert run.steps() == list(range(1, 6))
    run.server.behaviour = "well"
    attempt = run.followed()
    run.train(5)
    run.wait_until_taken()
    assert run.steps() == list(range(1, 16))
    kill(run.path, signal.SIGKILL)
    attempt.close()
    run.train(2)
    run.ends("preempted")
    assert run.sync().returncode == 0
    assert run.steps() == list(range(1, 18))
    assert [end["code"] for end in run.server.exits] == [1]
    assert "nothing to send" in run.sync().stdout


def test_the_signals_that_stop_a_job_lose_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """As Slurm sends them: to every process of the job, whatever its group and session."""
    attempt = run.followed()
    kill(run.path, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # before it has said or done anything
    run.train(5)
    run.wait_until_sent()
    (supervisor,) = [pid for pid in followers(run.path) if pid != client_of(run.path)]
    kill(run.path, signal.SIGUSR1, signal.SIGTERM)
    run.train(5)  # the steps that the trainer still does
    run.wait_until_sent()
    kill(run.path, signal.SIGTERM, signal.SIGINT)  # when it waits for nothing but the end
    assert supervisor in followers(run.path)
    run.ends("preempted")
    attempt.close()
    assert run.steps() == list(range(1, 11))
    assert [end["code"] for end in run.server.exits] == [1]
    assert not warnings_of(capsys.readouterr().out)
    wait_for(lambda: not processes(run.path), "something stays behind", 10)


def test_a_client_that_dies_again_and_again_is_followed_by_one_that_writes_offline(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = run.followed()
    for _ in range(4):
        run.train(1)
        run.wait_until_sent()
        os.kill(client_of(run.path), signal.SIGKILL)
    run.train(1)
    run.ends("finished")
    attempt.close()
    (warning,) = warnings_of(capsys.readouterr().out)
    assert "its client has died; the run goes on, it is written offline and can be sent later" in warning
    assert [row["step"] for row in Logged(run.path).rows][-1] == 5
    assert run.sync().returncode == 0
    assert run.steps() == list(range(1, 6))


def test_nothing_stays_behind_a_trainer_that_is_killed(tmp_path: Path, run: Run) -> None:
    program = (
        "import sys, time; from pathlib import Path; from partialfc.config import WandbConfig\n"
        "from partialfc.tracking.wandb.run import WandbRun\n"
        "WandbRun(Path(sys.argv[1]), WandbConfig(mode='online', timeout=3)); time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program, str(run.path)])
    run.train(5)
    run.wait_until_sent()
    assert len(processes(run.path)) == 4, "the trainer, supervisor, client and W&B's service"
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not processes(run.path), "something stays behind", 10)
    assert run.steps() == list(range(1, 6))
    assert [end["code"] for end in run.server.exits] == [1]


def test_a_follower_that_is_killed_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = run.followed("offline")
    run.train(1)
    run.wait_until_sent()
    kill(run.path, signal.SIGKILL)
    said: list[str] = []
    wait_for(lambda: said.extend(warnings_of(capsys.readouterr().out)) or said, "not a word")
    assert (
        f"its processes have ended; the run goes on, and can be sent later: partialfc runs sync {run.path}" in said[0]
    )
    attempt.close()


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_commands_that_the_trainer_understands(tmp_path: Path) -> None:
    """What W&B's agent would start for a trial, with a stand-in for the trainer that reads the config."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    root = Path(__file__).parents[2]
    sweep = yaml.safe_load((root / "configs" / "sweep.yaml").read_text())
    chosen: dict[str, Any] = {
        "optim.lr": 1e-05,
        "optim.head_lr_factor": 50,
        "head.loss.margin": 0.30000000000000004,
        "head.sample_rate": 0.1,
        "evaluation.every": 250,
    }
    assert set(chosen) == set(sweep["parameters"])
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    words: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        words += arguments["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    assert not any("${" in word for word in words)
    trainer = tmp_path / "partialfc"
    trainer.write_text(
        f"#!{sys.executable}\n"
        "import sys; from partialfc.config import load_config, to_yaml\n"
        "assert sys.argv[1] == 'train'; print(to_yaml(load_config(sys.argv[2], sys.argv[3:])))\n"
    )
    trainer.chmod(0o755)
    env = environment(tmp_path, WANDB_RUN_ID="trial7", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(root))
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=root, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    tree = yaml.safe_load(done.stdout)
    assert tree["run"]["dir"] == "runs/sweep/trial7"
    assert tree["tracking"]["wandb"]["mode"] == "auto"
    for key, value in chosen.items():
        found: Any = tree
        for name in key.split("."):
            found = found[name]
        assert found == value, key
    results = {"unseen_font": {"tar_at_far": {"0.001": 0.7}}}
    line = {"kind": "evaluation", "step": 1, "time": 1.0, "results": results}
    assert sweep["metric"]["name"] in wandb_rows.best(wandb_rows.row(line), {}), (
        "the sweep asks for a value that there is"
    )


def test_in_a_sweep_the_agent_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_id(tmp_path)
    assert len(own) == 8
    assert run_id(tmp_path) == own
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    assert run_id(tmp_path) == own, "a leftover variable of some other run"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    (tmp_path / "wandb" / "sent.txt").write_text("0 train 7\n")
    assert run_id(tmp_path) == "trial7"
    assert not (tmp_path / "wandb" / "sent.txt").exists(), "another run has sent nothing yet"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert run_id(tmp_path) == "trial7"
    assert run_id(tmp_path, anew=True) != "trial7"


def test_rows_have_names_that_w_and_b_takes_for_names() -> None:
    results = {
        "v1.2": {"tar_at_far": {"0.01": 0.9, "1e-05": 0.4, "0.00015": 0.5}, "genuine_pairs": 3},
        "known": {"accuracy": 0.8, "genuine_cosine": None},
    }
    found = wandb_rows.row({"kind": "evaluation", "time": 5.0, "step": 7, "results": results})
    assert found == {
        "_timestamp": 5.0,
        "evaluation/v1_2/tar_at_far/1e-2": 0.9,
        "evaluation/v1_2/tar_at_far/1e-5": 0.4,
        "evaluation/v1_2/tar_at_far/1_5e-4": 0.5,
        "evaluation/v1_2/genuine_pairs": 3,
        "evaluation/known/accuracy": 0.8,
    }
    highest = wandb_rows.best(found, {"best/known/accuracy": 0.85, "best/v1_2/tar_at_far/1e-2": 0.1})
    assert highest["best/known/accuracy"] == 0.85
    assert highest["best/v1_2/tar_at_far/1e-2"] == 0.9
    assert "best/v1_2/genuine_pairs" not in highest
    event = wandb_rows.row({"kind": "event", "time": 5.0, "event": "checkpoint", "step": 3, "path": "p"})
    assert event == {"_timestamp": 5.0, "event/checkpoint/step": 3, "event/checkpoint/path": "p"}


def test_lines_are_read_as_they_come_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "event", "event": "started"}\n{"kind": "train", "step": 1}\n{"kind": "tra')
    notes = Notes(tmp_path / "sent.txt")
    reader = Lines(path, notes.sent)

    def new() -> list[tuple[str, int | None]]:
        found = []
        for line in reader.new():
            notes.add(line)
            found.append((line["kind"], line.get("step")))
        return found

    assert new() == [("event", None), ("train", 1)]
    with path.open("a") as file:
        file.write('in", "step": 2}\nnonsense\n{"kind": "evaluation", "step": 2}\n')
    assert not reader.are_all()
    assert new() == [("train", 2), ("evaluation", 2)]
    assert new() == []
    assert reader.are_all()
    assert reader.sent == Sent(rows=4, train=2, evaluation=2, events=1)
    assert Notes(tmp_path / "sent.txt").sent == reader.sent
    # The next attempt begins at step 1: it does step 2 again, and goes on.
    path.write_text(
        '{"kind": "event", "event": "started"}\n{"kind": "train", "step": 1}\n{"kind": "event", "event": "started"}\n'
        '{"kind": "train", "step": 2}\n{"kind": "evaluation", "step": 2}\n{"kind": "train", "step": 3}\n'
    )
    (tmp_path / "another").write_bytes(path.read_bytes())
    (tmp_path / "another").replace(path)
    assert not reader.are_all()
    notes = Notes(tmp_path / "sent.txt")
    reader = Lines(path, notes.sent)
    assert new() == [("event", None), ("train", 3)]
    assert reader.sent.rows == 6
    # W&B's server turns out to have three rows: the others come again.
    with (tmp_path / "sent.txt").open("a") as file:
        file.write("6 tra")
    notes = Notes(tmp_path / "sent.txt", rows=3)
    assert notes.sent == Sent(rows=3, train=2, events=1)
    reader = Lines(path, notes.sent)
    assert new() == [("event", None), ("evaluation", 2), ("train", 3)]
    assert Notes(tmp_path / "sent.txt").sent == reader.sent == Sent(rows=6, train=3, evaluation=2, events=2)
    assert Notes(tmp_path / "lost.txt", rows=4).sent == Sent(rows=4), "rows are not numbered twice"


def test_a_run_that_asks_for_w_and_b_needs_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # a folder called wandb, which is not the client
    require_wandb(WandbConfig())
    with pytest.raises(MissingDependency, match=r"pip install 'partialfc\[wandb\]'"):
        require_wandb(WandbConfig(mode="auto"))


def test_runs_lists_a_folder_whose_name_is_not_a_command(offline: Path) -> None:
    for arguments in (["runs", str(offline)], ["runs", "list", str(offline)]):
        done = partialfc(offline, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1].split()[:3] == ["run", "finished", "36/36"]
    for folder in ("home", "nope"):
        done = partialfc(offline, "runs", "sync", str(offline / folder))
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: there is no run in {offline}/{folder}")


def test_a_curve_keeps_its_ends_and_its_values_when_points_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    genuine, impostors = torch.randint(0, 3, (2, 1 << 20), generator=generator)
    scores = Scores(genuine, impostors)
    far, tar = scores.roc()
    points = scores.roc_points(50)
    assert 40 <= len(points["far"]) <= 50
    assert (points["far"][0], points["far"][-1], points["tar"][-1]) == (far[far > 0][0], 1.0, 1.0)
    exact = dict(zip(far.tolist(), tar.tolist(), strict=True))
    assert all(exact[x] == y for x, y in zip(points["far"], points["tar"], strict=True))
    nothing = Scores(scores.genuine, torch.zeros(1 << 20, dtype=torch.int64))
    assert nothing.roc_points() == {"far": [], "tar": []}
