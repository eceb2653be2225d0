// The vector type and the primitives that kernels are written in. Arithmetic is that of the GCC and Clang vector
// extensions, so one source serves every instruction set; only what differs is spelled out per set.
// Included by kernels.cpp alone, inside its anonymous namespace.
#pragma once

#if defined(__AVX512BW__)
constexpr std::size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t kVectorBytes = 32;
#else
constexpr std::size_t kVectorBytes = 16;
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

// The same bits seen as another vector type of the same size.
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The rest of a row: `bytes` < sizeof(V); lanes behind them are zero.
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

// The same number in every lane; "- 0" changes none, so compilers leave it out.
template <class T>
inline Vec<T> repeat(T number) {
  return number - Vec<T>{};
}

// What will be needed in a while: cores fetch ahead by themselves, but not far enough for many streams at once.
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

// A number as a type, to choose a template by.
template <int N>
struct Int {
  static constexpr int value = N;
};

// body(Int<0>{}), body(Int<1>{}) and so on, N times: numbers that pick from arrays of vectors, which then stay in
// registers.
template <std::size_t N, class Body>
__attribute__((always_inline)) inline void repeat(const Body& body) {
  if constexpr (N > 0) {
    repeat<N - 1>(body);
    body(Int<static_cast<int>(N - 1)>{});
  }
}

// Halves added (or whatever `op` does) until one lane is left.
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

// A constant for a whole loop: GCC would else make it anew wherever it is used.
template <class V>
inline V kept(V v) {
#if defined(__SSE2__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
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

// Whether a comparison holds in all lanes.
inline bool all(Vec<std::int32_t> holds) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(bit_cast<__m512i>(holds), _mm512_setzero_si512()) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bit_cast<__m256>(holds)) == 0xff;
#elif defined(__SSE2__)
  return _mm_movemask_ps(bit_cast<__m128>(holds)) == 0xf;
#else
  return fold(holds, [](auto a, auto b) { return a & b; }) != 0;
#endif
}

inline Vec<float> abs(Vec<float> v) { return bit_cast<Vec<float>>(bit_cast<Vec<std::uint32_t>>(v) & 0x7fffffffu); }

// The larger of v and zero, by one instruction: compilers make two of it.
inline Vec<float> positive_part(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(v), _mm512_setzero_ps()));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(v), _mm256_setzero_ps()));
#else
  return v > 0 ? v : Vec<float>{};
#endif
}

// Correctly rounded, as IEEE demands of sqrt.
template <class V>
inline V sqrt(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) return bit_cast<V>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
  if constexpr (sizeof(v[0]) == 8) return bit_cast<V>(_mm512_sqrt_pd(bit_cast<__m512d>(v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(v[0]) == 4) return bit_cast<V>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
  if constexpr (sizeof(v[0]) == 8) return bit_cast<V>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
#elif defined(__SSE2__)
  if constexpr (sizeof(v[0]) == 4) return bit_cast<V>(_mm_sqrt_ps(bit_cast<__m128>(v)));
  if constexpr (sizeof(v[0]) == 8) return bit_cast<V>(_mm_sqrt_pd(bit_cast<__m128d>(v)));
#elif defined(__aarch64__)
  if constexpr (sizeof(v[0]) == 4) return bit_cast<V>(vsqrtq_f32(bit_cast<float32x4_t>(v)));
  if constexpr (sizeof(v[0]) == 8) return bit_cast<V>(vsqrtq_f64(bit_cast<float64x2_t>(v)));
#else
  for (std::size_t i = 0; i < sizeof v / sizeof v[0]; ++i) {
    v[i] = sizeof v[0] == 4 ? __builtin_sqrtf(static_cast<float>(v[i])) : __builtin_sqrt(v[i]);
  }
  return v;
#endif
}

// The same, by a way that leaves alone what divides, where a set has one: from an approximation of 14 bits by fused
// multiplications. tests/test_optim.py proves that the root is the same whatever approximation a CPU gives.
#if defined(__AVX512F__)
template <class T>
constexpr bool kRootByProducts = std::is_same_v<T, float>;

inline Vec<float> sqrt_by_products(Vec<float> v) {
  const auto fused = [](Vec<float> a, Vec<float> b, Vec<float> c) {
    return bit_cast<Vec<float>>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  };
  const Vec<std::uint32_t> bits = bit_cast<Vec<std::uint32_t>>(v);
  constexpr std::uint32_t least = 0x0d800000u, infinity = 0x7f800000u;  // 2^-100: no residual is flushed
  if (_mm512_cmpge_epu32_mask(bit_cast<__m512i>(bits - least), _mm512_set1_epi32(infinity - least))) return sqrt(v);
  const Vec<float> inverse = bit_cast<Vec<float>>(_mm512_rsqrt14_ps(bit_cast<__m512>(v)));
  const Vec<float> half = bit_cast<Vec<float>>(bit_cast<Vec<std::uint32_t>>(inverse) - 0x800000u);  // of the inverse
  const Vec<float> root = v * inverse, error = fused(-root, half, Vec<float>{} + 0.5f);
  const Vec<float> root1 = fused(root, error, root), half1 = fused(half, error, half);
  return fused(fused(-root1, root1, v), half1, root1);
}
#else
template <class T>
constexpr bool kRootByProducts = false;
#endif

// Half to even, for |v| < 2^22; beyond, and for zeros, something of the same sign or zero. Without an instruction,
// adding 1.5 * 2^23 leaves no bits below the point.
inline Vec<float> round_even(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_round_ps(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  return bit_cast<Vec<float>>(vrndnq_f32(bit_cast<float32x4_t>(v)));
#else
  constexpr float magic = 12582912.0f;
  return (v + magic) - magic;
#endif
}

// sum + a * b for products that are exact, so that it is the same with and without FMA. A product with 1 adds by the
// units that multiply, where those that add are busy.
inline Vec<float> add_product(Vec<float> sum, Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(sum)));
#elif defined(__FMA__)
  return bit_cast<Vec<float>>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(sum)));
