"""Memory of a run, predicted before it starts.

Imports ``evaluate``, ``build``, ``engines``, ``data``, ``tracking.console``, ``config``, ``models`` and ``head``.
``train`` and the rooms above may import it.
"""
