"""This process among the ranks of a run: joining, agreeing, noticing a lost rank, stopping on request.

Imports ``tracking.console`` and ``errors`` only. Everything from ``engines`` upwards may import it; models, losses and
the head know nothing of it.
"""
