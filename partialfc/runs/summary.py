"""The summary printed when a run has finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partialfc.tracking.console import duration
from partialfc.tracking.metrics import read_metrics


def summarize(run: Path) -> str:
    """Return a short table: loss, accuracy, TAR at FAR, speed, and the paths of the results."""
    lines = read_metrics(run / "metrics.jsonl")
    train: dict[str, Any] = next((line for line in reversed(lines) if line["kind"] == "train"), {})
    end: dict[str, Any] = next((line for line in reversed(lines) if line.get("event") == "finished"), {})
    evaluation: dict[str, Any] = next((line for line in reversed(lines) if line["kind"] == "evaluation"), {})
    rows: list[tuple[str, str]] = []
    if train:
        rows.append(
            ("loss", f"{train['loss']:.4f}  (mean over the last steps, target cosine {train['target_cosine']:.3f})")
        )
    for name, found in evaluation.get("results", {}).items():
        label = name.replace("_", " ")
        if "accuracy" in found:
            rows.append((f"{label}: accuracy", f"{found['accuracy']:.4f}  ({found['samples']:,} samples)"))
        if found.get("tar_at_far") == {}:
            rows.append((f"{label}: no TAR", f"{found.get('impostor_pairs')} impostor pairs are too few"))
        for far, tar in found.get("tar_at_far", {}).items():
            if float(far) <= 1e-3:
                rows.append((f"{label}: TAR at FAR {far}", f"{tar:.4f}"))
    if end:
        rows.append(("training", f"{end['samples_per_s']:,.0f} images/s, {duration(end['training_seconds'])}"))
    roc = sorted((run / "evaluation").glob("roc-*.png"))
    if roc:
        rows.append(("ROC", str(roc[-1])))
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if checkpoints:
        rows.append(("checkpoint", str(checkpoints[-1])))
    rows.append(("run folder", f"{run}  (config.yaml, metrics.jsonl, state.json)"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
