"""W&B beside a run: one client process follows ``metrics.jsonl`` and sends each line as a row.

``metrics.jsonl`` is authoritative. Every client asks the server for its number of rows and sends the rest, so the next
attempt, or ``partialfc runs sync``, sends rows that were lost for any reason. Only the client process
(:mod:`~partialfc.tracking.wandb.client`) imports ``wandb``; the trainer's side is :mod:`~partialfc.tracking.wandb.run`.
"""
