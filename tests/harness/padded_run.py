"""``partialfc train`` whose backbone sees padding as in version 0.1, with its numbers: padded_run.py train WORDS…

That version filled a rank's part of a short batch with grey images, which counted in batch statistics and drew random
numbers; their embeddings had label -1.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from partialfc.data.order import local_share
from partialfc.train import trainer


def build_padding_engine(module: Any, config: Any, process: Any) -> Any:
    engine = build_engine(module, config, process)
    forward = engine.forward
    share = local_share(config.data.global_batch_size, config.optim.accumulation, process.world_size)

    def forward_padded(images: Tensor, images_of_all_ranks: int, last: bool) -> Tensor:
        grey = images.new_zeros(share - len(images), *images.shape[1:])
        return forward(torch.cat([images, grey]), share * process.world_size, last)[: len(images)]

    engine.forward = forward_padded  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    from partialfc.__main__ import main

    build_engine, trainer.build_engine = trainer.build_engine, build_padding_engine
    sys.argv[0] = "partialfc"
    main()
