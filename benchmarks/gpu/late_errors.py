"""Check the call that reports a bad batch, and that the weight is unharmed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from partialfc import LabelOutOfRange, NonFiniteEmbeddings, PartialFC, RowSGD, losses

from .measure import Bench, Entries

CLASSES, DIM, BATCH = 1000, 64, 16
_EXPECTED = {"label out of range": LabelOutOfRange, "NaN embedding": NonFiniteEmbeddings}


def run(bench: Bench, entries: Entries) -> None:
    for fault, expected in _EXPECTED.items():
        for then in ("optimizer.step", "the next forward"):
            name = f"{fault}, then {then}"
            found = entries.measure(name, partial(try_out, bench, fault, then))
            if found is None:
                continue
            if found["raised"] != expected.__name__:
                entries.problems.append(f"{name}: expected {expected.__name__}, got {found['raised']}")
            if not (found["weight untouched"] and found["works again"]):
                entries.problems.append(f"{name}: the weight was changed, or the head does not work any more")


def try_out(bench: Bench, fault: str, then: str) -> dict[str, Any]:
    """Train one good step, then one with a fault; return the exception, the call that raises it, and the state left."""
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), sample_rate=0.5, device=bench.device)
    optimizer = RowSGD(head.parameters(), lr=1.0)
    head(*_batch(bench)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = head.weight.detach().clone()
    error, raised_by = "none", "no call"
    calls = []
    try:
        calls.append("forward")
        out = head(*_batch(bench, fault))
        calls.append("backward")
        out.loss.backward()
        if then == "optimizer.step":
            calls.append("optimizer.step")
            optimizer.step()
        calls.append("the next forward")
        head(*_batch(bench))
    except Exception as raised:
        error, raised_by = type(raised).__name__, calls[-1]
    untouched = torch.equal(before, head.weight.detach())
    optimizer.zero_grad()
    out = head(*_batch(bench))
    out.loss.backward()
    optimizer.step()
    works = bool(torch.isfinite(out.loss)) and not torch.equal(before, head.weight.detach())
    return {"raised": error, "by": raised_by, "weight untouched": untouched, "works again": works}


def _batch(bench: Bench, fault: str = "") -> tuple[Tensor, Tensor]:
    embeddings = bench.randn(BATCH, DIM)
    labels = torch.randint(0, CLASSES, (BATCH,), device=bench.device)
    if fault == "label out of range":
        labels[2] = CLASSES + 7
    elif fault == "NaN embedding":
        embeddings[2, 5] = torch.nan
    return embeddings.requires_grad_(), labels
