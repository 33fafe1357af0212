"""Starting runs: under torchrun on one host or many, and as Slurm jobs.

The shell scripts lie in this package, so that an installed copy has them; ``launch/`` of the repository links to them.
May import ``config``, ``tracking`` and what lies below; only ``cli`` imports it. Needs no torch.
"""