#elif defined(__aarch64__)
  return bit_cast<Vec<float>>(
      vfmaq_f32(bit_cast<float32x4_t>(sum), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
  return sum + a * b;
#endif
}

// t / d, correctly rounded, where `inverse` is 1 / d, correctly rounded. Without a division: the remainder of a first
// quotient corrects it (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990;
// Cornea, Harrison and Tang, "Scientific computing on Itanium-based systems", 2002). The result could only be wrong
// where t / d lies so close to the middle of two floats that the significands T and D of 24 bits and M of 25, an odd
// one, have |T * 2^k - M * D| <= 6 (k = 24 where T >= D, else 25): the first quotient is off by less than two units in
// the last place, so its remainder times what `inverse` is off by, and the rounding of the remainder, are off by no
// more. All 46 million pairs up to 8 were tried, and none is wrong; tests/test_quant.py tries some of them.
// For |d| from 2^-90 to 2^90 and |t / d| below 2^30; below 2^-9 it is small, but may not be the nearest.
inline Vec<float> divide(Vec<float> t, [[maybe_unused]] Vec<float> d, [[maybe_unused]] Vec<float> inverse) {
#if defined(__AVX512F__)
  const __m512 i = bit_cast<__m512>(inverse), first = bit_cast<__m512>(t * inverse);
  return bit_cast<Vec<float>>(
      _mm512_fmadd_ps(_mm512_fnmadd_ps(first, bit_cast<__m512>(d), bit_cast<__m512>(t)), i, first));
#elif defined(__FMA__)
  const __m256 i = bit_cast<__m256>(inverse), first = bit_cast<__m256>(t * inverse);
  return bit_cast<Vec<float>>(
      _mm256_fmadd_ps(_mm256_fnmadd_ps(first, bit_cast<__m256>(d), bit_cast<__m256>(t)), i, first));
#elif defined(__aarch64__)
  const float32x4_t i = bit_cast<float32x4_t>(inverse), first = bit_cast<float32x4_t>(t * inverse);
  return bit_cast<Vec<float>>(
      vfmaq_f32(first, vfmsq_f32(bit_cast<float32x4_t>(t), first, bit_cast<float32x4_t>(d)), i));
#else
  return t / d;
#endif
}

// Bytes are widened and narrowed by the instruction that each set has for it: compilers take vectors of fewer than
// 16 bytes apart, lane by lane.
inline Vec<float> float_of_bytes(const std::uint8_t* from) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<float>>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(from))));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i bytes = _mm_cvtsi32_si128(load<int>(from));
  return bit_cast<Vec<float>>(_mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero)));
