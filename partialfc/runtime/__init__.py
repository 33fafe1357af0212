"""This process among the ranks of a run: joining, agreeing, noticing who is gone, stopping."""
