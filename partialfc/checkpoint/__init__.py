"""Checkpoints: written during training, checked before use.

Imported by evaluate, train, exchange and cli; imports runs, engines, runtime, data, config and the head, never train.
"""