#else
  return convert<float, kLanes<float>>(load<Vec<std::uint8_t, kLanes<float>>>(from));
#endif
}

// Whole numbers; those below 0 become 0, those above 255 that.
inline void store_bytes(std::uint8_t* to, Vec<std::int32_t> v) {
#if defined(__AVX512BW__)
  store(to, _mm512_cvtusepi32_epi8(bit_cast<__m512i>(v < 0 ? Vec<std::int32_t>{} : v)));
#elif defined(__AVX2__)
  const __m256i words = bit_cast<__m256i>(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#elif defined(__SSE2__)
  const __m128i halves = _mm_packs_epi32(bit_cast<__m128i>(v), _mm_setzero_si128());
  store(to, _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves)));
#else
  v = v < 0 ? Vec<std::int32_t>{} : v;
  store(to, convert<std::uint8_t, kLanes<float>>(v > 255 ? Vec<std::int32_t>{} + 255 : v));
#endif
}

// Integers of 8 and 16 bits, one in each lane of 32.
inline Vec<std::uint32_t> load_bytes(const std::uint8_t* from) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::uint32_t>>(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::uint32_t>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i bytes = _mm_cvtsi32_si128(load<int>(from));
  return bit_cast<Vec<std::uint32_t>>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero));
#else
  return convert<std::uint32_t, kLanes<float>>(load<Vec<std::uint8_t, kLanes<float>>>(from));
#endif
}

inline Vec<std::int32_t> load_signed_bytes(const std::uint8_t* from) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::int32_t>>(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::int32_t>>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return convert<std::int32_t, kLanes<float>>(load<Vec<std::int8_t, kLanes<float>>>(from));
#endif
}

inline Vec<std::uint32_t> load_words(const std::uint16_t* from) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::uint32_t>>(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::uint32_t>>(_mm256_cvtepu16_epi32(load<__m128i>(from)));
#else
  return convert<std::uint32_t, kLanes<float>>(load<Vec<std::uint16_t, kLanes<float>>>(from));
#endif
}

inline void store_low_bytes(std::uint8_t* to, Vec<std::uint32_t> v) {
#if defined(__AVX512BW__)
  store(to, _mm512_cvtepi32_epi8(bit_cast<__m512i>(v)));
#else
  store_bytes(to, bit_cast<Vec<std::int32_t>>(v & 0xff));
#endif
}

