"""Quantizing linears: recipes, calibration samples, rounding and AutoRound, the checkpoint."""
