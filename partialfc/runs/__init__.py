"""Run folders: what a run writes of itself, and how it is found again."""
