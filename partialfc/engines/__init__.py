"""Engines, which update the backbone: DistributedDataParallel or DeepSpeed. The head is not their business.

Imports ``config``, ``models``, ``runtime``, ``options``, ``tracking.console`` and ``errors``; ``build`` makes the
engine that a config names. ``checkpoint`` knows of engines only :mod:`partialfc.engines.state`.
"""
