"""Studies: programs that answer one question by many runs of the pipeline's stages."""
