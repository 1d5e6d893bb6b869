"""Trains the demonstration model."""
