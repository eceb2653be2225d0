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
void pack(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  if constexpr (Bits == 8) {
    std::memcpy(packed, codes, n);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    constexpr std::size_t lanes = kLanes<Word>, per_byte = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * per_byte <= n; i += lanes) {
      store(packed + i, convert<std::uint8_t, lanes>(P::gather(load<Vec<Word>>(codes + i * per_byte))));
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
      const Vec<Word> words = convert<Word, lanes>(load<Vec<std::uint8_t, lanes>>(packed + i));
      store(codes + i * per_byte, P::scatter(words) & P::mask);
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

// ---- range ---------------------------------------------------------------------------------------------------

// Smallest and largest of n > 0 values; `magnitude` grows to the largest bits of any |x|, ordered like the numbers
// with NaN last.
inline Range range_of(const float* x, std::size_t n, Vec<std::int32_t>* magnitude) {
  using V = Vec<float>;
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  constexpr float inf = __builtin_inff();
  V low = V{} + inf, high = V{} - inf;
  Ints largest = *magnitude;
  const auto take = [&](V v) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    const Ints bits = bit_cast<Ints>(v) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
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
  // -0 and +0 are equal, so which of them came out depends on the order: + 0 makes it +0.
  return {fold(low, [](auto a, auto b) { return a < b ? a : b; }) + 0.0f,
          fold(high, [](auto a, auto b) { return a > b ? a : b; }) + 0.0f};
}

inline unsigned non_finite(Vec<std::int32_t> magnitude) {
  return fold(magnitude, [](auto a, auto b) { return a > b ? a : b; }) >= 0x7f800000 ? kNonFinite : 0;
}

unsigned range(const float* x, std::size_t n, Range* out) {
  Vec<std::int32_t> magnitude = {};
  *out = range_of(x, n, &magnitude);
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

constexpr std::size_t kGroupsAtOnce = 16;

// Grids of as many ranges. With float16 parameters they are made side by side, unless one of them is unusual.
inline void make_grids(const float (&low)[kGroupsAtOnce], const float (&high)[kGroupsAtOnce], std::size_t n, bool half,
                       float top, Grid* grids, bool* misfit) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  float scales[kGroupsAtOnce], minima[kGroupsAtOnce];
  bool usual = half;
  for (std::size_t i = 0; i < n && usual; i += lanes) {
    const V l = load<V>(low + i), h = load<V>(high + i);
    std::uint16_t halves[lanes];
    store_halves(halves, l);
    const V minimum = float_of_halves(halves), exact = (h - l) / top;
    store_halves(halves, (h - minimum) / top);
    const V scale = float_of_halves(halves);
    const auto good = (exact >= kSmallestNormal) & (exact <= 0x1.fffffep127f) & (scale >= kSmallestHalf) &
                      (scale <= 65504.0f) & (abs(minimum - l) <= exact * 0.5f);
    usual = fold(good, [](auto a, auto b) { return a & b; }) != 0;
    store(scales + i, scale);
    store(minima + i, minimum);
  }
  for (std::size_t i = 0; i < n; ++i) {
    const Range r = {low[i], high[i]};
    grids[i] = usual  ? Grid{scales[i], minima[i], 1.0f, minima[i], scales[i], 1.0f}
               : half ? grid_f16(r, top, misfit)
                      : grid_f32(r, top);
  }
}

// `ahead` is how far away what is read next lies: it comes from memory while these codes are made.
template <bool Plain>
inline void encode(const float* x, std::size_t n, const Grid& grid, float top, std::size_t ahead, std::uint8_t* codes) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  const auto code = [&](V v) {
    v = Plain ? (v - grid.offset) / grid.divisor : (v * grid.half - grid.offset) / grid.divisor * grid.levels;
    v = round_even(v);
    v = v > top ? V{} + top : v;
    return v > 0 ? v : V{};
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
// fitted from. Sums run over sixteen partial ones, element i to number i % 16, added as a tree.
struct Sums {
  float d, dd, r, rd;
};

inline Sums fit_sums(const float* x, std::size_t n, float top, float minimum, float inverse) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, chunk = 16, vectors = chunk / lanes;
  const float middle = top * 0.5f;
  V sum_d[vectors] = {}, sum_dd[vectors] = {}, sum_r[vectors] = {}, sum_rd[vectors] = {};
  const auto take = [&](std::size_t j, V v, std::size_t left) {
    const V u = (v - minimum) * inverse;
    V code = round_even(u);
    code = code > top ? V{} + top : code;
    code = code > 0 ? code : V{};
    V d = code - middle, r = u - code;
    if (left < lanes) {
      const auto exists = lane_numbers() < static_cast<std::int32_t>(left);
      d = exists ? d : V{};
      r = exists ? r : V{};
    }
    sum_d[j] += d;
    sum_dd[j] += d * d;
    sum_r[j] += r;
    sum_rd[j] += r * d;
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
    V sum = v[0];
    if constexpr (vectors == 2) sum = v[0] + v[1];
    if constexpr (vectors == 4) sum = (v[0] + v[2]) + (v[1] + v[3]);
    return fold(sum, [](auto a, auto b) { return a + b; });
  };
  return {total(sum_d), total(sum_dd), total(sum_r), total(sum_rd)};
}

// Eight times: codes of the pair, then the pair that fits these codes best, which the line changes a little: nothing
// cancels. `n` values in groups of `group`, side by side so that one does not wait for the other, and without branches,
// which the compiler makes vectors of; a pair of scale 0 is left alone, and one whose codes are all equal.
inline void fit_groups(const float* x, std::size_t n, std::size_t group, float top, Pair (&pairs)[kGroupsAtOnce]) {
  const double middle = static_cast<double>(top * 0.5f);
  double count[kGroupsAtOnce], d[kGroupsAtOnce], dd[kGroupsAtOnce], r[kGroupsAtOnce], rd[kGroupsAtOnce];
  float scale[kGroupsAtOnce], minimum[kGroupsAtOnce], inverse[kGroupsAtOnce];
  for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
    scale[g] = pairs[g].scale > 0 ? pairs[g].scale : 1.0f;
    minimum[g] = pairs[g].minimum;
    const std::size_t left = g * group < n ? n - g * group : 0;
    count[g] = static_cast<double>(left < group ? left : group);
    d[g] = dd[g] = r[g] = rd[g] = 0;
  }
  for (int step = 0; step < 8; ++step) {
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) inverse[g] = 1.0f / scale[g];
    for (std::size_t g = 0, at = 0; at < n; ++g, at += group) {
      if (!(pairs[g].scale > 0)) continue;
      const Sums sums = fit_sums(x + at, n - at < group ? n - at : group, top, minimum[g], inverse[g]);
      d[g] = static_cast<double>(sums.d);
      dd[g] = static_cast<double>(sums.dd);
      r[g] = static_cast<double>(sums.r);
      rd[g] = static_cast<double>(sums.rd);
    }
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
      const double spread = count[g] * dd[g] - d[g] * d[g], s = static_cast<double>(scale[g]);
      const double b = (count[g] * rd[g] - d[g] * r[g]) / spread, a = (r[g] - b * d[g]) / count[g];
      const float better = static_cast<float>(s * (1 + b));
      const float moved = static_cast<float>(static_cast<double>(minimum[g]) + s * (a - b * middle));
      const bool good = (spread > 0) & (better >= kSmallestNormal) & (better <= 0x1p100f);
      scale[g] = good ? better : scale[g];
      minimum[g] = good ? moved : minimum[g];
    }
  }
  for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
    if (pairs[g].scale > 0) pairs[g] = {scale[g], minimum[g]};
  }
}

