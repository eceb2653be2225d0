// b-bit min-max quantization. Codes pass through a block of bytes that stays in L1, so groups and rows may have any
// length, and 8, 4 and 2 bits differ in pack and unpack alone.

constexpr std::size_t kBlock = 1024;  // codes in flight; a multiple of every packing unit

// ---- packing: lowest bits first ------------------------------------------------------------------------------

// 8 / Bits codes share a byte. They are packed as one integer that is as many bytes wide: its bytes hold a code
// each, and shifting it onto itself gathers them in the lowest byte.
template <int Bits>
struct Packing;
template <>
struct Packing<8> {
  using Word = std::uint8_t;
};
template <>
struct Packing<4> {
  using Word = std::uint16_t;
  static Vec<Word> widen(const std::uint8_t* packed) {
    return convert<Word, kLanes<Word>>(load<Vec<std::uint8_t, kLanes<Word>>>(packed));
  }
  static void narrow(Vec<Word> v, std::uint8_t* packed) { store(packed, convert<std::uint8_t, kLanes<Word>>(v)); }
  static constexpr Word mask = 0x0f0f;
  template <class W>
  static W gather(W w) {
    return w | w >> 4;
  }
  template <class W>
  static W scatter(W w) {
    return w | w << 4;
  }
};
template <>
struct Packing<2> {
  using Word = std::uint32_t;
  static Vec<Word> widen(const std::uint8_t* packed) { return load_bytes(packed); }
  static void narrow(Vec<Word> v, std::uint8_t* packed) { store_low_bytes(packed, v); }
  static constexpr Word mask = 0x03030303;
  template <class W>
  static W gather(W w) {
    return w | w >> 6 | w >> 12 | w >> 18;
  }
  template <class W>
  static W scatter(W w) {
    return w | w << 6 | w << 12 | w << 18;
  }
};

template <int Bits>
inline void pack_vector(Vec<std::uint8_t> codes, std::uint8_t* packed) {
  using P = Packing<Bits>;
  using Word = typename P::Word;
  P::narrow(P::gather(bit_cast<Vec<Word>>(codes)), packed);
}

template <int Bits>
void pack(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  if constexpr (Bits == 8) {
    std::memcpy(packed, codes, n);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    constexpr std::size_t lanes = kLanes<Word>, per_byte = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * per_byte <= n; i += lanes) {
      pack_vector<Bits>(load<Vec<std::uint8_t>>(codes + i * per_byte), packed + i);
    }
    for (; i * per_byte < n; ++i) {
      const std::size_t left = n - i * per_byte;
      const Word word = load_part<Word>(codes + i * per_byte, left < per_byte ? left : per_byte);
      packed[i] = static_cast<std::uint8_t>(P::gather(std::uint32_t{word}));
    }
  }
}

template <int Bits>
void unpack(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  if constexpr (Bits == 8) {
    std::memcpy(codes, packed, n);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    constexpr std::size_t lanes = kLanes<Word>, per_byte = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * per_byte <= n; i += lanes) {
      store(codes + i * per_byte, P::scatter(P::widen(packed + i)) & P::mask);
    }
    for (; i * per_byte < n; ++i) {
      const Word word = static_cast<Word>(P::scatter(std::uint32_t{packed[i]}) & P::mask);
      const std::size_t left = n - i * per_byte;
      store_part(codes + i * per_byte, word, left < per_byte ? left : per_byte);
    }
  }
}

void pack_any(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  bits == 8 ? pack<8>(codes, n, packed) : bits == 4 ? pack<4>(codes, n, packed) : pack<2>(codes, n, packed);
}

void unpack_any(int bits, const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  bits == 8 ? unpack<8>(packed, n, codes) : bits == 4 ? unpack<4>(packed, n, codes) : unpack<2>(packed, n, codes);
}

// Groups are worked at side by side: what costs as much for one as for a vector of them is done for all at once.
constexpr std::size_t kGroupsAtOnce = 32;
using PerGroup = float[kGroupsAtOnce];

// The folds of n groups, of which each vector holds `Folded`.
template <std::size_t Folded = 1, class Op>
inline void fold_groups(const Vec<float>* v, std::size_t n, PerGroup* result, Op op) {
  constexpr std::size_t lanes = kLanes<float>, vectors = lanes / Folded;
  std::size_t g = 0;
  for (; g + (Folded == 1 ? lanes : 1) <= n; g += lanes) {
    Vec<float> some[vectors];
    for (std::size_t i = 0; i < vectors; ++i) some[i] = v[g / Folded + i];
    store(*result + g, fold_each<Folded>(some, op));
  }
  for (; g < n; ++g) (*result)[g] = fold(v[g], op);
}

// ---- range ---------------------------------------------------------------------------------------------------

constexpr auto smaller = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };

