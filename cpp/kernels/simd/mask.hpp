// Bits that stand for lanes: comparisons to bits, masks of columns to lanes and back, and the numbers of sparse rows,
// loaded as floats.

// For a byte of a mask: where its set bits are, and for each bit how many are set below it, kNone if it is not set.
constexpr std::uint8_t kNone = 0x80;

struct BitTables {
  std::uint8_t place[256][8], rank[256][8];
};

constexpr BitTables make_bit_tables() {
  BitTables tables = {};
  for (unsigned bits = 0; bits < 256; ++bits) {
    std::uint8_t count = 0;
    for (std::uint8_t j = 0; j < 8; ++j) {
      const bool set = bits >> j & 1;
      tables.rank[bits][j] = set ? count : kNone;
      if (set) tables.place[bits][count++] = j;
    }
  }
  return tables;
}

alignas(64) constexpr BitTables kBits = make_bit_tables();

inline std::size_t popcount(unsigned bits) { return static_cast<std::size_t>(__builtin_popcount(bits)); }

// A bit for each lane of a comparison, of 32 or 64 bits.
template <class S>
inline unsigned lane_bits(S lanes) {
  [[maybe_unused]] constexpr bool wide = sizeof lanes[0] == 8;
#if defined(__AVX512DQ__)
  const __m512i v = bit_cast<__m512i>(lanes);
  return wide ? unsigned{_mm512_movepi64_mask(v)} : unsigned{_mm512_movepi32_mask(v)};
#elif defined(__AVX2__)
  const __m256i v = bit_cast<__m256i>(lanes);
  return static_cast<unsigned>(wide ? _mm256_movemask_pd(_mm256_castsi256_pd(v))
                                    : _mm256_movemask_ps(_mm256_castsi256_ps(v)));
#elif defined(__SSE2__)
  const __m128i v = bit_cast<__m128i>(lanes);
  return static_cast<unsigned>(wide ? _mm_movemask_pd(_mm_castsi128_pd(v)) : _mm_movemask_ps(_mm_castsi128_ps(v)));
#else
  const auto halves = bit_cast<Vec<std::uint64_t>>(lanes);
  if ((halves[0] | halves[1]) == 0) return 0;
  unsigned bits = 0;
  for (unsigned j = 0; j < sizeof lanes / sizeof lanes[0]; ++j) bits |= (lanes[j] != 0 ? 1u : 0u) << j;
  return bits;
#endif
}

// Moves the lanes whose bits are set to the front and fills the rest with zeros. It is there only where it is one
// instruction; elsewhere a loop over the bits is as fast.
#if defined(__AVX512DQ__)
constexpr bool kHasFrontLanes = true;

template <class V>
inline V front_lanes(V v, unsigned bits) {
  const __m512i all = bit_cast<__m512i>(v);
  return bit_cast<V>(sizeof v[0] == 8 ? _mm512_maskz_compress_epi64(static_cast<__mmask8>(bits), all)
                                      : _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all));
}
#else
constexpr bool kHasFrontLanes = false;

template <class V>
V front_lanes(V v, unsigned bits);  // declared for `if constexpr` alone
#endif

using Eight = Vec<float, 8>;

// Eight columns under a byte of a mask: the next of eight numbers where its bits are set, zero elsewhere.
inline Eight spread(Eight next, unsigned bits) {
#if defined(__AVX2__)
  const __m256i rank = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBits.rank[bits])));
  const __m256 all = _mm256_permutevar8x32_ps(bit_cast<__m256>(next), rank);
  return bit_cast<Eight>(_mm256_blendv_ps(all, _mm256_setzero_ps(), _mm256_castsi256_ps(rank)));
#elif defined(__aarch64__)
  const uint8x16_t low = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8x16_t byte = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  const uint8x16_t rank = vcombine_u8(vld1_u8(kBits.rank[bits]), vdup_n_u8(0));
  const uint8x16x2_t all = bit_cast<uint8x16x2_t>(next);
  struct {
    uint8x16_t half[2];
  } out;
  for (int i = 0; i < 2; ++i) {  // saturated, an index is beyond the table, which gives zero
    const uint8x16_t lane = vqtbl1q_u8(rank, vaddq_u8(low, vdupq_n_u8(static_cast<std::uint8_t>(4 * i))));
    out.half[i] = vqtbl2q_u8(all, vqaddq_u8(vqshlq_n_u8(lane, 2), byte));
  }
  return bit_cast<Eight>(out);
