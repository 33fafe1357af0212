"""Reports of a run: console lines and progress, ``metrics.jsonl``, ``/healthz`` and ``/metrics`` over HTTP, and W&B.

Imports ``config`` and ``files``, so that it needs no torch. ``runtime``, ``data`` and the rooms above may import its
``console``; ``runs``, ``train`` and the rooms above all of it.
"""
