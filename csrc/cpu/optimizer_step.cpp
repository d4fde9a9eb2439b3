// AdamW with clipping, 16-bit rounding and the average of the weights in one pass over CPU memory: what
// optimizer_step.py says, for the same arguments. A plain C library, without PyTorch's or Python's headers.
//
// Bytes a weight, with an average and the norm of the gradients, and what PyTorch's operations move:
//   float32 weights and state   norm 4 + step 36 (weight, m, v, average in and out; gradient in) = 40
//       norm 4 + clip 8 + fused AdamW 28 + lerp 12 = 52
//   bf16 weights, float32 state, float32 average   2 + 30 = 32
//   bf16 weights, 8-bit state, bf16 average        2 + 14 = 16 (scales: 1/16 more)
//
// Measured on one core of a two-core EPYC (Zen 3, AVX2) with other load on the machine, on tiles in the cache,
// the smallest: 0.5 ns a weight with float32, 1.3 with bf16 weights, and 2.8 with 8-bit state and a bf16 average
// beside, which loads and the divider limit: codes are read in 0.55, with moments and roots beside; quotients of all
// kinds take 0.55, each look-up of codes 0.3, Philox 0.4 and rounding with the average 0.35. The forms for AVX-512
// and AArch64 are the same code for another instruction set; they have been compiled and not yet been run.
//
// Threads take chunks of 64 tiles in turns. No result depends on which thread took what or on the number
// of threads: elements are independent, random bits are a function of the place, and the norm is summed over chunks.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 1024, QUANTUM = 256, LANES = 16, PHILOX_ROUNDS = 7;  // the first two as in arena.py
constexpr int64_t CHUNK = 64 * BLOCK;

enum Dtype { FLOAT32, BFLOAT16, FLOAT16, UINT8 };
enum Rounding { NEAREST, STOCHASTIC, KAHAN };

constexpr int size_of(int dtype) { return dtype == FLOAT32 ? 4 : dtype == UINT8 ? 1 : 2; }

// The code of a number is found by the first 16 bits of a float: sign, exponent, from 2^-24 to 1, and 7 bits
// of the mantissa. In such a bucket there is at most one middle between two values of the map, and an
// addition compares the other 16 bits with the middle's. To an entry of `buckets` the place of a number is
// added, its bucket in the upper half and these bits in the lower one: the upper half of the sum is the number of
// middles below, as the entry's has the bucket taken off, and its lower half carries beyond the middle.
constexpr int32_t ONE = 127 << 23, FIRST_BUCKET = (127 - 24) << 23;
constexpr int NUM_BUCKETS = ((ONE - FIRST_BUCKET) >> 16) + 1;
constexpr uint32_t SMALLEST_NORMAL = 1u << 23;

struct Codebook {
  uint32_t buckets[2 * NUM_BUCKETS];  // in the order of numbers; the bits of negative ones are complemented
};

// As the class of this name in cpu_library.py.
struct Step {
  int64_t num_tensors;
  void* const* weights;
  void* const* grads;
  const int64_t* sizes;
  const int64_t* offsets;
  const int64_t* groups;
  const uint8_t* weight_dtypes;
  const uint8_t* grad_dtypes;
  void* m;
  void* v;
  float* m_absmax;
  float* v_absmax;
  void* ema;
  uint16_t* compensation;
  const float* hyper;
  const float* scalars;
  const int64_t* seed;
  const float* m_map;
  const float* v_map;
  double beta1, beta2, eps;
  int32_t state_dtype, ema_dtype, rounding;
};

// The numbers of a step for one tensor.
struct Numbers {
  float factor, beta1, m_share, beta2, v_share, root_scale, eps, rate, rest, ema_share;
  uint64_t seed;
  const Codebook *m_book, *v_book;
};

double sum_pairwise(const double* x, int64_t count) {
  if (count <= 2) return count == 0 ? 0.0 : count == 1 ? x[0] : x[0] + x[1];
  return sum_pairwise(x, count / 2) + sum_pairwise(x + count / 2, count - count / 2);
}

