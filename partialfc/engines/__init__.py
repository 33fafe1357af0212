"""Who updates the backbone: DistributedDataParallel or DeepSpeed."""