// Smallest and largest of n > 0 values, some in each lane; `magnitude` grows to the largest bits of any |x|, ordered
// like the numbers with NaN last.
struct Extremes {
  Vec<float> low, high;
};

inline Extremes extremes(const float* x, std::size_t n, Vec<std::int32_t>* magnitude) {
  using V = Vec<float>;
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  constexpr float inf = __builtin_inff();
  V low = V{} + inf, high = V{} - inf;
  Ints largest = *magnitude;
  const auto take = [&](V v) {
    low = smaller(v, low);
    high = larger(v, high);
    const Ints bits = bit_cast<Ints>(v) & 0x7fffffff;
    largest = larger(bits, largest);
  };
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) take(load<V>(x + i));
  if (n < lanes) {
    V v = V{} + x[0];
    std::memcpy(&v, x, n * sizeof(float));
    take(v);
  } else if (i < n) {
    take(load<V>(x + n - lanes));
  }
  *magnitude = largest;
  return {low, high};
}

// -0 and +0 are equal, so which of them comes out depends on the order: + 0 makes it +0.
inline Range range_of(Extremes e) { return {fold(e.low, smaller) + 0.0f, fold(e.high, larger) + 0.0f}; }

inline unsigned non_finite(Vec<std::int32_t> magnitude) {
  return fold(magnitude, larger) >= 0x7f800000 ? kNonFinite : 0;
}

unsigned range(const float* x, std::size_t n, Range* out) {
  Vec<std::int32_t> magnitude = {};
  *out = range_of(extremes(x, n, &magnitude));
  return non_finite(magnitude);
}

// ---- quantize ------------------------------------------------------------------------------------------------

// code = round((x * half - offset) / divisor * levels), clamped to [0, top]; `half` is 1, or 1/2 where max - min
// would overflow.
struct Grid {
  float scale, minimum;  // as stored
  float half, offset, divisor, levels;
};

constexpr float kSmallestNormal = 0x1p-126f, kSmallestHalf = 0x1p-14f;

inline float next_up(float f) { return bit_cast<float>(bit_cast<std::uint32_t>(f) + 1u); }

inline Grid grid_f32(Range r, float top) {
  if (!(r.max > r.min)) return {0.0f, r.min, 0.0f, 0.0f, 1.0f, 0.0f};
  const float width = r.max - r.min;
  if (width > 0x1.fffffep127f) {
    const float half_width = r.max * 0.5f - r.min * 0.5f;
    return {r.max / top - r.min / top, r.min, 0.5f, r.min * 0.5f, half_width, top};
  }
  const float scale = width / top;
  if (scale < kSmallestNormal) {  // too coarse to stand for width / top: round up, and code against what is stored
    const float up = scale * top < width ? next_up(scale) : scale;
    return {up, r.min, 1.0f, r.min, up, 1.0f};
  }
  return {scale, r.min, 1.0f, r.min, width, top};
}

// The minimum is rounded to float16 first, the scale follows from it, and codes are made against the rounded pair.
// Sets `misfit` where that would move a value by more than half a step.
inline Grid grid_f16(Range r, float top, bool* misfit) {
  const float minimum = float_of_half(half_of_float(r.min));
  const Grid exact = grid_f32(r, top);
  if (exact.scale == 0.0f) {
    *misfit |= !(minimum >= -65504.0f && minimum <= 65504.0f);
    *misfit |= r.min != 0.0f && minimum < kSmallestHalf && minimum > -kSmallestHalf;
    return {0.0f, minimum, 0.0f, 0.0f, 1.0f, 0.0f};
  }
  const float scale = float_of_half(half_of_float((r.max - minimum) / top));
  const float moved = minimum > r.min ? minimum - r.min : r.min - minimum;
  *misfit |= !(scale >= kSmallestHalf && scale <= 65504.0f && moved <= exact.scale * 0.5f);
  return {scale, minimum, 1.0f, minimum, scale, 1.0f};
}

// Codes against a pair that is stored as it is here.
inline Grid grid_of_pair(Pair p, bool half, bool* misfit) {
  if (half) {
    const Pair exact = p;
    p = {float_of_half(half_of_float(p.scale)), float_of_half(half_of_float(p.minimum))};
    const float moved = p.minimum > exact.minimum ? p.minimum - exact.minimum : exact.minimum - p.minimum;
    *misfit |= !(p.scale >= kSmallestHalf && p.scale <= 65504.0f && moved <= exact.scale * 0.5f);
  }
  return {p.scale, p.minimum, 1.0f, p.minimum, p.scale, 1.0f};
}

// Grids of so many groups.
struct Grids {
  float scale[kGroupsAtOnce], minimum[kGroupsAtOnce];  // as stored
  float factor[kGroupsAtOnce], offset[kGroupsAtOnce], divisor[kGroupsAtOnce], inverse[kGroupsAtOnce];
  float levels[kGroupsAtOnce];
  bool plain;  // factor and levels are 1

