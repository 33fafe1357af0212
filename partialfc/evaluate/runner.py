"""Evaluates a network on every evaluation set of a config."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import LoaderSettings, evaluation_batches
from partialfc.data.pairs import PairList
from partialfc.evaluate.embed import embed
from partialfc.evaluate.figures import draw_roc
from partialfc.evaluate.identification import nearest_classes
from partialfc.evaluate.listed_pairs import cosines_of_pairs, fold_accuracies, scores_of_pairs
from partialfc.evaluate.sets import EvaluationSet, open_set, require_different_names, training_ids
from partialfc.evaluate.verification import Scores, score_pairs
from partialfc.files import write_atomically
from partialfc.head import PartialFC
from partialfc.runtime.collectives import broadcast_from_rank0
from partialfc.runtime.process import ProcessContext
from partialfc.tracking.console import console_progress, log, no_progress

FARS = (1e-2, 1e-3, 1e-4, 1e-5)
_FOLDER = "evaluation"


class Evaluation:
    """Evaluates a network on all sets of a config.

    A set with ``protocol.json`` or ``pairs.csv`` is for verification. Any other is for identification, with labelled
    samples of training classes: ``accuracy`` is the share of samples whose own class has the highest logit.

    Raises:
        InvalidData: a set is missing, incomplete or empty, or its protocol or list of pairs compares nothing.
        ConfigError: the results of two sets have the same name.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sets = [open_set(folder) for folder in config.evaluation.sets]
        require_different_names(self.sets)

    def match_classes(self, num_classes: int, class_table: Path | None) -> None:
        """Find the classes of the sets for identification among the training classes, by name. A collective.

        Args:
            num_classes: of the training set.
            class_table: of the training set; None: there is none, and class ids must do.

        Raises:
            InvalidData: on every rank, if a class of a set is not in the training set, or a class table is damaged.
        """
        for found in self.sets:
            if found.by_class:
                table, count = found.dataset.class_table, found.dataset.num_classes
                find = partial(training_ids, table, count, class_table, num_classes)
                found.class_ids = broadcast_from_rank0(find)

    def run(
        self, backbone: nn.Module, head: PartialFC, process: ProcessContext, name: str | None
    ) -> dict[str, Any] | None:
        """Return all results, e.g. ``{"unseen_font": {"tar_at_far": {"0.001": 0.9}, …}}``. A collective.

        Rank 0 also writes them, with a ROC figure, into the run folder's ``evaluation/``.

        Args:
            name: of the files; None: nothing is written.

        Returns:
            The results by protocol or set, or None if a stop was requested meanwhile.
        """

        def interrupted() -> bool:  # on this rank; the others learn of it within a second or two
            process.report_progress()
            return process.stop.requested

        results: dict[str, Any] = {}
        curves: dict[str, Scores] = {}
        for found in self.sets:
            embeddings = self._embed(backbone, found.dataset, process, interrupted)
            if process.agree_to_stop():
                return None
            if found.class_ids is not None:
                ids = torch.from_numpy(found.class_ids[found.dataset.labels]).to(process.device)
                correct = nearest_classes(head, embeddings) == ids
                results[found.folder.name] = {"accuracy": float(correct.double().mean()), "samples": len(ids)}
                continue
            for name_of_result, scores, accuracy in _verify(found, embeddings, interrupted):
                if process.agree_to_stop():
                    return None
                curves[name_of_result], results[name_of_result] = scores, accuracy | _summarize(scores)
        if process.is_first and results and name:
            try:
                self._write(results, curves, name)
            except OSError as error:  # no reason to lose them, or to end a training
                log(f"WARNING: the results of {name} cannot be written ({error.strerror}); they are only printed")
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
        folder = self.config.run.dir / _FOLDER
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
        if curves:
            points = {protocol: scores.roc_points() for protocol, scores in curves.items()}
            write_atomically(folder / f"roc-{name}.json", json.dumps(points) + "\n")
            self._draw(curves, folder / f"roc-{name}.png", f"{self.config.run.dir.name}, {name}")

    def _draw(self, curves: dict[str, Scores], path: Path, title: str) -> None:
        try:
            draw_roc(curves, path, title)
        except Exception as error:  # the numbers are written; a figure is no reason to end a run
            log(f"WARNING: {path} cannot be drawn: {type(error).__name__}: {error}")


def _verify(
    found: EvaluationSet, embeddings: Tensor, interrupted: Callable[[], bool]
) -> Iterator[tuple[str, Scores, dict[str, Any]]]:
    """Yield the results of a verification set: their name, scores, and accuracy over folds if it has any. Collective
    work is done before each.
    """
    embeddings = nn.functional.normalize(embeddings)
    if found.pairs is not None:
        cosines = cosines_of_pairs(embeddings, found.pairs, interrupted)
        yield found.folder.name, scores_of_pairs(cosines, found.pairs.same), _accuracy(cosines, found.pairs)
    labels = torch.tensor(found.dataset.labels).to(embeddings.device)
    for protocol in found.protocols:
        yield (
            protocol.name,
            score_pairs(embeddings, labels, found.designs, protocol, found.look_alikes, interrupted),
            {},
        )


def _accuracy(cosines: npt.NDArray[np.float64], pairs: PairList) -> dict[str, Any]:
    """Return the accuracy over folds; nothing if there is only one."""
    if not pairs.folds.any():
        return {}
    found = fold_accuracies(cosines, pairs.same, pairs.folds)
    return {"accuracy": float(found.mean()), "fold_deviation": float(found.std()), "folds": len(found)}


def why_not_writable(run: Path) -> str:
    """Return the reason that results cannot be written into a run folder; ``""`` if they can."""
    folder = run / _FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"


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
    return [f"{name}: {_describe(found)}" for name, found in results.items()]


def _describe(found: dict[str, Any]) -> str:
    parts = []
    if "accuracy" in found:
        over = f" ± {found['fold_deviation']:.4f} over {found['folds']} folds" if "folds" in found else ""
        parts.append(f"accuracy {found['accuracy']:.4f}{over}")
    if "tar_at_far" in found:
        parts += [f"TAR {value:.4f} at FAR {far}" for far, value in found["tar_at_far"].items()] or [
            f"no TAR: {found['impostor_pairs']} impostor pairs are too few for FAR {max(FARS):g}"
        ]
    return "  ".join(parts)
