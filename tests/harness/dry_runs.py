"""The table of a dry run, read back."""

from __future__ import annotations

import re


def in_bytes(text: str) -> float:
    number, unit = text.replace(",", "").split()
    return float(number) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def sizes_of(lines: list[str]) -> dict[str, float]:
    """The bytes of each line of a dry run's table, by ``where what``."""
    sizes, where = {}, ""
    for line in lines[1:]:
        match = re.match(r"(.*?)\s\s+([\d.,]+ (?:bytes|KiB|MiB|GiB))", line[12:] + "  ")
        if line.startswith("  ") and match:
            where = line[2:12].strip() or where
            sizes[f"{where} {match[1]}".strip()] = in_bytes(match[2])
    return sizes
