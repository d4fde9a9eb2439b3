// The optimizer step of one tile of 1024 elements, in plain loops that compilers vectorise. No include
// guard: optimizer_step.cpp includes this once for each instruction set, in a namespace of its own, with
// FMA(a, b, c) = a b + c, rounded once where there is such an instruction.
//
// All arithmetic is in float32 on a quarter of a tile, whose buffers leave room for tables and what is
// fetched in the first-level cache. float32 tensors are worked on where they are; others are widened into a
// buffer, and rounded or quantized out of it. So the loops are one for each type, and not one for each
// combination of types. Rounding and average go piece by piece.
//
// Operations come in the order of the PyTorch path (optimizer_step.py), and contraction is off, so that
// both agree to the last bit or two. The random numbers are the same.

constexpr int PIECE = WIDTH;  // elements that are rounded and averaged while they are in registers

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// -- 16-bit types ---------------------------------------------------------------------------------

template <int COUNT>
void widen_bf16(const uint16_t* from, float* to) {
  for (int i = 0; i < COUNT; ++i) to[i] = as_float(uint32_t(from[i]) << 16);
}

template <int COUNT>
void widen_fp16(const uint16_t* from, float* to) {
  for (int i = 0; i < COUNT; ++i) {
    const uint32_t sign = uint32_t(from[i] & 0x8000) << 16, rest = uint32_t(from[i] & 0x7fff) << 13;
    const uint32_t finite = rest + (112u << 23);  // the exponents' biases are 112 apart
    const uint32_t normal = rest >= (31u << 23) ? finite + (112u << 23) : finite;  // inf, NaN
    const uint32_t small = as_bits(as_float(rest + (113u << 23)) - as_float(113u << 23));
    to[i] = as_float(sign | (rest < (1u << 23) ? small : normal));
  }
}

inline uint32_t nearest_bf16(uint32_t x) {
  const uint32_t rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  return (x & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;  // NaN, which could become infinite
}

inline uint32_t nearest_fp16(uint32_t bits) {
  const uint32_t x = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const uint32_t normal = (x - (112u << 23) + 0xfff + ((x >> 13) & 1)) >> 13;
  const uint32_t small = as_bits(as_float(x) + 0.5f) - as_bits(0.5f);  // 2^-24 is the last bit of 0.5
  const uint32_t finite = x < (113u << 23) ? small : normal;
  const uint32_t huge = x > 0x7f800000 ? 0x7e00 : 0x7c00;
  return sign | (x >= (143u << 23) ? huge : finite);
}

// The three below also leave in `x` what they store.
INLINE void round_bf16(float* x, uint16_t* to) {
  for (int i = 0; i < PIECE; ++i) {
    const uint32_t rounded = nearest_bf16(as_bits(x[i]));
    to[i] = uint16_t(rounded);
    x[i] = as_float(rounded << 16);
  }
}

// What 16 random bits are added to. Of infinity the lower half is zeros, and nothing carries; NaN becomes one
// whose lower half is. Selecting before the sum spares vectors of 32 bits a detour over 16.
inline uint32_t before_rounding(float x) { return x == x ? as_bits(x) : 0x7fc00000; }

// Up with the probability of the part that is cut off; the random bits are a half of `words`.
template <bool HIGH>
INLINE void round_bf16_stochastic(float* x, uint16_t* to, const uint32_t* words) {
  for (int i = 0; i < PIECE; ++i) {
    const uint32_t sum = before_rounding(x[i]) + (HIGH ? words[i] >> 16 : words[i] & 0xffff);
    to[i] = uint16_t(sum >> 16);
    x[i] = as_float(sum & 0xffff0000);
  }
}

void round_fp16(float* x, uint16_t* to) {
  for (int i = 0; i < PIECE; ++i) to[i] = uint16_t(nearest_fp16(as_bits(x[i])));
  widen_fp16<PIECE>(to, x);
}

void widen(const void* from, int dtype, float* to) {
  if (dtype == FLOAT32) std::memcpy(to, from, QUANTUM * sizeof(float));
  if (dtype == BFLOAT16) widen_bf16<QUANTUM>(static_cast<const uint16_t*>(from), to);
  if (dtype == FLOAT16) widen_fp16<QUANTUM>(static_cast<const uint16_t*>(from), to);
}

// -- random bits: arena.py --------------------------------------------------------------------------

// Words are in lanes of 64 bits, of which the upper half is anything: for these there is an instruction
// that multiplies the lower halves.
typedef uint64_t Words __attribute__((vector_size(WIDTH)));

void random_words(uint64_t seed, uint32_t stream, int64_t tile, uint32_t* words) {
  constexpr int COUNT = WIDTH / 8;
  const uint64_t first = uint64_t(tile) * QUANTUM, low = 0xffffffff;
  uint64_t keys[PHILOX_ROUNDS][2];
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    keys[round][0] = uint32_t(seed) + round * 0x9E3779B9u;
    keys[round][1] = uint32_t(seed >> 32) + round * 0xBB67AE85u;
  }
  // Counters of a tile differ in the first of four words alone: half of the first two rounds is the same for
  // all of them.
  const uint64_t second = stream * 0xCD9E8D57ull, c0 = (second >> 32) ^ (first >> 32) ^ keys[0][0];
  const uint64_t third = c0 * 0xD2511F53ull;
  Words even;
  for (int i = 0; i < COUNT; ++i) even[i] = first + 2 * i;
  for (int begin = 0; begin < QUANTUM; begin += 2 * COUNT, even += 2 * COUNT) {
    Words c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const Words p0 = PRODUCT(even + odd, 0xD2511F53);
      const Words p2 = PRODUCT((p0 >> 32) ^ keys[0][1], 0xCD9E8D57);
      c[odd][0] = (p2 >> 32) ^ ((second & low) ^ keys[1][0]);
      c[odd][1] = p2;
      c[odd][2] = p0 ^ ((third >> 32) ^ keys[1][1]);
      c[odd][3] = Words{} + (third & low);
    }
    for (int round = 2; round < PHILOX_ROUNDS; ++round)
      for (auto& w : c) {
        const Words p0 = PRODUCT(w[0], 0xD2511F53), p2 = PRODUCT(w[2], 0xCD9E8D57);
        w[0] = (p2 >> 32) ^ w[1] ^ keys[round][0];
        w[2] = (p0 >> 32) ^ w[3] ^ keys[round][1];
        w[1] = p2;
        w[3] = p0;
      }
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Words both = (c[0][quarter] & low) | (c[1][quarter] << 32);
      std::memcpy(words + quarter * QUANTUM + begin, &both, sizeof both);
    }
  }
}