#else
  Eight out;
  for (int j = 0; j < 8; ++j) {
    const std::uint8_t rank = kBits.rank[bits][j];
    const float value = next[rank & 7];
    out[j] = rank == kNone ? 0.0f : value;
  }
  return out;
#endif
}

// An element of any float type is zero if all its bits but the sign are.
template <class U>
inline bool nonzero(U bits) {
  return static_cast<U>(bits << 1) != 0;
}

// Returns a bit for each of eight elements that is not zero.
template <class U>
inline unsigned nonzero_bits(const U* x) {
#if defined(__AVX2__)
  if constexpr (sizeof(U) == 4) {
    const __m256i v = load<__m256i>(x);
    const __m256i zero = _mm256_cmpeq_epi32(_mm256_add_epi32(v, v), _mm256_setzero_si256());
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(zero))) ^ 0xffu;
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(U) == 2) {
    const __m128i v = load<__m128i>(x);
    const __m128i zero = _mm_cmpeq_epi16(_mm_add_epi16(v, v), _mm_setzero_si128());
    return ~static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(zero, zero))) & 0xffu;
  }
#endif
  unsigned bits = 0;
  for (unsigned j = 0; j < 8; ++j) bits |= static_cast<unsigned>(nonzero(x[j])) << j;
  return bits;
}

// The elements of a mask that are computed at a time: eight, or more where the instruction set makes that faster.
#if defined(__AVX512DQ__)
template <class U>
constexpr std::size_t kNonzeroAtOnce = sizeof(U) == 4 ? 64 : 8;

inline std::uint64_t nonzero_bits_of_64(const std::uint32_t* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  std::uint64_t bits = 0;
  for (std::size_t j = 0; j < 4; ++j)
    bits |= std::uint64_t{_mm512_test_epi32_mask(load<__m512i>(x + 16 * j), magnitude)} << (16 * j);
  return bits;
}
#else
template <class U>
constexpr std::size_t kNonzeroAtOnce = 8;

template <class U>
std::uint64_t nonzero_bits_of_64(const U* x);  // declared for `if constexpr` alone
#endif

// The elements of eight that a byte of a mask names, to the front.
template <class U>
inline void gather_eight(const U* x, unsigned bits, U* to) {
#if defined(__AVX2__)
  if constexpr (sizeof(U) == 4) {
    const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBits.place[bits])));
    store(to, _mm256_permutevar8x32_epi32(load<__m256i>(x), place));
    return;
  }
#endif
  U all[8];
  std::memcpy(all, x, sizeof all);
  for (int j = 0; j < 8; ++j) to[j] = all[kBits.place[bits][j]];
}

using Columns = Vec<std::uint16_t, 8>;

inline Columns widen_bytes(const std::uint8_t* from) {
#if defined(__SSE2__)
  return bit_cast<Columns>(
      _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), _mm_setzero_si128()));
#else
  return convert<std::uint16_t, 8>(load<Vec<std::uint8_t, 8>>(from));
#endif
}

using Four = Vec<float, 4>;

struct Half {
  std::uint16_t bits;
};

struct Brain {
  std::uint16_t bits;
};

// Eight or four numbers, whatever they are stored as.
inline Eight load_eight(const float* from) { return load<Eight>(from); }

inline Eight load_eight(const Half* from) {
#if defined(__F16C__)
  return bit_cast<Eight>(_mm256_cvtph_ps(load<__m128i>(from)));
#elif defined(__aarch64__)
  const float16x8_t halves = vreinterpretq_f16_u16(load<uint16x8_t>(from));
  const float32x4x2_t floats = {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)}};
  return bit_cast<Eight>(floats);
#else
  Eight v;
  for (int j = 0; j < 8; ++j) v[j] = float_of_half(from[j].bits);
  return v;
#endif
}

inline Eight load_eight(const Brain* from) {
#if defined(__AVX2__)
  return bit_cast<Eight>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
#else
  return bit_cast<Eight>(convert<std::uint32_t, 8>(load<Vec<std::uint16_t, 8>>(from)) << 16);
#endif
}

inline Four load_four(const float* from) { return load<Four>(from); }

