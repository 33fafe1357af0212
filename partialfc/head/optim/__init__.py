"""Optimizers that update only the rows that have a gradient, and hooks around any optimizer's step."""
