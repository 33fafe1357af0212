"""Starting runs: under torchrun on one host or many, and as Slurm jobs.

The shell scripts live in this package, so that an installed copy has them; the repository's ``launch/`` links to them.
Imports ``runtime.stopping``, ``files`` and ``errors``, and no torch. Only ``cli`` may import it.
"""