inline Four load_four(const Half* from) {
#if defined(__F16C__)
  return bit_cast<Four>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
  return bit_cast<Four>(vcvt_f32_f16(vreinterpret_f16_u16(load<uint16x4_t>(from))));
#else
  return Four{float_of_half(from[0].bits), float_of_half(from[1].bits), float_of_half(from[2].bits),
              float_of_half(from[3].bits)};
#endif
}

inline Four load_four(const Brain* from) {
#if defined(__SSE2__)
  const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return bit_cast<Four>(_mm_unpacklo_epi16(_mm_setzero_si128(), words));
#else
  return bit_cast<Four>(convert<std::uint32_t, 4>(load<Vec<std::uint16_t, 4>>(from)) << 16);
#endif
}

inline float number(const float* from) { return *from; }
inline float number(const Half* from) { return float_of_half(from->bits); }
inline float number(const Brain* from) { return bit_cast<float>(std::uint32_t{from->bits} << 16); }

// A vector of columns under as many bits of a mask: the next numbers of `from` where bits are set, zero elsewhere.
#if defined(__AVX512F__)
using Spread = Vec<float, 16>;

inline Spread spread_numbers(const float* from, unsigned bits) {
  return bit_cast<Spread>(_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load<__m512>(from)));
}
inline Spread spread_numbers(const Half* from, unsigned bits) {
  return bit_cast<Spread>(_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_cvtph_ps(load<__m256i>(from))));
}
inline Spread spread_numbers(const Brain* from, unsigned bits) {
  const __m512i all = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
  return bit_cast<Spread>(_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_castsi512_ps(all)));
}
#else
using Spread = Eight;

template <class T>
inline Spread spread_numbers(const T* from, unsigned bits) {
  return spread(load_eight(from), bits);
}
#endif
constexpr std::size_t kSpread = sizeof(Spread) / sizeof(float);

// Eight or more columns at a time: whether there is an instruction that loads sixteen numbers from anywhere, and
// whether it is faster than sixteen loads here. It is on the cores since Sapphire Rapids, which AVX512-FP16 stands for;
// those before are slowed down by the defence against GDS, and those of AMD split it.
#if defined(__AVX512BW__)
constexpr bool kHasGather = true;

inline bool gathers_fast() { return __builtin_cpu_supports("avx512fp16"); }

inline Vec<float> gather_sixteen(const float* x, const std::uint16_t* columns) {
  const __m512i index = _mm512_cvtepu16_epi32(load<__m256i>(columns));
  return bit_cast<Vec<float>>(_mm512_i32gather_ps(index, x, sizeof(float)));
}
inline Vec<float> load_sixteen(const float* from) { return load<Vec<float>>(from); }
inline Vec<float> load_sixteen(const Half* from) { return bit_cast<Vec<float>>(_mm512_cvtph_ps(load<__m256i>(from))); }
inline Vec<float> load_sixteen(const Brain* from) {
  return bit_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16));
}
#else
constexpr bool kHasGather = false;
inline bool gathers_fast() { return false; }
template <class T>  // declared for `if constexpr` alone
Vec<float> gather_sixteen(const float*, const T*);
template <class T>
Vec<float> load_sixteen(const T*);
#endif

// As many vectors of four numbers of x as fit in one, each from its column: x is [cols][4].
inline Vec<float> load_fours(const float* x, const std::uint16_t* columns) {
  const auto four = [&](std::size_t i) { return x + 4 * std::size_t{columns[i]}; };
#if defined(__AVX512BW__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(four(0)));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(four(1)), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(four(2)), 2);
  return bit_cast<Vec<float>>(_mm512_insertf32x4(v, _mm_loadu_ps(four(3)), 3));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(
      _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(four(0))), _mm_loadu_ps(four(1)), 1));
#else
  return load<Four>(four(0));
#endif
}

// As many numbers as a vector has lanes / 4, each of them four times.
inline Vec<float> repeat_fours(const float* numbers) {
#if defined(__AVX512BW__)
  const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return bit_cast<Vec<float>>(_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(numbers)), lane));
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const __m256 both = _mm256_castpd_ps(_mm256_set1_pd(load<double>(numbers)));
  return bit_cast<Vec<float>>(_mm256_permutevar_ps(both, lane));
#else
  return broadcast(numbers[0]);
#endif
}
