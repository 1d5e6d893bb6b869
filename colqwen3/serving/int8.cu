// Rounds activations to int8 with one scale a token, and takes 4-bit weights to int8.
//
// One program is one token. What a kernel rounds is held in registers, eight bfloat16 numbers a vector.

typedef unsigned int u32;
typedef unsigned short u16;
typedef signed char s8;

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void widen(uint4 vector, float *values) {
  u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000);
  }
}

__device__ __forceinline__ u32 narrow(float low, float high) {  // two bfloat16
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ uint4 narrow(const float *values) {
  return make_uint4(narrow(values[0], values[1]), narrow(values[2], values[3]),
                    narrow(values[4], values[5]), narrow(values[6], values[7]));
}

// The largest magnitude's bits: NaN is above all numbers, and stays.
__device__ __forceinline__ u32 largest_of(const float *values) {
  u32 top = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) top = max(top, __float_as_uint(values[j]) & 0x7FFFFFFF);
  return top;
}

__device__ __forceinline__ uint2 rounded(const float *values, float factor) {
  u32 words[2];
#pragma unroll
  for (int w = 0; w < 2; w++) {
    const float *four = values + 4 * w;
    u32 low = __byte_perm(__float2int_rn(four[0] * factor), __float2int_rn(four[1] * factor), 0x0040);
    u32 high = __byte_perm(__float2int_rn(four[2] * factor), __float2int_rn(four[3] * factor), 0x0040);
    words[w] = __byte_perm(low, high, 0x5410);
  }
  return make_uint2(words[0], words[1]);
}

template <int VECTORS>
__device__ __forceinline__ void store_int8(float (*values)[8], s8 *codes, float *scales, int vectors) {
  __shared__ u32 tops[32];
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) top = max(top, largest_of(values[i]));
  top = __reduce_max_sync(0xFFFFFFFF, top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  top = threadIdx.x % 32 < blockDim.x / 32 ? tops[threadIdx.x % 32] : 0;
  top = max(__reduce_max_sync(0xFFFFFFFF, top), __float_as_uint(1e-8f));
  float largest = __uint_as_float(top), factor = 127.0f / largest;
  if (threadIdx.x == 0) scales[blockIdx.x] = largest / 127.0f;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    int at = threadIdx.x + i * blockDim.x;
    if (at < vectors) ((uint2 *)codes)[(size_t)blockIdx.x * vectors + at] = rounded(values[i], factor);
  }
}

template <int VECTORS> __global__ void quantize(const uint4 *x, s8 *codes, float *scales, int vectors) {
  let_next_start();
  await_previous();
  float values[VECTORS][8] = {};
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    int at = threadIdx.x + i * blockDim.x;
    if (at < vectors) widen(x[(size_t)blockIdx.x * vectors + at], values[i]);
  }
  store_int8<VECTORS>(values, codes, scales, vectors);
}

// Two neighbouring threads hold what is rotated together.
template <int VECTORS> __global__ void gate(const uint4 *x, s8 *codes, float *scales, int vectors) {
  let_next_start();
  await_previous();
  float values[VECTORS][8] = {};
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    int at = threadIdx.x + i * blockDim.x;
    if (at < vectors) {
      const uint4 *both = x + ((size_t)blockIdx.x * vectors + at) * 2;
      float up[8];
      widen(both[0], values[i]);
      widen(both[1], up);
#pragma unroll
      for (int j = 0; j < 8; j++) values[i][j] = values[i][j] / (1 + __expf(-values[i][j])) * up[j];
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (!(j & step)) {
          float first = values[i][j], second = values[i][j + step];
          values[i][j] = first + second;
          values[i][j + step] = first - second;
        }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float other = __shfl_xor_sync(0xFFFFFFFF, values[i][j], 1);
      values[i][j] = 0.25f * (threadIdx.x & 1 ? other - values[i][j] : values[i][j] + other);
    }
  }
  store_int8<VECTORS>(values, codes, scales, vectors);
}

