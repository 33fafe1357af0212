"""``partialfc train``: a config in, a run folder out."""

from __future__ import annotations

import torch.distributed as dist

from partialfc.config import Config
from partialfc.errors import PartialFCError, RankLost
from partialfc.tracking.progress import log
from partialfc.train.ranks import Rank, joined
from partialfc.train.run_folder import finished_before
from partialfc.train.summary import summarize
from partialfc.train.trainer import Trainer


def train(config: Config) -> None:
    """Train what ``config`` describes, on the ranks that torchrun started, or alone.

    Raises:
        PartialFCError: the run failed; the message says why. ``RankLost`` names the ranks not heard from.
    """
    if finished_before(config):
        _say_finished(config, "this run has finished before; nothing to do")
        return
    with joined() as rank:
        try:
            Trainer(config, rank).train()
        except PartialFCError as error:
            if isinstance(error, RankLost):
                _name_silent_ranks(rank, error)
            raise
        except RuntimeError as error:  # how collectives of DDP and of torch itself fail
            _name_silent_ranks(rank, error)
            raise
        if rank.is_first:
            _say_finished(config, "finished")


def _say_finished(config: Config, words: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        log(words)
        print(summarize(config.run.dir), flush=True)


def _name_silent_ranks(rank: Rank, error: Exception) -> None:
    silent = rank.liveness.silent_ranks() if rank.liveness else []
    if silent:
        names = ", ".join(map(str, silent))
        raise RankLost(
            f"rank {rank.rank}: not heard from rank {names}: it has died, hangs or cannot be reached; "
            f"look at the end of its log ({error})"
        ) from error
