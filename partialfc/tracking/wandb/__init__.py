"""W&B beside a run: one client process at a time follows ``metrics.jsonl`` and sends each line as a row.

``metrics.jsonl`` is authoritative. Every client asks the server for its number of rows and sends the rest, so the next
attempt, or ``partialfc runs sync``, sends rows that were lost for any reason. Only the client process
(:mod:`~partialfc.tracking.wandb.client`) imports ``wandb``; the trainer's side is :mod:`~partialfc.tracking.wandb.run`.

A client that dies is followed by another, four in turn at most. The signals of ``scancel``, of a time limit or of a
preemption reach every process of a job, and W&B's own service dies of SIGTERM and SIGINT, its client with it, while the
trainer still has its last rows to write. A job gets a few such signals, not many: after four deaths the fault lies
elsewhere, and the run continues offline.
"""