// Where scale and inverse are numbers of full precision; elsewhere the pair of the range stays.
inline bool can_fit(const Grid& exact) {
  return exact.half == 1.0f && exact.scale >= 0x1p-100f && exact.scale <= 0x1p100f;
}

Pair fit_any(const float* x, std::size_t n, int bits, Range r) {
  const float top = static_cast<float>((1 << bits) - 1);
  const Grid exact = grid_f32(r, top);
  Pair pairs[kGroupsAtOnce] = {};
  if (can_fit(exact)) {
    pairs[0] = {exact.scale, exact.minimum};
    fit_groups(x, n, n, top, pairs);
  }
  return pairs[0];
}

inline void store_params(const Quantized& q, std::size_t at, const Grid& grid) {
  if (q.half) {
    static_cast<std::uint16_t*>(const_cast<void*>(q.scale))[at] = half_of_float(grid.scale);
    static_cast<std::uint16_t*>(const_cast<void*>(q.minimum))[at] = half_of_float(grid.minimum);
  } else {
    static_cast<float*>(const_cast<void*>(q.scale))[at] = grid.scale;
    static_cast<float*>(const_cast<void*>(q.minimum))[at] = grid.minimum;
  }
}

// Codes of a row on their way into its bytes.
template <int Bits>
class Packer {
 public:
  Packer(std::uint8_t* to, std::size_t ahead) : to_(to), ahead_(ahead) {}

  void add(const float* x, std::size_t n, const Grid& grid) {
    constexpr float top = (1 << Bits) - 1;
    while (n > 0) {
      const std::size_t take = n < kBlock - filled_ ? n : kBlock - filled_;
      if (grid.half == 1.0f && grid.levels == 1.0f) {
        encode<true>(x, take, grid, top, ahead_, block_ + filled_);
      } else {
        encode<false>(x, take, grid, top, ahead_, block_ + filled_);
      }
      x += take;
      n -= take;
      filled_ += take;
      if (filled_ == kBlock) flush();
    }
  }

