"""Console progress, metrics.jsonl and figures of a run."""
