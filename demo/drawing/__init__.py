"""Draws the demo's page sets and calibration texts."""