template <int VECTORS>
__global__ void add_norm(const uint4 *x, const uint4 *change, const uint4 *weight, uint4 *total, s8 *codes,
                         float *scales, float eps, int vectors) {
  __shared__ float sums[32];
  let_next_start();
  await_previous();
  float values[VECTORS][8] = {}, sum = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    size_t place = (size_t)blockIdx.x * vectors + at;
    widen(x[place], values[i]);
    if (change) {
      float more[8];
      widen(change[place], more);
#pragma unroll
      for (int j = 0; j < 8; j++) values[i][j] += more[j];
      uint4 rounded = narrow(values[i]);
      total[place] = rounded;
      widen(rounded, values[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum += values[i][j] * values[i][j];
  }
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0;
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
  float size = rsqrtf(sum / (8 * vectors) + eps);
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    float factors[8];
    widen(weight[at], factors);
#pragma unroll
    for (int j = 0; j < 8; j++) values[i][j] *= size;
    widen(narrow(values[i]), values[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) values[i][j] *= factors[j];
    widen(narrow(values[i]), values[i]);
  }
  store_int8<VECTORS>(values, codes, scales, vectors);
}

// ---- 4-bit weights -----------------------------------------------------------------------------------------
// humming's layout for 16-bit activations: of each 16 inputs ("block") and 64 outputs, lane l of a warp has four
// words, one for each 16 outputs. Nibble 4 a + 2 b + c of word s is the code, 8 added, of output 16 s + 8 b + l / 4
// and input 8 c + 2 (l % 4) + a. Scales of each 64 outputs are in the order (output % 8, output / 8).

constexpr int CHUNK = 128;          // inputs of a program
constexpr int PITCH = CHUNK + 16;   // bytes of an output in shared memory

__device__ __forceinline__ u32 twice(float value) {  // float16
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return (u32)half << 16 | half;
}

// The weights of inputs 8 C + 2 (l % 4) and the next, of an output of the word's B: int8 in the low byte of each half.
template <int B, int C> __device__ __forceinline__ u32 two(u32 word, u32 ratio) {
  u32 codes;
  asm("lop3.b32 %0, %1, 0x000F000F, 0x64006400, 0xEA;" : "=r"(codes) : "r"(word >> (8 * B + 4 * C)));  // 1024 + code
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(codes) : "r"(0x64086408));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(codes) : "r"(ratio), "r"(0x66006600));  // 1536: steps are integers
  asm("min.f16x2 %0, %0, %1;" : "+r"(codes) : "r"(0x667F667F));                     // 1536 + 127
  return codes;
}

// The same two, in float32, rounded before they are added: as plain torch does.
template <int B, int C> __device__ __forceinline__ float2 two_wide(u32 word, float ratio) {
  u32 pair = word >> (8 * B + 4 * C);
  return make_float2(__fmul_rn((int)(pair & 15) - 8, ratio), __fmul_rn((int)(pair >> 16 & 15) - 8, ratio));
}

// Sum and difference with the lane `STEP` away, by the lane's own bit.
template <int STEP> __device__ __forceinline__ float across(float value) {
  float other = __shfl_xor_sync(0xFFFFFFFF, value, STEP);
  return threadIdx.x & STEP ? other - value : value + other;
}

// Both pairs of an output's block, rotated: int8 in the low byte of each half.
template <int B> __device__ __forceinline__ uint2 rotated_four(u32 word, float ratio) {
  float2 low = two_wide<B, 0>(word, ratio), high = two_wide<B, 1>(word, ratio);
  low = make_float2(low.x + low.y, low.x - low.y);
  high = make_float2(high.x + high.y, high.x - high.y);
  float values[4] = {low.x + high.x, low.y + high.y, low.x - high.x, low.y - high.y};
  int codes[4];
#pragma unroll
  for (int i = 0; i < 4; i++) codes[i] = __float2int_rn(0.25f * across<1>(across<2>(values[i])));
  return make_uint2(__byte_perm(codes[0], codes[1], 0x5410), __byte_perm(codes[2], codes[3], 0x5410));
}

template <int GROUP_SIZE, bool ROTATED>
__global__ void __launch_bounds__(128)
unpack(const uint4 *packed, const u16 *scales, const float *inverse, s8 *out, int outputs, int padded, int inputs) {
  __shared__ __align__(16) s8 tile[64 * PITCH];
  int chunk = blockIdx.x, first = blockIdx.y * 64, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row = lane / 4;
  uint4 words[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    words[i] = packed[((size_t)(chunk * 8 + warp * 2 + i) * padded + first) / 2 + lane];
  // the blocks of a warp are of one group
  size_t group = chunk * (CHUNK / GROUP_SIZE) + warp * 32 / GROUP_SIZE;
  uint4 eight = *(const uint4 *)(scales + group * padded + first + row * 8);
  u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
  float ratios[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float scale = __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000 : pairs[i / 2] << 16);
    ratios[i] = scale * inverse[first + i * 8 + row];
  }
  let_next_start();
  await_previous();  // which may still read what is written here
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
    s8 *to = tile + row * PITCH + (warp * 2 + i) * 16 + lane % 4 * 2;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint2 even, odd;
      if (ROTATED) {
        even = rotated_four<0>(w[s], ratios[2 * s]);
        odd = rotated_four<1>(w[s], ratios[2 * s + 1]);
      } else {
        u32 low = twice(ratios[2 * s]), high = twice(ratios[2 * s + 1]);
        even = make_uint2(two<0, 0>(w[s], low), two<0, 1>(w[s], low));
        odd = make_uint2(two<1, 0>(w[s], high), two<1, 1>(w[s], high));
      }
      s8 *here = to + s * 16 * PITCH;
      *(u16 *)here = __byte_perm(even.x, 0, 0x0020);
      *(u16 *)(here + 8) = __byte_perm(even.y, 0, 0x0020);
      *(u16 *)(here + 8 * PITCH) = __byte_perm(odd.x, 0, 0x0020);
      *(u16 *)(here + 8 * PITCH + 8) = __byte_perm(odd.y, 0, 0x0020);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int piece = threadIdx.x + i * 128, n = piece / 8, part = piece % 8;
    if (first + n < outputs)
      *(uint4 *)(out + (size_t)(first + n) * inputs + chunk * CHUNK + part * 16) = *(uint4 *)(tile + n * PITCH + part * 16);
  }
}
