"""Serving a ColQwen3, original or 4-bit, at the speed of the GPU: `load_runtime`."""

from colqwen3.serving.load import load_runtime
from colqwen3.serving.runtime import Runtime

__all__ = ["Runtime", "load_runtime"]
