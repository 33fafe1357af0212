"""Arguments that several commands share, and the way their help is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="config keys to override, e.g. optim.lr=0.2")
]
# With too many, all memory would go into processes before the first of them works.
Workers = Annotated[int | None, typer.Option(min=1, max=1024, help="number of processes; default: all cores")]
Force = Annotated[bool, typer.Option("--force", help="resume a run despite a changed config")]


class Group(TyperGroup):
    """A group of commands whose help is printed at once."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return ``--help`` with False for "not given": to convert typer's None, recent releases import pydantic."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


def group(about: str, cls: type[Group] = Group) -> typer.Typer:
    """Return an empty group of commands."""
    # Without markup: rich takes longer to import than all the rest of a help page.
    return typer.Typer(
        help=about,
        cls=cls,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
