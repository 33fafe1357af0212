"""Optimizers that update only the rows that have a gradient."""
