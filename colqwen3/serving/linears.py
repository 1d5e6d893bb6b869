"""Linears for serving: dense, or 4-bit by the fastest installed kernel that gives correct results."""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from colqwen3.checkpoint.packing import dense_weight, dequantize, unpack
from colqwen3.model.modeling_colqwen3 import dequantize_rows
from colqwen3.serving.fused import gate as apply_gate
from colqwen3.serving.gate_features import alternate
from colqwen3.serving.humming_tiles import (
    Product,
    Range,
    gate_beyond,
    gated_ranges,
    has_tiles,
    replace_tiles,
    split_sums,
    trial_tokens,
)
from colqwen3.serving.int8 import (
    Int8Tokens,
    Int8Weight,
    channel_scales,
    express_in_int8,
    multiply,
    rotate_into_int8,
    rotated_channel_scales,
)
from colqwen3.system.errors import first_line

logger = logging.getLogger(__name__)

Linear = Callable[[torch.Tensor], torch.Tensor]
"""[tokens, in_features] -> [tokens, out_features]."""
DecoderLinear = Callable[[Any], Any]
"""A linear whose inputs may also be `Int8Tokens`, and its outputs `Gated`, if it was built for that."""
Embeddings = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [...] -> vectors [..., hidden]."""
BYTE = 8
Parts = Mapping[str, torch.Tensor]
"""``qweight``, ``qzeros`` and ``scales`` of a packed linear, as `colqwen3.checkpoint.packing.pack` returns them."""

# humming takes weights in whole tiles; its tuning for compute capability 9.0 needs outputs by 128
HUMMING_OUT, HUMMING_IN = 128, 32
# 16-bit inputs, weights and outputs are each off by 2^-9 at most: a correct kernel is far below.
# A row or a column of few numbers is off by more than the whole, and by nearly all of it if wrong
MAXIMUM_ERROR, MAXIMUM_LOCAL_ERROR = 0.02, 0.1
TRIED_TOKENS, GPU_TRIED_TOKENS = (16, 64, 256), (1291, 2100)


class Gated(NamedTuple):
    """What a gate gives, by the product that gives its inputs.

    Attributes
    ----------
    values
        [tokens, features].
    """

    values: torch.Tensor


class GateSums:
    """Where parts of split tiles are added up before a gate, for the layers of one model.

    It is zero before and after each product; no two of them may run at a time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

    def zeros(self, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return so many numbers, the same tensor each time."""
        key = device, dtype, count
        if key not in self._kept:
            self._kept[key] = torch.zeros(count, device=device, dtype=dtype)
        return self._kept[key]


def dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return the linear of a dense weight [out_features, in_features]."""
    return lambda x: functional.linear(x, weight, bias)


def side_by_side(linears: Sequence[DecoderLinear], gate: bool = False) -> DecoderLinear:
    """Return linears of one input as one, outputs in a row, or those of a `gate` as it takes them."""

    def call(x: Any) -> torch.Tensor:
        outputs = torch.cat([linear(x) for linear in linears], -1)
        return alternate(outputs) if gate else outputs

    return call


def dequantized_on_use(parts: Parts, bias: torch.Tensor, dtype: torch.dtype) -> Linear:
    """Return an 8-bit linear that keeps its codes, and dequantizes them in every call.

    That costs some percent of the time of a page, whose linears have thousands of tokens, and
    halves the memory. The values are those of `dequantize`, cast to `dtype`.
    """
    scales = parts["scales"].T.contiguous()
    codes = unpack(parts["qweight"], parts["qzeros"], BYTE).to(torch.int8)

    def call(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, dense_weight(codes, scales).to(dtype), bias)

    return call


def dense_embeddings(table: torch.Tensor) -> Embeddings:
    """Return the lookup in a table [tokens of the vocabulary, hidden]."""
    return lambda ids: functional.embedding(ids, table)


def packed_embeddings(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype
) -> Embeddings:
    """Return the lookup in a packed table, see `dequantize_rows`, whose rows become `dtype`."""
    return lambda ids: dequantize_rows(packed[ids], scales[ids], bits).to(dtype)


def humming(
    parts: Parts,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    own_tiles: bool = False,
    gate: GateSums | None = None,
) -> DecoderLinear:
    """Return a packed linear that the humming kernels compute; on the device of `parts`.

    The weights are copied into another layout, so `parts` can be freed. Tiles are those of
    `humming_tiles` where it has some, unless humming's own are wanted. With these, outputs of which a
    `gate` is computed, as `fused.gate` takes them, are `Gated` for more tokens than `gate_beyond`.

    Raises
    ------
    ImportError
        If humming is not installed.
    """
    product = None if own_tiles else humming_product(parts, bits)
    return _without_overhead(_humming_layer(parts, bits, group_size, dtype), product, gate)


def humming_product(parts: Parts, bits: int) -> Product | None:
    """Return what the tiles of a packed linear depend on, or None if it has humming's own."""
    qweight = parts["qweight"]
    if qweight.device.type != "cuda":
        return None
    processors = torch.cuda.get_device_properties(qweight.device).multi_processor_count
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    product = Product(inputs, outputs, processors, tiles_may_split())
    capability = torch.cuda.get_device_capability(qweight.device)
    return product if has_tiles(capability, bits, product) else None


def tiles_may_split() -> bool:
    """Whether torch is not asked for deterministic algorithms."""
    return not torch.are_deterministic_algorithms_enabled()


def _humming_layer(parts: Parts, bits: int, group_size: int, dtype: torch.dtype) -> Any:
    from humming.layer import HummingLayer
    from humming.schema.autoround import AutoRoundWeightSchema

    qweight = parts["qweight"]
    layer: Any = HummingLayer(
        shape_n=qweight.shape[1],
        shape_k=qweight.shape[0] * 32 // bits,
        weight_config=AutoRoundWeightSchema(
            bits=bits, group_size=group_size, sym=True, packing_format="auto_round:auto_gptq"
        ),
        pad_n_to_multiple=HUMMING_OUT,
        pad_k_to_multiple=HUMMING_IN,
        torch_dtype=dtype,
    )
    layer.load_from_tensors({**parts, "scales": parts["scales"].to(dtype)})
    layer = layer.to(qweight.device)
    layer.transform()
    return layer


def _without_overhead(layer: Any, product: Product | None, gate: GateSums | None) -> DecoderLinear:
    """Return what a humming layer computes, its configuration written out once.

    Its tiles are those of `product`, if it is given; a `gate` is part of it as `humming` says. Each
    kernel starts while the previous one is finishing.
    """
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    from colqwen3.serving.humming_gate import GatedKernel, gated_config

    own = get_heuristics_config(
        layer.humming_config,
        use_batch_invariant=not tiles_may_split(),
        device=layer.weight.device,
    )
    ranges = [Range(*each) for each in own]
    config, last = layer.humming_config.to_str(), ranges[-1].up_to
    if product is None:
        return _launched(layer, HummingKernel, config, ranges)
    ranges = replace_tiles(ranges, product)
    if gate is None:
        return _launched(layer, HummingKernel, config, ranges)
    beyond, (tiles, sums) = gate_beyond(product), split_sums(product)
    few = [each for each in ranges if each.beyond < beyond]
    plain = _launched(layer, HummingKernel, config, few)
    kept = gate.zeros(tiles * sums, layer.weight.device, layer.weight_scale.dtype)
    ranges, config = gated_ranges(product, last), gated_config(config)
    gated = _launched(layer, GatedKernel, config, ranges, sorted_ids=kept, top_k=max(tiles, 1))
    return lambda x: Gated(gated(x)) if len(x) > beyond else plain(x)


def _launched(layer: Any, kernel: Any, config: str, ranges: Sequence[Range], **more: Any) -> Linear:
    """Return what starts kernels of humming for ranges of tokens; its first call compiles them.

    They are given what is `more`, too.
    """
    from humming.ops import launch_kernel

    tuning = [[beyond, up_to, {**options, "use_pdl": True}] for beyond, up_to, options in ranges]
    weight, scale, locks = layer.weight.data, layer.weight_scale.data, layer.locks
    made = functools.cache(
        lambda: kernel.prepare_kernels(config, None, json.dumps(tuning), weight.device)
    )

    def call(x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = launch_kernel(
            configs=made(),
            inputs=x,
            weight=weight,
            weight_scale=scale,
            locks=locks,
            **more,
        )
        return outputs

    return call


def humming_or_int8(
    parts: Parts,
    group_size: int,
    rotated: bool,
    own_tiles: bool = False,
    gate: GateSums | None = None,
) -> DecoderLinear:
    """Return a 4-bit linear that humming computes on bfloat16 inputs, and int8 kernels on others.

    Its weights are kept once, in humming's layout. Inputs in 8 bits may be `rotated`. Outputs of a
    `gate` are as of `humming`, for bfloat16 inputs.
    """
    from colqwen3.serving import int8_kernels as kernels

    layer = _humming_layer(parts, 4, group_size, torch.bfloat16)
    inputs, outputs = parts["qweight"].shape[0] * 8, parts["qweight"].shape[1]
    scales = parts["scales"].bfloat16()
    if rotated:
        codes = unpack(parts["qweight"], parts["qzeros"], 4)
        channels = rotated_channel_scales(codes, scales)
    else:
        channels = channel_scales(scales, 4)
    packed_scales = layer.weight_scale.data
    padding = packed_scales.shape[1] - outputs
    channels = functional.pad(channels, (0, padding), value=1.0)
    weight = kernels.PackedWeight(
        words=layer.weight.data,
        scales=packed_scales,
        channels=channels,
        inverse=1 / channels,
        rotated=rotated,
        outputs=outputs,
        inputs=inputs,
        group_size=group_size,
    )

    def in_int8(x: Int8Tokens) -> torch.Tensor:
        return kernels.multiply(x, kernels.unpack(weight))

    product = None if own_tiles else humming_product(parts, 4)
    return either(_without_overhead(layer, product, gate), in_int8)


def streams_int8(bits: int, inputs: int, group_size: int) -> bool:
    """Whether `humming_or_int8` can compute such a linear."""
    return bits == 4 and inputs % 128 == 0 and group_size in (32, 64, 128)


def with_int8_weight(linear: Linear, weight: Int8Weight, dtype: torch.dtype) -> DecoderLinear:
    """Return a linear that keeps a second weight for inputs in 8 bits."""
    if weight.codes.device.type == "cpu":
        return either(linear, lambda x: multiply(x, weight, dtype))
    from colqwen3.serving import int8_kernels as kernels

    return either(linear, lambda x: kernels.multiply(x, weight))


def packed_in_int8(parts: Parts, bits: int, dtype: torch.dtype, rotated: bool) -> Int8Weight:
    """Return a packed weight in 8 bits, its scales as a kernel for inputs of `dtype` has them."""
    codes = unpack(parts["qweight"], parts["qzeros"], bits)
    scales = parts["scales"].to(dtype)
    return rotate_into_int8(codes, scales) if rotated else express_in_int8(codes, scales, bits)


def either(linear: DecoderLinear, in_int8: Callable[[Int8Tokens], torch.Tensor]) -> DecoderLinear:
    """Return what computes one linear on inputs of either kind."""
    return lambda x: in_int8(x) if isinstance(x, Int8Tokens) else linear(x)


def auto_round_lib(parts: Parts, bits: int, group_size: int, dtype: torch.dtype) -> Linear:
    """Return a packed linear that auto-round-lib computes on a CPU.

    Raises
    ------
    ImportError
        If auto-round-lib is not installed.
    """
    from auto_round_kernel.qlinear import QuantLinearGPTQ

    rows, outputs = parts["qweight"].shape
    layer: Any = QuantLinearGPTQ(
        bits, group_size, True, rows * 32 // bits, outputs, False, weight_dtype=dtype
    )
    layer.qweight, layer.qzeros = parts["qweight"], parts["qzeros"]
    layer.scales = parts["scales"].to(dtype)
    layer.post_init()
    linear: Linear = layer
    return linear


def dequantized(parts: Parts, bits: int, group_size: int, dtype: torch.dtype) -> Linear:
    """Return a packed linear with its weight dequantized once."""
    weight = dequantize(parts["qweight"], parts["qzeros"], parts["scales"], bits)
    return dense(weight.to(dtype))


OWN_TILES = "humming, its own tiles"
KERNELS: dict[str, Callable[..., DecoderLinear]] = {
    "dense": dequantized,
    "humming": humming,
    OWN_TILES: functools.partial(humming, own_tiles=True),
    "auto-round-lib": auto_round_lib,
}
"""Name -> what builds a packed linear for it."""


def build(
    name: str, parts: Parts, bits: int, group_size: int, dtype: torch.dtype, gate: GateSums | None
) -> DecoderLinear:
    """Return the packed linear of a kernel; only humming's has use for whether a `gate` follows."""
    more = {"gate": gate} if name == "humming" else {}
    return KERNELS[name](parts, bits, group_size, dtype, **more)


def choose_kernel(
    parts: Parts, bits: int, group_size: int, dtype: torch.dtype, gate: GateSums | None = None
) -> str:
    """Return the name of the kernel for packed linears, by a trial with the linear `parts`.

    On a GPU that is humming when it is installed, on a CPU auto-round-lib when it is installed and
    takes less time than a dense weight; each only if it computes what the dequantized weight does.
    Otherwise linears are dense; on a GPU a warning says so.
    """
    gpu = parts["qweight"].device.type == "cuda"
    inputs, outputs = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
    first, module = ("humming", "humming") if gpu else ("auto-round-lib", "auto_round_kernel")
    names = [] if find_spec(module) is None else [first]
    if names and humming_product(parts, bits) is not None:
        names.append(OWN_TILES)
    what = f"{bits}-bit weights [{outputs}, {inputs}]"
    level = logging.WARNING if gpu else logging.INFO
    problem = f"{first} is not installed (extra {'gpu' if gpu else 'cpu'} of colqwen3-autoround)"
    if gpu and names:
        logger.info("compiling and trying the kernels of %s; compiled ones are kept", what)
    for name in names:
        if name == OWN_TILES:
            message = "%s: %s are tried with humming's own tiles, which are slower"
            logger.log(level, message, problem, what)
        try:
            linear = build(name, parts, bits, group_size, dtype, gate)
            whole, local = kernel_errors(linear, parts, bits, dtype, gate)
            if whole < MAXIMUM_ERROR and local < MAXIMUM_LOCAL_ERROR:  # NaN is not
                if gpu:
                    return name
                plain = KERNELS["dense"](parts, bits, group_size, dtype)
                faster = _cpu_seconds(linear, inputs, dtype) < _cpu_seconds(plain, inputs, dtype)
                return name if faster else "dense"
            problem = f"{name} is off by {whole:.2g}, and by {local:.2g} for a token or an output"
        except Exception as failure:  # a kernel library can fail in any way: compiler, driver, CPU
            problem = f"{name} fails ({first_line(failure)})"
    message = "%s: %s are served dense, as fast as the original and as large"
    logger.log(level, message, problem, what)
    return "dense"


@torch.inference_mode()
def _cpu_seconds(linear: Linear, inputs: int, dtype: torch.dtype) -> float:
    """Return the minimum time of some calls with a query's tokens."""
    x = torch.ones(26, inputs, dtype=dtype)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        linear(x)
        taken.append(time.perf_counter() - start)
    return min(taken)


@torch.inference_mode()
def kernel_errors(
    linear: DecoderLinear, parts: Parts, bits: int, dtype: torch.dtype, gate: GateSums | None = None
) -> tuple[float, float]:
    """Return how far a linear is from the dequantized weight, relative, on random inputs.

    Its outputs may be `Gated` where a `gate` follows.

    Returns
    -------
    tuple
        The largest error of any number of tokens, as a whole and of any one token or output; NaN
        where there is one. A kernel is tried with each of its tiles.
    """
    weight = dequantize(parts["qweight"], parts["qzeros"], parts["scales"], bits)
    generator = torch.Generator(weight.device).manual_seed(0)
    product = humming_product(parts, bits)
    tried = [*TRIED_TOKENS, *(GPU_TRIED_TOKENS if weight.is_cuda else ())]
    errors = []
    for tokens in [*tried, *(trial_tokens(product, gate is not None) if product else ())]:
        x = torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device)
        actual, expected = linear(x.to(dtype)), x.to(dtype).float() @ weight.T
        if isinstance(actual, Gated):
            actual, expected = actual.values, apply_gate(expected)
        error = actual.float().sub_(expected)
        errors.append(torch.stack([error.norm() / expected.norm(), local_error(error, expected)]))
    whole, local = torch.stack(errors).amax(0).tolist()  # NaN stays NaN
    return whole, local


def local_error(error: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the largest relative error of any row or column, NaN if there is one.

    One that is nearly 0 counts as a tenth of the whole: it has no error of its own.
    """
    floor = _root_mean_square(expected.flatten(), 0) / 10
    worst = [
        (_root_mean_square(error, axis) / _root_mean_square(expected, axis).clamp_min(floor)).max()
        for axis in (0, 1)
    ]
    return torch.stack(worst).max()


def _root_mean_square(x: torch.Tensor, axis: int) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=axis, dtype=torch.float32)
    return norm / math.sqrt(x.shape[axis])
