"""The locks that set-up installs from: every package pinned, with digests, and the same versions as constraints.txt."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")  # the user's choice, and what a build of it brings


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pins(text: str) -> dict[str, str]:
    """The versions by package of a requirements file."""
    return {name_of(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
LOCKS = {name: (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "dev")}


def test_what_is_installed_here_is_pinned() -> None:
    installed = {name_of(found.name) for found in distributions()} - {"partialfc", "pip"}
    if {"ruff", "deepspeed"} - installed:
        pytest.skip("not what `make test` sets up")
    chosen = {name for name in installed if OF_TORCH.match(name)}
    assert installed - chosen <= set(CONSTRAINTS)


def test_a_lock_has_the_pinned_versions() -> None:
    train, dev = (pins(LOCKS[name]) for name in ("train", "dev"))
    assert {name: version for name, version in CONSTRAINTS.items() if name != "torch"} == dev
    assert train.items() < dev.items()
    assert {"pydantic", "typer", "setuptools", "numpy", "sympy"} <= set(train), (
        "what the trainer, set-up and torch need"
    )


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_digests(name: str) -> None:
    for package in re.split(r"\n(?=\w)", LOCKS[name].partition("\n")[2]):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package
    assert "://" not in LOCKS[name], "an index is the choice of whoever installs"


def test_set_up_checks_the_digests(tmp_path: Path) -> None:
    """With a pip that only writes down what it is asked for."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for tool in ("pip", "python"):
        (venv / "bin" / tool).write_text(f'#!/bin/sh\n[ {tool} = python ] && exit 1\necho "$@" >>{tmp_path}/asked\n')
        (venv / "bin" / tool).chmod(0o755)
    words = [str(ROOT / "launch" / "install.sh"), "python3", str(venv), "torch==2.13.0", "train", "--find-links w"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    locked, torch, package = (tmp_path / "asked").read_text().splitlines()[-3:]
    assert {"--require-hashes", "--no-deps", "--find-links", "locks/train.txt"} <= set(locked.split())
    assert torch.endswith("--find-links w torch==2.13.0")
    assert {"--no-deps", "--no-build-isolation", "-e"} <= set(package.split())
