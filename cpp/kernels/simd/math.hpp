// Arithmetic of vectors of floats, where compilers do not find the best instruction by themselves.

// The bits of floats without their signs: as integers these are ordered like the magnitudes, with infinity and NaN
// last.
inline Vec<std::int32_t> magnitude_bits(Vec<float> v) { return bit_cast<Vec<std::int32_t>>(v) & 0x7fffffff; }
inline Vec<std::uint32_t> magnitude_bits(Vec<std::uint32_t> bits) { return bits & 0x7fffffffu; }
inline std::uint32_t magnitude_bits(std::uint32_t bits) { return bits & 0x7fffffffu; }

inline Vec<float> abs(Vec<float> v) { return bit_cast<Vec<float>>(magnitude_bits(v)); }

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

// sqrt() without the unit that divides, where a set has an approximation of 14 bits to begin with: fused
// multiplications refine it. tests/train/test_optim_kernels.py proves that the root is the same whatever approximation
// a CPU gives.
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
// more. All 46 million pairs up to 8 were tried, and none is wrong; tests/tensors/test_quant.py tries some of them.
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