  // A power of two brings the divisor to where divide() is exact, and changes no code: what is rounded off where x is
  // so small that x * factor is subnormal is nothing beside the width of a group that is shifted down.
  void set(std::size_t g, const Grid& grid) {
    const float shift = grid.divisor < 0x1p-60f ? 0x1p64f : grid.divisor > 0x1p60f ? 0x1p-64f : 1.0f;
    scale[g] = grid.scale;
    minimum[g] = grid.minimum;
    factor[g] = grid.half * shift;
    offset[g] = grid.offset * shift;
    divisor[g] = grid.divisor * shift;
    inverse[g] = 1.0f / divisor[g];
    levels[g] = grid.levels;
    plain &= factor[g] == 1.0f && levels[g] == 1.0f;
  }
};

// As float16 would store it.
inline Vec<float> rounded_to_half(Vec<float> v) {
  std::uint16_t halves[kLanes<float>];
  store_halves(halves, v);
  return float_of_halves(halves);
}

// Grids of ranges, and of the pairs that were fitted where a scale is not 0. They are made side by side, unless one of
// them is unusual. divide() by these tops was tried with all significands.
inline void make_grids(const PerGroup& low, const PerGroup& high, const PerGroup* fitted_scale,
                       const PerGroup* fitted_minimum, bool half, float top, Grids* grids, bool* misfit) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  bool usual = true;
  const V tops = repeat(top), inverse_top = repeat(1.0f / top);
  grids->plain = half || fitted_scale;
  for (std::size_t i = 0; i < kGroupsAtOnce && usual; i += lanes) {
    const V l = load<V>(low + i) + 0.0f, h = load<V>(high + i) + 0.0f, width = h - l;
    const V lowest = fitted_scale ? load<V>(*fitted_minimum + i) : l;
    const V minimum = half ? rounded_to_half(lowest) : lowest;
    const V exact = fitted_scale ? load<V>(*fitted_scale + i) : divide(h - minimum, tops, inverse_top);
    const V scale = half ? rounded_to_half(exact) : exact;
    auto good = (exact >= 0x1p-60f) & (exact <= 0x1p50f);
    if (half) {
      const V step = fitted_scale ? exact : width * (0.999f / top);  // what it surely is
      good &= (scale >= kSmallestHalf) & (scale <= 65504.0f) & (abs(minimum - lowest) <= step * 0.5f);
    }
    usual = all(good);
    const V divisor = grids->plain ? scale : width;
    store(grids->scale + i, scale);
    store(grids->minimum + i, minimum);
    store(grids->offset + i, minimum);
    store(grids->divisor + i, divisor);
    store(grids->inverse + i, 1.0f / divisor);
    if (grids->plain) continue;
    store(grids->factor + i, repeat(1.0f));
    store(grids->levels + i, tops);
  }
  if (usual) return;
  grids->plain = true;
  for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
    const Range r = {low[i] + 0.0f, high[i] + 0.0f};
    grids->set(i, fitted_scale && (*fitted_scale)[i] > 0
                      ? grid_of_pair({(*fitted_scale)[i], (*fitted_minimum)[i]}, half, misfit)
                  : half ? grid_f16(r, top, misfit)
                         : grid_f32(r, top));
  }
}

// Codes of values that share a grid; what is read next, `ahead` of them, comes from memory meanwhile.
template <bool Plain>
inline void encode(const float* x, std::size_t n, int top, const Grids& grids, std::size_t g, std::size_t ahead,
                   std::uint8_t* codes) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  const V offset = repeat(grids.offset[g]), divisor = repeat(grids.divisor[g]), inverse = repeat(grids.inverse[g]);
  const float factor = grids.factor[g], levels = grids.levels[g];
  const auto code = [&](V v) {
    v = divide((Plain ? v : v * factor) - offset, divisor, inverse);
    return smaller(round_to_int(Plain ? v : v * levels), Vec<std::int32_t>{} + top);
  };
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    __builtin_prefetch(x + i + ahead);
    store_bytes(codes + i, code(load<V>(x + i)));
  }
  if (i < n) {
    std::uint8_t last[lanes];
    store_bytes(last, code(load_part<V>(x + i, (n - i) * sizeof(float))));
    std::memcpy(codes + i, last, n - i);
  }
}

// ---- least squares -------------------------------------------------------------------------------------------

// With u = (x - minimum) / scale, d the code counted from the middle and r = u - code: what the line r ~ a + b * d is
// fitted from. Sums run over sixteen partial ones, element i to number i % 16, added as a tree; here, its first steps
// down to a vector. Not inlined, as the compiler then runs out of registers.
struct Sums {
  Vec<float> d[kGroupsAtOnce], dd[kGroupsAtOnce], r[kGroupsAtOnce], rd[kGroupsAtOnce];
};

