"""The command line: help, version and wrong usage, without the packages that commands need to do their work."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.main import get_command

import partialfc
from partialfc import losses
from partialfc.cli.main import app
from partialfc.config import parse_config
from partialfc.config.schema import SpikeConfig
from tests.harness.running import run

HEAVY = {"torch", "pydantic", "numpy", "yaml", "matplotlib", "wandb", "rich"}
PRINT_HELP = """
import json, sys
from partialfc.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert not end.code, words
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def verbs(command: object, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of a command and of all commands below it."""
    below = getattr(command, "commands", {})
    return [words, *(found for name, child in below.items() for found in verbs(child, (*words, name)))]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)


def imported_by_help(commands: list[tuple[str, ...]]) -> set[str]:
    """Return the top-level packages that are loaded once the help of these commands is printed."""
    done = python("-c", PRINT_HELP, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_no_heavy_package() -> None:
    assert not HEAVY & imported_by_help([()])
    every = verbs(get_command(app))
    assert {("train",), ("launch", "torchrun"), ("runs", "sync")} <= set(every)
    every.remove(("launch", "torchrun"))  # passes --help on to the launcher
    assert not HEAVY & imported_by_help(every)


def test_config_lists_every_key_with_its_line_of_documentation() -> None:
    done = python("-m", "partialfc", "config", "--keys")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    config = parse_config({"data": {"train": "x"}, "head": {"sample_rate_schedule": {}, "center_loss": {}}})
    config.optim.spike = SpikeConfig()
    assert set(keys_of(config)) <= set(lines)
    assert lines["optim.lr"].split(maxsplit=1) == ["0.1", "peak learning rate"]
    assert lines["head.center_loss"].startswith("null ")
    assert lines["engine.name"].endswith("torch alone, or DeepSpeed (ddp, deepspeed)")
    for name, kind in losses.BY_NAME.items():
        for option in inspect.signature(kind).parameters:
            assert any(re.match(rf"head\.loss\.{option} .* {name}: \S", line) for line in done.stdout.splitlines())
    for wrong in ((), ("c.yaml", "--keys")):
        done = python("-m", "partialfc", "config", *wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: config ")


def keys_of(section: BaseModel, prefix: str = "") -> list[str]:
    """Return the dotted keys of all values of a config."""
    found = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        found += keys_of(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("module", ["partialfc.launch.torchrun", "partialfc.tracking.wandb.client"])
def test_a_process_beside_the_training_imports_no_torch(module: str) -> None:
    done = python("-c", f"import sys, {module}; print('torch' in sys.modules or 'pydantic' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_version() -> None:
    done = python("-m", "partialfc", "--version")
    assert (done.returncode, done.stdout) == (0, f"partialfc {partialfc.__version__}\n")


def test_help_of_launch_torchrun_is_that_of_the_script() -> None:
    done = python("-m", "partialfc", "launch", "torchrun", "--help")
    assert done.returncode == 0, done.stderr
    assert "launch/torchrun.sh CONFIG" in done.stdout
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    of_script = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, env=environment)
    assert of_script.stdout == done.stdout


@pytest.mark.parametrize("words", [["nonsense"], ["train"], ["train", "c.yaml", "--nonsense"], ["runs", "list"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app(words)
    assert end.value.code == 2
    assert "Usage:" in capsys.readouterr().err


def test_a_missing_package_of_the_trainer_is_one_line() -> None:
    program = (
        "import sys; sys.modules['pydantic'] = None; sys.argv = ['partialfc', 'config', 'c.yaml']\n"
        "from partialfc.__main__ import main; main()"
    )
    done = python("-c", program)
    assert done.returncode == 1
    assert done.stderr == "error: pydantic is not installed: pip install 'partialfc[train]'\n"


def test_public_names_are_imported_at_their_first_use() -> None:
    program = (
        "import sys, partialfc; assert 'torch' not in sys.modules\n"
        "assert set(partialfc.__all__) <= set(dir(partialfc)); assert 'torch' not in sys.modules\n"
        "from partialfc import PartialFC; assert 'torch' in sys.modules\n"
        "assert partialfc.PartialFC is PartialFC and partialfc.head.PartialFC is PartialFC\n"
        "from partialfc import *; assert losses.ArcFace and RowSGD and ConfigError and StepRate"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'partialfc' has no attribute 'nonsense'"):
        _ = partialfc.nonsense


@pytest.mark.parametrize("name", ["PartialFC", "RowSGD", "ClassPartition", "ConfigError"])
def test_public_classes_can_be_pickled(name: str) -> None:
    found = getattr(partialfc, name)
    assert pickle.loads(pickle.dumps(found)) is found


def test_ranks_is_an_option_of_dry_runs_only(short_task: Path) -> None:
    done = run(short_task, 0, "--ranks", "2")
    assert done.returncode == 2
    assert "--ranks belongs to --dry-run" in done.stderr
