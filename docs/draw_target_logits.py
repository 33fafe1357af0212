"""Draw docs/images/target-logits.png: each target logit and its slope, by the angle to the own class.

    python docs/draw_target_logits.py

Every curve is the loss's own `target_logit` at scale 1; the slope beside it is what it pulls with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from partialfc import losses

matplotlib.use("Agg")
from matplotlib import pyplot

NORM, MEAN, STD = 30.0, 20.0, 10.0  # a sample of more than average length: AdaFace's ẑ is 0.33

#: name: (loss, line style). Losses that depend on an embedding's length are drawn for ‖x‖ = 30.
CURVES: dict[str, tuple[losses.Loss, str]] = {
    "NormFace": (losses.NormFace(1.0), "k--"),
    "CosFace 0.4": (losses.CosFace(1.0, 0.4), "C0"),
    "ArcFace 0.5, Sub-center, CurricularFace": (losses.ArcFace(1.0, 0.5), "C1"),
    "SphereFace 1.35": (losses.SphereFace(1.0, 1.35), "C2"),
    "A-Softmax 4, λ = 5": (losses.ASoftmax(1.0, 4, annealing_start=5.0), "C3"),
    "A-Softmax 4, bare": (losses.ASoftmax(1.0, 4, annealing_start=0.0, annealing_end=0.0), "C3:"),
    "MagFace, ‖x‖ = 30": (losses.MagFace(1.0), "C4"),
    "AdaFace 0.4, ẑ = 0.33": (losses.AdaFace(1.0, 0.4), "C5"),
    "AdaFace 0.4, ẑ = −1": (losses.AdaFace(1.0, 0.4), "C5:"),
    "Circle 0.25": (losses.Circle(1.0, 0.25), "C6"),
}


def main() -> None:
    """Write the figure."""
    degrees = torch.linspace(0.5, 179.5, 800, dtype=torch.float64)
    cosine = torch.cos(torch.deg2rad(degrees))
    ones = torch.ones_like(cosine)
    samples = losses.Samples(NORM * ones, ones.bool(), torch.arange(len(cosine)), 0, 0)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), dpi=130, layout="constrained")
    for name, (loss, style) in CURVES.items():
        state = torch.tensor([MEAN, STD], dtype=torch.float64)
        if name.endswith("−1"):
            state = torch.tensor([1e4, 1.0], dtype=torch.float64)
        variable = cosine.clone().requires_grad_()
        logit = loss.target_logit(variable, replace(samples, state=state))
        (slope,) = torch.autograd.grad(logit.sum(), variable)
        left.plot(degrees, logit.detach(), style, linewidth=1.6, label=name)
        right.plot(degrees, slope, style, linewidth=1.6)
    left.set(title="target logit / s", ylim=(-2.6, 1.05), ylabel="z_y / s")
    right.set(title="its slope: how hard the target pulls", ylim=(0, 4), ylabel="d(z_y / s) / d cos θ_y")
    for axes in (left, right):
        axes.set(xlabel="angle θ_y between embedding and class, degrees", xlim=(0, 180), xticks=range(0, 181, 30))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower left")
    figure.savefig(Path(__file__).parent / "images" / "target-logits.png")


if __name__ == "__main__":
    main()
