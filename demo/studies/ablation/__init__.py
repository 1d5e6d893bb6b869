"""What calibration is worth: recipes made and measured by the stages of the pipeline."""
