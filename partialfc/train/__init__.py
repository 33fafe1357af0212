"""The trainer: the loop, the training step, and the decision of all ranks to apply or skip it.

Imports every room below: ``build`` makes its parts; ``checkpoint``, ``evaluate``, ``runs`` and ``tracking`` keep its
results. Only ``cli`` and ``exchange`` may import it.
"""
