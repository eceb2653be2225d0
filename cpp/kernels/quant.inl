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

unsigned range(const float* x, std::size_t n, Range* out) {
  using V = Vec<float>;
  using U = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  constexpr float inf = __builtin_inff();
  V low = V{} + inf, high = V{} - inf;
  U magnitude = {};
  const auto take = [&](V v) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    const U bits = bit_cast<U>(v) & 0x7fffffff;
    magnitude = bits > magnitude ? bits : magnitude;
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
  out->min = low[0];
  out->max = high[0];
  std::int32_t largest = magnitude[0];
  for (std::size_t j = 1; j < lanes; ++j) {
    out->min = low[j] < out->min ? low[j] : out->min;
    out->max = high[j] > out->max ? high[j] : out->max;
    largest = magnitude[j] > largest ? magnitude[j] : largest;
  }
  out->min += 0.0f;  // -0 and +0 are equal, so which of them came out depends on the order: make it +0
  out->max += 0.0f;
  return largest >= 0x7f800000 ? kNonFinite : 0;
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

inline void encode(const float* x, std::size_t n, const Grid& grid, float top, std::uint8_t* codes) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  const auto code = [&](V v) {
    v = round_even((v * grid.half - grid.offset) / grid.divisor * grid.levels);
    v = v > top ? V{} + top : v;
    return v > 0 ? v : V{};
  };
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) store_bytes(codes + i, code(load<V>(x + i)));
  if (i < n) {
    std::uint8_t last[lanes];
    store_bytes(last, code(load_part<V>(x + i, (n - i) * sizeof(float))));
    std::memcpy(codes + i, last, n - i);
  }
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

template <int Bits>
unsigned quantize(const float* x, const Quantized& q, const Range* shared, std::size_t begin, std::size_t end) {
  constexpr float top = (1 << Bits) - 1;
  unsigned flags = 0;
  bool misfit = false;
  const auto grid_of = [&](Range r) { return q.half ? grid_f16(r, top, &misfit) : grid_f32(r, top); };
  std::uint8_t block[kBlock];
  for (std::size_t row = begin; row < end; ++row) {
    const float* from = x + row * q.cols;
    std::uint8_t* to = const_cast<std::uint8_t*>(q.codes) + row * q.row_bytes;
    std::size_t filled = 0;
    for (std::size_t g = 0; g < q.groups; ++g) {
      const std::size_t first = g * q.group;
      std::size_t left = q.cols - first < q.group ? q.cols - first : q.group;
      Range r = {};
      if (shared) {
        r = *shared;
      } else {
        flags |= range(from, left, &r);
      }
      const Grid grid = grid_of(r);
      if (!shared || row == 0) store_params(q, row * q.param_stride + g, grid);
      while (left > 0) {
        const std::size_t take = left < kBlock - filled ? left : kBlock - filled;
        encode(from, take, grid, top, block + filled);
        from += take;
        left -= take;
        filled += take;
        if (filled == kBlock) {
          pack<Bits>(block, filled, to);
          to += kBlock * Bits / 8;
          filled = 0;
        }
      }
    }
    pack<Bits>(block, filled, to);
  }
  return flags | (misfit ? kHalfMisfit : 0);
}

unsigned quantize_any(const float* x, const Quantized& q, const Range* shared, std::size_t begin, std::size_t end) {
  return q.bits == 8   ? quantize<8>(x, q, shared, begin, end)
         : q.bits == 4 ? quantize<4>(x, q, shared, begin, end)
                       : quantize<2>(x, q, shared, begin, end);
}

// ---- dequantize ----------------------------------------------------------------------------------------------

inline float param_at(const Quantized& q, const void* params, std::size_t at) {
  return q.half ? float_of_half(static_cast<const std::uint16_t*>(params)[at]) : static_cast<const float*>(params)[at];
}

// minimum + scale * code. Where scale * code could overflow although the sum does not, both are halved: that changes
// no bit of the result.
inline void decode(const std::uint8_t* codes, std::size_t n, float scale, float minimum, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const float twice = scale > 0x1p119f ? 2.0f : 1.0f;
  scale /= twice;
  minimum /= twice;
  std::size_t i = 0;
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
