"""Train every loss on the glyph data at the same budget, and measure it on unseen characters and typefaces.

    make quickstart                          # once: makes data/glyphs
    python benchmarks/losses_on_glyphs.py --out docs/benchmarks/losses-on-glyphs.json
    python benchmarks/losses_on_glyphs.py --only arcface,circle --epochs 5

Each run is `torchrun … -m partialfc train` with the same config except `head.loss`; seeds, batches, negatives and
budget are the same. Results are added to the file after every run, so that an interrupted comparison resumes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

#: The losses compared. Scales and margins suit 2,000 classes and a network trained from scratch for a few epochs: the
#: published ones (s = 64, m = 0.5) are for millions of images and many epochs.
LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax"},
    "softmax, label smoothing": {"name": "label_smoothing", "loss": {"name": "softmax"}},
    "normface": {"name": "normface", "scale": 16},
    "sphereface": {"name": "sphereface", "scale": 16, "margin": 1.35},
    "a-softmax": {"name": "a_softmax", "scale": 16},
    "cosface": {"name": "cosface", "scale": 16, "margin": 0.2},
    "arcface": {"name": "arcface", "scale": 16, "margin": 0.2},
    "combined": {"name": "combined", "scale": 16, "m1": 1.0, "m2": 0.1, "m3": 0.1},
    "sub-center arcface": {"name": "subcenter_arcface", "scale": 16, "margin": 0.2, "sub_centers": 3},
    "curricularface": {"name": "curricularface", "scale": 16, "margin": 0.2},
    "mv-am-softmax": {"name": "mv_am_softmax", "scale": 16, "margin": 0.2},
    "magface": {"name": "magface", "scale": 16, "margin_low": 0.1, "margin_high": 0.3, "norm_low": 1, "norm_high": 51},
    "adaface": {"name": "adaface", "scale": 16, "margin": 0.2},
    "elasticface-arc": {"name": "elastic_arcface", "scale": 16, "margin": 0.2},
    "elasticface-arc+": {"name": "elastic_arcface", "scale": 16, "margin": 0.2, "std": 0.0175, "plus": True},
    "elasticface-cos": {"name": "elastic_cosface", "scale": 16, "margin": 0.2},
    "circle": {"name": "circle", "scale": 32, "margin": 0.25},
    "uce": {"name": "uce", "scale": 16, "margin": 0.2},
    "focal arcface": {"name": "focal", "loss": {"name": "arcface", "scale": 16, "margin": 0.2}},
    "arcface + center loss": {"name": "arcface", "scale": 16, "margin": 0.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--out", type=Path, default=Path("losses-on-glyphs.json"))
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("data/glyphs"))
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(LOSSES)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results["machine"] = f"{platform.machine()}, {arguments.ranks} ranks, torch {torch.__version__}"
    results["epochs"] = arguments.epochs
    runs = results.setdefault("runs", {})
    for number, name in enumerate(chosen):
        if name in runs and not arguments.only:
            continue
        print(f"[{number + 1}/{len(chosen)}] {name}", flush=True)
        runs[name] = {"loss": LOSSES[name], "epochs": arguments.epochs, "seed": arguments.seed, **run(arguments, name)}
        print(f"    {summary(runs[name])}", flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(runs))


def run(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train with one loss; return the measurements of the run."""
    tree = yaml.safe_load(arguments.config.read_text())
    tree["run"]["seed"] = arguments.seed
    tree["data"]["train"] = str(arguments.data)
    tree["head"]["loss"] = LOSSES[name]
    tree["head"]["center_loss"] = {"weight": 0.001, "alpha": 0.5} if "center loss" in name else None
    tree["optim"]["epochs"] = arguments.epochs
    tree["evaluation"]["sets"] = [str(arguments.data / part) for part in ("verification", "closed_set")]
    with tempfile.TemporaryDirectory() as folder:
        tree["run"]["dir"] = f"{folder}/run"
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        started = time.monotonic()
        done = subprocess.run(
            [*command, str(arguments.ranks), "-m", "partialfc", "train", str(config)], capture_output=True, text=True
        )
        seconds = time.monotonic() - started
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    if done.returncode:
        return {"failed": lines[-1].get("reason") or done.stderr[-500:]}
    train = [line for line in lines if line["kind"] == "train"]
    evaluation = next(line["results"] for line in reversed(lines) if line["kind"] == "evaluation")
    return {
        "evaluation": evaluation,
        "loss_curve": [round(line["loss"], 4) for line in train],
        "target_cosine": train[-1]["target_cosine"],
        "seconds": seconds,
    }


def summary(result: dict[str, Any]) -> str:
    """Return one line on a run."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    return "  ".join(f"{name}: {measured(result, name):.4f}" for name in result["evaluation"])


def table(runs: dict[str, Any]) -> str:
    """Return the results in Markdown, best on unseen characters first."""
    done = {name: result for name, result in runs.items() if "failed" not in result}
    sets = list(next(iter(done.values()))["evaluation"]) if done else []
    columns = [*sets, "same character", "different characters", "cos θ_y"]
    rows = ["| loss | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, result in sorted(done.items(), key=lambda item: -measured(item[1], sets[0])):
        found = result["evaluation"][sets[0]]
        cells = [f"{measured(result, kind):.4f}" for kind in sets]
        cells += [
            f"{found[f'{kind}_cosine']:.3f} ± {found[f'{kind}_deviation']:.3f}" for kind in ("genuine", "impostor")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} | {result['target_cosine']:.3f} |")
    rows += [f"| {name} | failed: {result['failed']} |" for name, result in runs.items() if "failed" in result]
    return "\n".join(rows)


def measured(result: dict[str, Any], name: str) -> float:
    """Return TAR at FAR 1e-3, or the accuracy."""
    found = result["evaluation"][name]
    return found["tar_at_far"]["0.001"] if "tar_at_far" in found else found["accuracy"]


if __name__ == "__main__":
    main()
