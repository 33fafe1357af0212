"""Checkpoints: written during training, checked before use.

Imports ``runs``, ``engines``, ``runtime``, ``data``, ``tracking.console``, ``config``, ``models`` and ``head``.
``evaluate``, ``train`` and the rooms above may import it.
"""
