// Enough of CUDA C++ to run a kernel on the CPU: one std::thread for each thread of a block, one block
// after the other, and warps that exchange values at barriers. For tests where there is no GPU.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__ static
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct Index { unsigned x; };
struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };

static thread_local Index threadIdx;
static Index blockIdx, gridDim;

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Misaligned {};

template <typename T>
inline T __ldcs(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) throw Misaligned();  // a GPU faults, too
  return *from;
}
template <typename T>
inline void __stcs(T* to, T x) {
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof(T)) throw Misaligned();
  *to = x;
}

inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(bytes >> (8 * ((selector >> (4 * i)) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = round_;
    if (++waiting_ == count_) {
      waiting_ = 0, ++round_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_, waiting_ = 0;
  long round_ = 0;
};

static std::vector<Barrier*> warp_barriers;
static Barrier* block_barrier;
static std::vector<float> exchanged;

inline void __syncthreads() { block_barrier->wait(); }

inline float __shfl_xor_sync(unsigned, float x, int lanes) {
  Barrier& warp = *warp_barriers[threadIdx.x / 32];
  exchanged[threadIdx.x] = x;
  warp.wait();
  const float other = exchanged[threadIdx.x ^ lanes];
  warp.wait();
  return other;
}

template <typename Kernel>
void run_grid(unsigned grid, unsigned threads, Kernel kernel) {
  gridDim.x = grid;
  exchanged.resize(threads);
  Barrier block(threads);
  block_barrier = &block;
  for (unsigned i = 0; i < threads / 32; ++i) warp_barriers.push_back(new Barrier(32));
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    std::vector<std::thread> all;
    for (unsigned i = 0; i < threads; ++i) {
      all.emplace_back([&kernel, i] { threadIdx.x = i; kernel(); });
    }
    for (std::thread& thread : all) thread.join();
  }
}
