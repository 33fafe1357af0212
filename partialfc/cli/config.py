"""``partialfc config``."""

from __future__ import annotations

from typing import Annotated

import typer

from partialfc.cli.arguments import ConfigFile, Overrides


def config_command(
    config: ConfigFile,
    overrides: Overrides = None,
    get: Annotated[str, typer.Option(help="print the value of one key only, e.g. run.dir")] = "",
) -> None:
    """Check a config and print it with every key spelled out."""
    from partialfc.config import load_config, to_yaml, value_of

    resolved = load_config(config, overrides or [])
    print(value_of(resolved, get) if get else to_yaml(resolved), end="\n" if get else "")