#include "moments_8bit.h"

// -- the update -------------------------------------------------------------------------------------

template <int COUNT>
void adamw(float* __restrict w, const float* __restrict grad, float* __restrict m,
           float* __restrict v, const Numbers& numbers) {
  const Numbers n = numbers;  // in registers: no store can change a copy
  for (int i = 0; i < COUNT; ++i) {
    const float g = grad[i] * n.factor;
    const float new_m = FMA(g, n.m_share, m[i] * n.beta1);
    const float new_v = FMA(n.v_share * g, g, v[i] * n.beta2);
    const float update = new_m / (std::sqrt(new_v) * n.root_scale + n.eps);
    m[i] = new_m;
    v[i] = new_v;
    w[i] = w[i] * n.rest - update * n.rate;
  }
}

// As torch.lerp, which is exact at both ends.
INLINE void lerp(float* average, const float* w, float share) {
  if (std::fabs(share) < 0.5f)
    for (int i = 0; i < PIECE; ++i) average[i] = FMA(share, w[i] - average[i], average[i]);
  else
    for (int i = 0; i < PIECE; ++i) average[i] = FMA(share - 1, w[i] - average[i], w[i]);
}

// Both to bf16, for the commonest case.
template <bool NEAR>
void round_and_average(const float* __restrict w, uint16_t* __restrict to, uint16_t* __restrict average,
                       const uint32_t* __restrict words, float share) {
  for (int i = 0; i < QUANTUM; ++i) {
    const uint32_t sum = before_rounding(w[i]) + (words[i] & 0xffff);
    to[i] = uint16_t(sum >> 16);
    const float weight = as_float(sum & 0xffff0000), old = as_float(uint32_t(average[i]) << 16);
    const float x = NEAR ? FMA(share, weight - old, old) : FMA(share - 1, weight - old, weight);
    average[i] = uint16_t((before_rounding(x) + (words[i] >> 16)) >> 16);
  }
}

