// The optimizer step over a list of tensors: what fasttune_kernels/optimizer_step_kernels.py has in Triton,
// with what Triton cannot express, lookup tables in shared memory. To quantize to 8 bits takes 35
// instructions there, and 8 and a lookup here.
//
// A warp has a chunk, some tiles of one tensor, and takes every gridDim-th. In a tile of 4 x 256 elements, a
// lane has 8 neighbours of each quarter: loads of 16 bytes from bf16 and twice that from float32, the
// largest magnitude of a quantized block by shuffles, and one Philox counter for the four elements that
// are 256 apart. Weights and gradients are found by address; state is in arenas, where each tensor starts a
// tile. Needs no header, so that NVRTC alone compiles it.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bf16 {
  u16 bits;
};

constexpr int BLOCK = 1024, QUANTUM = 256, LANE = 8;
constexpr int THREADS = 256;

// Of `lookup_tables` in optimizer_step_cuda.py: for each 128th of an octave from 2^-23 to 1 the one border
// between two codes that may be in it, with the code below it in the lowest 8 bits.
constexpr int CELLS = 2945, FIRST_CELL = (127 - 23) << 7;

struct Tables {
  u32 encode_m[CELLS], encode_v[CELLS];
  float decode_m[256], decode_v[256];
};

// -- 8 elements ------------------------------------------------------------------------------------------

__device__ __forceinline__ float from_bits(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ u32 nearest(u32 x) { return 0x7fff + ((x >> 16) & 1); }

// float32 with a bf16's mantissa: up where `bits`, 16 of them, and what is cut off carry.
__device__ __forceinline__ float round_to_bf16(float x, u32 bits) {
  const u32 raw = __float_as_uint(x);
  return (raw & 0x7f800000) == 0x7f800000 ? x : from_bits((raw + (bits & 0xffff)) & 0xffff0000);
}

__device__ __forceinline__ void load(const float* from, float (&x)[LANE]) {
  const float4 a = __ldcs(reinterpret_cast<const float4*>(from));
  const float4 b = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void load(const bf16* from, float (&x)[LANE]) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
  const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < LANE; ++i) x[i] = from_bits(i & 1 ? pairs[i / 2] & 0xffff0000 : pairs[i / 2] << 16);
}

__device__ __forceinline__ void store(float* to, const float (&x)[LANE]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  __stcs(reinterpret_cast<float4*>(to) + 1, make_float4(x[4], x[5], x[6], x[7]));
}

// Of what is rounded already.
__device__ __forceinline__ void store(bf16* to, const float (&x)[LANE]) {
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __byte_perm(__float_as_uint(x[2 * i]), __float_as_uint(x[2 * i + 1]), 0x7632);
  }
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return from_bits(u32(x.bits) << 16); }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, bf16* to) { to->bits = u16(__float_as_uint(x) >> 16); }

