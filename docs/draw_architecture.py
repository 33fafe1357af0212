"""Draw the two pictures of docs/architecture.md: the rooms of the package, and the life of a step.

    python docs/draw_architecture.py [FOLDER]      # default: docs/images

The rooms are read from the code: layers from the import contract in pyproject.toml, purposes from the packages'
docstrings, arrows from the imports.
"""

from __future__ import annotations

import ast
import sys
import textwrap
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "partialfc"
INK, PAPER, EDGE, QUIET = "#1b1f24", "#f3f6fa", "#8aa0b8", "#5b6775"
GROUPS = {"data": "#eef6ee", "backbone": "#f3f6fa", "head": "#fff4e2", "update": "#f6eef6"}

#: A sample's way through a step: (group, file, what happens there).
STEP = [
    ("data", "data/order.py", "global batch of step t, a function\nof (seed, epoch); this rank's slice"),
    ("data", "data/dataset.py", "offset in the tar → encoded bytes, label"),
    ("data", "data/loader.py", "decode, augment by (seed, epoch, sample)\n→ images [b, C, H, W], labels [b]"),
    ("backbone", "train/trainer.py", "train_step: micro-batches, phases, the decision"),
    ("backbone", "engines/ddp.py", "forward → embeddings [b, D]"),
    ("head", "head/message.py", "header + labels + embeddings as one message"),
    ("head", "head/collectives.py", "1  all-gather → [B, D], [B] on every rank"),
    (
        "head",
        "head/softmax/sampling.py",
        "active rows: classes of the batch\n+ negatives hashed from (seed, step, class)",
    ),
    ("head", "head/softmax/targets.py", "own classes' cosines in float64, margin applied"),
    ("head", "head/softmax/class_chunks.py", "logits of a chunk of rows;\nnever [B, all classes] at once"),
    ("head", "head/softmax/log_sum_exp.py", "Σ exp of the negatives of this shard"),
    ("head", "head/softmax/sharded_softmax.py", "2  all-reduce [B, k] float64\n→ loss, equal on all ranks"),
    (
        "head",
        "head/softmax/sharded_softmax.py",
        "backward: 3  reduce-scatter of ∂/∂embeddings,\nmeanwhile the active rows' gradient",
    ),
    ("update", "engines/ddp.py", "backbone's backward, averaged over ranks"),
    ("update", "train/step_check.py", "finite on all ranks? → step or skip, together"),
    ("update", "head/optim/sgd.py", "active rows and their momentum, nothing else"),
    ("update", "head/step_state.py", "counter, centers and loss state follow the step"),
]


def layers() -> list[list[str]]:
    """Return the rooms from the top floor down, as in the import contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (rooms,) = [contract for contract in contracts if contract["id"] == "rooms"]
    return [layer.replace(":", "|").replace(" ", "").split("|") for layer in rooms["layers"]]


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def purpose(room: str) -> str:
    """Return the first sentence of a room's docstring."""
    first = files_of(room)[0] if not (PACKAGE / room).is_dir() else PACKAGE / room / "__init__.py"
    text = ast.get_docstring(ast.parse(first.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".").replace("``", "")


def imports(room: str) -> list[str]:
    """Return the other packages that ``room`` imports, from the top floor down."""
    found = set()
    for file in files_of(room):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("partialfc"):
                parts = node.module.split(".")
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    known = [name for layer in layers() for name in layer if (PACKAGE / name).is_dir()]  # errors are everywhere
    return [name for name in known if name in found - {room}]


def _box(ax: Axes, x: float, y: float, width: float, height: float, fill: str) -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.08", fc=fill, ec=EDGE, lw=0.8))


def draw_rooms(path: Path) -> None:
    floors = layers()
    height = 1.3
    fig, ax = plt.subplots(figsize=(11, height * len(floors) * 0.86))
    for level, rooms in enumerate(floors):
        y = (len(floors) - 1 - level) * height
        width = 11.0 / len(rooms)
        for column, room in enumerate(rooms):
            x = column * width + 0.06
            _box(ax, x, y, width - 0.12, height - 0.16, GROUPS["head"] if room in ("head", "losses") else PAPER)
            name = f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"
            ax.text(x + 0.12, y + height - 0.25, name, weight="bold", size=10, va="top", color=INK)
            words = textwrap.fill(purpose(room), int((width - 0.3) * 14))
            ax.text(x + 0.12, y + height - 0.54, words, size=7.2, va="top", color=INK, linespacing=1.15)
            arrows = textwrap.fill("→ " + ", ".join(imports(room)), int((width - 0.3) * 16)) if imports(room) else ""
            ax.text(x + 0.12, y + 0.07, arrows, size=6.2, color=QUIET)
    _finish(fig, ax, 11.0, len(floors) * height, path)


def draw_step(path: Path) -> None:
    columns = [group for group in GROUPS if any(group == step[0] for step in STEP)]
    titles = {"data": "data", "backbone": "backbone, forward", "head": "head: forward and backward", "update": "update"}
    width, row = 3.5, 0.92
    tallest = max(sum(step[0] == group for step in STEP) for group in columns)
    fig, ax = plt.subplots(figsize=(13.2, tallest * row * 0.94 + 0.5))
    before: tuple[float, float] | None = None
    for column, group in enumerate(columns):
        steps = [step for step in STEP if step[0] == group]
        x = column * width
        ax.text(x + 0.1, tallest * row + 0.12, titles[group], size=10.5, weight="bold", color=INK)
        for number, (_, file, words) in enumerate(steps):
            y = (tallest - 1 - number) * row
            _box(ax, x, y, width - 0.42, row - 0.2, GROUPS[group])
            ax.text(x + 0.1, y + row - 0.29, file, size=7.6, weight="bold", va="top", color=INK)
            ax.text(x + 0.1, y + row - 0.5, words, size=6.6, va="top", color=INK, linespacing=1.15)
            top = (x + (width - 0.42) / 2, y + row - 0.2)
            if before is not None:
                if number == 0:
                    start, end, bend = before, (x, y + (row - 0.2) / 2), "arc3,rad=0"
                else:
                    start, end, bend = (top[0], y + row), top, "arc3"
                ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "connectionstyle": bend})
            before = (x + width - 0.42, y + (row - 0.2) / 2)
    _finish(fig, ax, len(columns) * width - 0.4, tallest * row + 0.4, path)


def _finish(fig: plt.Figure, ax: Axes, width: float, height: float, path: Path) -> None:
    ax.set_xlim(-0.05, width + 0.05)
    ax.set_ylim(-0.05, height + 0.05)
    ax.axis("off")
    fig.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    # Text stays text, so that it can be searched, and compared with the code; the same code gives the same bytes.
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "partialfc", "font.family": "DejaVu Sans"}
    draw_rooms(folder / "rooms.svg")
    draw_step(folder / "step.svg")


if __name__ == "__main__":
    main()