// The elements of a tensor that belong to a quarter of a tile, in float32, and zeros: where they are, if all are
// float32, and else in `buffer`.
float* quarter_of(void* from, int dtype, int64_t count, float* buffer) {
  if (count == QUANTUM && dtype == FLOAT32) return static_cast<float*>(from);
  if (count == QUANTUM) {
    widen(from, dtype, buffer);
    return buffer;
  }
  alignas(64) char part[QUANTUM * sizeof(float)] = {};
  std::memcpy(part, from, count * size_of(dtype));
  widen(part, dtype, buffer);
  return buffer;
}

// What lies a tile further, into the second-level cache, 64 bytes at a time.
void prefetch_next(const void* quarter, int dtype) {
  const char* from = static_cast<const char*>(quarter) + BLOCK * size_of(dtype);
  for (int i = 0; i < QUANTUM * size_of(dtype); i += 64) __builtin_prefetch(from + i, 0, 2);
}

// `begin`: in the tensor. `words`: of its elements, and others for state.
void step_quarter(const Step& s, int64_t tensor, int64_t begin, const Numbers& n, const uint32_t* words,
                  const uint32_t* state_words) {
  alignas(64) float w_buffer[QUANTUM], g_buffer[QUANTUM], m_buffer[QUANTUM], v_buffer[QUANTUM];
  alignas(64) uint16_t part[QUANTUM];
  const int dtype = s.weight_dtypes[tensor], grad_dtype = s.grad_dtypes[tensor];
  const int64_t at = s.offsets[tensor] + begin;
  const int64_t count = std::max<int64_t>(0, std::min<int64_t>(QUANTUM, s.sizes[tensor] - begin));
  char* weight = static_cast<char*>(s.weights[tensor]) + begin * size_of(dtype);
  char* grad = static_cast<char*>(s.grads[tensor]) + begin * size_of(grad_dtype);
  uint16_t* compensation = s.compensation == nullptr ? nullptr : s.compensation + at;

  prefetch_next(weight, dtype);
  prefetch_next(grad, grad_dtype);
  float *w = w_buffer, *m = m_buffer, *v = v_buffer;
  uint16_t *m_bf16 = static_cast<uint16_t*>(s.m) + at, *v_bf16 = static_cast<uint16_t*>(s.v) + at;
  uint8_t *m_codes = static_cast<uint8_t*>(s.m) + at, *v_codes = static_cast<uint8_t*>(s.v) + at;
  float *m_absmax = s.m_absmax + at / QUANTUM, *v_absmax = s.v_absmax + at / QUANTUM;
  const bool whole = count == QUANTUM && compensation == nullptr;
  if (s.state_dtype == UINT8 && whole && dtype == BFLOAT16 && grad_dtype == BFLOAT16) {
    adamw_8bit(w, reinterpret_cast<uint16_t*>(weight), reinterpret_cast<uint16_t*>(grad), m_codes, v_codes,
               m_absmax, v_absmax, s, n);
  } else {
    w = quarter_of(weight, dtype, count, w_buffer);
    const float* g = quarter_of(grad, grad_dtype, count, g_buffer);
    if (compensation != nullptr) {
      if (w != w_buffer) std::memcpy(w_buffer, w, sizeof w_buffer);
      w = w_buffer;
      for (int i = 0; i < QUANTUM; ++i) w[i] += as_float(uint32_t(compensation[i]) << 16);
    }
    if (s.state_dtype == FLOAT32) {
      m = static_cast<float*>(s.m) + at;
      v = static_cast<float*>(s.v) + at;
    } else if (s.state_dtype == BFLOAT16) {
      widen_bf16<QUANTUM>(m_bf16, m);
      widen_bf16<QUANTUM>(v_bf16, v);
    }
    if (s.state_dtype == UINT8) adamw_8bit<float>(w, w, g, m_codes, v_codes, m_absmax, v_absmax, s, n);
    else adamw<QUANTUM>(w, g, m, v, n);
    for (int i = 0; s.state_dtype == BFLOAT16 && i < QUANTUM; i += PIECE) {
      round_bf16_stochastic<true>(m + i, m_bf16 + i, state_words + i);
      round_bf16_stochastic<false>(v + i, v_bf16 + i, state_words + i);
    }
  }
  prefetch_next(static_cast<char*>(s.m) + at * size_of(s.state_dtype), s.state_dtype);
  prefetch_next(static_cast<char*>(s.v) + at * size_of(s.state_dtype), s.state_dtype);
  if (s.ema != nullptr) prefetch_next(static_cast<char*>(s.ema) + at * size_of(s.ema_dtype), s.ema_dtype);

  const bool stochastic = s.rounding == STOCHASTIC && dtype == BFLOAT16;
  uint16_t* to = count == QUANTUM ? reinterpret_cast<uint16_t*>(weight) : part;
  float* average = static_cast<float*>(s.ema) + at;
  uint16_t* average_bf16 = static_cast<uint16_t*>(s.ema) + at;
  const bool both = stochastic && s.ema != nullptr && s.ema_dtype == BFLOAT16;
  if (both && std::fabs(n.ema_share) < 0.5f) round_and_average<true>(w, to, average_bf16, words, n.ema_share);
  else if (both) round_and_average<false>(w, to, average_bf16, words, n.ema_share);
  for (int i = 0; !both && i < QUANTUM; i += PIECE) {
    alignas(64) float exact[PIECE], wide[PIECE];
    if (compensation != nullptr) std::memcpy(exact, w + i, sizeof exact);
    if (dtype == FLOAT16) round_fp16(w + i, to + i);
    else if (stochastic) round_bf16_stochastic<false>(w + i, to + i, words + i);
    else if (dtype == BFLOAT16) round_bf16(w + i, to + i);
    if (compensation != nullptr) {
      for (int j = 0; j < PIECE; ++j) exact[j] -= w[i + j];
      round_bf16(exact, compensation + i);
    }
    if (s.ema == nullptr) continue;
    if (s.ema_dtype == FLOAT32) {
      lerp(average + i, w + i, n.ema_share);
    } else {
      widen_bf16<PIECE>(average_bf16 + i, wide);
      lerp(wide, w + i, n.ema_share);
      round_bf16_stochastic<true>(wide, average_bf16 + i, words + i);
    }
  }
  if (dtype != FLOAT32) {
    if (count < QUANTUM) std::memcpy(weight, part, count * 2);
  } else if (reinterpret_cast<char*>(w) != weight) {
    std::memcpy(weight, w, count * sizeof(float));
  }
}

