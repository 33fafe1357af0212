"""W&B beside a run: one client process follows ``metrics.jsonl`` and sends each line as a row.

``metrics.jsonl`` is the truth. Every client asks the server how many rows it has and sends the rest, so a row that was
lost, for whatever reason, is sent by the next attempt or by ``partialfc runs sync``. Only the client process
(:mod:`~partialfc.tracking.wandb.client`) imports ``wandb``; the trainer's side is :mod:`~partialfc.tracking.wandb.run`.
"""