[[gnu::noinline]] void fit_sums(const float* x, std::size_t n, float top, float minimum, float inverse, Sums* sums,
                                std::size_t g) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, chunk = 16, vectors = chunk / lanes;
  const float middle = top * 0.5f;
  const V one = repeat(1.0f);
  V sum_d[vectors] = {}, sum_dd[vectors] = {}, sum_r[vectors] = {}, sum_rd[vectors] = {};
  const auto take = [&](std::size_t j, V v, std::size_t left) {
    const V u = (v - minimum) * inverse;
    const V code = positive_part(smaller(round_even(u), repeat(top)));
    V d = code - middle, r = u - code;
    if (left < lanes) {
      const auto exists = lane_numbers() < static_cast<std::int32_t>(left);
      d = exists ? d : V{};
      r = exists ? r : V{};
    }
    sum_d[j] = add_product(sum_d[j], d, one);
    sum_dd[j] = add_product(sum_dd[j], d, d);
    sum_r[j] = add_product(sum_r[j], r, one);
    sum_rd[j] = add_product(sum_rd[j], r * d, one);
  };
  std::size_t i = 0;
  for (; i + chunk <= n; i += chunk) {
    for (std::size_t j = 0; j < vectors; ++j) take(j, load<V>(x + i + j * lanes), lanes);
  }
  for (std::size_t j = 0; i < n; ++j, i += lanes) {
    const std::size_t left = n - i < lanes ? n - i : lanes;
    take(j, load_part<V>(x + i, left * sizeof(float)), left);
  }
  const auto total = [&](const V(&v)[vectors]) {
    if constexpr (vectors == 4) return (v[0] + v[2]) + (v[1] + v[3]);
    return vectors == 2 ? v[0] + v[vectors - 1] : v[0];
  };
  sums->d[g] = total(sum_d);
  sums->dd[g] = total(sum_dd);
  sums->r[g] = total(sum_r);
  sums->rd[g] = total(sum_rd);
}

// Eight times: codes of the pair, then the pair that fits these codes best, which the line changes a little: nothing
// cancels. `n` values in groups of `group`, side by side so that one does not wait for the other, and without branches,
// which the compiler makes vectors of; a pair of scale 0 is left alone, and one whose codes are all equal. A pair that
// a step has not changed, the next one would not change either.
inline void fit_groups(const float* x, std::size_t n, std::size_t group, float top, PerGroup& scales,
                       PerGroup& minimum) {
  const double middle = static_cast<double>(top * 0.5f);
  const std::size_t groups = (n + group - 1) / group;
  Sums sums;
  PerGroup d = {}, dd = {}, r = {}, rd = {}, scale, inverse, least;
  double count[kGroupsAtOnce], share[kGroupsAtOnce];
  std::int32_t moving[kGroupsAtOnce];
  std::uint32_t left = ~0u >> (kGroupsAtOnce - groups);  // the same, a bit for each group
  for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
    scale[g] = scales[g] > 0 ? scales[g] : 1.0f;
    least[g] = scale[g] * 0x1p-20f;
    count[g] = static_cast<double>(group);
    moving[g] = 1;
  }
  count[groups - 1] = static_cast<double>(n - (groups - 1) * group);
  for (std::size_t g = 0; g < kGroupsAtOnce; ++g) share[g] = 1 / count[g];
  for (int step = 0; step < 8 && left != 0; ++step) {
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) inverse[g] = 1.0f / scale[g];
    for (std::uint32_t rest = left; rest != 0; rest &= rest - 1) {
      const std::size_t g = static_cast<std::size_t>(__builtin_ctz(rest)), at = g * group;
      fit_sums(x + at, n - at < group ? n - at : group, top, minimum[g], inverse[g], &sums, g);
    }
    const auto plus = [](auto a, auto b) { return a + b; };
    fold_groups(sums.d, groups, &d, plus);
    fold_groups(sums.dd, groups, &dd, plus);
    fold_groups(sums.r, groups, &r, plus);
    fold_groups(sums.rd, groups, &rd, plus);
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
      const double sum_d = static_cast<double>(d[g]), sum_dd = static_cast<double>(dd[g]);
      const double sum_r = static_cast<double>(r[g]), sum_rd = static_cast<double>(rd[g]);
      const double spread = count[g] * sum_dd - sum_d * sum_d, s = static_cast<double>(scale[g]);
      const double b = (count[g] * sum_rd - sum_d * sum_r) / spread, a = (sum_r - b * sum_d) * share[g];
      const float better = static_cast<float>(s * (1 + b));
      const float moved = static_cast<float>(static_cast<double>(minimum[g]) + s * (a - b * middle));
      const bool good = (moving[g] != 0) & (spread > 0) & (better >= least[g]) & (better <= 0x1p100f);
      moving[g] = good & ((better != scale[g]) | (moved != minimum[g]));
      scale[g] = good ? better : scale[g];
      minimum[g] = good ? moved : minimum[g];
    }
    left = 0;
    for (std::size_t g = 0; g < groups; ++g) left |= static_cast<std::uint32_t>(moving[g]) << g;
  }
  for (std::size_t g = 0; g < kGroupsAtOnce; ++g) scales[g] = scales[g] > 0 ? scale[g] : 0.0f;
}

