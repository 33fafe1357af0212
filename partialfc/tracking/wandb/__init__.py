"""W&B beside a run: a process of its own that follows metrics.jsonl."""
