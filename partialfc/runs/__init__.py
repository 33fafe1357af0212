"""Run folders: what a run writes about itself, who may write it, and how runs are listed.

Imported by checkpoint, train and cli; imports config, files, tracking and nothing above them.
"""
