"""The sharded softmax: sampled classes, logits by chunk, targets, reduction of the negatives.

Imported by the rest of the head only; imports other modules of the head and partialfc.losses.
"""
