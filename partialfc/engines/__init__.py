"""Engines, which update the backbone and never the head: DistributedDataParallel or DeepSpeed.

Imports ``runtime``, ``tracking.console``, ``config``, ``models`` and ``options``. ``build`` and the rooms above may
import it; ``checkpoint`` and ``evaluate`` use only :mod:`partialfc.engines.state`.
"""
