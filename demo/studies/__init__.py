"""Studies: what calibration is worth, and what happens as models grow."""
