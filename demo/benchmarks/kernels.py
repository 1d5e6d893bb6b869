"""Times the kernels for 4-bit linears on the shapes of the 4B model, each checked for its error.

Weights are random. A kernel runs on several weights in turns, so that no cache holds them, and on a
GPU within one CUDA graph, so that launches do not count. What is not installed is left out; what
fails is recorded with its reason.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.packing import dequantize, pack
from colqwen3.serving.linears import (
    KERNELS,
    OWN_TILES,
    Linear,
    auto_round_lib,
    dense,
    humming,
    humming_or_int8,
)
from colqwen3.system.errors import first_line, run
from colqwen3.system.files import write_json
from demo.benchmarks.measure import machine
from demo.benchmarks.true_size import PRESETS

logger = logging.getLogger(__name__)

BITS, GROUP_SIZE = 4, 128
TOKENS = {"cuda": (16, 26, 64, 208, 512, 1291, 1664, 5164), "cpu": (1, 26, 208)}
WEIGHTS_BYTES = 3e8  # of all weights of one shape together: more than a GPU's cache
REPEATS = {"cuda": 15, "cpu": 3}

Parts = dict[str, torch.Tensor]
Candidate = Callable[[Parts], Linear]


def shapes() -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the decoder's linears as the serving runtime merges them."""
    text = PRESETS["4b"]["text_config"]
    hidden, wide, size = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    return {
        "qkv": (hidden, (heads + 2 * key_heads) * size),
        "o": (heads * size, hidden),
        "gate_up": (hidden, 2 * wide),
        "down": (wide, hidden),
    }


def random_parts(inputs: int, outputs: int, device: torch.device, seed: int) -> Parts:
    """Return a packed linear of random codes and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, inputs // GROUP_SIZE, generator=generator).sub_(0.5).mul_(0.02)
    return {key: part.to(device) for key, part in pack(codes, scales.half(), BITS).items()}


def dense_weight(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized weight."""
    return dequantize(parts["qweight"], parts["qzeros"], parts["scales"], BITS).to(dtype)


def torch_int4(parts: Parts) -> Linear:
    """Return torch's own 4-bit kernel."""
    scales = parts["scales"].to(torch.bfloat16)
    weight = dense_weight(parts, torch.float32)
    wide = parts["scales"].float().T.repeat_interleave(GROUP_SIZE, 1)
    codes = (weight / wide).round_().add_(8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(
        (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8
    )
    both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP_SIZE, both)


def auto_round(kind: str, dtype: torch.dtype) -> Candidate:
    """Return a linear that AutoRound brings, as transformers would load it."""

    def make(parts: Parts) -> Linear:
        from auto_round.inference.backend import dynamic_import_inference_linear

        config = {"bits": BITS, "group_size": GROUP_SIZE, "sym": True}
        kind_of_linear: Any = dynamic_import_inference_linear(kind, config)
        rows, outputs = parts["qweight"].shape
        inputs = rows * 32 // BITS
        layer = kind_of_linear(BITS, GROUP_SIZE, inputs, outputs, False, weight_dtype=dtype)
        layer.qweight, layer.qzeros = parts["qweight"], parts["qzeros"]
        layer.scales = parts["scales"].to(dtype)
        layer.post_init()
        output: Linear = layer
        return output

    return make


def in_int8(parts: Parts) -> Linear:
    """Return the serving runtime's linear on 8-bit activations, rounding included."""
    from colqwen3.serving.int8_kernels import quantize_tokens

    linear = humming_or_int8(parts, GROUP_SIZE, rotated=False)
    return lambda x: linear(quantize_tokens(x))


def candidates(device: str) -> dict[str, tuple[torch.dtype, Candidate]]:
    """Return name -> (dtype of the inputs, how to make the linear)."""
    bf16, f32 = torch.bfloat16, torch.float32
    if device == "cuda":
        return {
            "dense bfloat16": (bf16, lambda parts: dense(dense_weight(parts, bf16))),
            "humming": (bf16, lambda parts: humming(parts, BITS, GROUP_SIZE, bf16)),
            OWN_TILES: (bf16, lambda parts: KERNELS[OWN_TILES](parts, BITS, GROUP_SIZE, bf16)),
            "int8 activations": (bf16, in_int8),
            "torch int4": (bf16, torch_int4),
            "auto-round tritonv2": (bf16, auto_round("auto_round:tritonv2_zp", bf16)),
            "auto-round torch": (bf16, auto_round("auto_round:torch_zp", bf16)),
        }
    return {
        "dense float32": (f32, lambda parts: dense(dense_weight(parts, f32))),
        "dense bfloat16": (bf16, lambda parts: dense(dense_weight(parts, bf16))),
        "auto-round torch": (f32, auto_round("auto_round:torch_zp", f32)),
        "auto-round-lib": (f32, lambda parts: auto_round_lib(parts, BITS, GROUP_SIZE, f32)),
    }


def time_us(works: list[Callable[[], object]], device: torch.device) -> float:
    """Return the median microseconds of one of several works done in a row."""
    for work in works:
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in works:
                work()
    taken = []
    for _ in range(REPEATS[device.type]):
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            taken.append(1000 * begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            for work in works:
                work()
            taken.append(1e6 * (time.perf_counter() - start))
    return float(statistics.median(taken)) / len(works)


@torch.inference_mode()
def measure(
    make: Candidate, dtype: torch.dtype, weights: list[Parts], device: torch.device
) -> dict[str, Any]:
    """Return microseconds and relative error by number of tokens."""
    linears = [make(parts) for parts in weights]
    reference = dense_weight(weights[0], torch.float32)
    result: dict[str, Any] = {}
    for tokens in TOKENS[device.type]:
        x = torch.randn(tokens, reference.shape[1], device=device).to(dtype)
        expected = x.float() @ reference.T
        error = float((linears[0](x).float() - expected).norm() / expected.norm())
        taken = time_us([partial(linear, x) for linear in linears], device)
        result[str(tokens)] = {"us": round(taken, 1), "error": float(f"{error:.2g}")}
    return result


def measure_all(device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each shape with what was measured of every candidate."""
    for name, (inputs, outputs) in shapes().items():
        copies = 2 if device.type == "cpu" else max(2, int(2 * WEIGHTS_BYTES / (inputs * outputs)))
        weights = [random_parts(inputs, outputs, device, seed) for seed in range(copies)]
        timings: dict[str, Any] = {}
        for candidate, (dtype, make) in candidates(device.type).items():
            try:
                timings[candidate] = measure(make, dtype, weights, device)
            except ImportError as error:
                logger.warning("%s is left out: %s", candidate, str(error).splitlines()[0])
            except Exception as error:  # a kernel can fail in any way; the others go on
                timings[candidate] = {"failed": first_line(error)[:200]}
            print(name, candidate, timings.get(candidate), flush=True)
        yield name, {"inputs": inputs, "outputs": outputs, "kernels": timings}


def main() -> None:
    """Write metrics/size/kernels-<device>.json."""
    parser = argparse.ArgumentParser(prog="python -m demo.benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", choices=TOKENS, default="cpu")
    parser.add_argument("--out", type=Path, help="default: metrics/size/kernels-<device>.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    out = args.out or Path(f"metrics/size/kernels-{args.device}.json")
    results: dict[str, Any] = {"machine": machine(args.device == "cuda"), "shapes": {}}
    for name, shape in measure_all(device):
        results["shapes"][name] = shape
        write_json(out, results)


if __name__ == "__main__":
    run(main)
