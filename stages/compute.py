"""Where the arithmetic runs, and how it is made repeatable."""

import logging

import torch

from stages.errors import PipelineError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``compute.device``; ``auto`` takes a CUDA GPU when there is one.

    Raises
    ------
    PipelineError
        If CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise PipelineError(
            "params.yaml: compute.device is cuda, but torch sees no GPU; set auto or cpu"
        )
    device = torch.device("cuda:0" if available and wanted != "cpu" else "cpu")
    logger.info(
        "running on %s", torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    )
    return device


def make_deterministic(seed: int = 0) -> None:
    """Seed torch and ask it for deterministic kernels, warning where there is none."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling every new tensor finds reads of unwritten memory; it costs time, and changes nothing
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
