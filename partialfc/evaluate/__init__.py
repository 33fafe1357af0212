"""Evaluation of a network: open-set verification, closed-set identification, and their figures.

Imported by train and cli; imports checkpoint, build, data, runtime and the head.
"""
