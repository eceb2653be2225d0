// Dot products of unsigned codes with signed bytes, summed in lanes of 32 bits.

// True where dot() is one instruction. Loops around it are worth unrolling then; elsewhere they grow too large.
#if defined(__AVX512VNNI__)
constexpr bool kOneInstructionDot = true;
#else
constexpr bool kOneInstructionDot = false;
#endif

using Pairs = Vec<std::int16_t>;

#if defined(__SSE2__)
// Products of 16 bits, summed in pairs to 32 bits.
inline Vec<std::int32_t> multiply_pairs(Pairs a, Pairs b) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::int32_t>>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::int32_t>>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return bit_cast<Vec<std::int32_t>>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#endif
}
#else
inline Vec<std::int32_t> multiply_pairs(Pairs, Pairs) { return Vec<std::int32_t>{}; }  // never called
#endif

// True where one instruction multiplies bytes and sums them in pairs to 16 bits. Of codes below 8 bits, two such pairs
// fit into 16 bits, and need only one instruction more to become sums of 32 bits; of codes below 5 bits, sixteen.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <int Bits>
constexpr bool kPairsFirst = Bits < 8;

inline Pairs byte_pairs(Vec<std::uint8_t> codes, Vec<std::int8_t> x) {
#if defined(__AVX512BW__)
  return bit_cast<Pairs>(_mm512_maddubs_epi16(bit_cast<__m512i>(codes), bit_cast<__m512i>(x)));
#else
  return bit_cast<Pairs>(_mm256_maddubs_epi16(bit_cast<__m256i>(codes), bit_cast<__m256i>(x)));
#endif
}

inline Vec<std::int32_t> sum_pairs(Pairs pairs) { return multiply_pairs(pairs, Pairs{} + std::int16_t{1}); }
#else
template <int Bits>
constexpr bool kPairsFirst = false;

// Never called: `if constexpr` needs their names.
inline Pairs byte_pairs(Vec<std::uint8_t>, Vec<std::int8_t>) { return Pairs{}; }
inline Vec<std::int32_t> sum_pairs(Pairs) { return Vec<std::int32_t>{}; }
#endif

// sums[l] + codes[4l .. 4l + 3] . x[4l .. 4l + 3]; `codes` are unsigned, below 2^Bits, x is signed.
template <int Bits>
inline Vec<std::int32_t> dot(Vec<std::int32_t> sums, Vec<std::uint8_t> codes, Vec<std::int8_t> x) {
#if defined(__AVX512VNNI__)
  return bit_cast<Vec<std::int32_t>>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(sums), bit_cast<__m512i>(codes), bit_cast<__m512i>(x)));
#elif defined(__SSE2__)
  if constexpr (kPairsFirst<Bits>) return sums + sum_pairs(byte_pairs(codes, x));
  const Pairs both = bit_cast<Pairs>(codes), xs = bit_cast<Pairs>(x);
  const Pairs odd = bit_cast<Pairs>(bit_cast<Vec<std::uint16_t>>(both) >> 8);
  return sums + multiply_pairs(both & std::int16_t{0xff}, xs << 8 >> 8) + multiply_pairs(odd, xs >> 8);
#elif defined(__aarch64__)
  // Signed by signed: codes of 8 bits lose 128 first, and get back 128 * x, as twice 64 * x.
  int32x4_t s = bit_cast<int32x4_t>(sums);
  const int8x16_t xs = bit_cast<int8x16_t>(x);
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

// Adds the dot products of several vectors of codes, each with its own 64 bytes of x.
template <int Bits, std::size_t Parts>
inline Vec<std::int32_t> dot_words(Vec<std::int32_t> sums, const Vec<std::uint8_t> (&codes)[Parts],
                                   const std::int8_t* x) {
  if constexpr (kPairsFirst<Bits>) {
    Pairs pairs = {};
    for (std::size_t p = 0; p < Parts; ++p) pairs += byte_pairs(codes[p], load<Vec<std::int8_t>>(x + 64 * p));
    return sums + sum_pairs(pairs);
  }
  for (std::size_t p = 0; p < Parts; ++p) sums = dot<Bits>(sums, codes[p], load<Vec<std::int8_t>>(x + 64 * p));
  return sums;
}

// True where products of 16 bits are fewer instructions than dot(): x and codes that meet in many products are worth
// widening to 16 bits once then.
#if defined(__SSE2__) && !defined(__AVX512VNNI__)
template <int Bits>
constexpr bool kWide = kVectorBytes == 16 || Bits == 8;
#else
template <int Bits>
constexpr bool kWide = false;
#endif

// The four bytes at `x` in each lane of 32 bits.
inline Vec<std::int8_t> broadcast_word(const std::int8_t* x) {
  return bit_cast<Vec<std::int8_t>>(broadcast(load<std::uint32_t>(x)));
}

// sums[l] + codes[2l] * x[2l] + codes[2l + 1] * x[2l + 1], of 16 bits each.
inline Vec<std::int32_t> dot_wide(Vec<std::int32_t> sums, Vec<std::uint8_t> codes, Vec<std::int8_t> x) {
  return sums + multiply_pairs(bit_cast<Pairs>(codes), bit_cast<Pairs>(x));
}
