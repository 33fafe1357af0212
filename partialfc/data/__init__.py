"""Data sets: the folder format, the order of samples, augmentation, the loader, and the glyph data set.

Imports ``tracking.console``, ``config``, ``files`` and ``errors``. ``engines`` and the rooms above may import it.
"""