// Where scale and inverse are numbers of full precision; elsewhere the pair of the range stays.
inline bool can_fit(Range r, float scale) {
  return r.max - r.min <= 0x1.fffffep127f && scale >= 0x1p-100f && scale <= 0x1p100f;
}

Pair fit_any(const float* x, std::size_t n, int bits, Range r) {
  const float top = static_cast<float>((1 << bits) - 1);
  const Grid exact = grid_f32(r, top);
  if (!can_fit(r, exact.scale)) return {};
  PerGroup scale = {exact.scale}, minimum = {exact.minimum};
  fit_groups(x, n, n, top, scale, minimum);
  return {scale[0], minimum[0]};
}

// Scale and minimum of n groups.
inline void store_params(const Quantized& q, std::size_t at, const Grids& grids, std::size_t n) {
  constexpr std::size_t lanes = kLanes<float>;
  const auto to = [&](const void* params, const PerGroup& from) {
    if (q.half) {
      std::uint16_t* halves = static_cast<std::uint16_t*>(const_cast<void*>(params)) + at;
      std::size_t i = 0;
      for (; i + lanes <= n; i += lanes) store_halves(halves + i, load<Vec<float>>(from + i));
      std::uint16_t last[lanes];
      if (i < n) store_halves(last, load<Vec<float>>(from + i));
      for (std::size_t j = 0; i < n; ++i, ++j) halves[i] = last[j];
    } else {
      float* floats = static_cast<float*>(const_cast<void*>(params)) + at;
      std::size_t i = 0;
      for (; i + lanes <= n; i += lanes) store(floats + i, load<Vec<float>>(from + i));
      for (; i < n; ++i) floats[i] = from[i];
    }
  };
  to(q.scale, grids.scale);
  to(q.minimum, grids.minimum);
}

// Codes of a row on their way into its bytes.
class Packer {
 public:
  Packer(int bits, std::uint8_t* to, std::size_t ahead) : bits_(bits), to_(to), ahead_(ahead) {}

  // Of n values in groups of `group`.
  void add(const float* x, std::size_t n, std::size_t group, const Grids& grids) {
    grids.plain ? add<true>(x, n, group, grids) : add<false>(x, n, group, grids);
  }

  void flush() {
    pack_any(bits_, block_, filled_, to_);
    to_ += filled_ * static_cast<std::size_t>(bits_) / 8;
    filled_ = 0;
  }

 private:
  template <bool Plain>
  void add(const float* x, std::size_t n, std::size_t group, const Grids& grids) {
    if (n > kBlock - filled_) flush();
    for (std::size_t g = 0, at = 0; at < n; ++g) {
      const std::size_t end = n - at < group ? n : at + group;
      while (at < end) {
        const std::size_t take = end - at < kBlock - filled_ ? end - at : kBlock - filled_;
        encode<Plain>(x + at, take, (1 << bits_) - 1, grids, g, ahead_, block_ + filled_);
        at += take;
        filled_ += take;
        if (filled_ == kBlock) flush();
      }
    }
  }

  int bits_;
  std::uint8_t* to_;
  std::size_t ahead_, filled_ = 0;
  std::uint8_t block_[kBlock];
};

// Extremes of groups, one or more in each vector, and what extremes() calls their magnitude.
struct Ranges {
  Vec<float> low[kGroupsAtOnce], high[kGroupsAtOnce];
  Vec<std::int32_t> magnitude;
};

// Of groups of a row, `size` values, from group `first` on.
inline void measure_groups(const float* x, std::size_t size, std::size_t group, std::size_t first, Ranges* ranges) {
  for (std::size_t i = first, at = first * group; at < size; ++i, at += group) {
    const Extremes e = extremes(x + at, size - at < group ? size - at : group, &ranges->magnitude);
    ranges->low[i] = e.low;
    ranges->high[i] = e.high;
  }
}

