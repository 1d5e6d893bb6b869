"""Quantizing linears: recipes, calibration samples, rounding, AutoRound, GPTQ, the checkpoint."""
