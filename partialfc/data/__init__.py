"""Data sets: the folder format, the order of samples, augmentation, the loader, and the glyph data set.

Imports ``config``, ``tracking.console``, ``files`` and ``errors``. Everything from ``engines`` upwards may import it.
"""
