"""Starting runs: torchrun on one host or many, and jobs of Slurm."""
