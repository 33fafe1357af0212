"""W&B's names for the values in a line of ``metrics.jsonl``.

Each line becomes one row of the run's history: ``train/loss``, ``evaluation/<set>/tar_at_far/1e-3``,
``event/<event>/<field>``. Names hold no dots and no nested values, so that a sweep can use any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_AXES = ("step", "epoch", "samples")
_HIGHER_IS_BETTER = ("accuracy", "tar_at_far/")


def row(line: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a line, without its step."""
    kind = line["kind"]
    values = {"_timestamp": line["time"]} if isinstance(line.get("time"), int | float) else {}
    if kind == "evaluation":
        return values | dict(_flat(line.get("results", {}), "evaluation/"))
    if kind == "event":
        fields = {key: value for key, value in line.items() if key not in ("kind", "time", "event")}
        return values | dict(_flat(fields, f"event/{line.get('event')}/"))
    axes = {key: line[key] for key in _AXES[1:] if key in line}
    fields = {key: value for key, value in line.items() if key not in ("kind", "time", *_AXES)}
    return values | axes | dict(_flat(fields, f"{kind}/"))


def best(values: dict[str, Any], so_far: dict[str, float]) -> dict[str, float]:
    """Return the best values of an evaluation's row and of those before, as ``best/<set>/accuracy``."""
    found = dict(so_far)
    for key, value in values.items():
        section, _, rest = key.partition("/")
        measure = rest.partition("/")[2]
        if section == "evaluation" and measure.startswith(_HIGHER_IS_BETTER):
            found[f"best/{rest}"] = max(value, found.get(f"best/{rest}", value))
    return found


def table(results: dict[str, dict[str, Any]], step: int) -> tuple[list[str | int], list[list[Any]]]:
    """Return an evaluation as a table: its columns, and a row for each set or protocol."""
    flat = {name: dict(_flat(found, "")) for name, found in results.items()}
    measures = list(dict.fromkeys(key for found in flat.values() for key in found))
    rows = [[step, name, *(found.get(key) for key in measures)] for name, found in flat.items()]
    return ["step", "set", *measures], rows


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{_plain(key)}/")
        elif value is not None:  # NaN in the file: nothing to draw
            yield f"{prefix}{_plain(key)}", value


def _plain(key: str) -> str:
    """Return ``0.001`` as ``1e-3``, and other names with ``_`` for dots, which W&B takes for a path."""
    try:
        mantissa, exponent = f"{float(key):e}".split("e")
    except ValueError:
        return key.replace(".", "_")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace(".", "_")
