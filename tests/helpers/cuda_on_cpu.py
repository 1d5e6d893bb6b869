"""Runs the kernels of a CUDA file on a CPU: a C++ compiler, one thread each, assembler by hand."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

COMPILER = shutil.which("g++")

SHIM = r"""
#include <algorithm>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tuple>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
using std::max; using std::min;
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
struct Index { int x, y, z; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
static uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static thread_local Index threadIdx, blockIdx;
static Index blockDim;
static std::unique_ptr<std::barrier<>> whole;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static uint32_t lanes[32][32];
static void __syncthreads() { whole->arrive_and_wait(); }
static uint32_t exchange(uint32_t value, int from) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  lanes[warp][lane] = value;
  warps[warp]->arrive_and_wait();
  uint32_t got = lanes[warp][from];
  warps[warp]->arrive_and_wait();
  return got;
}
static float __uint_as_float(uint32_t v) { float f; memcpy(&f, &v, 4); return f; }
static uint32_t __float_as_uint(float f) { uint32_t v; memcpy(&v, &f, 4); return v; }
static float __shfl_xor_sync(uint32_t, float v, int step) {
  return __uint_as_float(exchange(__float_as_uint(v), threadIdx.x % 32 ^ step));
}
static uint32_t __reduce_max_sync(uint32_t, uint32_t v) {
  for (int step = 16; step; step /= 2) v = max(v, exchange(v, threadIdx.x % 32 ^ step));
  return v;
}
static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t both = (uint64_t)b << 32 | a; uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= (uint32_t)(both >> (8 * (s >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
static int __float2int_rn(float f) { return std::isnan(f) ? 0 : (int)lrintf(f); }
#define __expf expf
static float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }
static float rsqrtf(float f) { return 1 / sqrtf(f); }
static float half(uint32_t bits) { uint16_t b = bits; _Float16 h; memcpy(&h, &b, 2); return (float)h; }
static uint16_t to_half(double v) { _Float16 h = (_Float16)v; uint16_t b; memcpy(&b, &h, 2); return b; }
template <class F> static uint32_t both_halves(F f, uint32_t a, uint32_t b, uint32_t c = 0) {
  return (uint32_t)to_half(f(half(a >> 16), half(b >> 16), half(c >> 16))) << 16
         | to_half(f(half(a), half(b), half(c)));
}
static uint32_t sub_halves(uint32_t a, uint32_t b) {
  return both_halves([](double x, double y, double) { return x - y; }, a, b);
}
static uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  return both_halves([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
static uint32_t min_halves(uint32_t a, uint32_t b) {
  return both_halves([](double x, double y, double) { return x < y ? x : y; }, a, b);
}
static uint16_t to_bfloat(float f) {
  uint32_t v = __float_as_uint(f);
  if (std::isnan(f)) return 0x7FFF;
  return (v + 0x7FFF + (v >> 16 & 1)) >> 16;
}
static void *map(const char *path) {
  if (!strcmp(path, "null")) return nullptr;
  int file = open(path, O_RDWR);
  struct stat info; fstat(file, &info);
  return mmap(nullptr, info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
}
template <class F> static void run(int x, int y, int threads, F kernel) {
  blockDim = {threads, 1, 1};
  whole = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> all;
  for (int t = 0; t < threads; t++) all.emplace_back([=] {
    threadIdx = {t, 0, 0};
    for (int i = 0; i < x; i++) for (int j = 0; j < y; j++) {
      blockIdx = {i, j, 0};
      kernel();
      whole->arrive_and_wait();
    }
  });
  for (auto &thread : all) thread.join();
}
"""

ASSEMBLER = [
    (r'asm volatile\("griddepcontrol[^;]*;" *(::: "memory")?\);', ""),
    (
        r'asm\("lop3\.b32 %0, %1, (\w+), (\w+), 0xEA;" : "=r"\((\w+)\) : "r"\((.*?)\)\);',
        r"\3 = ((\4) & \1) | \2;",
    ),
    (
        r'asm\("(sub|min)(?:\.rn)?\.f16x2 %0, %0, %1;" : "\+r"\((\w+)\) : "r"\((\w+)\)\);',
        r"\2 = \1_halves(\2, \3);",
    ),
    (
        r'asm\("fma\.rn\.f16x2 %0, %0, %1, %2;" : "\+r"\((\w+)\) : "r"\((\w+)\), "r"\((\w+)\)\);',
        r"\1 = fma_halves(\1, \2, \3);",
    ),
    (
        r'asm\("cvt\.rn\.f16\.f32 %0, %1;" : "=h"\((\w+)\) : "f"\((\w+)\)\);',
        r"\1 = to_half(\2);",
    ),
    (
        r'asm\("cvt\.rn\.bf16x2\.f32 %0, %1, %2;" : "=r"\((\w+)\) : "f"\((\w+)\), "f"\((\w+)\)\);',
        r"\1 = (u32)to_bfloat(\2) << 16 | to_bfloat(\3);",
    ),
]


class CudaOnCpu:
    """A CUDA file, compiled for the CPU kernel by kernel.

    Parameters
    ----------
    source
        The file.
    folder
        For what is compiled.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        text = source.read_text(encoding="utf-8")
        for pattern, replacement in ASSEMBLER:
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        assert "asm" not in text, "an instruction that this file does not know"
        self._text, self._folder = text, folder

    def run(
        self, kernel: str, types: str, grid: tuple[int, int], threads: int, *values: Any
    ) -> None:
        """Run a kernel, such as ``gate<5>``, on tensors and numbers.

        Parameters
        ----------
        kernel
            With its template arguments.
        types
            Those of its parameters, in C++, with commas between.
        grid, threads
            Programs in two directions, and threads of each.
        values
            What it is given; None for a null pointer.
        """
        kinds = types.split(", ")
        program = self._folder / re.sub("[^a-z0-9]", "_", kernel)
        if not program.exists():
            read = ", ".join(
                f"({kind})map(argv[{place}])" if kind.endswith("*")
                else f"({kind})ato{'f' if kind == 'float' else 'i'}(argv[{place}])"
                for place, kind in enumerate(kinds, 4)
            )  # fmt: skip
            names = ", ".join(f"v{number}" for number in range(len(kinds)))
            main = (
                "int main(int, char **argv) {\n"
                f"  auto [{names}] = std::make_tuple({read});\n"
                f"  run(atoi(argv[1]), atoi(argv[2]), atoi(argv[3]), [=] {{ {kernel}({names}); }});\n}}\n"
            )
            code = program.with_suffix(".cpp")
            code.write_text(f"{SHIM}\n{self._text}\n{main}")
            command = [str(COMPILER), "-std=c++20", "-O1", "-w", "-pthread", str(code)]
            subprocess.run([*command, "-o", str(program)], check=True)
        words = [str(program), *map(str, (*grid, threads))]
        files: dict[Path, torch.Tensor] = {}
        for value in values:
            if isinstance(value, torch.Tensor):
                path = self._folder / f"value{len(files)}"
                path.write_bytes(value.contiguous().view(torch.uint8).numpy().tobytes())
                files[path] = value
                words.append(str(path))
            else:
                words.append("null" if value is None else repr(value))
        # a process of its own: what hangs or breaks ends with it
        subprocess.run(words, check=True, timeout=120)
        for path, value in files.items():
            read_back = torch.frombuffer(bytearray(path.read_bytes()), dtype=value.dtype)
            value.copy_(read_back.view(value.shape))
