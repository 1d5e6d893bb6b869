"""A ColQwen3 folder without torch: finding it, its headers, its layout, and packed weights."""
