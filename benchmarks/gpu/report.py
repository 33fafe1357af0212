"""Writes the results: as JSON, and as a table for people."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import partialfc

Row = tuple[str, dict[str, Any]]


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and software of a measurement."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "partialfc": str(Path(partialfc.__file__).parent),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu memory GiB"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def write(folder: Path, results: dict[str, Any]) -> str:
    """Replace results.json and results.txt in ``folder``; returns the latter's text."""
    text = "\n".join(_lines(results)) + "\n"
    for name, content in {"results.json": json.dumps(results, indent=1, default=str), "results.txt": text}.items():
        unfinished = folder / f"{name}.part"
        unfinished.write_text(content)
        unfinished.replace(folder / name)
    return text


def _lines(results: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    for name, section in results["sections"].items():
        yield ""
        yield f"== {name} ({section.get('seconds', 0):.0f} s)"
        for reason in ("skipped", "failed"):
            if reason in section:
                yield f"{reason}: {section[reason]}"
        yield from _entries(section.get("entries", {}))
    yield ""
    yield "\n".join(["PROBLEMS", *results["problems"]]) if results["problems"] else "no problems"


def _entries(entries: dict[str, Any]) -> Iterator[str]:
    """Yield entries in order; neighbours with the same fields share a heading."""
    table: list[Row] = []
    for name, value in entries.items():
        is_row = isinstance(value, dict) and value and not any(isinstance(v, dict | list) for v in value.values())
        if table and (not is_row or set(value) != set(table[0][1])):
            yield from _table(table)
            table = []
        if is_row:
            table.append((name, value))
        else:
            yield from _nested(name, value)
    yield from _table(table)


def _nested(name: str, value: Any, indent: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        yield f"{indent}{name}"
        for key, inner in value.items():
            yield from _nested(key, inner, indent + "  ")
    elif isinstance(value, list):
        yield f"{indent}{name}:{'' if value else ' none'}"
        yield from (f"{indent}  {_show(item)}" for item in value)
    else:
        yield f"{indent}{name:44} {_show(value)}"


def _table(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    fields = list(rows[0][1])
    if len(fields) == 1:  # a reason, or a single number: the heading would say less than the line
        for name, value in rows:
            yield f"{name:44} {_show(value[fields[0]])} ({fields[0]})"
        return
    first = max(len(name) for name, _ in rows) + 1
    widths = {field: max(len(field), *(len(_show(row[field])) for _, row in rows)) + 2 for field in fields}
    yield " " * first + "".join(f"{field:>{widths[field]}}" for field in fields)
    for name, row in rows:
        yield f"{name:{first}}" + "".join(f"{_show(row[field]):>{widths[field]}}" for field in fields)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)