inline void store_low_words(std::uint16_t* to, Vec<std::uint32_t> v) {
#if defined(__AVX512BW__)
  store(to, _mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256(bit_cast<__m256i>(v), _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  store(to, _mm256_castsi256_si128(packed));
#else
  store(to, convert<std::uint16_t, kLanes<float>>(v));
#endif
}

// The upper halves of two vectors of 32 bits.
inline void store_high_words(std::uint16_t* to, Vec<std::uint32_t> a, Vec<std::uint32_t> b) {
#if defined(__AVX512BW__)
  const Vec<std::uint16_t> odd = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  store(to, _mm512_permutex2var_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(odd), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(a >> 16), bit_cast<__m256i>(b >> 16));
  store(to, _mm256_permute4x64_epi64(packed, 0xd8));
#elif defined(__SSE2__)
  store(to, _mm_packs_epi32(_mm_srai_epi32(bit_cast<__m128i>(a), 16), _mm_srai_epi32(bit_cast<__m128i>(b), 16)));
#elif defined(__aarch64__)
  vst1q_u16(to, vuzp2q_u16(bit_cast<uint16x8_t>(a), bit_cast<uint16x8_t>(b)));
#else
  store(to, convert<std::uint16_t, kLanes<float>>(a >> 16));
  store(to + kLanes<float>, convert<std::uint16_t, kLanes<float>>(b >> 16));
#endif
}

#if !defined(__SSE2__) && !defined(__aarch64__)
template <class To, class V>
inline Vec<To> pack_lanes(V a, V b) {
  constexpr std::size_t half = kLanes<To> / 2;
  constexpr int top = 1 << (8 * sizeof(To) - 1), low = std::is_signed_v<To> ? -top : 0;
  constexpr int high = std::is_signed_v<To> ? top - 1 : 2 * top - 1;
  Vec<To> packed;
  for (std::size_t i = 0; i < 2 * half; ++i) {
    const int n = i < half ? a[i] : b[i - half];
    packed[i] = static_cast<To>(n < low ? low : n > high ? high : n);
  }
  return packed;
}
#endif

// Two vectors of integers packed into one of half their width, saturating. Wide vectors are packed in parts of 16
// bytes; unpacked_order() puts bytes that were packed twice back into the order of their numbers.
using Words = Vec<std::int16_t>;

inline Words pack_words(Vec<std::int32_t> a, Vec<std::int32_t> b) {
#if defined(__AVX512BW__)
  return bit_cast<Words>(_mm512_packs_epi32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Words>(_mm256_packs_epi32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<Words>(_mm_packs_epi32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return bit_cast<Words>(vqmovn_high_s32(vqmovn_s32(bit_cast<int32x4_t>(a)), bit_cast<int32x4_t>(b)));
#else
  return pack_lanes<std::int16_t>(a, b);
#endif
}

// The bits from `Dropped` on, 16 or more, of two vectors, in the order of pack_words().
template <int Dropped>
inline Words pack_high(Vec<std::int32_t> a, Vec<std::int32_t> b) {
#if defined(__AVX512BW__)
  const Vec<std::uint16_t> odd = {1,  3,  5,  7,  33, 35, 37, 39, 9,  11, 13, 15, 41, 43, 45, 47,
                                  17, 19, 21, 23, 49, 51, 53, 55, 25, 27, 29, 31, 57, 59, 61, 63};
  const __m512i high = _mm512_permutex2var_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(odd), bit_cast<__m512i>(b));
  return bit_cast<Words>(high) >> (Dropped - 16);
#else
  return pack_words(a >> Dropped, b >> Dropped);
#endif
}

inline Vec<std::uint8_t> pack_unsigned(Words a, Words b) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::uint8_t>>(_mm512_packus_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::uint8_t>>(_mm256_packus_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec<std::uint8_t>>(_mm_packus_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return bit_cast<Vec<std::uint8_t>>(vqmovun_high_s16(vqmovun_s16(bit_cast<int16x8_t>(a)), bit_cast<int16x8_t>(b)));
#else
  return pack_lanes<std::uint8_t>(a, b);
#endif
}

inline Vec<std::uint8_t> pack_signed(Words a, Words b) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::uint8_t>>(_mm512_packs_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::uint8_t>>(_mm256_packs_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec<std::uint8_t>>(_mm_packs_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return bit_cast<Vec<std::uint8_t>>(vqmovn_high_s16(vqmovn_s16(bit_cast<int16x8_t>(a)), bit_cast<int16x8_t>(b)));
#else
  return bit_cast<Vec<std::uint8_t>>(pack_lanes<std::int8_t>(a, b));
#endif
}

inline Vec<std::uint8_t> unpacked_order(Vec<std::uint8_t> v) {
#if defined(__AVX512BW__)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return bit_cast<Vec<std::uint8_t>>(_mm512_maskz_permutexvar_epi32(0xffff, order, bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return bit_cast<Vec<std::uint8_t>>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(v), order));
#else
  return v;
#endif
}

// float16 by hand where the baseline has no instruction for it; all it is needed for is a number per group.
inline float float_of_half(std::uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t rest = h & 0x7fffu;
  std::uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    bits = (rest << 13) + (112u << 23);
  } else {
    return bit_cast<float>(bit_cast<std::uint32_t>(static_cast<float>(rest) * 0x1p-24f) | sign);
  }
  return bit_cast<float>(bits | sign);
#endif
}

inline std::uint16_t half_of_float(float f) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(f);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t rest = bits & 0x7fffffffu;
  std::uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (rest >= 0x38800000u) {  // normal: drop 13 bits, half to even
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else {  // subnormal: let the adder round at 2^-24
    half = bit_cast<std::uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  }
  return static_cast<std::uint16_t>(sign | half);
}

// Out of line where it takes a loop: it is used in many places.
#if !defined(__F16C__) && !defined(__aarch64__)
__attribute__((noinline))
#else
inline
#endif
Vec<float> float_of_halves(const std::uint16_t* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(load<__m256i>(from)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(load<__m128i>(from)));
#elif defined(__aarch64__)
  return bit_cast<Vec<float>>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
#else
  Vec<float> v = {};
  for (std::size_t i = 0; i < kLanes<float>; ++i) v[i] = float_of_half(from[i]);
  return v;
#endif
}

// The first n, up to 16, of as many as there are lanes, zeros behind them: what lies there need not exist.
inline Vec<float> first_floats(const float* from, std::size_t n) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from));
#else
  return n < kLanes<float> ? load_part<Vec<float>>(from, n * sizeof(float)) : load<Vec<float>>(from);
#endif
}

inline Vec<float> first_halves(const std::uint16_t* from, std::size_t n) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), from)));
#else
  if (n >= kLanes<float>) return float_of_halves(from);
  std::uint16_t part[kLanes<float>] = {};
  std::memcpy(part, from, n * sizeof *from);
  return float_of_halves(part);
