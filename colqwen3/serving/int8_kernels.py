"""GPU kernels for linears on 8-bit activations: what rounds activations, and products of int8.

Each kernel that rounds stands for one that a forward has anyway, so 8-bit activations cost no launch
but the one that rounds what attention gives. 4-bit weights stay in humming's layout, and become int8
for as long as a product takes: a layer's linears share that memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has types of its own

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from cuda.bindings import driver
from humming.jit.runtime import KernelRuntime
from triton.tools.tensor_descriptor import TensorDescriptor

from colqwen3.serving.int8 import Int8Tokens, Int8Weight

SOURCE = Path(__file__).with_name("int8.cu").read_text(encoding="utf-8")
VECTOR = 8
"""Features that a thread reads at a time: the features of a token are a multiple."""
THREADS = 256
"""Of a program, at most, where it is one token."""
CHUNK, ROWS, UNPACKING_THREADS = 128, 64, 128
"""Inputs, outputs and threads of a program that unpacks; inputs are a multiple."""
TILE = 128
"""Tokens, outputs and inputs of a tile of the product."""
TILES_IN_GROUP = 8
"""Rows of tiles that are worked on together, so that a cache holds their inputs."""
PROGRAMS = 2
"""Of the product on a multiprocessor."""


@dataclass(kw_only=True)
class _Kernel(KernelRuntime):  # type: ignore[misc]
    """A kernel template of `int8.cu` with its arguments; humming compiles and keeps it.

    Attributes
    ----------
    name
        Of the template.
    arguments
        Its own, as C++ writes them.
    """

    disable_fast_math: ClassVar[bool] = True
    name: str
    arguments: str

    def init_kernel(self) -> None:
        """Compile it, or find it compiled."""
        self.code = SOURCE
        self.kernel_expr = f"{self.name}<{self.arguments}>"
        self.prepare()

    def __call__(self, grid: tuple[int, int], threads: int, *values: Any) -> None:
        """Start it; with what is not read before `griddepcontrol.wait` it may start early."""
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.hStream = torch.cuda.current_stream().cuda_stream
        self.set_pdl_launch_attribute(config, True)
        types = tuple(_TYPES.get(type(value), ctypes.c_void_p) for value in values)
        plain = tuple(_address(value) for value in values)
        (result,) = driver.cuLaunchKernelEx(config, self.load_cubin(), (plain, types), 0)
        if int(result):
            raise RuntimeError(f"{self.name} does not start: {result!r}")


_TYPES = {int: ctypes.c_int, float: ctypes.c_float}
"""Of arguments that are no pointers."""


def _address(value: torch.Tensor | float | None) -> float:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return 0 if value is None else value


@functools.cache
def _kernel(name: str, arguments: tuple[int, ...], device: int) -> _Kernel:
    return _Kernel(name=name, arguments=", ".join(map(str, map(int, arguments))))


def _one_token_each(
    name: str,
    features: int,
    like: torch.Tensor,
    before: tuple[Any, ...],
    after: tuple[Any, ...] = (),
) -> Int8Tokens:
    """Run a kernel whose programs are one token each, and return what it rounds."""
    assert all(part is None or part.is_contiguous() for part in before)
    assert like.dtype == torch.bfloat16
    tokens, vectors = len(like), features // VECTOR
    codes = torch.empty(tokens, features, dtype=torch.int8, device=like.device)
    made = Int8Tokens(codes, torch.empty(tokens, device=like.device))
    each = -(-vectors // THREADS)
    threads = -(-vectors // (each * 32)) * 32
    kernel = _kernel(name, (each,), torch.cuda.current_device())
    kernel((tokens, 1), threads, *before, *made, *after, vectors)
    return made


def quantize_tokens(x: torch.Tensor) -> Int8Tokens:
    """Do as `int8.quantize_tokens` on bfloat16 [tokens, features]."""
    return _one_token_each("quantize", x.shape[1], x, (x,))


def gate(gate_up: torch.Tensor) -> Int8Tokens:
    """Do as `fused.gate`, and rotate and round the result, see `int8.rotate`."""
    return _one_token_each("gate", gate_up.shape[1] // 2, gate_up, (gate_up,))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Int8Tokens:
    """Do as `fused.rms_norm`, and round the result as `quantize_tokens`."""
    given = (x, None, weight, None)
    return _one_token_each("add_norm", x.shape[1], x, given, (eps,))


def add_rms_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, Int8Tokens]:
    """Do as `fused.add_rms_norm`, and round the norm as `quantize_tokens`."""
    total = torch.empty_like(x)
    given = (x, change, weight, total)
    return total, _one_token_each("add_norm", x.shape[1], x, given, (eps,))


@dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight as humming keeps it for 16-bit activations.

    Attributes
    ----------
    words
        Int32 [in_features / 16, padded x 2].
    scales
        Bfloat16 [groups, padded].
    channels
        Float32 [padded]: scales of the outputs in int8; 1 where padded.
    inverse
        One over `channels`.
    rotated
        Whether its inputs are, see `int8.rotate`.
    outputs, inputs, group_size
        Of the linear; inputs are a multiple of 128, a group is 32, 64 or 128.
    """

    words: torch.Tensor
    scales: torch.Tensor
    channels: torch.Tensor
    inverse: torch.Tensor
    rotated: bool
    outputs: int
    inputs: int
    group_size: int


