"""The trainer: the loop, the training step, and the decision of all ranks to apply or skip it.

Stands on every room below: ``build`` makes its parts, ``checkpoint``, ``evaluate``, ``runs`` and ``tracking`` keep what
it does. Only ``cli`` and ``exchange`` import it.
"""
