"""The glyph data set: Han characters drawn in many typeface designs. Only ``cli`` imports it."""
