"""Figures of an evaluation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from partialfc.evaluate.verification import Scores
from partialfc.files import write_atomically


def draw_roc(curves: dict[str, Scores], path: Path, title: str) -> None:
    """Write the ROC of several protocols as a PNG: TAR over FAR, FAR logarithmic. Texts may hold any characters."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    lowest = 0.1  # the axis spans a decade, or more
    for name, scores in curves.items():
        far, tar = scores.roc()
        shown = far > 0  # on a logarithmic axis
        if not shown.any():
            continue
        lowest = min(lowest, float(far[shown][0]))
        tar_at, _ = scores.tar_at_far(1e-3)
        label = _as_text(name.replace("_", " ")) + ("" if np.isnan(tar_at) else f" (TAR {tar_at:.4f} at FAR 1e-3)")
        axes.step(far[shown], tar[shown], where="post", linewidth=1.8, label=label)
    axes.set_xscale("log")
    axes.set_xlim(10 ** np.floor(np.log10(max(lowest, 1e-9))), 1)
    axes.set_ylim(0, 1.005)
    axes.set_xlabel("false accept rate (FAR)")
    axes.set_ylabel("true accept rate (TAR)")
    axes.set_title(_as_text(title), fontsize=10)
    axes.grid(True, which="major", alpha=0.35)
    if axes.lines:
        axes.legend(loc="lower right", fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def _as_text(name: str) -> str:
    """Return a name as matplotlib draws it: a dollar would begin a formula, and a lone surrogate has no glyph."""
    return name.encode(errors="replace").decode().replace("$", r"\$")
