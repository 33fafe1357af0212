"""Checkpoints: written while training continues, checked before they are read, resumed on any number of ranks.

Imported by evaluate, train, exchange and cli; imports runs, engines, runtime, data, config and the head, never train.
"""
