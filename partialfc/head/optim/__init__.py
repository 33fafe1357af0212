"""Optimizers that touch only the rows that have a gradient."""
