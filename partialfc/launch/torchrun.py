"""Train under torchrun, on one host or on many, with exit codes that a supervisor can act on:

  launch/torchrun.sh CONFIG [key=value …] [--force]

  0 finished · 1 failed · 2 wrong usage, config or data, which no restart mends · 75 stopped on request, with a
  checkpoint if there was anything to write: start it again

TERM, USR1 and INT ask the run to stop. (Send them here, not to torchrun: USR1 kills it without its workers, and 30
seconds after TERM it kills its workers, with or without a checkpoint.) A start that has not begun to train within 30
seconds of them is ended, and at once by a second INT.

One host:    NPROC=8 launch/torchrun.sh configs/….yaml
Many hosts:  the same command on each, with NNODES=4 RDZV_ENDPOINT=first-host:29400
Elastic:     NNODES=3:4 starts with three or four hosts, and continues when one is lost or joins

Settings are environment variables:
  PYTHON         Python with partialfc installed (for launch/torchrun.sh only; default python3)
  NPROC          ranks per host: a number, or auto (default): one per GPU, without GPUs one per core
  NNODES         number of hosts, or MIN:MAX (default 1)
  RDZV_ENDPOINT  host:port of one host that all can reach
  RDZV_ID        name of the rendezvous: the same on all hosts, different for each run (default partialfc)
  RDZV_CONF      key=value,… for the rendezvous, e.g. last_call_timeout=10
  LOCAL_ADDR     address at which the others reach this host (default: its name)
  MAX_RESTARTS   restarts of all ranks after one has failed (default 3)
  LOG_DIR        folder for stdout and stderr of each attempt and rank (default: logs in the run folder)
  STOPPED        exit code for a run that was stopped on request (default 75)
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

from partialfc.files import write_atomically
from partialfc.runtime.stopping import STOP_FILE, StopCause, StoppedBy

_SELF = "launch/torchrun.sh"
_POLL = 0.2  # seconds
_BEGIN_WITHIN = 30.0  # seconds after a signal; a start that trains by then stops by itself, with a checkpoint
_END_WITHIN = 10.0  # seconds; torchrun ends by itself when all ranks have
_KNOWN_WITHIN = 60.0  # seconds; a cluster may start the endpoint's host at the same time


@dataclass(frozen=True)
class Settings:
    """Settings of a launch: the environment variables of the same names in capitals; empty counts as unset."""

    nproc: str = "auto"
    nnodes: str = "1"
    rdzv_endpoint: str = ""
    rdzv_id: str = "partialfc"
    rdzv_conf: str = ""
    local_addr: str = ""
    max_restarts: str = "3"
    log_dir: str = ""
    stopped: str = "75"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Return the settings that ``environment`` holds."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: environment[name.upper()] for name in names if environment.get(name.upper())})

    @property
    def single_host(self) -> bool:
        """True if the run uses this host alone."""
        return self.nnodes == "1" and not self.rdzv_endpoint

    def torchrun_options(self, logs: Path) -> list[str]:
        """Return torchrun's options, up to the program that it starts."""
        where = ["--standalone"]
        if not self.single_host:
            # The other hosts wait for a lost one as long as join_timeout, 600 s by default. It must wait for them as
            # long: with the default of 60 s, a link that is cut for a minute would end the run.
            conf = f"read_timeout=600{',' if self.rdzv_conf else ''}{self.rdzv_conf}"
            where = ["--nnodes", self.nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", self.rdzv_endpoint]
            where += ["--rdzv-id", self.rdzv_id, "--rdzv-conf", conf]
            where += ["--local-addr", self.local_addr] if self.local_addr else []
        ranks = ["--nproc-per-node", self.nproc, "--max-restarts", self.max_restarts]
        return [*where, *ranks, "--log-dir", str(logs), "--tee", "3"]

    def environment(self, own: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the ranks: ``own``, with defaults for variables unset or empty there."""
        defaults = {"NCCL_DEBUG": "WARN"}
        if not own.get("OMP_NUM_THREADS"):
            defaults["OMP_NUM_THREADS"] = str(max(1, _cores() // self._ranks_here()))
        if not self.single_host:
            # Otherwise torchrun announces the address of the ranks' store in its first round only, and a host that
            # joins later waits for it until all give up. With this, rank 0 keeps the store, a new one in each round.
            defaults["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return {**own, **{key: value for key, value in defaults.items() if not own.get(key)}, "PYTHONUNBUFFERED": "1"}

    def _ranks_here(self) -> int:
        if self.nproc.isdecimal() and int(self.nproc) > 0:
            return int(self.nproc)
        return _gpus() or _cores()


class StopSignals:
    """Records signals that ask the run to stop, from creation on."""

    def __init__(self) -> None:
        self.name = ""  # of the last signal, without SIG
        self.first = math.inf  # time.monotonic() at the first one
        self.interrupts = 0  # number of SIGINT
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name.removeprefix("SIG")
        self.first = min(self.first, time.monotonic())
        self.interrupts += number == signal.SIGINT


class Start:
    """One start of a run under torchrun.

    Args:
        run: run folder.
        own_state: file in which rank 0 reports the state of this start, while ``state.json`` may belong to another
            start that uses the run folder; None if there is no such file.
        code_file: file in which a failed rank leaves its exit code and message, which torchrun does not pass on.
    """

    def __init__(self, run: Path, own_state: Path | None, code_file: Path) -> None:
        self._run, self._own_state, self._code_file = run, own_state, code_file
        self._attempt_before = self._state().get("attempt")
        self._request = ""  # content of the stop file that this process has written
        self._given_up = False  # asked to stop before it had begun, and ended

    def wait(self, torchrun: subprocess.Popen[bytes], signals: StopSignals) -> int:
        """Wait until torchrun has ended and return its exit code. Signals are passed on as requests to stop."""
        announced, began, refused = False, time.monotonic(), math.inf
        while (code := torchrun.poll()) is None:
            if signals.name and not announced:
                print(f"{_SELF}: got {signals.name}; asking the run to stop", flush=True)
                announced = True
            if signals.name and not self._request and self._takes_requests():
                self._leave_request(signals.name)
            now = time.monotonic()
            if signals.name and not self._has_begun():
                patience = max(signals.first, began) + _BEGIN_WITHIN
                self._given_up = signals.interrupts > 1 or now > patience
            if self._refusal():
                refused = min(refused, now)
            if self._given_up or now > refused + _END_WITHIN:
                _end(torchrun)
            time.sleep(_POLL)
        return code

    def exit_code(self, torchrun_code: int, stopped: int) -> int:
        """Return the exit code of the launch: torchrun's own does not distinguish failures from requests to stop."""
        refusal = self._refusal()
        if refusal:
            print(f"error: {refusal}", file=sys.stderr, flush=True)
            return 2
        ended = None
        if self._has_begun():
            ended = self._state().get("state")
        elif torchrun_code == 0:  # the run had finished before
            ended = _read_json(self._run / "state.json").get("state")
        if ended == "finished":
            return 0
        if ended == "preempted" or self._given_up:
            return stopped
        _, reason = self._rank_error()
        if reason:  # said before, but torchrun has printed a report since
            print(f"error: {reason}", file=sys.stderr, flush=True)
        return 1

    def _refusal(self) -> str:
        """Return the error of a rank that no restart mends."""
        code, reason = self._rank_error()
        return reason if code == "2" else ""

    def _rank_error(self) -> tuple[str, str]:
        """Return the code and the message that a rank has left, both empty if none has."""
        code, _, reason = _read_text(self._code_file).partition("\n")
        return code, (reason.strip().splitlines() or [""])[0]

    def remove_request(self) -> None:
        """Remove a request that came too late, so that it does not stop the next start."""
        stop = self._run / STOP_FILE
        if self._request and _read_text(stop) == self._request:
            stop.unlink(missing_ok=True)

    def _takes_requests(self) -> bool:
        """Return False while this start may still wait for another one, which would take the request as its own."""
        return self._own_state is None or self._has_begun()

    def _leave_request(self, signal_name: str) -> None:
        job = os.environ.get("SLURM_JOB_ID")
        by = StoppedBy.PERSON if signal_name == "INT" else StoppedBy.LAUNCHER
        words = f"{signal_name} to {_SELF} on {socket.gethostname()}" + (f", job {job}" if job else "")
        request = StopCause(by, words).to_text() + (f"job: {job}\n" if job else "")  # the job script looks for it
        with suppress(OSError):  # the next poll tries again
            write_atomically(self._run / STOP_FILE, request)
            self._request = request

    def _has_begun(self) -> bool:
        return self._state().get("attempt") != self._attempt_before

    def _state(self) -> dict[str, Any]:
        return _read_json(self._own_state or self._run / "state.json")


def launch(arguments: Sequence[str], settings: Settings, signals: StopSignals) -> int:
    """Train with the arguments of ``partialfc train`` under torchrun, and return the exit code."""
    if settings.nnodes != "1" and not settings.rdzv_endpoint:
        return _usage_error(f"NNODES={settings.nnodes} needs RDZV_ENDPOINT=host:port")
    if not settings.stopped.isdecimal():
        return _usage_error(f"STOPPED={settings.stopped}: expected an exit code")
    if settings.rdzv_endpoint and not settings.single_host:
        problem = _wait_for_host(settings.rdzv_endpoint, signals)
        if problem:
            return _usage_error(f"RDZV_ENDPOINT={settings.rdzv_endpoint}: {problem}")
        if signals.name:
            return int(settings.stopped)
    # Before any rank starts: an error in the config is then reported once, not by every rank of every restart.
    overrides = [word for word in arguments if word != "--force"]
    command = [sys.executable, "-m", "partialfc", "config", *overrides, "--get", "run.dir"]
    config = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if config.returncode != 0:
        return config.returncode if config.returncode > 0 else 128 - config.returncode
    run = Path(config.stdout.rstrip("\n"))
    logs = Path(settings.log_dir or run / "logs")
    try:
        logs.mkdir(parents=True, exist_ok=True)
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _usage_error(f"run.dir: cannot create {error.filename}: {error.strerror}")
    with tempfile.TemporaryDirectory(prefix="partialfc-") as folder:
        own_state = os.environ.get("PARTIALFC_STATE_FILE") or (f"{folder}/state.json" if settings.single_host else "")
        files = {"PARTIALFC_STATE_FILE": own_state, "PARTIALFC_CODE_FILE": f"{folder}/code"}
        environment = settings.environment(os.environ) | files
        start = Start(run, Path(own_state) if own_state else None, Path(folder) / "code")
        command = [sys.executable, "-m", "torch.distributed.run", *settings.torchrun_options(logs)]
        # In a session of its own: signals that a terminal or Slurm sends to this group must not reach torchrun.
        torchrun = subprocess.Popen(
            [*command, "-m", "partialfc", "train", *arguments], env=environment, start_new_session=True
        )
        try:
            return start.exit_code(start.wait(torchrun, signals), int(settings.stopped))
        finally:
            start.remove_request()


def _wait_for_host(endpoint: str, signals: StopSignals) -> str:
    """Wait until the name of the endpoint's host is known, or a signal has come; return what is wrong with it.

    torchrun itself waits for ten minutes, and takes no signals meanwhile.
    """
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):  # torchrun has a default port
        host, port = endpoint, "29400"
    if not port.isdecimal() or int(port) > 65535:
        return "expected host:port"
    deadline = time.monotonic() + _KNOWN_WITHIN
    announced = False
    while not signals.name:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return ""
        except (OSError, UnicodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "not a host name"
        if time.monotonic() > deadline:
            return f"the host is not known: {problem}"
        if not announced:
            print(f"{_SELF}: waiting for the host {host} to be known ({problem})", flush=True)
            announced = True
        time.sleep(_POLL)
    return ""


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    """End torchrun, and by it the ranks, which have nothing to save. While it waits for a network it takes no TERM."""
    torchrun.terminate()
    try:
        torchrun.wait(_END_WITHIN)
    except subprocess.TimeoutExpired:
        torchrun.kill()


def _usage_error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return 0
    return sum(line.startswith("GPU") for line in listed.stdout.splitlines())


def main(arguments: Sequence[str]) -> int:
    """Run a launch with the settings of the environment, and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    return launch(arguments, Settings.of(os.environ), StopSignals())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
