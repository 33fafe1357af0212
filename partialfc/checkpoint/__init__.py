"""Checkpoints: written, found, checked and resumed from."""
