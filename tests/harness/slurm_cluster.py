"""A real Slurm on this machine: a controller and three nodes on loopback, with two made-up GPUs each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")

_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held
AuthInfo=socket={base}/munge/socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/%n.log
PlugStackConfig={base}/plugstack.conf
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SrunPortRange={srun_ports}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
ReturnToService=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
EnforcePartLimits=ALL
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait=15
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=120
JobRequeue=1
{nodes}
PartitionName=debug Nodes=n[1-3] Default=YES MaxTime=1440 State=UP
"""


def why_not() -> str | None:
    """Return the reason there can be no cluster here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; tests/install_slurm.sh"
    if os.geteuid() != 0:
        return "only root can give each node a name of its own"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True)
    return None if probe.returncode == 0 else "this machine allows no namespaces"


class Cluster:
    """Slurm under a folder with a short path; ``environment`` is for the commands that talk to it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environment = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        self._pid_files = [*(base / "run" / f"{node}.pid" for node in NODES), base / "run" / "slurmctld.pid"]
        self._pid_files.append(base / "munge" / "munged.pid")

    def start(self) -> None:
        base = self.base
        for name in ("munge", "state", "run", "log", "spool", "dev"):
            (base / name).mkdir(parents=True)
        for folder in (base, base / "munge"):
            folder.chmod(0o755)
        (base / "munge" / "key").write_bytes(os.urandom(1024))
        (base / "munge" / "key").chmod(0o600)
        host = socket.gethostname()
        (base / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        for number, minor in ((0, 3), (1, 5)):  # the devices null and zero stand for GPUs
            os.mknod(base / "dev" / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, minor))
        (base / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-3] Name=gpu File={base}/dev/gpu[0-1]\n")
        (base / "plugstack.conf").touch()
        port = 17000 + os.getpid() % 500 * 10
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port + number} CPUs=4 RealMemory=4000 "
            "Gres=gpu:2 State=UNKNOWN"
            for number, node in enumerate(NODES, 1)
        )
        srun_ports = f"{port + 10000}-{port + 10099}"
        (base / "slurm.conf").write_text(
            _SLURM_CONF.format(host=host, port=port, base=base, srun_ports=srun_ports, nodes=nodes)
        )
        munge = base / "munge"
        self.run(
            "munged",
            f"--key-file={munge}/key",
            f"--socket={munge}/socket",
            f"--pid-file={munge}/munged.pid",
            f"--log-file={munge}/munged.log",
            f"--seed-file={munge}/munged.seed",
        )
        self.run("slurmctld", "-c", "-f", str(base / "slurm.conf"))
        for node in NODES:
            inside = (
                f"hostname {node} && mount --bind {base}/hosts /etc/hosts && exec slurmd -f {base}/slurm.conf -N {node}"
            )
            self.run("unshare", "--uts", "--mount", "bash", "-c", inside)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split().count("idle") != len(NODES):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user", "root", check=False)
        for file in self._pid_files:
            with contextlib.suppress(OSError, ValueError):
                _end(int(file.read_text()))

    def run(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Return the output of a command; an error ends the test with its message."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.environment, stdin=subprocess.DEVNULL, timeout=60, cwd=cwd
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job in Slurm: JobState, Restarts, ExitCode, …"""
        words = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """The job, once it is in one of these states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {states}\n{self.logs()}"
            time.sleep(0.3)
        return job

    def logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in sorted((self.base / "log").iterdir()))


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster, all of whose processes end with it."""
    base = Path(tempfile.mkdtemp(prefix="slurm"))  # paths of sockets are short
    found = Cluster(base)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(base, ignore_errors=True)


def _end(pid: int) -> None:
    """End a process that this module has started."""
    os.kill(pid, signal.SIGTERM)
    for _ in range(150):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
