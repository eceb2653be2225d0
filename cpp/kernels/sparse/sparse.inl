// Sparse storage and products with it. What is stored of a row are its entries: numbers with their columns, or, under
// a mask of blocks, 16 numbers at a time. Elements are integers of their width where they are only moved.

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

// Set bits among the first n of a mask.
std::size_t count_bits(const std::uint8_t* mask, std::size_t n) {
  std::size_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64)
    count += static_cast<std::size_t>(__builtin_popcountll(load<std::uint64_t>(mask + i / 8)));
  const std::uint64_t rest = load_part<std::uint64_t>(mask + i / 8, (n - i + 7) / 8);
  return count + static_cast<std::size_t>(__builtin_popcountll(rest & ((std::uint64_t{1} << (n - i)) - 1)));
}

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

// ---- dense to sparse and back --------------------------------------------------------------------------------

// Whatever the float type, an element is zero when all bits but the sign are.
template <class U>
inline bool nonzero(U bits) {
  return static_cast<U>(bits << 1) != 0;
}

// Which of eight elements are not zero.
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

template <class U>
std::size_t nonzero_mask(const void* from, std::size_t n, std::uint8_t* mask) {
  const U* x = static_cast<const U*>(from);
  std::size_t count = 0, i = 0;
#if defined(__AVX512DQ__)
  if constexpr (sizeof(U) == 4) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (; i + 64 <= n; i += 64) {
      std::uint64_t bits = 0;
      for (std::size_t j = 0; j < 4; ++j)
        bits |= std::uint64_t{_mm512_test_epi32_mask(load<__m512i>(x + i + 16 * j), magnitude)} << (16 * j);
      store(mask + i / 8, bits);
      count += static_cast<std::size_t>(__builtin_popcountll(bits));
    }
  }
#endif
  for (; i + 8 <= n; i += 8) {
    const unsigned bits = nonzero_bits(x + i);
    mask[i / 8] = static_cast<std::uint8_t>(bits);
    count += popcount(bits);
  }
  if (i < n) {
    unsigned bits = 0;
    for (std::size_t j = 0; i + j < n; ++j) bits |= static_cast<unsigned>(nonzero(x[i + j])) << j;
    mask[i / 8] = static_cast<std::uint8_t>(bits);
    count += popcount(bits);
  }
  return count;
}

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

// `count` elements under the mask. Eight are written at a time while there is room for them.
template <class U>
void compress_row(const void* from, const std::uint8_t* mask, std::size_t cols, std::size_t count, void* values) {
  const U* x = static_cast<const U*>(from);
  U* to = static_cast<U*>(values);
  const U* const end = to + count;
  std::size_t i = 0;
  for (; i + 8 <= cols && end - to >= 8; i += 8) {
    const unsigned bits = mask[i / 8];
    gather_eight(x + i, bits, to);
    to += popcount(bits);
  }
  for (; i < cols; ++i) {
    if (mask[i / 8] >> (i % 8) & 1) *to++ = x[i];
  }
}

template <class U>
void expand_row(const std::uint8_t* mask, const void* values, std::size_t count, std::size_t cols, void* out) {
  const U* from = static_cast<const U*>(values);
  const U* const end = from + count;
  U* x = static_cast<U*>(out);
  std::size_t i = 0;
  for (; i + 8 <= cols && end - from >= 8; i += 8) {
    const unsigned bits = mask[i / 8];
    if constexpr (sizeof(U) == 4) {
      store(x + i, spread(load<Eight>(from), bits));
    } else {
      for (int j = 0; j < 8; ++j) {
        const std::uint8_t rank = kBits.rank[bits][j];
        const U value = from[rank & 7];
        x[i + static_cast<std::size_t>(j)] = rank == kNone ? U{0} : value;
      }
    }
    from += popcount(bits);
  }
  for (; i < cols; ++i) x[i] = mask[i / 8] >> (i % 8) & 1 ? *from++ : U{0};
}

