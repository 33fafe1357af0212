"""Reports of a run: console lines and progress, ``metrics.jsonl``, ``/healthz`` and ``/metrics`` over HTTP, and W&B.

May import ``config`` and what lies below it; imported by ``runs``, ``train`` and above. Needs no torch.
"""