// Grids of the next groups of a row, `size` values, of which each vector of the ranges holds `folded`; the same for all
// widths of codes, and not inlined, as it is long.
[[gnu::noinline]] void prepare_groups(const float* x, std::size_t size, const Quantized& q, bool refit, float top,
                                      const Ranges& ranges, std::size_t folded, Grids* grids, bool* misfit) {
  const std::size_t n = (size + q.group - 1) / q.group;
  PerGroup low, high;
  const auto fold_all = [&](auto held) {
    fold_groups<held.value>(ranges.low, n, &low, smaller);
    fold_groups<held.value>(ranges.high, n, &high, larger);
  };
  folded == 4 ? fold_all(Int<4>{}) : folded == 2 ? fold_all(Int<2>{}) : fold_all(Int<1>{});
  for (std::size_t i = n; i < kGroupsAtOnce; ++i) {
    low[i] = 0.0f;
    high[i] = 1.0f;
  }
  make_grids(low, high, nullptr, nullptr, q.half && !refit, top, grids, misfit);
  if (refit) {
    PerGroup scale, minimum;
    for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
      scale[i] = can_fit({low[i], high[i]}, grids->scale[i]) ? grids->scale[i] : 0.0f;
      minimum[i] = grids->minimum[i];
    }
    fit_groups(x, size, q.group, top, scale, minimum);
    make_grids(low, high, &scale, &minimum, q.half, top, grids, misfit);
  }
}

// Encodes groups of a row, `size` values, the first of them with grid number g, and takes the ranges of as many values
// at `next` meanwhile: one waits for memory, the other calculates. Codes of four vectors of values leave as one vector;
// groups are of one or two vectors, or (0) of any number of fours; of the small ones, four vectors' ranges go into one.
// What is to be read is asked for twice: far ahead for the second cache, as the first cannot wait for so many lines at
// once, and from there for the first; what is to be written, once.
template <int Vectors, bool Plain>
[[gnu::noinline]] void encode_and_measure(const float* x, std::size_t size, const Quantized& q, const Grids& grids,
                                          std::size_t g, std::uint8_t* codes, const float* next, Ranges* ranges) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, far = 16384 / sizeof(float);
  constexpr float inf = __builtin_inff();
  const int bits = q.bits;
  const std::size_t bytes = kVectorBytes * static_cast<std::size_t>(bits) / 8;
  const Vec<std::uint8_t> top = repeat<std::uint8_t>(static_cast<std::uint8_t>((1 << bits) - 1));
  V *lows = ranges->low, *highs = ranges->high;
  Vec<std::int32_t> largest = ranges->magnitude;
  for (std::size_t i = 0; i < size;) {
    const std::size_t end = Vectors == 0 ? i + q.group : size;
    V offset, divisor, inverse, factor, levels, low = V{} + inf, high = V{} - inf;
    const auto choose = [&](std::size_t n) {
      offset = repeat(grids.offset[n]);
      divisor = repeat(grids.divisor[n]);
      inverse = repeat(grids.inverse[n]);
      factor = repeat(grids.factor[n]);
      levels = repeat(grids.levels[n]);
    };
    choose(g);
    for (; i < end; i += 4 * lanes) {
      Vec<std::int32_t> code[4];
      __builtin_prefetch(codes + 2048, 1, 2);
      V seen[4];
      repeat<4>([&](auto j) {
        if constexpr (Vectors != 0) choose(g + j.value / Vectors);
        const V v = load<V>(x + i + j.value * lanes);
        const V quotient = divide((Plain ? v : v * factor) - offset, divisor, inverse);
        code[j.value] = round_to_int(Plain ? quotient : quotient * levels);
        const float* from = next + i + j.value * lanes;
        if constexpr (j.value * kVectorBytes % 64 == 0) {
          prefetch<2048>(from);
          __builtin_prefetch(from + far, 0, 2);
        }
        seen[j.value] = load<V>(from);
        largest = larger(bit_cast<Vec<std::int32_t>>(seen[j.value]) & 0x7fffffff, largest);
        if constexpr (Vectors == 0) {
          low = smaller(seen[j.value], low);
          high = larger(seen[j.value], high);
        }
      });
      if constexpr (Vectors == 1) {
        *lows++ =
            fold_pair<1>(fold_pair<2>(seen[0], seen[2], smaller), fold_pair<2>(seen[1], seen[3], smaller), smaller);
        *highs++ = fold_pair<1>(fold_pair<2>(seen[0], seen[2], larger), fold_pair<2>(seen[1], seen[3], larger), larger);
        g += 4;
      }
      if constexpr (Vectors == 2) {
        *lows++ = fold_pair<1>(smaller(seen[0], seen[1]), smaller(seen[2], seen[3]), smaller);
        *highs++ = fold_pair<1>(larger(seen[0], seen[1]), larger(seen[2], seen[3]), larger);
        g += 2;
      }
      const Vec<std::uint8_t> unclamped =
          unpacked_order(pack_unsigned(pack_words(code[0], code[1]), pack_words(code[2], code[3])));
      const Vec<std::uint8_t> clamped = smaller(unclamped, top);
      bits == 8 ? store(codes, clamped) : bits == 4 ? pack_vector<4>(clamped, codes) : pack_vector<2>(clamped, codes);
      codes += bytes;
    }
    if constexpr (Vectors == 0) {
      *lows++ = low;
      *highs++ = high;
      ++g;
    }
  }
  ranges->magnitude = largest;
}

