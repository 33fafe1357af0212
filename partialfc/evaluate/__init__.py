"""Verification, identification, and their figures.

Imports ``checkpoint``, ``build``, ``engines.state``, ``runtime``, ``data``, ``tracking.console``, ``config``,
``models`` and ``head``. ``train`` and the rooms above may import it.
"""
