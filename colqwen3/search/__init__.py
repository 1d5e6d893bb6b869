"""A local page that shows what original and 4-bit find, side by side."""
