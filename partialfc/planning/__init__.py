"""Memory of a run, known before it starts.

Imported by train and cli; imports build, engines, data, tracking.console, config, models and the head.
"""