#endif
}

inline void store_halves(std::uint16_t* to, Vec<float> v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(to, _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(v))));
#else
  for (std::size_t i = 0; i < kLanes<float>; ++i) to[i] = half_of_float(v[i]);
#endif
}

// Half to even, for |v| < 2^31.
inline Vec<std::int32_t> round_to_int(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Vec<std::int32_t>>(_mm512_cvtps_epi32(bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::int32_t>>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#elif defined(__SSE2__)
  return bit_cast<Vec<std::int32_t>>(_mm_cvtps_epi32(bit_cast<__m128>(v)));
#elif defined(__aarch64__)
  return bit_cast<Vec<std::int32_t>>(vcvtnq_s32_f32(bit_cast<float32x4_t>(v)));
#else
  Vec<std::int32_t> n;
  for (std::size_t i = 0; i < kLanes<float>; ++i) n[i] = static_cast<std::int32_t>(__builtin_rintf(v[i]));
  return n;
#endif
}

inline Vec<std::int32_t> lane_numbers() {
  Vec<std::int32_t> v = {};
  for (std::size_t l = 0; l < kLanes<std::int32_t>; ++l) v[l] = static_cast<std::int32_t>(l);
  return v;
}

// table[index[l]] for each lane, of a table of as many floats as there are lanes.
inline Vec<float> lookup(const float* table, Vec<std::int32_t> index) {
#if defined(__AVX512F__)
  // With a mask of all lanes, as GCC 12 warns of the plain one in its own header.
  return bit_cast<Vec<float>>(_mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(index), load<__m512>(table)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_permutevar8x32_ps(load<__m256>(table), bit_cast<__m256i>(index)));
#else
  Vec<float> v;
  for (std::size_t l = 0; l < kLanes<float>; ++l) v[l] = table[index[l]];
  return v;
#endif
}

// sums[l] + codes[4l .. 4l + 3] . x[4l .. 4l + 3]; `codes` are unsigned, below 2^Bits, x is signed.
template <int Bits>
inline Vec<std::int32_t> dot(Vec<std::int32_t> sums, Vec<std::uint8_t> codes, const std::int8_t* x) {
#if defined(__AVX512VNNI__)
  return bit_cast<Vec<std::int32_t>>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(sums), bit_cast<__m512i>(codes), load<__m512i>(x)));
#elif defined(__SSE2__)
  using Pairs = Vec<std::int16_t>;
#if defined(__AVX512BW__)
  const auto add_products = [](Pairs a, Pairs b) {
    return bit_cast<Vec<std::int32_t>>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
  };
  if constexpr (Bits < 8) {  // sums of two products stay below 2^15
    const __m512i pairs = _mm512_maddubs_epi16(bit_cast<__m512i>(codes), load<__m512i>(x));
    return sums + add_products(bit_cast<Pairs>(pairs), Pairs{} + std::int16_t{1});
  }
#elif defined(__AVX2__)
  const auto add_products = [](Pairs a, Pairs b) {
    return bit_cast<Vec<std::int32_t>>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
  };
  if constexpr (Bits < 8) {
    const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(codes), load<__m256i>(x));
    return sums + add_products(bit_cast<Pairs>(pairs), Pairs{} + std::int16_t{1});
  }
#else
  const auto add_products = [](Pairs a, Pairs b) {
    return bit_cast<Vec<std::int32_t>>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
  };
