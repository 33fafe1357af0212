"""Job scripts for Slurm: ``train.sbatch`` with a request and a run of its own, for people to read and keep."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from partialfc.errors import ConfigError, MissingDependency, PartialFCError
from partialfc.launch.scripts import script

_SETTINGS = "# [settings of `partialfc launch slurm`]\n"
_REQUEST = re.compile(r"(?:^#SBATCH .*\n)+", re.MULTILINE)
_USAGE = re.compile(r"^#\n# Train on the nodes.*?(?=^set )", re.MULTILINE | re.DOTALL)
_TIME = re.compile(r"(?:\d+-\d+(?::\d+){0,2}|\d+(?::\d+){0,2})")


class SubmissionFailed(PartialFCError):
    """Slurm has not taken a job."""


@dataclass(frozen=True)
class Request:
    """What a job asks Slurm for; None leaves the choice to Slurm."""

    nodes: int
    time: str  # as sbatch takes it, e.g. 24:00:00 or 2-00:00:00
    partition: str | None = None
    account: str | None = None
    gpus_per_node: str | None = None  # a number, or kind:number
    cpus_per_task: int | None = None  # a task is a node here
    mem: str | None = None  # a node
    warning_seconds: int = 300  # before the limit
    more: tuple[str, ...] = ()  # options of sbatch as they are, e.g. --qos=high

    def options(self, name: str, output: str) -> list[str]:
        """The options for sbatch.

        Raises:
            ConfigError: a value is not what sbatch takes.
        """
        if not _TIME.fullmatch(self.time):
            raise ConfigError(f"--time: expected minutes, hours:minutes:seconds or days-hours, got {self.time!r}")
        given = {
            "job-name": name,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus_per_task,
            "gpus-per-node": self.gpus_per_node,
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "signal": f"B:USR1@{self.warning_seconds}",
            "output": output,
        }
        options = [f"--{key}={_quoted(value)}" for key, value in given.items() if value is not None]
        for option in self.more:
            if not option.startswith("-") or "\n" in option:
                raise ConfigError(f"--sbatch: expected an option of sbatch such as --qos=high, got {option!r}")
        return [*options, "--requeue", "--open-mode=append", *self.more]


def job_script(
    request: Request, name: str, run: Path, config: Path, overrides: Sequence[str], image: str = "", cache: str = ""
) -> str:
    """The text of a script for sbatch that trains ``config`` in the run folder ``run``.

    Raises:
        ConfigError: a value cannot be written into it.
    """
    words = [str(config), *overrides]
    settings = {"PYTHON": "python3" if image else sys.executable, "IMAGE": image, "CACHE": cache}
    lines = [f"{key}={shlex.quote(value)}" for key, value in settings.items() if value]
    lines.append(f'set -- {shlex.join(words)} "$@"')
    if any("\n" in line for line in lines):
        raise ConfigError("a config's name or an override holds a line break, which a job script cannot")
    options = request.options(name, str(run / "slurm-%j.out"))
    header = "".join(f"#SBATCH {option}\n" for option in options)
    about = (
        f"#\n# Written by `partialfc launch slurm`: trains {config} in {run}.\n"
        "# Submit it again with sbatch to go on; docs/slurm.md tells the rest.\n"
    )
    text = script("train.sbatch").read_text(encoding="utf-8")
    assert _SETTINGS in text
    text = _REQUEST.sub(lambda _: header, text, count=1)
    text = _USAGE.sub(lambda _: about, text, count=1)
    return text.replace(
        _SETTINGS, "\n# What to run; arguments given to sbatch after the script are added.\n" + "\n".join(lines) + "\n"
    )


def submit(path: Path) -> str:
    """Give a job script to Slurm; returns the job's number.

    Raises:
        MissingDependency: there is no sbatch here.
        SubmissionFailed: Slurm does not take it.
    """
    if shutil.which("sbatch") is None:
        raise MissingDependency(f"sbatch is not installed here: take {path} to a login node, or use --dry-run")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SBATCH_")}
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SubmissionFailed(f"sbatch does not take {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _quoted(value: object) -> str:
    """A value on an #SBATCH line, in quotes if it needs them."""
    text = str(value)
    if "\n" in text or '"' in text:
        raise ConfigError(f"expected a value without quotes and line breaks, got {text!r}")
    return text if re.fullmatch(r"[\w@%+:,./=*\[\]-]+", text) else f'"{text}"'