  void flush() {
    pack<Bits>(block_, filled_, to_);
    to_ += filled_ * Bits / 8;
    filled_ = 0;
  }

 private:
  std::uint8_t* to_;
  std::size_t ahead_, filled_ = 0;
  std::uint8_t block_[kBlock];
};

template <int Bits>
unsigned quantize(const float* x, const Quantized& q, const Shared* shared, bool refit, std::size_t begin,
                  std::size_t end) {
  constexpr float top = (1 << Bits) - 1;
  bool misfit = false;
  Vec<std::int32_t> magnitude = {};
  for (std::size_t row = begin; row < end; ++row) {
    const float* from = x + row * q.cols;
    Packer<Bits> packer(const_cast<std::uint8_t*>(q.codes) + row * q.row_bytes,
                        q.groups > kGroupsAtOnce ? kGroupsAtOnce * q.group : q.cols);
    if (shared) {
      const Pair pair = shared->pair;
      const Grid grid = pair.scale > 0 ? grid_of_pair(pair, q.half, &misfit)
                        : q.half       ? grid_f16(shared->range, top, &misfit)
                                       : grid_f32(shared->range, top);
      if (row == 0) store_params(q, 0, grid);
      packer.add(from, q.cols, grid);
    }
    for (std::size_t g = 0; g < q.groups && !shared; g += kGroupsAtOnce) {
      const std::size_t n = q.groups - g < kGroupsAtOnce ? q.groups - g : kGroupsAtOnce;
      const auto length = [&](std::size_t i) {
        const std::size_t left = q.cols - (g + i) * q.group;
        return left < q.group ? left : q.group;
      };
      float low[kGroupsAtOnce], high[kGroupsAtOnce];
      for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
        const Range r = i < n ? range_of(from + i * q.group, length(i), &magnitude) : Range{0.0f, 1.0f};
        low[i] = r.min;
        high[i] = r.max;
      }
      Grid grids[kGroupsAtOnce];
      make_grids(low, high, n, q.half && !refit, top, grids, &misfit);
      if (refit) {
        Pair pairs[kGroupsAtOnce] = {};
        for (std::size_t i = 0; i < n; ++i) {
          if (can_fit(grids[i])) pairs[i] = {grids[i].scale, grids[i].minimum};
        }
        const std::size_t all = q.cols - g * q.group;
        fit_groups(from, all < n * q.group ? all : n * q.group, q.group, top, pairs);
        for (std::size_t i = 0; i < n; ++i) {
          if (pairs[i].scale > 0) {
            grids[i] = grid_of_pair(pairs[i], q.half, &misfit);
          } else if (q.half) {
            grids[i] = grid_f16({low[i], high[i]}, top, &misfit);
          }
        }
      }
      for (std::size_t i = 0; i < n; ++i) {
        store_params(q, row * q.param_stride + g + i, grids[i]);
        packer.add(from + i * q.group, length(i), grids[i]);
      }
      from += kGroupsAtOnce * q.group;
    }
    packer.flush();
  }
  return non_finite(magnitude) | (misfit ? kHalfMisfit : 0);
}

unsigned quantize_any(const float* x, const Quantized& q, const Shared* shared, bool refit, std::size_t begin,
                      std::size_t end) {
  return q.bits == 8   ? quantize<8>(x, q, shared, refit, begin, end)
         : q.bits == 4 ? quantize<4>(x, q, shared, refit, begin, end)
                       : quantize<2>(x, q, shared, refit, begin, end);
}

// ---- dequantize ----------------------------------------------------------------------------------------------

inline float param_at(const Quantized& q, const void* params, std::size_t at) {
  return q.half ? float_of_half(static_cast<const std::uint16_t*>(params)[at]) : static_cast<const float*>(params)[at];
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
  std::size_t skip = begin % per_byte;
  for (std::size_t at = begin - skip; at < end;) {
    const std::size_t n = end - at < kBlock ? end - at : kBlock;
    unpack<Bits>(packed + at / per_byte, n, block);
    for (std::size_t i = skip; i < n;) {
      const std::size_t g = (at + i) / q.group;
      const std::size_t group_end = (g + 1) * q.group - at;
      const std::size_t stop = group_end < n ? group_end : n;
      const std::size_t param = row * q.param_stride + g;
      decode(block + i, stop - i, param_at(q, q.scale, param), param_at(q, q.minimum, param), out);
      out += stop - i;
      i = stop;
    }
    skip = 0;
    at += n;
  }
}

void dequantize_any(const Quantized& q, std::size_t row, std::size_t begin, std::size_t end, float* out) {
  q.bits == 8   ? dequantize<8>(q, row, begin, end, out)
  : q.bits == 4 ? dequantize<4>(q, row, begin, end, out)
                : dequantize<2>(q, row, begin, end, out);
}
