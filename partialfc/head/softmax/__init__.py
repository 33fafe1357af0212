"""The sharded softmax: sampled classes, logits by chunk, target logits, and the reduction of the negatives."""
