// Bytes of a vector to other places of it, where one instruction does that within each 16 bytes, a lane here.

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool kShufflesBytes = true;
#else
constexpr bool kShufflesBytes = false;
#endif

// True where each lane of 16 bits can be shifted by another number.
#if defined(__AVX512BW__) || defined(__aarch64__)
constexpr bool kShiftsApart = true;
#else
constexpr bool kShiftsApart = false;
#endif

// Byte i of each lane is byte index[i] of that lane of v, or 0 where index[i] is 0x80.
inline Vec<std::uint8_t> shuffle_bytes(Vec<std::uint8_t> v, Vec<std::uint8_t> index) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<std::uint8_t>>(_mm512_shuffle_epi8(bit_cast<__m512i>(v), bit_cast<__m512i>(index)));
#elif defined(__AVX2__)
  return bit_cast<Vec<std::uint8_t>>(_mm256_shuffle_epi8(bit_cast<__m256i>(v), bit_cast<__m256i>(index)));
#elif defined(__aarch64__)
  return bit_cast<Vec<std::uint8_t>>(vqtbl1q_u8(bit_cast<uint8x16_t>(v), bit_cast<uint8x16_t>(index)));
#else
  return v ^ index;  // never called: `if constexpr` needs the name
#endif
}

// Lane k of load_lanes() holds the bytes of `from` from lane_source() on, which is at or before First + k * Step. No
// byte at or behind `Total` is read.
template <std::size_t Total>
constexpr std::size_t lane_source(std::size_t start) {
#if defined(__AVX512BW__)
  return start / 4 * 4;
#else
  return Total >= 16 && start + 16 > Total ? Total - 16 : start;
#endif
}

template <std::size_t First, std::size_t Step, std::size_t Total>
inline Vec<std::uint8_t> load_lanes(const std::uint8_t* from) {
#if defined(__AVX512BW__)
  const auto word = [](std::size_t i) {
    const std::size_t at = lane_source<Total>(First + i / 4 * Step) / 4 + i % 4;
    return 4 * at >= Total ? 0 : at < 16 ? at : at + 16 - (Total - 64) / 4;
  };
  const __m512i words = bit_cast<__m512i>(lanes_of<std::uint32_t>(word));
  if constexpr (Total < 64) {
    const __m512i v = _mm512_maskz_loadu_epi8((std::uint64_t{1} << Total) - 1, from);
    return bit_cast<Vec<std::uint8_t>>(_mm512_permutexvar_epi32(words, v));
  } else {
    return bit_cast<Vec<std::uint8_t>>(
        _mm512_permutex2var_epi32(load<__m512i>(from), words, load<__m512i>(from + Total - 64)));
  }
#elif defined(__AVX2__)
  const __m128i low = load<__m128i>(from + lane_source<Total>(First));
  const __m128i high = load<__m128i>(from + lane_source<Total>(First + Step));
  return bit_cast<Vec<std::uint8_t>>(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
#else
  if constexpr (Total < 16) {
    static_assert(Total == 12);
    return bit_cast<Vec<std::uint8_t>>(Vec<std::uint64_t>{load<std::uint64_t>(from), load<std::uint32_t>(from + 8)});
  } else {
    return load<Vec<std::uint8_t>>(from + lane_source<Total>(First));
  }
#endif
}

// The lanes of 32 bits with even numbers of each lane of `a` and of `b`, or those with odd numbers.
template <std::size_t Odd, std::size_t... I>
inline Vec<std::uint8_t> alternate(Vec<std::uint32_t> a, Vec<std::uint32_t> b, std::index_sequence<I...>) {
  constexpr std::size_t n = sizeof...(I);
  return bit_cast<Vec<std::uint8_t>>(
      __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + Odd + (I % 4 < 2 ? 0 : n))...));
}

// Lanes of `a` and `b` in turn: those of their lower halves, or of their upper halves.
template <std::size_t First, class V, std::size_t... I>
inline V zip(V a, V b, std::index_sequence<I...>) {
  constexpr std::size_t n = sizeof...(I);
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * n)...);
}

// Transposes a square of lanes of 32 bits. Each round moves the highest bit of a lane's address to its end: after as
// many rounds as a row has bits, row and column have changed places.
inline void transpose(Vec<std::uint32_t> (&rows)[kLanes<float>]) {
  constexpr std::size_t n = kLanes<float>;
  constexpr auto lanes = std::make_index_sequence<n>{};
#pragma GCC unroll 4
  for (std::size_t round = 1; round < n; round *= 2) {
    Vec<std::uint32_t> zipped[n];
#pragma GCC unroll 8
    for (std::size_t i = 0; i < n / 2; ++i) {
      zipped[2 * i] = zip<0>(rows[i], rows[i + n / 2], lanes);
      zipped[2 * i + 1] = zip<n / 2>(rows[i], rows[i + n / 2], lanes);
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < n; ++i) rows[i] = zipped[i];
  }
}
