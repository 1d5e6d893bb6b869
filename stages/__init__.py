"""The pipeline: one module per DVC stage, and the small modules that they share."""
