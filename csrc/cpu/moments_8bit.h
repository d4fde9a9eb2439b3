// AdamW on 8-bit moments, a quarter of a tile at a time. Included by tile.h, for each instruction set.
//
// In vectors by name: of plain loops that read codes, compilers take four vectors of numbers for one of codes, which
// registers do not hold (0.97 ns a weight for the update, with AVX2; this 0.74).

constexpr int N = WIDTH / 4;  // numbers in a vector

typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

INLINE Floats read(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE Floats read(const uint16_t* bf16) {
  uint16_t x __attribute__((vector_size(WIDTH / 2)));
  std::memcpy(&x, bf16, sizeof x);
  return Floats(__builtin_convertvector(x, Bits) << 16);
}

INLINE Bits read(const uint32_t* from) {
  Bits x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T, typename Vector>
INLINE void write(T* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

INLINE Floats fma_of(Floats a, Floats b, Floats c) {
  Floats sum;
  for (int i = 0; i < N; ++i) sum[i] = FMA(a[i], b[i], c[i]);
  return sum;
}

INLINE Floats root_of(Floats x) {
  Floats root;
  for (int i = 0; i < N; ++i) root[i] = std::sqrt(x[i]);
  return root;
}

INLINE int32_t largest_of(Ints x) {
  int32_t lanes[N], largest = 0;
  write(lanes, x);
  for (int i = 0; i < N; ++i) largest = std::max(largest, lanes[i]);
  return largest;
}

// values[codes[0]], values[codes[1]] ...
template <size_t... I>
INLINE Floats pick(const float* values, const uint8_t* codes, std::index_sequence<I...>) {
  return Floats{values[codes[I]]...};
}

// The same of indices that are read two at a time: loads, of which there are two or three in a cycle, limit this.
template <size_t... I>
INLINE Bits pick(const uint32_t* values, const int32_t* indices, std::index_sequence<I...>) {
  int64_t two[N / 2];
  std::memcpy(two, indices, sizeof two);
  return Bits{values[I % 2 ? two[I / 2] >> 32 : int32_t(two[I / 2])]...};
}

template <size_t... I>
INLINE Halves upper_halves(Bits a, Bits b, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(Halves(a), Halves(b), int(2 * I + 1)...);
#else
  return __builtin_shuffle(Halves(a), Halves(b), Halves{uint16_t(2 * I + 1)...});
#endif
}

template <size_t... I>
INLINE Bytes lower_bytes(Halves a, Halves b, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(Bytes(a), Bytes(b), int(2 * I)...);
#else
  return __builtin_shuffle(Bytes(a), Bytes(b), Bytes{uint8_t(2 * I)...});
#endif
}

// -- codes ------------------------------------------------------------------------------------------

struct Places {  // of numbers in a table of buckets
  alignas(64) uint32_t bits[QUANTUM];
  alignas(64) int32_t bucket[QUANTUM];
};

template <bool SIGNED>
INLINE void find_places(Floats x, uint32_t absmax, Places& places, int at) {
  const Ints bits = Ints(x / as_float(std::max(absmax, SMALLEST_NORMAL)));
  Ints size = bits & 0x7fffffff;
  size = size > FIRST_BUCKET ? size : Ints{} + FIRST_BUCKET;
  size = (size < ONE ? size : Ints{} + ONE) - FIRST_BUCKET;
  if (SIGNED) size ^= bits >> 31;
  write(places.bits + at, size);
  write(places.bucket + at, size >> 16);
}

void look_up(const Places& places, const Codebook& book, uint8_t* codes) {
  const uint32_t* middle = book.buckets + NUM_BUCKETS;
  for (int i = 0; i < QUANTUM; i += 4 * N) {
    Bits sums[4];
    for (int j = 0; j < 4; ++j) {
      const Bits more = pick(middle, places.bucket + i + j * N, std::make_index_sequence<N>());
      sums[j] = read(places.bits + i + j * N) + more;
    }
    constexpr auto halves = std::make_index_sequence<2 * N>();
    const Halves first = upper_halves(sums[0], sums[1], halves), second = upper_halves(sums[2], sums[3], halves);
    write(codes + i, lower_bytes(first, second, std::make_index_sequence<4 * N>()));
  }
}

// -- the update -------------------------------------------------------------------------------------

// `adamw` of tile.h, from codes to codes; `w` may be `from`. Loops are short of loads where they read codes and
// tables, and of the divider elsewhere: roots are found beside the codes. With the quotients in the same loop
// the chain is too long for a processor to have several under way (0.86 ns a weight instead of 0.74).
template <typename T>
void adamw_8bit(float* w, const T* from, const T* grad, uint8_t* m_codes, uint8_t* v_codes, float* m_absmax,
                float* v_absmax, const Step& s, const Numbers& numbers) {
  const Numbers n = numbers;
  const float m_scale = *m_absmax, v_scale = *v_absmax;
  alignas(64) float m[QUANTUM], v[QUANTUM], root[QUANTUM];
  Ints m_largest{}, v_largest{};  // as bits, in which NaN is larger than all else
  for (int i = 0; i < QUANTUM; i += N) {
    const Floats old_m = pick(s.m_map, m_codes + i, std::make_index_sequence<N>()) * m_scale;
    const Floats old_v = pick(s.v_map, v_codes + i, std::make_index_sequence<N>()) * v_scale;
    const Floats g = read(grad + i) * n.factor;
    const Floats new_m = fma_of(g, Floats{} + n.m_share, old_m * n.beta1);
    const Floats new_v = fma_of(n.v_share * g, g, old_v * n.beta2);
    write(m + i, new_m);
    write(v + i, new_v);
    write(root + i, root_of(new_v));
    const Ints m_size = Ints(new_m) & 0x7fffffff, v_size = Ints(new_v) & 0x7fffffff;
    m_largest = m_largest > m_size ? m_largest : m_size;
    v_largest = v_largest > v_size ? v_largest : v_size;
  }
  const uint32_t m_new_scale = largest_of(m_largest), v_new_scale = largest_of(v_largest);
  *m_absmax = as_float(m_new_scale);
  *v_absmax = as_float(v_new_scale);
  Places m_places, v_places;
  for (int i = 0; i < QUANTUM; i += N) {
    const Floats update = read(m + i) / (read(root + i) * n.root_scale + n.eps);
    write(w + i, read(from + i) * n.rest - update * n.rate);
    find_places<true>(read(m + i), m_new_scale, m_places, i);
    find_places<false>(read(v + i), v_new_scale, v_places, i);
  }
  look_up(m_places, *n.m_book, m_codes);
  look_up(v_places, *n.v_book, v_codes);
}
