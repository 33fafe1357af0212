"""The summary printed when a run has finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partialfc.tracking.console import duration, printable
from partialfc.tracking.metrics import read_metrics


def summarize(run: Path) -> str:
    """Return a short table: loss, accuracy, TAR at FAR, speed, and the paths of the results."""
    lines = read_metrics(run / "metrics.jsonl")
    end: dict[str, Any] = next((line for line in reversed(lines) if line.get("event") == "finished"), {})
    evaluation: dict[str, Any] = next((line for line in reversed(lines) if line["kind"] == "evaluation"), {})
    train = [line for line in lines if line["kind"] == "train"]
    step, evaluated = (end or (train[-1] if train else {})).get("step"), evaluation.get("step")
    earlier = f"  (at step {evaluated:,})" if evaluated not in (None, step) else ""
    rows: list[tuple[str, str]] = []
    if train:
        rows.append(("loss", _describe_loss(train)))
    for name, found in evaluation.get("results", {}).items():
        label = name.replace("_", " ")
        if "accuracy" in found:
            of = f"{found['folds']} folds" if "folds" in found else f"{found['samples']:,} samples"
            rows.append((f"{label}: accuracy", f"{found['accuracy']:.4f}  ({of}){earlier}"))
        if found.get("tar_at_far") == {}:
            rows.append((f"{label}: no TAR", f"{found.get('impostor_pairs')} impostor pairs are too few"))
        for far, tar in found.get("tar_at_far", {}).items():
            if float(far) <= 1e-3:
                rows.append((f"{label}: TAR at FAR {far}", f"{tar:.4f}{earlier}"))
    if end:
        rows.append(("training", f"{end['samples_per_s']:,.0f} images/s, {duration(end['training_seconds'])}"))
    roc = run / "evaluation" / f"roc-step-{evaluated or 0:08d}.png"  # not of other sets
    if roc.exists():
        rows.append(("ROC", f"{roc}{earlier}"))
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if checkpoints:
        rows.append(("checkpoint", str(checkpoints[-1])))
    rows.append(("run folder", f"{run}  (config.yaml, metrics.jsonl, state.json)"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(printable(f"  {name:<{width}}  {value}") for name, value in rows)


def _describe_loss(train: list[dict[str, Any]]) -> str:
    """Return the newest loss: a line has none if all of its steps were skipped."""
    applied = next((line for line in reversed(train) if line["loss"] is not None), None)
    if applied is None:
        return "none  (all steps were skipped)"
    loss, cosine = applied["loss"], applied["target_cosine"]
    if applied is train[-1]:
        return f"{loss:.4f}  (mean over the last steps, target cosine {cosine:.3f})"
    step = applied["step"]
    return f"{loss:.4f}  (mean up to step {step:,}, target cosine {cosine:.3f}; all later steps were skipped)"
