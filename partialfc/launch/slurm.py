"""Slurm job scripts: ``train.sbatch`` with the request and the run filled in, to be read and kept."""

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
_GPUS = re.compile(r"([A-Za-z][\w.-]*:)?[1-9]\d*(,[A-Za-z][\w.-]*:[1-9]\d*)*")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
# The options of sbatch that a job script sets, with the letter that some have, and what to use instead.
_OWN_OPTIONS = {
    "job-name": ("J", "run.dir names the job"),
    "nodes": ("N", "use --nodes"),
    "ntasks-per-node": ("", "one task runs on a node, and starts a rank per GPU"),
    "cpus-per-task": ("c", "use --cpus-per-task"),
    "gpus-per-node": ("", "use --gpus-per-node"),
    "mem": ("", "use --mem"),
    "time": ("t", "use --time"),
    "partition": ("p", "use --partition"),
    "account": ("A", "use --account"),
    "signal": ("", "use --warning-seconds; the script waits for USR1"),
    "chdir": ("D", "the job works in the folder from which it is submitted"),
    "output": ("o", "the job's output goes to the run folder"),
    "requeue": ("", "the job is requeued until the training has ended"),
    "no-requeue": ("", "the job is requeued until the training has ended"),
    "open-mode": ("", "the output of all starts is kept"),
}
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})|UNLIMITED|INFINITE", re.IGNORECASE)


class SubmissionFailed(PartialFCError):
    """Slurm refused a job."""


@dataclass(frozen=True)
class Request:
    """Resources that a job requests; None leaves the choice to Slurm."""

    nodes: int
    time: str  # as sbatch takes it, e.g. 24:00:00 or 2-00:00:00
    partition: str | None = None
    account: str | None = None
    gpus_per_node: str | None = None  # a number, or kind:number
    cpus_per_task: int | None = None  # one task runs on a node
    mem: str | None = None  # per node
    warning_seconds: int = 300  # before the limit
    more: tuple[str, ...] = ()  # further options of sbatch, e.g. --qos=high

    def options(self, name: str, output: str, folder: str) -> list[str]:
        """Return the options for sbatch; the job runs in ``folder``.

        Raises:
            ConfigError: sbatch would reject or misread a value.
        """
        limit = seconds_of(self.time)
        if limit is not None and self.warning_seconds >= limit:
            raise ConfigError(
                f"--time: a start of {limit:g} s would be warned before it begins, {self.warning_seconds} s before the "
                "limit; raise --time, or lower --warning-seconds"
            )
        _require(_GPUS, "gpus-per-node", self.gpus_per_node, "a number of GPUs, or kind:number")
        _require(_MEMORY, "mem", self.mem, "memory such as 400G")
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
            "chdir": folder,
            "output": output,
        }
        options = [f"--{key}={_quoted(key, value)}" for key, value in given.items() if value is not None]
        return [*options, "--requeue", "--open-mode=append", *map(_extra_option, self.more)]


def seconds_of(time: str) -> float | None:
    """Convert sbatch's notation of a time limit to seconds; None for no limit.

    Raises:
        ConfigError: sbatch would reject it.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"--time: expected minutes, hours:minutes:seconds, days-hours or UNLIMITED, got {time!r}")
    if found["parts"] is None:
        return None
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    total = ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return total or None  # sbatch takes 0 for no limit


def job_script(
    request: Request,
    name: str,
    run: Path,
    config: Path,
    words: Sequence[str],
    image: str = "",
    cache: str = "",
    output: Path | None = None,
) -> str:
    """Return a script for sbatch that trains ``config`` in the run folder ``run``.

    The job runs in the working directory of this process, wherever the script is submitted from.

    Args:
        words: overrides, and ``--force``.
        output: folder for the job's output; default: the run folder. It must exist, or the job fails silently.

    Raises:
        ConfigError: a value cannot be written into a job script.
    """
    if re.search(r'["\n]', str(run)):
        raise ConfigError(f"run.dir: a job script cannot name {str(run)!r}: it holds a quote or a line break")
    here = Path.cwd()
    settings = {"PYTHON": "python3" if image else sys.executable, "IMAGE": image, "CACHE": cache}
    lines = [f"{key}={shlex.quote(value)}" for key, value in settings.items() if value]
    lines.append(f'set -- {shlex.join([str(config), *words])} "$@"')
    if any("\n" in line for line in lines):
        raise ConfigError("a job script cannot hold the line break in the name of the config or in an override")
    file = str(here / (output or run)).replace("%", "%%") + "/slurm-%j.out"  # sbatch expands %
    options = request.options(name, file, str(here))
    header = "".join(f"#SBATCH {option}\n" for option in options)
    about = (
        f"#\n# Written by `partialfc launch slurm`: trains {config} in {run}.\n"
        "# Submit it again with sbatch to resume; see docs/slurm.md.\n"
    )
    text = script("train.sbatch").read_text(encoding="utf-8")
    assert _SETTINGS in text
    text = _REQUEST.sub(lambda _: header, text, count=1)
    text = _USAGE.sub(lambda _: about, text, count=1)
    return text.replace(
        _SETTINGS, "\n# What to run; arguments given to sbatch after the script are added.\n" + "\n".join(lines) + "\n"
    )


def submit(path: Path) -> str:
    """Submit a job script to Slurm and return the job's number.

    Raises:
        MissingDependency: sbatch is not installed.
        SubmissionFailed: Slurm refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise MissingDependency(f"sbatch is not installed here: take {path} to a login node, or use --dry-run")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SBATCH_")}
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SubmissionFailed(f"sbatch refuses {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _require(pattern: re.Pattern[str], option: str, value: str | None, expected: str) -> None:
    """Refuse a value that sbatch would only refuse once it is submitted."""
    if value is not None and not pattern.fullmatch(value):
        raise ConfigError(f"--{option}: expected {expected}, got {value!r}")


def _extra_option(option: str) -> str:
    """Format an option for an #SBATCH line. Of one that is there twice, Slurm takes the last without a word."""
    if not option.startswith("-") or "\n" in option:
        raise ConfigError(f"--sbatch: expected an option of sbatch such as --qos=high, got {option!r}")
    given = re.split(r"[=\s]", option, maxsplit=1)[0]
    for own, (letter, advice) in _OWN_OPTIONS.items():
        is_own = f"--{own}".startswith(given) and given != "--gpus"  # sbatch takes abbreviations
        if is_own or (letter and given.startswith(f"-{letter}")):
            raise ConfigError(f"--sbatch={option}: the job script sets --{own} itself; {advice}")
    name, _, value = option.partition("=")
    if not name.startswith("--") or not value or re.fullmatch(r"""(["']).*\1""", value):
        return option
    return f"{name}={_quoted(name[2:], value)}"


def _quoted(option: str, value: object) -> str:
    """Quote a value for an #SBATCH line."""
    text = str(value)
    if "\n" in text or '"' in text:
        raise ConfigError(f"--{option}: expected a value without quotes and line breaks, got {text!r}")
    return text if re.fullmatch(r"[\w@%+:,./=*\[\]-]+", text) else f'"{text}"'
