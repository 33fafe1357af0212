"""``partialfc train``: a config in, a run folder out."""

from __future__ import annotations

from partialfc.config import Config
from partialfc.runs.folder import finished_before
from partialfc.runs.summary import summarize
from partialfc.runtime.collectives import run_on_rank0
from partialfc.runtime.process import joined
from partialfc.tracking.console import log
from partialfc.tracking.wandb.run import require_wandb
from partialfc.train.trainer import Outcome, Trainer


def train(config: Config, force: bool = False) -> Outcome:
    """Train what ``config`` describes, on the ranks that torchrun started, or alone.

    A run folder that holds a checkpoint is gone on with; ``force`` allows changes of the config that change results.
    After ``"preempted"`` the process ignores further requests to stop, Ctrl-C too: it is expected to end.

    Returns:
        ``"finished"``, or ``"preempted"`` if the run was asked to stop: it has written a checkpoint, and can go on.

    Raises:
        PartialFCError: the run failed; the message says why. ``RankLost`` names the rank that keeps the others waiting.
    """
    require_wandb(config.tracking.wandb)
    with joined(config.run.dir, config.run.timeout, group_of_one=config.engine.name == "deepspeed") as process:
        if run_on_rank0(lambda: finished_before(config, force)):  # each by itself might find it finished, or not yet
            if process.is_first:
                _say_finished(config, "this run has finished before; nothing to do")
            return "finished"
        outcome = Trainer(config, process, force).train()
        if process.is_first and outcome == "finished":
            _say_finished(config, "finished")
        return outcome


def _say_finished(config: Config, words: str) -> None:
    log(words)
    print(summarize(config.run.dir), flush=True)
