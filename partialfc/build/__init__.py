"""The parts of a run, built from its config: backbone, head, optimizers, engine.

Imports ``engines``, ``runtime``, ``config``, ``models`` and ``head``. ``checkpoint``, ``evaluate``, ``planning``,
``runs`` and the rooms above may import it.
"""
