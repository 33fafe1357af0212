"""The sharded softmax: sampled classes, logits by chunk, targets, reduction of the negatives.

Imports ``losses`` and other modules of the head. Only the rest of the head imports it.
"""