def unpack(weight: PackedWeight) -> Int8Weight:
    """Return a 4-bit weight in 8 bits, as `int8.express_in_int8` or `rotate_into_int8` does."""
    codes = torch.empty(weight.outputs, weight.inputs, dtype=torch.int8, device=weight.words.device)
    padded = len(weight.channels)
    kernel = _kernel("unpack", (weight.group_size, weight.rotated), torch.cuda.current_device())
    kernel(
        (weight.inputs // CHUNK, padded // ROWS), UNPACKING_THREADS,
        weight.words, weight.scales, weight.inverse, codes,
        weight.outputs, padded, weight.inputs,
    )  # fmt: skip
    return Int8Weight(codes, weight.channels)


@triton.jit(do_not_specialize=["tokens"])
def _multiply(
    x, x_scales, weight, weight_scales, out, tokens, outputs, inputs: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip  # pragma: no cover - runs on a GPU
    down, across = tl.cdiv(tokens, TILE), tl.cdiv(outputs, TILE)
    half: tl.constexpr = TILE // 2
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * across)
        rows = min(down - group * GROUP, GROUP)
        token = (group * GROUP + tile % (GROUP * across) % rows) * TILE
        output = tile % (GROUP * across) // rows * TILE
        sums = tl.zeros((TILE, TILE), tl.int32)
        for k in range(0, inputs, TILE):
            part = weight.load([output, k])
            sums = tl.dot(x.load([token, k]), part.T, sums, out_dtype=tl.int32)
        m, n = token + tl.arange(0, TILE), output + tl.arange(0, TILE)
        scale = tl.load(x_scales + m, m < tokens, 0.0)[:, None]
        scale = scale * tl.load(weight_scales + n, n < outputs, 0.0)[None, :]
        values = (sums.to(tl.float32) * scale).to(tl.bfloat16)
        halves = tl.permute(tl.reshape(values, (TILE, 2, half)), (0, 2, 1))
        first, second = tl.split(halves)
        out.store([token, output], first)
        out.store([token, output + half], second)


def multiply(x: Int8Tokens, weight: Int8Weight) -> torch.Tensor:
    """Do as `int8.multiply`: bfloat16 [tokens, out_features].

    Inputs are a multiple of sixteen, outputs of eight; needs compute capability 9.0.
    """
    (tokens, inputs), outputs = x.codes.shape, len(weight.codes)
    out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=x.codes.device)
    tiles = triton.cdiv(tokens, TILE) * triton.cdiv(outputs, TILE)
    processors = torch.cuda.get_device_properties(out.device).multi_processor_count
    programs = min(tiles, PROGRAMS * processors)
    describe = TensorDescriptor.from_tensor
    _multiply[(programs,)](
        describe(x.codes, [TILE, TILE]), x.scales,
        describe(weight.codes, [TILE, TILE]), weight.scales,
        describe(out, [TILE, TILE // 2]),
        tokens, outputs, inputs,
        TILE=TILE, GROUP=TILES_IN_GROUP, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
