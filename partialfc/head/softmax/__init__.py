"""The sharded softmax: sampled classes, logits by chunk, targets, reduction of the negatives. For partialfc.head."""