template <class U>
void scatter_row(const std::uint16_t* columns, const void* values, std::size_t count, std::size_t cols, void* out) {
  const U* from = static_cast<const U*>(values);
  U* x = static_cast<U*>(out);
  std::memset(x, 0, cols * sizeof(U));
  for (std::size_t i = 0; i < count; ++i) x[columns[i]] = from[i];
}

template <class Call>
auto by_width(int width, Call call) {
  switch (width) {
    case 2:
      return call(std::uint16_t{});
    case 4:
      return call(std::uint32_t{});
    default:
      return call(std::uint64_t{});
  }
}

std::size_t nonzero_mask_any(int width, const void* x, std::size_t n, std::uint8_t* mask) {
  return by_width(width, [&](auto u) { return nonzero_mask<decltype(u)>(x, n, mask); });
}

void compress_row_any(int width, const void* x, const std::uint8_t* mask, std::size_t cols, std::size_t count,
                      void* values) {
  by_width(width, [&](auto u) { compress_row<decltype(u)>(x, mask, cols, count, values); });
}

void expand_row_any(int width, const std::uint8_t* mask, const void* values, std::size_t count, std::size_t cols,
                    void* out) {
  by_width(width, [&](auto u) { expand_row<decltype(u)>(mask, values, count, cols, out); });
}

void scatter_row_any(int width, const std::uint16_t* columns, const void* values, std::size_t count, std::size_t cols,
                     void* out) {
  by_width(width, [&](auto u) { scatter_row<decltype(u)>(columns, values, count, cols, out); });
}

// ---- columns -------------------------------------------------------------------------------------------------

using Columns = Vec<std::uint16_t, 8>;

inline Columns widen_bytes(const std::uint8_t* from) {
#if defined(__SSE2__)
  return bit_cast<Columns>(
      _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), _mm_setzero_si128()));
#else
  return convert<std::uint16_t, 8>(load<Vec<std::uint8_t, 8> >(from));
#endif
}

// The columns of a mask's set bits; there must be room for 7 more. Returns how many.
std::size_t mask_columns(const std::uint8_t* mask, std::size_t cols, std::uint16_t* columns) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < cols; i += 8) {
    const unsigned bits = mask[i / 8];
    store(columns + count, widen_bytes(kBits.place[bits]) + static_cast<std::uint16_t>(i));
    count += popcount(bits);
  }
  return count;
}

// Of each entry the distance from the one before, less one; from column -1 for the first. Where it is more than a
// byte holds, entries with the value zero step in between. Returns the number of entries; `gaps` may be null.
std::size_t column_gaps(const std::uint16_t* columns, std::size_t count, std::uint8_t* gaps) {
  if (count == 0) return 0;
  std::size_t steps = columns[0] / 256u;
  for (std::size_t i = 1; i < count; ++i) steps += static_cast<std::uint16_t>(columns[i] - columns[i - 1] - 1) / 256u;
  if (!gaps) return count + steps;
  if (steps == 0) {
    gaps[0] = static_cast<std::uint8_t>(columns[0]);
    for (std::size_t i = 1; i < count; ++i) gaps[i] = static_cast<std::uint8_t>(columns[i] - columns[i - 1] - 1);
    return count;
  }
  std::size_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t gap = columns[i] - next;
    next = columns[i] + std::size_t{1};
    for (; gap > 255; gap -= 256) *gaps++ = 255;
    *gaps++ = static_cast<std::uint8_t>(gap);
  }
  return count + steps;
}

// The first `left` of eight columns from their gaps and, in all lanes, the column before. The carry from eight to eight
// stays in a vector.
inline Columns columns_of_gaps(const std::uint8_t* gaps, std::size_t left, Columns before) {
  std::uint8_t part[8] = {};
  if (left < 8) {
    std::memcpy(part, gaps, left);
    gaps = part;
  }
  const Columns zero = {};
  Columns c = widen_bytes(gaps) + std::uint16_t{1};
  c += __builtin_shufflevector(zero, c, 0, 8, 9, 10, 11, 12, 13, 14);
  c += __builtin_shufflevector(zero, c, 0, 1, 8, 9, 10, 11, 12, 13);
  c += __builtin_shufflevector(zero, c, 0, 1, 2, 3, 8, 9, 10, 11);
  return c + before;
}

