// Numbers of one width to and from numbers of another: bytes, words, float16, packed integers.

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
  const std::uint32_t rest = magnitude_bits(bits);
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

// Loads the first n floats, n up to 16, and zeros for the other lanes: memory behind the n floats is not read.
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
