"""The command lines of README and the pages: verbs and options that the command has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from partialfc.cli.main import app
from partialfc.cli.runs import FolderOrCommand

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])


def commands(page: Path) -> list[str]:
    """Return the lines of a page's blocks that call partialfc, joined where a backslash continues them."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    called = [re.search(r"(?:^|-m )partialfc ((?!\d).*)", line.removeprefix("$ ")) for line in lines]
    return [found[1] for found in called if found]


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def test_pages_show_commands() -> None:
    assert len(EVERY) >= 10


@pytest.mark.parametrize(("page", "line"), EVERY, ids=[f"{page.stem}: {line[:60]}" for page, line in EVERY])
def test_a_command_of_a_page_has_the_right_verb_and_options(page: Path, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...", "&")]
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        if words[0] not in command.commands:
            assert isinstance(command, FolderOrCommand), f"no verb {words[0]}"
            words = ["list", *words]  # as the group itself completes them
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)
