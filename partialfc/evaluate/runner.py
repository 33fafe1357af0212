"""Evaluates a network on every evaluation set of a config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import LoaderSettings, evaluation_batches
from partialfc.errors import ConfigError, DataError
from partialfc.evaluate.embed import embed
from partialfc.evaluate.figures import draw_roc
from partialfc.evaluate.identification import nearest_classes
from partialfc.evaluate.verification import Scores, read_protocols, score_pairs
from partialfc.files import write_atomically
from partialfc.head import PartialFC
from partialfc.runtime.process import ProcessContext
from partialfc.tracking.console import console_progress, no_progress

FARS = (1e-2, 1e-3, 1e-4, 1e-5)


class Evaluation:
    """Evaluates a network on all sets of a config.

    A set with ``protocol.json`` is for verification. Any other is for identification, with labelled samples of the
    training classes: ``accuracy`` is the share of samples whose own class has the highest logit.

    Raises:
        DataError: a set is missing or incomplete, or its classes are not those of the training set.
        ConfigError: the results of two sets have the same name.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        self.config = config
        self.sets = [(folder, TarDataset(folder)) for folder in config.evaluation.sets]
        names: list[str] = []
        for folder, dataset in self.sets:
            protocols = read_protocols(folder)[0] if _is_verification(folder) else []
            names += [protocol.name for protocol in protocols] or [folder.name]
            if not protocols and dataset.num_classes != num_classes:
                raise DataError(
                    f"evaluation set {folder} has {dataset.num_classes} classes, but the training set {num_classes}; "
                    "a set without protocol.json must hold samples of the training classes"
                )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"evaluation.sets: two sets give results called {', '.join(twice)}; rename one of them")

    def run(self, backbone: nn.Module, head: PartialFC, process: ProcessContext, name: str) -> dict[str, Any] | None:
        """Return all results, e.g. ``{"unseen_font": {"tar_at_far": {"0.001": 0.9}, …}}``. A collective.

        Rank 0 also writes them, with a ROC figure, into the run folder's ``evaluation/`` under ``name``.

        Returns:
            The results by protocol or set, or None if a stop was requested meanwhile.
        """

        def interrupted() -> bool:  # on this rank; the others learn of it within a second or two
            process.report_progress()
            return process.stop.requested

        results: dict[str, Any] = {}
        curves: dict[str, Scores] = {}
        for folder, dataset in self.sets:
            embeddings = self._embed(backbone, dataset, process, interrupted)
            if process.agree_to_stop():
                return None
            labels = torch.from_numpy(dataset.labels).to(process.device)
            if not _is_verification(folder):
                correct = nearest_classes(head, embeddings) == labels
                results[folder.name] = {"accuracy": float(correct.double().mean()), "samples": len(labels)}
                continue
            embeddings = nn.functional.normalize(embeddings)
            protocols, look_alikes = read_protocols(folder)
            designs = [key.partition("-")[2] for key in dataset.keys]
            for protocol in protocols:
                scores = score_pairs(embeddings, labels, designs, protocol, look_alikes, interrupted)
                if process.agree_to_stop():
                    return None
                curves[protocol.name], results[protocol.name] = scores, _summarize(scores)
        if process.is_first and results:
            self._write(results, curves, name)
        return results

    def _embed(
        self, backbone: nn.Module, dataset: TarDataset, process: ProcessContext, interrupted: Callable[[], bool]
    ) -> torch.Tensor:
        settings = LoaderSettings.from_config(self.config, process.rank, process.world_size)
        batches = evaluation_batches(dataset, settings, self.config.evaluation.batch_size)
        progress = console_progress if process.is_first else no_progress
        share = -(-dataset.num_samples // process.world_size)
        with progress(f"embedding {dataset.folder.name}", share) as advance:

            def counted() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                for indices, images in batches:
                    yield indices, images
                    advance(len(indices))

            dim = self.config.model.embedding_dim
            return embed(backbone, counted(), dataset.num_samples, dim, process.device, interrupted)

    def _write(self, results: dict[str, Any], curves: dict[str, Scores], name: str) -> None:
        folder: Path = self.config.run.dir / "evaluation"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
        if curves:
            points = {protocol: scores.roc_points() for protocol, scores in curves.items()}
            write_atomically(folder / f"roc-{name}.json", json.dumps(points) + "\n")
            draw_roc(curves, folder / f"roc-{name}.png", f"{self.config.run.dir.name}, {name}")


def _is_verification(folder: Path) -> bool:
    return (folder / "protocol.json").exists()


def _summarize(scores: Scores) -> dict[str, Any]:
    """Return the results of one protocol, without the figures that too few pairs leave undefined."""
    rates = {f"{far:g}": scores.tar_at_far(far) for far in FARS}
    return {
        "tar_at_far": {far: tar for far, (tar, _) in rates.items() if not math.isnan(tar)},
        "threshold": {far: edge for far, (_, edge) in rates.items() if not math.isnan(edge)},
        "genuine_pairs": int(scores.genuine.sum()),
        "impostor_pairs": int(scores.impostors.sum()),
        **{name: value for name, value in scores.spread().items() if not math.isnan(value)},
    }


def describe_results(results: dict[str, Any]) -> list[str]:
    """Return a readable line for each protocol or set."""
    lines = []
    for name, found in results.items():
        tar = "  ".join(f"TAR {value:.4f} at FAR {far}" for far, value in found.get("tar_at_far", {}).items())
        lines.append(f"{name}: " + (tar or f"accuracy {found['accuracy']:.4f}"))
    return lines
