"""Optimizers that update only the rows that have a gradient, and hooks around any optimizer's step.

Imported by the rest of the head and by build; imports the head's ``random`` and ``transfers``, and errors.
"""