// An entry beyond so many middles.
uint32_t entry(int place, int code) { return uint32_t(code - place + NUM_BUCKETS) << 16; }

// False for values that are not increasing, or lie too close to each other for the buckets.
bool fill(const float* values, Codebook& book) {
  std::fill_n(book.buckets, 2 * NUM_BUCKETS, 0u);
  int last = -1;  // in the order of numbers
  for (int code = 0; code < 255; ++code) {
    if (!(values[code] < values[code + 1])) return false;
    const float middle = (values[code + 1] + values[code]) / 2;
    int32_t bits;
    std::memcpy(&bits, &middle, 4);
    const bool negative = bits < 0;
    bits &= 0x7fffffff;
    if (bits < FIRST_BUCKET || bits >= ONE) return false;
    const int index = (bits - FIRST_BUCKET) >> 16;
    const int place = negative ? NUM_BUCKETS - 1 - index : NUM_BUCKETS + index;
    if (place == last) return false;
    for (int between = last + 1; between <= place; ++between) book.buckets[between] = entry(between, code);
    book.buckets[place] += negative ? bits & 0xffff : 0xffff - (bits & 0xffff);
    last = place;
  }
  for (int rest = last + 1; rest < 2 * NUM_BUCKETS; ++rest) book.buckets[rest] = entry(rest, 255);
  return true;
}

}  // namespace

// -- one namespace for each instruction set -----------------------------------------------------------

#define TILE_FUNCTIONS(name)  \
  namespace name {            \
  namespace {
#define END_TILE_FUNCTIONS }}
#define INLINE inline __attribute__((always_inline))

#ifdef __x86_64__
#define FMA(a, b, c) ((a) * (b) + (c))
#ifdef __clang__  // which finds the instruction; GCC multiplies whole lanes
#define PRODUCT128(a, b) (((a) & 0xffffffffu) * (b))
#define PRODUCT256 PRODUCT128
#define PRODUCT512 PRODUCT128
#else
#define PRODUCT128(a, b) Words(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(b)))
#define PRODUCT256(a, b) Words(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)))
#define PRODUCT512(a, b) Words(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)))
#endif

#define PRODUCT PRODUCT128
#define WIDTH 16
TILE_FUNCTIONS(baseline)
#include "tile.h"
END_TILE_FUNCTIONS

#undef FMA
#undef PRODUCT
#undef WIDTH
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#define PRODUCT PRODUCT256
#define WIDTH 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
TILE_FUNCTIONS(avx2)
#include "tile.h"
END_TILE_FUNCTIONS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef PRODUCT
#undef WIDTH
#define PRODUCT PRODUCT512
#define WIDTH 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
TILE_FUNCTIONS(avx512)
#include "tile.h"
END_TILE_FUNCTIONS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
#ifdef __aarch64__  // NEON has fused products
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#define PRODUCT(a, b) (((a) & 0xffffffffu) * (b))
#define WIDTH 16
TILE_FUNCTIONS(baseline)
#include "tile.h"
END_TILE_FUNCTIONS
#endif

namespace {

struct Level {
  const char* name;
  void (*step_tile)(const Step&, int64_t, int64_t, const Numbers&);
  double (*sum_of_squares)(const void*, int, int64_t);
};

const Level LEVELS[] = {
    {"baseline", baseline::step_tile, baseline::sum_of_squares},
#ifdef __x86_64__
    {"avx2", avx2::step_tile, avx2::sum_of_squares},
    {"avx512", avx512::step_tile, avx512::sum_of_squares},
#endif
};

int highest_level() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? 2 : 1;
#else
  return 0;
#endif
}

// -- threads ------------------------------------------------------------------------------------------

// OpenMP's entry for a parallel region, as compilers call it: (function, data, threads, flags). PyTorch's
// own runtime is used through it, where there is one: a second one, or threads of our own, would share the
// cores with the threads of the first, which spin for milliseconds after each operation of PyTorch's.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <typename Work>
struct Team {
  const Work& work;
  int64_t count;
  std::atomic<int64_t> next{0};

  static void run(void* self) {
    Team& team = *static_cast<Team*>(self);
    for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;)
      team.work(i);
  }
};

// work(0) ... work(count - 1), in any order.
template <typename Work>
void parallel_for(int64_t count, int num_threads, Parallel parallel, const Work& work) {
  Team<Work> team{work, count};
  const unsigned threads = unsigned(std::min<int64_t>(std::max(num_threads, 1), count));
  if (threads <= 1) return Team<Work>::run(&team);
  if (parallel != nullptr) return parallel(Team<Work>::run, &team, threads, 0);
  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(Team<Work>::run, &team);
  } catch (const std::system_error&) {  // no more threads: those that are there do the work
  }
  Team<Work>::run(&team);
  for (std::thread& other : others) other.join();
}

