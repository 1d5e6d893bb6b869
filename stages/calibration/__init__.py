"""Calibration sets: their schema, and drawing their samples from a dataset."""