// The same of a tensor, which ends somewhere and need not be aligned.
template <typename T>
__device__ __forceinline__ void load_some(const T* from, int left, bool wide, float (&x)[LANE]) {
  if (wide && left >= LANE) return load(from, x);
#pragma unroll
  for (int i = 0; i < LANE; ++i) x[i] = i < left ? widen(from[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_some(T* to, int left, bool wide, const float (&x)[LANE]) {
  if (wide && left >= LANE) return store(to, x);
#pragma unroll
  for (int i = 0; i < LANE; ++i) {
    if (i < left) narrow(x[i], to + i);
  }
}

// -- state -----------------------------------------------------------------------------------------------

template <bool SIGNED>
__device__ __forceinline__ void load_state(
    const float* from, const float*, i64 at, const Tables&, float (&x)[LANE]) {
  load(from + at, x);
}

template <bool SIGNED>
__device__ __forceinline__ void load_state(
    const u8* from, const float* absmax, i64 at, const Tables& tables, float (&x)[LANE]) {
  const float* decode = SIGNED ? tables.decode_m : tables.decode_v;
  const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(from + at));
  const float scale = absmax[at / QUANTUM];
#pragma unroll
  for (int i = 0; i < LANE; ++i) {
    const u32 word = i < 4 ? raw.x : raw.y;
    x[i] = decode[(word >> (8 * (i % 4))) & 0xff] * scale;
  }
}

template <bool SIGNED>
__device__ __forceinline__ void store_state(
    float* to, float*, i64 at, const Tables&, const float (&x)[LANE]) {
  store(to + at, x);
}

template <bool SIGNED>
__device__ __forceinline__ void store_state(
    u8* to, float* absmax, i64 at, const Tables& tables, const float (&x)[LANE]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < LANE; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
  }
  const float inverse = 1.0f / fmaxf(largest, 1e-37f);
  u32 codes[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < LANE; ++i) {
    const u32 size = __float_as_uint(fabsf(x[i]) * inverse);
    // At most 1 and a few units in the last place, which is in the last cell, or NaN.
    const int cell = min(max(int(size >> 16) - FIRST_CELL, 0), CELLS - 1);
    const u32 border = (SIGNED ? tables.encode_m : tables.encode_v)[cell];
    u32 code = (border & 0xff) + (size > border);
    if (SIGNED) code = x[i] < 0.0f ? 127 - min(code, 127u) : 127 + code;  // there is no -1
    codes[i / 4] |= code << (8 * (i % 4));
  }
  __stcs(reinterpret_cast<uint2*>(to + at), make_uint2(codes[0], codes[1]));
  if (threadIdx.x % 32 == 0) absmax[at / QUANTUM] = largest;
}

// -- random numbers --------------------------------------------------------------------------------------

// Philox 4x32 of 7 rounds: words[q] is for quarter q.
__device__ __forceinline__ void philox(u64 counter, u64 key, u32 (&words)[4]) {
  u32 c[4] = {u32(counter), u32(counter >> 32), 0, 0};
  u32 k0 = u32(key), k1 = u32(key >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const u64 a = u64(0xD2511F53u) * c[0], b = u64(0xCD9E8D57u) * c[2];
    c[0] = u32(b >> 32) ^ c[1] ^ k0, c[1] = u32(b);
    c[2] = u32(a >> 32) ^ c[3] ^ k1, c[3] = u32(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) words[q] = c[q];
}

// -- kernel ----------------------------------------------------------------------------------------------

struct NoAverage {};

__device__ __forceinline__ void average(NoAverage*, i64, float, const float (&)[LANE], const u32 (&)[LANE]) {}

__device__ __forceinline__ void average(
    float* ema, i64 at, float rest, const float (&w)[LANE], const u32 (&)[LANE]) {
  float e[LANE];
  load(ema + at, e);
#pragma unroll
  for (int i = 0; i < LANE; ++i) e[i] += rest * (w[i] - e[i]);
  store(ema + at, e);
}

__device__ __forceinline__ void average(
    bf16* ema, i64 at, float rest, const float (&w)[LANE], const u32 (&words)[LANE]) {
  float e[LANE];
  load(ema + at, e);
#pragma unroll
  for (int i = 0; i < LANE; ++i) e[i] = round_to_bf16(e[i] + rest * (w[i] - e[i]), words[i] >> 16);
  store(ema + at, e);
}

template <typename T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;
template <typename T>
constexpr bool is_8_bit = false;
template <>
constexpr bool is_8_bit<u8> = true;

template <typename Weight, typename Grad, typename State, typename Ema, bool STOCHASTIC>
__global__ void __launch_bounds__(THREADS, 2) optimizer_step(
    const int2* chunks, int num_chunks, int tiles, const i64* layout, const u64* pointers,
    int num_tensors, int aligned, State* m, State* v, float* m_absmax, float* v_absmax, Ema* ema,
    const float* hyper, const float* scalars, const u64* seed, const u32* tables_from, float beta1,
    float rest1, float beta2, float rest2, float eps) {
  if (scalars[2] == 0.0f) return;
  constexpr int WORDS = is_8_bit<State> ? sizeof(Tables) / 4 : 0;
  __shared__ u32 tables_words[is_8_bit<State> ? sizeof(Tables) / 4 : 1];
  for (int i = threadIdx.x; i < WORDS; i += THREADS) tables_words[i] = tables_from[i];
  __syncthreads();
  const Tables& tables = *reinterpret_cast<const Tables*>(tables_words);

  const float factor = scalars[1], correction = rsqrtf(scalars[4]), ema_rest = scalars[5];
  const u64 key = *seed;
  const int lane = threadIdx.x % 32, warps = THREADS / 32;
  for (int chunk = blockIdx.x * warps + threadIdx.x / 32; chunk < num_chunks; chunk += gridDim.x * warps) {
    const int2 place = chunks[chunk];
    const i64 begin = layout[3 * place.x], numel = layout[3 * place.x + 1], group = layout[3 * place.x + 2];
    Weight* weight = reinterpret_cast<Weight*>(pointers[place.x]);
    const Grad* grad = reinterpret_cast<const Grad*>(pointers[num_tensors + place.x]);
    const float lr = scalars[0] * hyper[2 * group];
    const float rate = lr / scalars[3], kept = 1.0f - lr * hyper[2 * group + 1];
    const int all = int((numel + BLOCK - 1) / BLOCK), last = min(all, place.y + tiles);
    for (int tile = place.y; tile < last; ++tile) {
      u32 words[4][LANE] = {};
      if (STOCHASTIC || is_bf16<Ema>) {
#pragma unroll
        for (int i = 0; i < LANE; ++i) {
          u32 four[4];
          philox(u64(begin / 4 + i64(tile) * QUANTUM + lane * LANE + i), key, four);
#pragma unroll
          for (int q = 0; q < 4; ++q) words[q][i] = four[q];
        }
      }
// Unrolled, this would take 155 registers and 4 times the instructions.
#pragma unroll 1
      for (int q = 0; q < 4; ++q) {
        const i64 local = i64(tile) * BLOCK + q * QUANTUM + lane * LANE, at = begin + local;
        const int left = int(min(numel - local, i64(LANE)));
        float g[LANE], w[LANE], x[LANE], y[LANE];
        load_some(grad + local, left, aligned, g);
        load_some(weight + local, left, aligned, w);
        load_state<true>(m, m_absmax, at, tables, x);
        load_state<false>(v, v_absmax, at, tables, y);
#pragma unroll
        for (int i = 0; i < LANE; ++i) {
          g[i] *= factor;
          x[i] = beta1 * x[i] + rest1 * g[i];
          y[i] = beta2 * y[i] + rest2 * (g[i] * g[i]);
          w[i] = w[i] * kept - __fdividef(rate * x[i], sqrtf(y[i]) * correction + eps);
          if (is_bf16<Weight>) {
            w[i] = round_to_bf16(w[i], STOCHASTIC ? words[0][i] : nearest(__float_as_uint(w[i])));
          }
        }
        store_state<true>(m, m_absmax, at, tables, x);
        store_state<false>(v, v_absmax, at, tables, y);
        store_some(weight + local, left, aligned, w);
        average(ema, at, ema_rest, w, words[0]);
#pragma unroll
        for (int i = 0; i < LANE; ++i) {
          words[0][i] = words[1][i], words[1][i] = words[2][i], words[2][i] = words[3][i];
        }
      }
    }
  }
}