#endif
  const Pairs both = bit_cast<Pairs>(codes), xs = load<Pairs>(x);
  const Pairs odd = bit_cast<Pairs>(bit_cast<Vec<std::uint16_t>>(both) >> 8);
  return sums + add_products(both & std::int16_t{0xff}, xs << 8 >> 8) + add_products(odd, xs >> 8);
#elif defined(__aarch64__)
  // Signed by signed: codes of 8 bits lose 128 first, and get back 128 * x, as twice 64 * x.
  int32x4_t s = bit_cast<int32x4_t>(sums);
  const int8x16_t xs = vld1q_s8(x);
  const int8x16_t c = bit_cast<int8x16_t>(Bits == 8 ? codes ^ std::uint8_t{0x80} : codes);
  const int8x16_t half = vdupq_n_s8(64);
#if defined(__ARM_FEATURE_DOTPROD)
  s = vdotq_s32(s, c, xs);
  if (Bits == 8) s = vdotq_s32(vdotq_s32(s, xs, half), xs, half);
#else
  const auto add = [&](int8x16_t a) {
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(xs)));
    s = vaddq_s32(s, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(a, xs))));
  };
  add(c);
  if (Bits == 8) {
    add(half);
    add(half);
  }
#endif
  return bit_cast<Vec<std::int32_t>>(s);
#else
  for (std::size_t i = 0; i < kVectorBytes; ++i) sums[i / 4] += codes[i] * x[i];
  return sums;
#endif
}

// The same of 8 / Bits vectors of codes with 64 bytes of x each.
template <int Bits>
inline Vec<std::int32_t> dot_words(Vec<std::int32_t> sums, const Vec<std::uint8_t> (&codes)[8 / Bits],
                                   const std::int8_t* x) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  if constexpr (Bits < 8) {  // the pairs of all parts also stay below 2^15
    Vec<std::int16_t> pairs = {};
    for (std::size_t p = 0; p < 8 / Bits; ++p) {
#if defined(__AVX512BW__)
      pairs +=
          bit_cast<Vec<std::int16_t>>(_mm512_maddubs_epi16(bit_cast<__m512i>(codes[p]), load<__m512i>(x + 64 * p)));
#else
      pairs +=
          bit_cast<Vec<std::int16_t>>(_mm256_maddubs_epi16(bit_cast<__m256i>(codes[p]), load<__m256i>(x + 64 * p)));
#endif
    }
    const Vec<std::int16_t> ones = Vec<std::int16_t>{} + std::int16_t{1};
#if defined(__AVX512BW__)
    return sums + bit_cast<Vec<std::int32_t>>(_mm512_madd_epi16(bit_cast<__m512i>(pairs), bit_cast<__m512i>(ones)));
#else
    return sums + bit_cast<Vec<std::int32_t>>(_mm256_madd_epi16(bit_cast<__m256i>(pairs), bit_cast<__m256i>(ones)));
#endif
  }
#endif
  for (std::size_t p = 0; p < 8 / Bits; ++p) sums = dot<Bits>(sums, codes[p], x + 64 * p);
  return sums;
}

// Treats subnormal numbers as zero, in and out, until it goes out of scope: a unit that has died would otherwise
// slow its optimizer step down ten- to twenty-fold. The empty assembly with a memory clobber keeps the compiler
// from moving loads and stores, and so what is computed between them, across the switch.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(read()) { write(saved_ | kFlush); }
  ~FlushSubnormals() { write(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE2__)
  using Word = std::uint32_t;
  static constexpr Word kFlush = 0x8040;  // flush to zero, denormals are zero
  static Word read() {
    Word word;
    asm volatile("stmxcsr %0" : "=m"(word)::"memory");
    return word;
  }
  static void write(Word word) { asm volatile("ldmxcsr %0" ::"m"(word) : "memory"); }
#elif defined(__aarch64__)
  using Word = std::uint64_t;
  static constexpr Word kFlush = Word{1} << 24;
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word)::"memory");
    return word;
  }
  static void write(Word word) { asm volatile("msr fpcr, %0" ::"r"(word) : "memory"); }
#else
  using Word = int;
  static constexpr Word kFlush = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif
  Word saved_;
};