// Whether all groups are such, and rows of vectors too.
inline bool fills_vectors(const Quantized& q) {
  constexpr std::size_t lanes = kLanes<float>;
  return q.cols % (4 * lanes) == 0 &&
         (q.group == lanes || q.group == 2 * lanes || (q.group % (4 * lanes) == 0 && q.cols % q.group == 0));
}

// Groups of a row that are worked at side by side.
struct Groups {
  const float* x;
  std::size_t size;  // values
  std::uint8_t* codes;
  std::size_t param;  // where their scale and minimum lie
};

inline Grid shared_grid(const Shared& shared, const Quantized& q, float top, bool* misfit) {
  if (shared.pair.scale > 0) return grid_of_pair(shared.pair, q.half, misfit);
  return q.half ? grid_f16(shared.range, top, misfit) : grid_f32(shared.range, top);
}

// While some groups are encoded, the next ones get their grids and those after them are measured.
unsigned quantize_vectors(const float* x, const Quantized& q, const Shared* shared, bool refit, std::size_t begin,
                          std::size_t end) {
  const std::size_t bits = static_cast<std::size_t>(q.bits);
  const float top = static_cast<float>((1 << q.bits) - 1);
  bool misfit = false;
  Grids grids[2] = {};
  Ranges ranges = {}, ignored = {};
  const std::size_t folded = q.group == kLanes<float> ? 4 : q.group == 2 * kLanes<float> ? 2 : 1;
  std::uint8_t nowhere[2 * kGroupsAtOnce * kLanes<float>];
  if (shared) {
    grids[0].plain = true;
    grids[0].set(0, shared_grid(*shared, q, top, &misfit));
    grids[1] = grids[0];
    if (begin == 0) store_params(q, 0, grids[0], 1);
  }
  const auto encode = [&](const Groups& groups, std::size_t from, std::size_t to, const Grids& of, const float* next,
                          Ranges* measured) {
    const auto run = [&](auto vectors) {
      (of.plain ? encode_and_measure<vectors.value, true>
                : encode_and_measure<vectors.value, false>)(groups.x + from, to - from, q, of, from / q.group,
                                                            groups.codes + from * bits / 8, next, measured);
    };
    q.group == kLanes<float> ? run(Int<1>{}) : q.group == 2 * kLanes<float> ? run(Int<2>{}) : run(Int<0>{});
  };
  Groups encoded, prepared = {}, measured = {};
  std::size_t row = begin, first = 0, turn = 0;
  do {
    encoded = prepared;
    prepared = measured;
    measured = {};
    if (row < end) {
      const std::size_t at = first * q.group, left = q.cols - at, most = kGroupsAtOnce * q.group;
      std::uint8_t* codes = const_cast<std::uint8_t*>(q.codes) + row * q.row_bytes + at * bits / 8;
      measured = {x + row * q.cols + at, left < most ? left : most, codes, row * q.param_stride + first};
      first = left > most ? first + kGroupsAtOnce : 0;
      row += first == 0;
    }
    Grids& next_grids = grids[turn];
    turn = 1 - turn;
    if (prepared.size != 0 && !shared) {
      prepare_groups(prepared.x, prepared.size, q, refit, top, ranges, folded, &next_grids, &misfit);
      store_params(q, prepared.param, next_grids, prepared.size / q.group);
    }
    const std::size_t both = encoded.size < measured.size ? encoded.size : measured.size;
    if (both != 0) encode(encoded, 0, both, grids[turn], measured.x, &ranges);
    if (both < encoded.size) encode(encoded, both, encoded.size, grids[turn], encoded.x + both, &ignored);
    if (both < measured.size && folded == 1) {
      measure_groups(measured.x, measured.size, q.group, both / q.group, &ranges);
    } else if (both < measured.size) {
      encode({measured.x, measured.size, nowhere, 0}, 0, measured.size, grids[turn], measured.x, &ranges);
    }
  } while (prepared.size + measured.size != 0);
  return non_finite(ranges.magnitude) | (misfit ? kHalfMisfit : 0);
}

