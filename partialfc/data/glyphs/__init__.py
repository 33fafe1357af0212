"""The glyph data set: Han characters drawn in many typeface designs."""
