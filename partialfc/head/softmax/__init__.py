"""The sharded softmax: sampled classes, logits by chunk, targets, and what the negatives add up to."""
