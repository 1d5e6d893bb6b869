"""The pipeline: each module here is one DVC stage; the folders hold what stages share."""

import os

# noted here, before imports that take seconds: `stages.pipeline.stage.claim` ends a stage whose
# parent, the DVC that started it, is gone
PARENT = os.getppid()
