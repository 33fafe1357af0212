"""Weights that come in and go out."""
