"""Verification, identification, and their figures.

Imported by train and cli; imports checkpoint, build, data, runtime and the head.
"""