void step_tile(const Step& s, int64_t tensor, int64_t begin, const Numbers& n) {
  const int64_t at = s.offsets[tensor] + begin;
  const bool floats = s.weight_dtypes[tensor] == FLOAT32 && s.grad_dtypes[tensor] == FLOAT32 &&
                      s.state_dtype == FLOAT32 && (s.ema == nullptr || s.ema_dtype == FLOAT32);
  if (floats && s.compensation == nullptr && begin + BLOCK <= s.sizes[tensor]) {
    // Nothing is buffered, and in quarters or with prefetches it takes a tenth longer.
    float* w = static_cast<float*>(s.weights[tensor]) + begin;
    adamw<BLOCK>(w, static_cast<const float*>(s.grads[tensor]) + begin, static_cast<float*>(s.m) + at,
                 static_cast<float*>(s.v) + at, n);
    for (int i = 0; s.ema != nullptr && i < BLOCK; i += PIECE)
      lerp(static_cast<float*>(s.ema) + at + i, w + i, n.ema_share);
    return;
  }
  alignas(64) uint32_t words[BLOCK], state_words[BLOCK];
  const bool stochastic = s.rounding == STOCHASTIC && s.weight_dtypes[tensor] == BFLOAT16;
  if (s.state_dtype == BFLOAT16) random_words(n.seed, 1, at / BLOCK, state_words);
  if (stochastic || (s.ema != nullptr && s.ema_dtype == BFLOAT16)) random_words(n.seed, 0, at / BLOCK, words);
  for (int i = 0; i < BLOCK; i += QUANTUM)
    step_quarter(s, tensor, begin + i, n, words + i, state_words + i);
}

// -- the norm ---------------------------------------------------------------------------------------

// Squares of float32 are exact in float64. 16 sums, whatever the width of the machine's vectors, so that
// the result does not depend on it.
double sum_of_squares(const void* from, int dtype, int64_t count) {
  double sums[LANES] = {};
  alignas(64) float buffer[QUANTUM];
  const char* data = static_cast<const char*>(from);
  for (int64_t begin = 0; begin < count; begin += QUANTUM, data += QUANTUM * size_of(dtype)) {
    const int64_t length = std::min<int64_t>(QUANTUM, count - begin);
    const float* x = quarter_of(const_cast<char*>(data), dtype, length, buffer);
    for (int i = 0; i < QUANTUM; i += LANES)
      for (int lane = 0; lane < LANES; ++lane) sums[lane] += double(x[i + lane]) * double(x[i + lane]);
  }
  return sum_pairwise(sums, LANES);
}