// Groups of any size, one after the other.
unsigned quantize_any(const float* x, const Quantized& q, const Shared* shared, bool refit, std::size_t begin,
                      std::size_t end) {
  if (fills_vectors(q)) return quantize_vectors(x, q, shared, refit, begin, end);
  const float top = static_cast<float>((1 << q.bits) - 1);
  const std::size_t ahead = q.groups > kGroupsAtOnce ? kGroupsAtOnce * q.group : q.cols;
  bool misfit = false;
  Grids grids = {};
  Ranges ranges = {};
  for (std::size_t row = begin; row < end; ++row) {
    const float* from = x + row * q.cols;
    Packer packer(q.bits, const_cast<std::uint8_t*>(q.codes) + row * q.row_bytes, ahead);
    if (shared) {
      grids.plain = true;
      grids.set(0, shared_grid(*shared, q, top, &misfit));
      if (row == 0) store_params(q, 0, grids, 1);
      packer.add(from, q.cols, q.cols, grids);
    }
    for (std::size_t g = 0; g < q.groups && !shared; g += kGroupsAtOnce) {
      const std::size_t n = q.groups - g < kGroupsAtOnce ? q.groups - g : kGroupsAtOnce;
      const std::size_t left = q.cols - g * q.group, size = left < n * q.group ? left : n * q.group;
      measure_groups(from, size, q.group, 0, &ranges);
      prepare_groups(from, size, q, refit, top, ranges, 1, &grids, &misfit);
      store_params(q, row * q.param_stride + g, grids, n);
      packer.add(from, size, q.group, grids);
      from += size;
    }
    packer.flush();
  }
  return non_finite(ranges.magnitude) | (misfit ? kHalfMisfit : 0);
}

// ---- dequantize ----------------------------------------------------------------------------------------------

inline float param_at(const Quantized& q, const void* params, std::size_t at) {
  return q.half ? float_of_half(static_cast<const std::uint16_t*>(params)[at]) : static_cast<const float*>(params)[at];
}

// Parameters [at, at + n) as float32, filled up with zeros to a multiple of 16. What lies behind the last ones in
// memory does not exist.
[[gnu::noinline]] void load_params(const Quantized& q, const void* params, std::size_t at, std::size_t n, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t all = q.param_stride ? q.rows * q.groups : q.groups;
  const std::uint16_t* halves = static_cast<const std::uint16_t*>(params) + at;
  const float* floats = static_cast<const float*>(params) + at;
  std::size_t i = 0;
  for (; i < n && at + i + lanes <= all; i += lanes) {
    Vec<float> v = q.half ? float_of_halves(halves + i) : load<Vec<float>>(floats + i);
    if (n - i < lanes) v = lane_numbers() < static_cast<std::int32_t>(n - i) ? v : Vec<float>{};  // of another row
    store(out + i, v);
  }
  for (; i < n; ++i) out[i] = param_at(q, params, at + i);
  for (; i % 16 != 0; ++i) out[i] = 0.0f;
}

// minimum + scale * code. Where scale * code could overflow although the sum does not, both are halved: that changes
// no bit of the result.
inline void decode(const std::uint8_t* codes, std::size_t n, float scale, float minimum, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const float twice = scale > 0x1p119f ? 2.0f : 1.0f, half = scale > 0x1p119f ? 0.5f : 1.0f;
  scale *= half;
  minimum *= half;
  std::size_t i = 0;
  if (twice == 1.0f) {
    for (; i + lanes <= n; i += lanes) store(out + i, minimum + scale * float_of_bytes(codes + i));
  }
  for (; i + lanes <= n; i += lanes) store(out + i, (minimum + scale * float_of_bytes(codes + i)) * twice);
  for (; i < n; ++i) out[i] = (minimum + scale * static_cast<float>(codes[i])) * twice;
}

template <int Bits>
void dequantize(const Quantized& q, std::size_t row, std::size_t begin, std::size_t end, float* out) {
  constexpr std::size_t per_byte = 8 / Bits;
  const std::uint8_t* packed = q.codes + row * q.row_bytes;
  std::uint8_t block[kBlock];
  PerGroup scale, minimum;
  std::size_t group = begin / q.group, group_end = (group + 1) * q.group, first = group, known = group;
  for (std::size_t at = begin; at < end;) {
    const std::size_t skip = at % per_byte;
    const std::size_t n = end - at < kBlock - skip ? end - at : kBlock - skip;
    unpack<Bits>(packed + at / per_byte, skip + n, block);
    const std::uint8_t* codes = block + skip;
    for (const std::size_t stop = at + n; at < stop;) {
      if (group == known) {
        first = group;
        known = q.groups - group < kGroupsAtOnce ? q.groups : group + kGroupsAtOnce;
        load_params(q, q.scale, row * q.param_stride + group, known - group, scale);
        load_params(q, q.minimum, row * q.param_stride + group, known - group, minimum);
      }
      const std::size_t size = (group_end < stop ? group_end : stop) - at;
      decode(codes, size, scale[group - first], minimum[group - first], out);
      codes += size;
      out += size;
      at += size;
      if (at == group_end) {
        ++group;
        group_end += q.group;
      }
    }
  }
}

void dequantize_any(const Quantized& q, std::size_t row, std::size_t begin, std::size_t end, float* out) {
  q.bits == 8   ? dequantize<8>(q, row, begin, end, out)
  : q.bits == 4 ? dequantize<4>(q, row, begin, end, out)
                : dequantize<2>(q, row, begin, end, out);
}