inline Columns last_column(Columns c) { return __builtin_shufflevector(c, c, 7, 7, 7, 7, 7, 7, 7, 7); }

void gap_columns(const std::uint8_t* gaps, std::size_t count, std::uint16_t next, std::uint16_t* columns) {
  Columns c = Columns{} + static_cast<std::uint16_t>(next - 1);
  for (std::size_t i = 0; i < count; i += 8) {
    c = columns_of_gaps(gaps + i, count - i, last_column(c));
    store(columns + i, c);
  }
}

// ---- products ------------------------------------------------------------------------------------------------

// The order of summation is fixed, so the result has the same bits on every instruction set and for any number of
// threads. By vectors: entry k of a stretch goes to partial sum k % 16, stretches are added up, and at last the
// sixteen as a tree. Under a mask k counts columns, elsewhere it counts entries.
constexpr std::size_t kReach = 1024;

// What kernels may read behind the last number that they need.
constexpr std::size_t kSlack = 16;

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
  return bit_cast<Eight>(convert<std::uint32_t, 8>(load<Vec<std::uint16_t, 8> >(from)) << 16);
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
  return bit_cast<Four>(convert<std::uint32_t, 4>(load<Vec<std::uint16_t, 4> >(from)) << 16);
#endif
}

inline float number(const float* from) { return *from; }
inline float number(const Half* from) { return float_of_half(from->bits); }
inline float number(const Brain* from) { return bit_cast<float>(std::uint32_t{from->bits} << 16); }

// Keeps compilers from shifting in the registers of masks, which takes four times as long.
inline unsigned in_register(unsigned bits) {
  asm("" : "+r"(bits));
  return bits;
}

// As many columns as one vector expands to, under as many bits of a mask; the numbers from `from` on.
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

// Numbers [begin, begin + n) of what is stored, n at most kReach, so that kSlack more may be read: where they are, or
// at the very end in `scratch`, which holds n + kSlack.
template <class T>
inline const T* numbers_of(const Sparse& w, std::size_t begin, std::size_t n, T* scratch) {
  const T* from = static_cast<const T*>(w.values) + begin;
  if (begin + n + kSlack <= w.count) return from;
  std::memcpy(scratch, from, n * sizeof(T));
  return scratch;
}

// Codes [begin, begin + n) of the first row, as `dequantize` gives them, but kSlack more numbers may be written: groups
// need not end with a vector.
inline void decode_codes(const Quantized& q, std::size_t begin, std::size_t n, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t per_byte = static_cast<std::size_t>(8 / q.bits), skip = begin % per_byte;
  std::uint8_t block[kReach + 4 + kSlack];
  const std::uint8_t* codes = q.codes + begin / per_byte;
  if (q.bits < 8 || begin + n + kSlack > q.cols) {
    unpack_any(q.bits, codes, skip + n, block);
    codes = block + skip;
  }
  std::size_t g = begin / q.group, next = (g + 1) * q.group - begin;
  for (std::size_t i = 0; i < n; ++g, next += q.group) {
    const std::size_t end = next < n ? next : n;
    float scale = param_at(q, q.scale, g), minimum = param_at(q, q.minimum, g);
    const float twice = scale > 0x1p119f ? 2.0f : 1.0f, once = 1.0f / twice;
    scale *= once;
    minimum *= once;
    for (; i < end; i += lanes) store(out + i, (minimum + scale * float_of_bytes(codes + i)) * twice);
    i = end;
  }
}

// The same as float, decoded into `scratch` if they are stored otherwise.
inline const float* values_of(const Sparse& w, std::size_t begin, std::size_t n, float* scratch) {
  const auto decode = [&](auto type) {
    decltype(type) last[kReach + kSlack];
    const auto* from = numbers_of(w, begin, n, last);
    for (std::size_t i = 0; i < n; i += 8) store(scratch + i, load_eight(from + i));
    return scratch;
  };
  if (w.quantized) {
    decode_codes(*w.quantized, begin, n, scratch);
    return scratch;
  }
  if (w.type == Float::f16) return decode(Half{});
  if (w.type == Float::bf16) return decode(Brain{});
  return numbers_of(w, begin, n, scratch);
}

