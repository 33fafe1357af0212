"""Data: the data set folder, the order in which samples are seen, augmentation, the loader, and the glyph data set."""
