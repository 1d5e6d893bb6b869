"""Judging a quantized model: cosines, retrieval, sizes, heat maps, limits."""
