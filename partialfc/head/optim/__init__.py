"""Optimizers that update only the rows with a gradient, and hooks around any optimizer's step.

Imports ``errors``, and ``random`` and ``transfers`` of the head. The rest of the head and ``build`` import it.
"""