struct Chunk {
  int64_t tensor, begin, end;
};

std::vector<Chunk> chunks(const int64_t* sizes, int64_t num_tensors) {
  std::vector<Chunk> found;
  for (int64_t tensor = 0; tensor < num_tensors; ++tensor)
    for (int64_t begin = 0; begin < sizes[tensor]; begin += CHUNK)
      found.push_back({tensor, begin, std::min(begin + CHUNK, sizes[tensor])});
  return found;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// To be changed with every change of an argument.
EXPORTED int fasttune_cpu_version() { return 1; }

// A hash of the sources, to find a library that is older than they are.
EXPORTED const char* fasttune_cpu_sources() { return FASTTUNE_SOURCES; }

EXPORTED int fasttune_cpu_highest_level() { return highest_level(); }

EXPORTED const char* fasttune_cpu_level_name(int level) { return LEVELS[level].name; }

EXPORTED float fasttune_cpu_gradient_norm(int64_t num_tensors, const void* const* grads, const int64_t* sizes,
                                 const uint8_t* dtypes, int level, int num_threads, Parallel parallel) {
  const std::vector<Chunk> work = chunks(sizes, num_tensors);
  std::vector<double> sums(work.size());
  parallel_for(int64_t(work.size()), num_threads, parallel, [&](int64_t i) {
    const Chunk& c = work[i];
    const int dtype = dtypes[c.tensor];
    const char* from = static_cast<const char*>(grads[c.tensor]) + c.begin * size_of(dtype);
    sums[i] = LEVELS[level].sum_of_squares(from, dtype, c.end - c.begin);
  });
  return float(std::sqrt(sum_pairwise(sums.data(), int64_t(sums.size()))));
}

// 0, or 1 for a map of 8-bit values that is none.
EXPORTED int fasttune_cpu_optimizer_step(const Step* step, int level, int num_threads, Parallel parallel) {
  const Step& s = *step;
  if (s.scalars[2] == 0.0f) return 0;
  Codebook m_book, v_book;
  if (s.state_dtype == UINT8 && !(fill(s.m_map, m_book) && fill(s.v_map, v_book))) return 1;
  std::vector<Numbers> numbers(s.num_tensors);
  for (int64_t i = 0; i < s.num_tensors; ++i) {
    const float* hyper = s.hyper + 2 * s.groups[i];
    const float rate = hyper[0] * s.scalars[0], decay = hyper[1] * rate;
    numbers[i] = {s.scalars[1],   float(s.beta1),          float(1 - s.beta1),
                  float(s.beta2), float(1 - s.beta2),      1 / std::sqrt(s.scalars[4]),
                  float(s.eps),   rate / s.scalars[3],     1 - decay,
                  s.scalars[5],   uint64_t(s.seed[0]),     &m_book,
                  &v_book};
  }
  const std::vector<Chunk> work = chunks(s.sizes, s.num_tensors);
  const int64_t last = int64_t(work.size()) - 1;
  parallel_for(last + 1, num_threads, parallel, [&](int64_t i) {
    const Chunk& c = work[last - i];  // backwards: the end of the gradients is in the cache since the norm
    for (int64_t begin = c.begin; begin < c.end; begin += BLOCK)
      LEVELS[level].step_tile(s, c.tensor, begin, numbers[c.tensor]);
  });
  return 0;
}
