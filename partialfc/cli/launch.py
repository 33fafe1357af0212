"""``partialfc launch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import ConfigFile, Force, Overrides, group
from partialfc.tracking.console import log

app = group("Start runs on many hosts, or as Slurm jobs.")


@app.command("slurm")
def slurm_command(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")],
    time: Annotated[str, typer.Option(help="time limit of one start, e.g. 24:00:00; the job is requeued after it")],
    overrides: Overrides = None,
    partition: Annotated[str | None, typer.Option(help="partition of the cluster")] = None,
    account: Annotated[str | None, typer.Option(help="account to charge")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="GPUs, as number or kind:number; one rank each")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="cores per node (one task runs on a node)")] = None,
    mem: Annotated[str | None, typer.Option(help="memory per node, e.g. 400G")] = None,
    warning_seconds: Annotated[
        int, typer.Option(min=10, max=65535, help="seconds before the limit at which a checkpoint is requested")
    ] = 300,
    image: Annotated[str, typer.Option(help="container: a .sif file (Apptainer), or any image that Pyxis takes")] = "",
    cache: Annotated[str, typer.Option(help="folder on the nodes' own disks to copy the training set to")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="further option for sbatch, e.g. --sbatch=--qos=high")
    ] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the job script; submit nothing")] = False,
) -> None:
    """Write a job script that trains CONFIG, and submit it."""
    from partialfc.config import load_config
    from partialfc.errors import ConfigError
    from partialfc.files import write_atomically
    from partialfc.launch.slurm import Request, job_script, seconds_of, submit

    run = load_config(config, overrides or []).run.dir
    request = Request(
        nodes, time, partition, account, gpus_per_node, cpus_per_task, mem, warning_seconds, tuple(sbatch or ())
    )
    words = [*(overrides or []), *(["--force"] if force else [])]
    # --dry-run creates no run folder, so the printed script sends the job's output elsewhere.
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
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(f"run.dir: {path} cannot be written: {error}") from error
    log(f"job {submit(path)}: {path}, output in {run}")


@app.command(
    "torchrun",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def torchrun_command(context: typer.Context) -> None:
    """Train under torchrun, with the arguments, settings and exit codes of launch/torchrun.sh."""
    from partialfc.launch.torchrun import main

    sys.exit(main(context.args))


@app.command("script")
def script_command(name: Annotated[str, typer.Argument(help="e.g. train.sbatch")]) -> None:
    """Print the path of one of the launch scripts."""
    from partialfc.launch.scripts import script

    print(script(name))
