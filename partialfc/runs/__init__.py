"""Run folders: their files, their lock, and the list of runs.

Imported by checkpoint, train and cli; imports config, files, tracking and nothing above them.
"""
