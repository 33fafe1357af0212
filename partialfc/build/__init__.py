"""The parts of a run, built from its config: backbone, head, optimizers, engine.

Imports ``engines``, ``models``, ``head`` and ``config``. ``train``, ``evaluate``, ``planning`` and rooms above them
import it.
"""
