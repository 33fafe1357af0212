"""The command ``partialfc``."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from partialfc.cli.launch import launch
from partialfc.errors import ConfigError, PartialFCError
from partialfc.tracking.console import console_progress, log

app = typer.Typer(
    help="Train classifiers with very many classes, the classifier sharded over ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class FolderOrCommand(TyperGroup):
    """Commands, the first of which may be left out: ``partialfc runs DIR`` is ``partialfc runs list DIR``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


data = typer.Typer(help="Make data sets.", no_args_is_help=True)
app.add_typer(data, name="data")
checkpoint = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")
imports = typer.Typer(help="Take in what other tools have written.", no_args_is_help=True)
app.add_typer(imports, name="import")
runs = typer.Typer(help="Look at runs: partialfc runs DIR.", no_args_is_help=True, cls=FolderOrCommand)
app.add_typer(runs, name="runs")
app.add_typer(launch, name="launch")


STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint written; start me again


class CenterDtype(StrEnum):
    float32 = "float32"
    float16 = "float16"


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. optim.lr=0.2")] = None,
    force: Annotated[bool, typer.Option("--force", help="go on with a run although its config has changed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compute nothing; print the memory by part")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="of --dry-run: over how many ranks (default 1)")] = None,
) -> None:
    """Train. Under torchrun the classifier is sharded over all ranks:

    torchrun --nproc-per-node 8 -m partialfc train CONFIG key=value …
    """
    from partialfc.config import load_config
    from partialfc.runtime.process import under_torchrun
    from partialfc.train.main import train

    if dry_run:
        from partialfc.planning.dry_run import dry_run as describe

        print("\n".join(describe(load_config(config, overrides or []), ranks or 1)))
        return
    if ranks is not None:
        raise ConfigError(
            "--ranks belongs to --dry-run; to train on several: torchrun --nproc-per-node N -m partialfc …"
        )
    outcome = train(load_config(config, overrides or []), force)
    # torchrun takes any other code for a failure, and starts the run again; state.json says how it has ended.
    _end(STOPPED if outcome == "preempted" and not under_torchrun() else 0)


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="run folder")],
    sets: Annotated[list[Path] | None, typer.Option("--set", help="folder; default: the sets of the config")] = None,
    model: Annotated[str | None, typer.Option(help="repeat the run's model.name where it is not one of ours")] = None,
) -> None:
    """Evaluate the newest checkpoint of a run, alone or under torchrun."""
    from partialfc.evaluate.saved_run import evaluate
    from partialfc.runtime.process import under_torchrun

    _end(STOPPED if evaluate(run, sets or [], model) is None and not under_torchrun() else 0)


@app.command("config")
def config_command(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    get: Annotated[str, typer.Option(help="print just this key's value, e.g. run.dir")] = "",
) -> None:
    """Check a config, and print it with every key spelled out."""
    from partialfc.config import load_config, to_yaml, value_of

    resolved = load_config(config, overrides or [])
    print(value_of(resolved, get) if get else to_yaml(resolved), end="\n" if get else "")


@checkpoint.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder, e.g. runs/run/checkpoints/step-00001000")],
    verify: Annotated[bool, typer.Option(help="read all files and compare their digests")] = True,
) -> None:
    """Print what a checkpoint holds, without loading it."""
    from partialfc.checkpoint.folders import describe

    for line in describe(folder, verify):
        print(line)


@checkpoint.command("merge")
def merge_command(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder, or a run folder for its newest")],
    out: Annotated[Path, typer.Argument(help="safetensors file to write")],
    only: Annotated[str, typer.Option(help="just the tensors whose names begin so, e.g. head.weight")] = "",
) -> None:
    """Write the tensors of a checkpoint, whole, into one safetensors file."""
    from partialfc.exchange.merge import merge

    size = merge(folder, out, only, console_progress)
    log(f"{out}: {size / 2**20:,.1f} MiB")


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="run folder, or one of its checkpoints")],
    out: Annotated[Path | None, typer.Option(help="folder to write; default: export in the run folder")] = None,
    centers: Annotated[bool, typer.Option("--centers", help="the class centres too, with their class table")] = False,
    center_dtype: Annotated[CenterDtype, typer.Option(help="of the class centres")] = CenterDtype.float32,
    onnx: Annotated[bool, typer.Option(help="write an ONNX file and check it against torch")] = True,
    model: Annotated[str | None, typer.Option(help="allow this my.module:factory or timm:NAME to be run")] = None,
) -> None:
    """Write the backbone as safetensors and ONNX, and on request the class centres."""
    from partialfc.config import load_config
    from partialfc.exchange.export import export
    from partialfc.tracking.wandb.run import catch_up

    done = export(run, out, centers, center_dtype.value, onnx, console_progress, model)
    checked = "" if done.onnx_difference is None else f"; ONNX as torch within {done.onnx_difference:.0e}"
    log(f"{done.folder}, from {done.checkpoint.name}: {', '.join(done.files)}{checked}")
    folder = done.checkpoint.parent.parent
    if (folder / "config.yaml").exists():
        catch_up(folder, load_config(folder / "config.yaml").tracking.wandb)


