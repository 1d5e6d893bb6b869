"""Device selection and determinism."""

import gc
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from colqwen3.system.errors import UserError

logger = logging.getLogger(__name__)

ActivationsKind = Literal["bfloat16", "int8"]
"""What the decoder's linears take when served: 16 bits, or 8 wherever that is faster."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""Variable and value with which cuBLAS is deterministic; of the size it has on an H100 anyway."""
MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""The cgroups that this process is in, and where Linux mounts their limits."""


def choose_device(name: str, number: int = 0) -> torch.device:
    """Return the device of a name; ``auto`` takes a CUDA GPU when there is one.

    A GPU becomes the current one of the process: kernels and graphs that name none are for it.

    Parameters
    ----------
    name
        ``auto``, ``cpu`` or ``cuda``.
    number
        Which GPU, counted from 0 again where there are fewer.

    Raises
    ------
    UserError
        If CUDA is requested and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "the device is cuda, but torch sees no GPU; choose auto or cpu (params.yaml: compute.device; "
            "command line: --device)"
        )
    on_gpu = available and name != "cpu"
    device = torch.device(f"cuda:{number % torch.cuda.device_count()}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    logger.info(
        "running on %s", torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    )
    return device


def memory_of(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or all that this process may use of the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *cgroup_limits()])


def cgroup_limits() -> list[int]:
    """Return the limits in bytes of the cgroups, version 1 or 2, that a container puts a process into.

    A process in a container may be told its path on the host, while its own cgroup is mounted as the
    root: so the limits of all folders from there to the root are looked for.
    """
    limits = []
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not on macOS
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # the root of version 2 has none; it may be "max"
                limits.append(int((folder / name).read_text()))
            if folder == root:
                break
    return limits


def free_memory() -> None:
    """Give back what no name refers to any more, also what torch keeps of a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU, or of this machine's CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on macOS
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor() or platform.machine()}"


def make_deterministic(seed: int = 0) -> None:
    """Seed torch and ask it for deterministic kernels, warning where there is none.

    To be called before the process's first product on a GPU: cuBLAS reads its setting then.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling every new tensor would expose reads of unwritten memory; it costs time, changes nothing
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
