"""Memory of a run, known before it starts.

Imported by train and cli; imports build, engines, config, models and the head.
"""