@runs.command("list")
def runs_list_command(
    folder: Annotated[Path, typer.Argument(help="a run folder, or one above run folders, e.g. runs")],
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again, until Ctrl-C")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 5.0,
) -> None:
    """Show how runs are doing: state, step, ETA, last metrics. `list` may be left out."""
    from partialfc.runs.listing import describe_runs, watch_runs

    if watch:
        watch_runs(folder, every)
    else:
        print(describe_runs(folder))


@runs.command("sync")
def runs_sync_command(
    folder: Annotated[Path, typer.Argument(help="a run folder")],
) -> None:
    """Send to W&B what a run has kept for later, because it was offline or its server did not answer."""
    from partialfc.tracking.wandb.sync import sync

    log(f"{folder}: " + ("sent what W&B did not have" if sync(folder) else "nothing to send"))


@imports.command("weights")
def import_weights_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run that shall start from the weights")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    backbone: Annotated[Path | None, typer.Option(help="backbone.pth, model.pt, checkpoint_gpu_0.pt, …")] = None,
    head: Annotated[Path | None, typer.Option(help="folder of checkpoint_gpu_*.pt or softmax_fc_gpu_*.pt")] = None,
) -> None:
    """Take InsightFace's weights, of any number of ranks, into the first checkpoint of a run."""
    from partialfc.config import load_config
    from partialfc.exchange.import_weights import import_weights

    import_weights(load_config(config, overrides or []), backbone, head)


@data.command("glyphs")
def glyphs_command(
    out: Annotated[Path, typer.Option(help="folder to write: training set, verification/, closed_set/")],
    classes: Annotated[int, typer.Option(min=1, help="training characters")] = 2000,
    size: Annotated[int, typer.Option(help="pixels: 32, 64 or 112")] = 32,
    fonts: Annotated[str, typer.Option(help="small (61 MB of fonts), core (about 350 MB) or all")] = "small",
    font_dir: Annotated[Path | None, typer.Option(help="look for font files here first")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="where font packages are kept")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace what is in --out")] = False,
) -> None:
    """Draw a large-class data set from the distribution's fonts: Han characters in many typeface designs."""
    from partialfc.data.glyphs.generate import make_glyphs

    report = make_glyphs(
        out,
        classes,
        size,
        fonts,
        cache_dir=cache_dir,
        font_dir=font_dir,
        workers=workers,
        progress=console_progress,
        overwrite=overwrite,
    )
    log(
        f"{out}: {report.num_samples:,} images of {report.num_classes:,} characters in "
        f"{len(report.training_designs)} designs" + (" (was there already)" if report.reused else "")
    )
    log(
        f"{report.verification}: {report.verification_samples:,} images of {report.held_out_characters:,} other "
        f"characters, also in the held-out {', '.join(report.held_out_designs)}; "
        f"{report.look_alikes} pairs look alike and are left out"
    )
    log(f"{report.closed_set}: {report.closed_set_samples:,} images of the training characters in held-out designs")


def main() -> None:
    """Run the command; exit codes: 0 finished, 1 failed (the last line says why), 2 wrong usage or config, 75 stopped
    on request with a checkpoint written.
    """
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _fail(error, 2)
    except PartialFCError as error:
        _fail(error, 1)


def _end(code: int) -> NoReturn:
    """End a process of a run whose work is written. Not by way of the interpreter's own end: native threads of the
    process group may abort there, and a launcher would start again what is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(error: Exception, code: int) -> NoReturn:
    sys.stdout.flush()
    with contextlib.suppress(OSError, KeyError):
        Path(os.environ["PARTIALFC_CODE_FILE"]).write_text(f"{code}\n{error}\n")  # torchrun passes none on
    prefix = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
    _end(code)  # a thread of a broken process group may never end, besides
