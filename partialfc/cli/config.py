"""``partialfc config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import Overrides
from partialfc.errors import ConfigError


def config_command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml")
    ] = None,
    overrides: Overrides = None,
    get: Annotated[str, typer.Option(help="print the value of one key only, e.g. run.dir")] = "",
    keys: Annotated[bool, typer.Option("--keys", help="list all keys, their defaults and what they do")] = False,
) -> None:
    """Check a config and print it with every key spelled out, or list the keys that there are."""
    if not keys and config is None:
        raise ConfigError("config needs a CONFIG, or --keys")
    from partialfc.config import Config, describe_keys, load_config, loss_keys, to_yaml, value_of

    if keys:
        if config or get:
            raise ConfigError("config --keys lists all keys; it takes no CONFIG and no --get")
        print("\n".join(describe_keys(Config, {"head.loss.name": loss_keys()})))
        return
    assert config is not None
    resolved = load_config(config, overrides or [])
    print(value_of(resolved, get) if get else to_yaml(resolved), end="\n" if get else "")
