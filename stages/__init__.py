"""The pipeline: one module per DVC stage, and the small modules that they share."""

import os

PARENT = os.getppid()  # who started this process, noted before imports that take seconds
