// The vector type: as wide as the instruction set has. Arithmetic is that of the GCC and Clang vector extensions, so
// one source serves every instruction set; only the differences are spelled out per set.

#if defined(__AVX512BW__)
constexpr std::size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t kVectorBytes = 32;
#else
constexpr std::size_t kVectorBytes = 16;
#endif

// SSE2 has 16 registers of 16 bytes; AVX2 has twice as many bytes in them, NEON and AVX-512 have 32 registers.
#if !defined(__SSE2__) || defined(__AVX2__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

template <class T, std::size_t Lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};
template <class T, std::size_t Lanes = kVectorBytes / sizeof(T)>
using Vec = typename VectorOf<T, Lanes>::type;

template <class T>
constexpr std::size_t kLanes = kVectorBytes / sizeof(T);

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Returns the same bits as another type of the same size.
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Loads the rest of a row, `bytes` < sizeof(V); the lanes behind it are zero.
template <class V>
inline V load_part(const void* from, std::size_t bytes) {
  V v = {};
  std::memcpy(&v, from, bytes);
  return v;
}

template <class V>
inline void store_part(void* to, V v, std::size_t bytes) {
  std::memcpy(to, &v, bytes);
}

// Puts a number into every lane. x - 0 is x for every float, so compilers make a broadcast of it.
template <class T>
inline Vec<T> broadcast(T number) {
  return number - Vec<T>{};
}

// The vector that has of(l) in lane l.
template <class T, class Of, std::size_t... Lane>
inline Vec<T> lanes_of(const Of& of, std::index_sequence<Lane...>) {
  return Vec<T>{static_cast<T>(of(Lane))...};
}
template <class T, class Of>
inline Vec<T> lanes_of(const Of& of) {
  return lanes_of<T>(of, std::make_index_sequence<kLanes<T>>{});
}

// Prefetches the line `Ahead` bytes behind `at`. Cores prefetch by themselves, but not far enough for many streams.
template <int Ahead>
inline void prefetch(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + Ahead);
}

template <class T, std::size_t Lanes, class From>
inline Vec<T, Lanes> convert(From from) {
  return __builtin_convertvector(from, Vec<T, Lanes>);
}

inline Vec<double, 8> doubles(Vec<float, 8> v) {
#if defined(__AVX512F__)
  return bit_cast<Vec<double, 8>>(_mm512_cvtps_pd(bit_cast<__m256>(v)));
#else
  return convert<double, 8>(v);
#endif
}

// Unrolls a loop: calls body(Int<0>{}), body(Int<1>{}) and so on, N times. Arrays of vectors that are indexed by these
// constants stay in registers.
template <std::size_t N, class Body>
__attribute__((always_inline)) inline void unroll(const Body& body) {
  if constexpr (N > 0) {
    unroll<N - 1>(body);
    body(Int<static_cast<int>(N - 1)>{});
  }
}

// Operations for folds and for the loops before them.
constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto bitwise_and = [](auto a, auto b) { return a & b; };
constexpr auto smaller = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };

// Combines the upper half of the lanes with the lower one by `op`, until one lane is left.
template <class T, std::size_t Lanes, class Op>
inline T fold_lanes(Vec<T, Lanes> v, Op op) {
  if constexpr (Lanes == 16) {
    return fold_lanes<T, 8>(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                            op);
  } else if constexpr (Lanes == 8) {
    return fold_lanes<T, 4>(op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)),
                            op);
  } else if constexpr (Lanes == 4) {
    return fold_lanes<T, 2>(op(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)), op);
  } else {
    static_assert(Lanes == 2);
    return op(v[0], v[1]);
  }
}
template <class V, class Op>
inline auto fold(V v, Op op) {
  using T = decltype(v[0] + v[0]);
  return fold_lanes<T, sizeof(V) / sizeof(T)>(v, op);
}

// Adds kPartials partial sums as the tree of the contract; `Partials` is an array of numbers, or of vectors of them.
template <class T, class Partials>
inline T tree(const Partials& partials) {
  static_assert(sizeof partials == kPartials * sizeof(T));
  return fold_lanes<T, kPartials>(load<Vec<T, kPartials>>(&partials), plus);
}

// Keeps a constant in a register for a whole loop; otherwise GCC rematerializes it at every use.
template <class V>
inline V in_register(V v) {
#if defined(__SSE2__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Keeps compilers from shifting an integer in the registers of masks, which takes four times as long.
inline unsigned in_register(unsigned bits) {
  asm("" : "+r"(bits));
  return bits;
}

// One step towards the folds of two vectors at once: the lanes whose number has the bit `Distance` go on with the
// second of them, the others with the first.
template <std::size_t Distance, class V, class Op, std::size_t... Lane>
inline V fold_pair(V a, V b, Op op, std::index_sequence<Lane...>) {
  constexpr std::size_t second = sizeof...(Lane);
  const Vec<std::int32_t> is_second = {((Lane & Distance) ? -1 : 0)...};
  return op(is_second ? b : a,
            __builtin_shufflevector(a, b, ((Lane & Distance) ? Lane - Distance + second : Lane + Distance)...));
}
template <std::size_t Distance, class Op>
inline Vec<float> fold_pair(Vec<float> a, Vec<float> b, Op op) {
  return fold_pair<Distance>(a, b, op, std::make_index_sequence<kLanes<float>>{});
}

// Lane l of the result is fold(v[l], op), for as many vectors as there are lanes, which are overwritten; op commutes.
// Or for fewer vectors, each of which already holds `Folded` neighbours as fold_pair() makes them.
template <std::size_t Folded = 1, std::size_t Distance = kLanes<float> / 2, class Op>
inline Vec<float> fold_each(Vec<float>* v, Op op) {
  if constexpr (Distance < Folded) {
    return v[0];
  } else {
    constexpr std::size_t n = Distance / Folded;
    for (std::size_t i = 0; i < n; ++i) v[i] = fold_pair<Distance>(v[i], v[i + n], op);
    return fold_each<Folded, Distance / 2>(v, op);
  }
}

// Returns true if a comparison holds in all lanes.
inline bool all(Vec<std::int32_t> holds) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(bit_cast<__m512i>(holds), _mm512_setzero_si512()) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bit_cast<__m256>(holds)) == 0xff;
#elif defined(__SSE2__)
  return _mm_movemask_ps(bit_cast<__m128>(holds)) == 0xf;
#else
  return fold(holds, bitwise_and) != 0;
#endif
}