inline float tree(const Four (&s)[4]) {
  const Four four = (s[0] + s[2]) + (s[1] + s[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Sixteen partial sums.
struct Sixteen {
  Spread part[16 / kSpread] = {};

  void add(const Sixteen& other) {
    for (std::size_t p = 0; p < 16 / kSpread; ++p) part[p] += other.part[p];
  }
  float sum() const {
    Four s[4];
    std::memcpy(s, part, sizeof s);
    return tree(s);
  }
};

// Fetches memory into the outer cache in steps, every line once: the cores' own prefetching falls behind where loads
// overlap and run at an uneven pace, and a line that is left out costs as much as many that are not.
class Ahead {
 public:
  Ahead(const void* begin, const void* end, std::size_t steps)
      : at_(static_cast<const char*>(begin)),
        left_((static_cast<std::size_t>(static_cast<const char*>(end) - at_) + 127) / 64),
        lines_((left_ + steps - 1) / steps) {}

  void step() {
    if (left_ < lines_) return;
    for (std::size_t i = 0; i < lines_; ++i) __builtin_prefetch(at_ + 64 * i, 0, 2);
    at_ += 64 * lines_;
    left_ -= lines_;
  }

 private:
  const char* at_;
  std::size_t left_, lines_;
};

// The sums of `Rows` rows under their masks: they share the loads of x, and their chains of additions overlap.
// T is what the numbers are stored as; or float where `Decoded`, for those that are decoded a stretch at a time.
template <class T, bool Decoded, std::size_t Rows>
void dot_masks(const Sparse& w, std::size_t row, const float* x, float* sums) {
  T scratch[Rows][kReach + kSlack];
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  std::size_t at[Rows];
  for (std::size_t r = 0; r < Rows; ++r) at[r] = static_cast<std::size_t>(w.row_offsets[row + r]);
  const std::size_t next = static_cast<std::size_t>(w.row_offsets[row + Rows]),
                    far = static_cast<std::size_t>(w.row_offsets[w.rows - row < 2 * Rows ? w.rows : row + 2 * Rows]);
  const std::size_t width = Decoded ? static_cast<std::size_t>(w.quantized->bits) : 8 * sizeof(T);
  const std::uint8_t* const values = Decoded ? w.quantized->codes : static_cast<const std::uint8_t*>(w.values);
  Ahead ahead(values + next * width / 8, values + far * width / 8, w.cols / 64 + 1),
      ahead_mask(mask + Rows * w.row_bytes, mask + 2 * Rows * w.row_bytes, w.cols / 512 + 1);

  Sixteen total[Rows];
  for (std::size_t begin = 0; begin < w.cols; begin += kReach) {
    const std::size_t n = w.cols - begin < kReach ? w.cols - begin : kReach;
    const T* from[Rows];
    for (std::size_t r = 0; r < Rows; ++r) {
      if constexpr (Decoded) {
        from[r] = values_of(w, at[r], count_bits(mask + r * w.row_bytes + begin / 8, n), scratch[r]);
      } else {
        const std::size_t left = static_cast<std::size_t>(w.row_offsets[row + r + 1]) - at[r];
        from[r] = numbers_of(w, at[r], left < n ? left : n, scratch[r]);
      }
    }
    const T* first[Rows];
    std::memcpy(first, from, sizeof first);
    Sixteen partial[Rows];
    const auto multiply = [&](std::size_t c, const std::uint64_t (&words)[Rows], std::size_t columns) {
      for (std::size_t p = 0; p < columns / kSpread; ++p) {
        const std::uint64_t below = (std::uint64_t{1} << (p * kSpread)) - 1;
        const Spread xs = load<Spread>(x + c + p * kSpread);
        for (std::size_t r = 0; r < Rows; ++r) {
          const unsigned bits = in_register(static_cast<unsigned>(words[r] >> (p * kSpread)) & ((1u << kSpread) - 1));
          const std::size_t before = static_cast<std::size_t>(__builtin_popcountll(words[r] & below));
          partial[r].part[p % (16 / kSpread)] += spread_numbers(from[r] + before, bits) * xs;
        }
      }
      for (std::size_t r = 0; r < Rows; ++r) from[r] += __builtin_popcountll(words[r]);
    };
    std::size_t c = begin;
    for (; c + 64 <= begin + n; c += 64) {
      std::uint64_t words[Rows];
      for (std::size_t r = 0; r < Rows; ++r) words[r] = load<std::uint64_t>(mask + r * w.row_bytes + c / 8);
      ahead.step();
      if (c % 512 == 0) ahead_mask.step();
      multiply(c, words, 64);
    }
    for (; c < begin + n; c += 16) {
      std::uint64_t words[Rows];
      for (std::size_t r = 0; r < Rows; ++r) {
        const std::uint8_t* bytes = mask + r * w.row_bytes + c / 8;
        words[r] = c + 8 < w.cols ? bytes[0] | std::uint64_t{bytes[1]} << 8 : bytes[0];
      }
      multiply(c, words, 16);
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      at[r] += static_cast<std::size_t>(from[r] - first[r]);
      total[r].add(partial[r]);
    }
  }
  for (std::size_t r = 0; r < Rows; ++r) sums[r] = total[r].sum();
}

inline float dot_blocks(const Sparse& w, std::size_t row, const float* x) {
  float scratch[kReach + kSlack];
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  std::size_t at = kBlockLength * static_cast<std::size_t>(w.row_offsets[row]);
  Sixteen total;
  for (std::size_t begin = 0; begin < w.cols; begin += kReach, mask += 8) {
    const std::size_t left = (w.cols - begin + 8 * kBlockLength - 1) / (8 * kBlockLength);  // bytes of mask
    std::uint64_t word = load_part<std::uint64_t>(mask, left < 8 ? left : 8);
    const std::size_t count = kBlockLength * static_cast<std::size_t>(__builtin_popcountll(word));
    const float* from = values_of(w, at, count, scratch);
    at += count;
    Sixteen partial;
    for (; word != 0; word &= word - 1, from += kBlockLength) {
      const float* xs = x + begin + kBlockLength * static_cast<std::size_t>(__builtin_ctzll(word));
      for (std::size_t p = 0; p < 16 / kSpread; ++p)
        partial.part[p] += load<Spread>(from + p * kSpread) * load<Spread>(xs + p * kSpread);
    }
    total.add(partial);
  }
  return total.sum();
}

// Loading the numbers of x one by one is twice as fast as the gather instruction. T and Decoded as above; an Index is
// a column, or in a byte the distance from the one before less one.
template <class T, bool Decoded, class Index>
float dot_columns(const Sparse& w, std::size_t row, const float* x) {
  T scratch[kReach + kSlack];
  const std::size_t first = static_cast<std::size_t>(w.row_offsets[row]),
                    end = static_cast<std::size_t>(w.row_offsets[row + 1]);
  Four total[4] = {};
  std::size_t next = 0;
  for (std::size_t at = first; at < end; at += kReach) {
    const std::size_t n = end - at < kReach ? end - at : kReach;
    const T* v;
    if constexpr (Decoded) {
      v = values_of(w, at, n, scratch);
    } else {
      v = static_cast<const T*>(w.values) + at;
    }
    const Index* index = static_cast<const Index*>(w.positions) + at;
    const auto fetch = [&](std::size_t i) {
      if constexpr (!Decoded) __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 8192, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(index + i) + 4096, 0, 2);
    };
    // Numbers of x at four entries, `before` of them behind those that `next` is for: then a byte takes one addition.
    const auto four = [&](std::size_t i, std::size_t before) {
      const Index* q = index + i;
      if constexpr (sizeof(Index) == 2) {
        const std::uint64_t c = load<std::uint64_t>(q);
        return Four{x[c & 0xffff], x[c >> 16 & 0xffff], x[c >> 32 & 0xffff], x[c >> 48]};
      } else {
        const float* xs = x + before;
        const std::size_t c0 = next + q[0], c1 = c0 + q[1], c2 = c1 + q[2], c3 = c2 + q[3];
        next = c3;
        return Four{xs[c0], xs[c1 + 1], xs[c2 + 2], xs[c3 + 3]};
      }
    };
    Four sum[4] = {};
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
      fetch(i);
      for (std::size_t j = 0; j < 4; ++j) sum[j] += four(i + 4 * j, 4 * j) * load_four(v + i + 4 * j);
      next += 16;
    }
    fetch(i);
    const auto rest = [&](Four& to) {
      if (i >= n) return;
      if (i + 4 <= n) {
        to += four(i, 0) * load_four(v + i);
        next += 4;
      } else {
        Four xs = {}, vs = {};
        for (std::size_t j = 0; i + j < n; ++j) {
          const std::size_t column = sizeof(Index) == 2 ? index[i + j] : next + index[i + j];
          next = column + 1;
          xs[j] = x[column];
          vs[j] = number(v + i + j);
        }
        to += xs * vs;
      }
      i += 4;
    };
    for (Four& to : sum) rest(to);
    for (std::size_t j = 0; j < 4; ++j) total[j] += sum[j];
  }
  return tree(total);
}

// Calls call(T{}, decoded) with the type that numbers are loaded as.
template <class Call>
inline void by_numbers(const Sparse& w, Call call) {
  if (w.quantized) return call(float{}, std::true_type{});
  if (w.type == Float::f16) return call(Half{}, std::false_type{});
  if (w.type == Float::bf16) return call(Brain{}, std::false_type{});
  call(float{}, std::false_type{});
}

void linear_sparse(const Sparse& w, const float* x, std::size_t stride, std::size_t batch, const float* bias, float* y,
                   std::size_t begin, std::size_t end) {
  constexpr std::size_t together = 4;
  by_numbers(w, [&](auto type, auto decoded) {
    using T = decltype(type);
    constexpr bool Decoded = decltype(decoded)::value;
    for (std::size_t row = begin, rows; row < end; row += rows) {
      rows = w.layout == Layout::mask && end - row >= together ? together : 1;
      for (std::size_t b = 0; b < batch; ++b) {
        const float* xs = x + b * stride;
        float sums[together];
        if (rows == together) {
          dot_masks<T, Decoded, together>(w, row, xs, sums);
        } else if (w.layout == Layout::mask) {
          dot_masks<T, Decoded, 1>(w, row, xs, sums);
        } else {
          sums[0] = w.layout == Layout::block     ? dot_blocks(w, row, xs)
                    : w.layout == Layout::index16 ? dot_columns<T, Decoded, std::uint16_t>(w, row, xs)
                                                  : dot_columns<T, Decoded, std::uint8_t>(w, row, xs);
        }
        for (std::size_t r = 0; r < rows; ++r) {
          y[b * w.rows + row + r] = bias ? sums[r] + bias[row + r] : sums[r];
        }
      }
    }
  });
}

// ---- products with many x ------------------------------------------------------------------------------------

// A tile of `width` rows of x lies transposed, [cols][width]. Its part of kTile numbers stays in L1 while all rows of a
// panel use it. Entry k of a row in that stretch of kTile / width columns goes to partial sum k % (64 / width); these
// are added as a tree, stretches in order.
constexpr std::size_t kTile = 8192, kPanel = 32, kWidest = 64;

void transpose_tile(const float* x, std::size_t batch, std::size_t cols, std::size_t first, std::size_t width,
                    std::size_t begin, std::size_t end, float* tile) {
  constexpr std::size_t block = 16;
  for (std::size_t c0 = begin; c0 < end; c0 += block) {
    const std::size_t c1 = end - c0 < block ? end : c0 + block;
    for (std::size_t b = 0; b < width; ++b) {
      const float* row = x + (first + b) * cols;
      for (std::size_t c = c0; c < c1; ++c) tile[c * width + b] = first + b < batch ? row[c] : 0.0f;
    }
  }
}

// y += the sum of values[k] * x[columns[k]], for Vectors vectors of a tile's rows in so many chains of additions.
template <std::size_t Width, std::size_t Vectors>
inline void accumulate(const std::uint16_t* columns, const float* values, std::size_t n, const float* x, float* y) {
  using V = Vec<float>;
  constexpr std::size_t chains = kWidest / Width;
  V sum[chains][Vectors] = {};
  const auto add = [&](std::size_t chain, std::size_t k) {
    const float* row = x + columns[k] * Width;
    for (std::size_t v = 0; v < Vectors; ++v) sum[chain][v] += values[k] * load<V>(row + v * kLanes<float>);
  };
  std::size_t k = 0;
  for (; k + chains <= n; k += chains) {
    for (std::size_t chain = 0; chain < chains; ++chain) add(chain, k + chain);
  }
  for (std::size_t chain = 0; chain + 1 < chains; ++chain) {
    if (k + chain < n) add(chain, k + chain);
  }
  for (std::size_t v = 0; v < Vectors; ++v) {
    for (std::size_t half = chains / 2; half > 0; half /= 2) {
      for (std::size_t chain = 0; chain < half; ++chain) sum[chain][v] += sum[chain + half][v];
    }
    float* to = y + v * kLanes<float>;
    store(to, load<V>(to) + sum[0][v]);
  }
}

// As many vectors at once as there are registers for their chains.
template <std::size_t Width>
inline void accumulate_tile(const std::uint16_t* columns, const float* values, std::size_t n, const float* x,
                            float* y) {
  constexpr std::size_t lanes = kLanes<float>, most = (kVectorBytes == 64 ? 4 : 8) * Width / kWidest,
                        vectors = most < 1               ? 1
                                  : most < Width / lanes ? most
                                                         : Width / lanes;
  for (std::size_t l = 0; l < Width; l += vectors * lanes) accumulate<Width, vectors>(columns, values, n, x + l, y + l);
}

// How far a row of a panel has been read.
struct Cursor {
  std::size_t at;      // entry
  std::uint16_t next;  // index8: column behind the last one
};

// Entries of a row in columns [begin, end): n numbers and their columns, counted from `origin`.
struct Stretch {
  const std::uint16_t* columns;
  const float* values;
  std::size_t n, origin;
};

inline Stretch next_stretch(const Sparse& w, std::size_t row, std::size_t begin, std::size_t end, Cursor& cursor,
                            std::uint16_t* columns, float* scratch) {
  const std::size_t left = static_cast<std::size_t>(w.row_offsets[row + 1]) - cursor.at, at = cursor.at;
  if (w.layout == Layout::mask) {
    const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes + begin / 8;
    const std::size_t n = mask_columns(mask, end - begin, columns);
    cursor.at += n;
    return {columns, values_of(w, at, n, scratch), n, begin};
  }
  if (w.layout == Layout::block) {
    const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
    std::size_t n = 0;
    for (std::size_t c = begin; c < end; c += kBlockLength) {
      if ((mask[c / kBlockLength / 8] >> (c / kBlockLength % 8) & 1) == 0) continue;
      for (std::size_t j = 0; j < kBlockLength; ++j) columns[n++] = static_cast<std::uint16_t>(c - begin + j);
    }
    cursor.at += n / kBlockLength;
    const float* values = values_of(w, kBlockLength * at, n, scratch);
    if (n > 0 && columns[n - 1] >= w.cols - begin) n -= columns[n - 1] - (w.cols - begin) + 1;  // the last is cut short
    return {columns, values, n, begin};
  }
  if (w.layout == Layout::index8) {
    const std::uint8_t* gaps = static_cast<const std::uint8_t*>(w.positions) + at;
    std::size_t n = 0;
    for (bool inside = true; inside && n < left;) {
      const Columns c = columns_of_gaps(gaps + n, left - n, Columns{} + static_cast<std::uint16_t>(cursor.next - 1));
      store(columns + n, c);
      const std::size_t some = left - n < 8 ? left - n : 8;
      std::size_t good = some;
      while (good > 0 && columns[n + good - 1] >= end) --good;
      inside = good == some;
      n += good;
      if (good > 0) cursor.next = static_cast<std::uint16_t>(columns[n - 1] + 1);
    }
    cursor.at += n;
    return {columns, values_of(w, at, n, scratch), n, 0};
  }
  const std::uint16_t* c = static_cast<const std::uint16_t*>(w.positions) + at;
  std::size_t n = 0;
  while (n + 8 <= left && c[n + 7] < end) n += 8;
  while (n < left && c[n] < end) ++n;
  cursor.at += n;
  return {c, values_of(w, at, n, scratch), n, 0};
}

// What is stored of the rows from `row` on, to be fetched in so many steps: the visits to one panel bring in the next,
// for a visit must know where its entries end before it can go on.
struct PanelAhead {
  Ahead positions, values;

  static const char* at(const void* from, std::size_t n, std::size_t bits) {
    return static_cast<const char*>(from) + n * bits / 8;
  }
  static PanelAhead of(const Sparse& w, std::size_t row, std::size_t end, std::size_t steps) {
    const std::size_t a = static_cast<std::size_t>(w.row_offsets[row]),
                      b = static_cast<std::size_t>(w.row_offsets[end]);
    const void* from = w.quantized ? w.quantized->codes : w.values;
    std::size_t bits = w.quantized ? static_cast<std::size_t>(w.quantized->bits) : w.type == Float::f32 ? 32 : 16;
    if (w.layout == Layout::block) bits *= kBlockLength;
    const Ahead values(at(from, a, bits), at(from, b, bits), steps);
    if (w.layout == Layout::mask || w.layout == Layout::block)
      return {Ahead(at(w.positions, row, 8 * w.row_bytes), at(w.positions, end, 8 * w.row_bytes), steps), values};
    bits = w.layout == Layout::index16 ? 16 : 8;
    return {Ahead(at(w.positions, a, bits), at(w.positions, b, bits), steps), values};
  }
};

template <std::size_t Width>
void linear_tile(const Sparse& w, const float* tile, std::size_t batch, std::size_t first, const float* bias, float* y,
                 std::size_t begin, std::size_t end) {
  constexpr std::size_t reach = kTile / Width;
  float scratch[reach + kSlack], sums[kPanel * Width];
  std::uint16_t columns[reach + kSlack];
  Cursor cursors[kPanel];
  for (std::size_t top = begin; top < end; top += kPanel) {
    const std::size_t rows = end - top < kPanel ? end - top : kPanel;
    for (std::size_t r = 0; r < rows; ++r) cursors[r] = {static_cast<std::size_t>(w.row_offsets[top + r]), 0};
    std::memset(sums, 0, rows * Width * sizeof(float));
    const std::size_t next = top + rows, after = w.rows - next < kPanel ? w.rows : next + kPanel;
    PanelAhead ahead = PanelAhead::of(w, next, after, rows * (w.cols / reach + 1));
    for (std::size_t c0 = 0; c0 < w.cols; c0 += reach) {
      const std::size_t c1 = w.cols - c0 < reach ? w.cols : c0 + reach;
      for (std::size_t r = 0; r < rows; ++r) {
        const Stretch s = next_stretch(w, top + r, c0, c1, cursors[r], columns, scratch);
        ahead.positions.step();
        ahead.values.step();
        accumulate_tile<Width>(s.columns, s.values, s.n, tile + s.origin * Width, sums + r * Width);
      }
    }
    for (std::size_t b = 0; b < Width && first + b < batch; ++b) {
      float* to = y + (first + b) * w.rows + top;
      for (std::size_t r = 0; r < rows; ++r) to[r] = sums[r * Width + b] + (bias ? bias[top + r] : 0.0f);
    }
  }
}

void linear_sparse_tile(const Sparse& w, const float* tile, std::size_t width, std::size_t batch, std::size_t first,
                        const float* bias, float* y, std::size_t begin, std::size_t end) {
  if (width == 64) return linear_tile<64>(w, tile, batch, first, bias, y, begin, end);
  if (width == 32) return linear_tile<32>(w, tile, batch, first, bias, y, begin, end);
  linear_tile<16>(w, tile, batch, first, bias, y, begin, end);
}
