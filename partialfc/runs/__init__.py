"""Run folders: their files, their lock, and the list of runs.

Imports ``tracking``, ``config`` and ``files``. ``checkpoint``, ``train`` and the rooms above may import it.
"""
