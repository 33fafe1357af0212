"""``partialfc train``: from a config to a run folder."""

from __future__ import annotations

from partialfc.checkpoint.config_diff import as_begun
from partialfc.checkpoint.folders import config_of_run
from partialfc.config import Config
from partialfc.runs.summary import summarize
from partialfc.runtime.algorithms import algorithms
from partialfc.runtime.collectives import broadcast_from_rank0
from partialfc.runtime.process import joined
from partialfc.runtime.timings import DEFAULT_TIMINGS, Timings
from partialfc.tracking.console import log
from partialfc.tracking.wandb.run import require_wandb
from partialfc.train.finished import finished_before
from partialfc.train.refusal import refusing
from partialfc.train.trainer import Outcome, Trainer


def train(config: Config, force: bool = False, timings: Timings = DEFAULT_TIMINGS) -> Outcome:
    """Train the run that ``config`` describes, on the ranks that torchrun started, or alone.

    A run folder that holds a checkpoint is resumed. After ``"preempted"`` the process ignores further requests to stop,
    Ctrl-C included, and is expected to end.

    Args:
        force: allow config changes that change results.
        timings: how often the run shows signs of life.

    Returns:
        ``"finished"``; or ``"preempted"`` if the run was asked to stop, has written a checkpoint, and can be resumed.

    Raises:
        ConfigError: the run cannot start, on any rank; starting it again changes nothing.
        PartialFCError: the run failed; the message says why. ``RankLost`` names the rank that the others waited for.
    """
    with refusing():
        require_wandb(config.tracking.wandb)
    group_of_one = config.engine.name == "deepspeed"
    with (
        algorithms(config.run.deterministic),
        joined(config.run.dir, config.run.timeout, group_of_one, timings) as process,
    ):
        before = broadcast_from_rank0(lambda: config_of_run(config.run.dir))
        if before is not None and config.checkpoint.resume == "auto":
            config = as_begun(config, before)
        # One answer for all ranks: another process may finish the run meanwhile.
        if broadcast_from_rank0(lambda: finished_before(config, force)):
            if process.is_first:
                _print_finished(config, "this run is already finished; nothing to do")
            return "finished"
        with refusing():
            trainer = Trainer(config, process, force)
        outcome = trainer.train()
        if process.is_first and outcome == "finished":
            _print_finished(config, "finished")
        return outcome


def _print_finished(config: Config, message: str) -> None:
    log(message)
    print(summarize(config.run.dir), flush=True)
