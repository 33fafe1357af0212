"""This process among the ranks of a run: joining, agreeing, detecting a lost rank, stopping on request.

Imports ``tracking.console`` and ``errors`` only. ``engines`` and the rooms above may import it.
"""
