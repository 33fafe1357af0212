"""The commands ``partialfc launch …``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from partialfc.tracking.console import log

launch = typer.Typer(help="Start runs on many hosts, or as jobs of Slurm.", no_args_is_help=True)
_AS_THEY_ARE = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@launch.command("slurm")
def slurm_command(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    nodes: Annotated[int, typer.Option(min=1, help="how many")],
    time: Annotated[str, typer.Option(help="limit of one start, e.g. 24:00:00; the job goes on after it")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    partition: Annotated[str | None, typer.Option(help="of the cluster")] = None,
    account: Annotated[str | None, typer.Option(help="that is charged")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="a number or kind:number; one rank each")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="cores of a node; a task is a node")] = None,
    mem: Annotated[str | None, typer.Option(help="memory of a node, e.g. 400G")] = None,
    warning_seconds: Annotated[
        int, typer.Option(min=10, max=65535, help="before the limit, to write a checkpoint")
    ] = 300,
    image: Annotated[str, typer.Option(help="container: a .sif file (Apptainer), or what Pyxis takes")] = "",
    cache: Annotated[str, typer.Option(help="folder on the nodes' own disks to copy the training set to")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="further option for sbatch, e.g. --sbatch=--qos=high")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="go on with a run although its config has changed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the job script, and do nothing")] = False,
) -> None:
    """Write a job script that trains CONFIG, and submit it."""
    from partialfc.config import load_config
    from partialfc.errors import ConfigError
    from partialfc.launch.slurm import Request, job_script, seconds_of, submit

    run = load_config(config, overrides or []).run.dir
    request = Request(
        nodes, time, partition, account, gpus_per_node, cpus_per_task, mem, warning_seconds, tuple(sbatch or ())
    )
    words = [*(overrides or []), *(["--force"] if force else [])]
    # A script that is only printed does not know that there is a run folder for the job's output.
    text = job_script(request, run.name, run, config, words, image, cache, Path() if dry_run else None)
    limit = seconds_of(time)
    if limit and warning_seconds > limit / 2:
        print(
            f"WARNING: each start trains for {limit - warning_seconds:g} s of its {limit:g} s, until the warning; "
            "raise --time, or lower --warning-seconds",
            file=sys.stderr,
        )
    if dry_run:
        print(text, end="")
        return
    path = run / "job.sbatch"
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir: {path} cannot be written: {error}") from error
    log(f"job {submit(path)}: {path}, output in {run}")


@launch.command("torchrun", context_settings=_AS_THEY_ARE)
def torchrun_command(context: typer.Context) -> None:
    """Become launch/torchrun.sh, with its arguments, settings and exit codes."""
    from partialfc.launch.scripts import script

    os.environ.setdefault("PYTHON", sys.executable)
    os.execvp("bash", ["bash", str(script("torchrun.sh")), *context.args])


@launch.command("script")
def script_command(name: Annotated[str, typer.Argument(help="e.g. train.sbatch")]) -> None:
    """Print where one of the scripts lies."""
    from partialfc.launch.scripts import script

    print(script(name))
