// Floats to packed codes, scales and minima.
//
// There are two ways, with the same results: quantize_vectors() for groups that fill vectors, in one pass over memory;
// and quantize_any() for groups of any size, which passes over each kGroupsAtOnce groups twice, in cache. Both encode
// with an Encoder.

// The arithmetic from a value to its code, against the grid of one group in all lanes. Codes are still to be clamped.
template <bool Plain>
struct Encoder {
  Vec<float> offset, divisor, inverse, factor, levels;

  void use(const Grids& grids, std::size_t g) {
    offset = broadcast(grids.offset[g]);
    divisor = broadcast(grids.divisor[g]);
    inverse = broadcast(grids.inverse[g]);
    factor = broadcast(grids.factor[g]);
    levels = broadcast(grids.levels[g]);
  }
  Vec<std::int32_t> operator()(Vec<float> v) const {
    const Vec<float> quotient = divide((Plain ? v : v * factor) - offset, divisor, inverse);
    return round_to_int(Plain ? quotient : quotient * levels);
  }
};

// Codes of n values that share grid g, one byte each. The values `ahead` of them are prefetched.
template <bool Plain>
inline void encode(const float* x, std::size_t n, int top, const Grids& grids, std::size_t g, std::size_t ahead,
                   std::uint8_t* codes) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  Encoder<Plain> encoder;
  encoder.use(grids, g);
  const auto code = [&](V v) { return smaller(encoder(v), Vec<std::int32_t>{} + top); };
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

// Writes scale and minimum of n groups, to place `at` and on.
inline void store_params(const QuantizedOut& q, std::size_t at, const Grids& grids, std::size_t n) {
  constexpr std::size_t lanes = kLanes<float>;
  const auto write = [&](void* params, const PerGroup& numbers) {
    if (q.half) {
      std::uint16_t* halves = static_cast<std::uint16_t*>(params) + at;
      std::size_t i = 0;
      for (; i + lanes <= n; i += lanes) store_halves(halves + i, load<Vec<float>>(numbers + i));
      std::uint16_t last[lanes];
      if (i < n) store_halves(last, load<Vec<float>>(numbers + i));
      for (std::size_t j = 0; i < n; ++i, ++j) halves[i] = last[j];
    } else {
      float* floats = static_cast<float*>(params) + at;
      std::size_t i = 0;
      for (; i + lanes <= n; i += lanes) store(floats + i, load<Vec<float>>(numbers + i));
      for (; i < n; ++i) floats[i] = numbers[i];
    }
  };
  write(q.scale, grids.scale);
  write(q.minimum, grids.minimum);
}

// Encodes a row into a buffer of one byte for each code, and packs the buffer whenever it is full.
class Packer {
 public:
  Packer(int bits, std::uint8_t* to, std::size_t ahead) : bits_(bits), to_(to), ahead_(ahead) {}

  // Encodes n values in groups of `group`.
  void add(const float* x, std::size_t n, std::size_t group, const Grids& grids) {
    grids.plain ? add<true>(x, n, group, grids) : add<false>(x, n, group, grids);
  }

  void flush() {
    pack_any(bits_, buffer_, filled_, to_);
    to_ += filled_ * static_cast<std::size_t>(bits_) / 8;
    filled_ = 0;
  }

 private:
  template <bool Plain>
  void add(const float* x, std::size_t n, std::size_t group, const Grids& grids) {
    if (n > kCodesAtOnce - filled_) flush();
    for (std::size_t g = 0, at = 0; at < n; ++g) {
      const std::size_t end = n - at < group ? n : at + group;
      while (at < end) {
        const std::size_t take = end - at < kCodesAtOnce - filled_ ? end - at : kCodesAtOnce - filled_;
        encode<Plain>(x + at, take, (1 << bits_) - 1, grids, g, ahead_, buffer_ + filled_);
        at += take;
        filled_ += take;
        if (filled_ == kCodesAtOnce) flush();
      }
    }
  }

  int bits_;
  std::uint8_t* to_;
  std::size_t ahead_, filled_ = 0;
  std::uint8_t buffer_[kCodesAtOnce];
};

// The extremes of groups, one or more in each vector, and the largest magnitude of all: see extremes().
struct Ranges {
  Vec<float> low[kGroupsAtOnce], high[kGroupsAtOnce];
  Vec<std::int32_t> magnitude;
};

// Measures the groups of the first `size` values of a row, from group `first` on.
inline void measure_groups(const float* x, std::size_t size, std::size_t group, std::size_t first, Ranges* ranges) {
  for (std::size_t i = first, at = first * group; at < size; ++i, at += group) {
    const Extremes e = extremes(x + at, size - at < group ? size - at : group, &ranges->magnitude);
    ranges->low[i] = e.low;
    ranges->high[i] = e.high;
  }
}

// The grids of the groups of `size` values, from their ranges, fitted if `least_squares`; `importance` is
// that of the first value, or null. A vector of the ranges holds `folded` groups. Not inlined: it is long, and the same
// for every width of codes.
[[gnu::noinline]] void prepare_groups(const float* x, const float* importance, std::size_t size, const QuantizedOut& q,
                                      bool least_squares, float top, const Ranges& ranges, std::size_t folded,
                                      Grids* grids, bool* misfit) {
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
  make_grids(low, high, nullptr, nullptr, q.half && !least_squares, top, q.limit, grids, misfit);
  if (least_squares) {
    PerGroup scale, minimum;
    for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
      scale[i] = can_fit({low[i], high[i]}, grids->scale[i]) ? grids->scale[i] : 0.0f;
      minimum[i] = grids->minimum[i];
    }
    fit_groups(x, importance, size, q.group, q.group < q.cols ? q.group : q.cols, top, scale, minimum);
    make_grids(low, high, &scale, &minimum, q.half, top, q.limit, grids, misfit);
  }
}

// Folds the four vectors of a turn to one, which holds the extremes of four groups of one vector, or of two groups of
// two vectors: see the drawing below.
template <int Vectors, class Op>
inline Vec<float> fold_turn(const Vec<float> (&v)[4], Op op) {
  if constexpr (Vectors == 1) {
    return fold_pair<1>(fold_pair<2>(v[0], v[2], op), fold_pair<2>(v[1], v[3], op), op);
  } else {
    return fold_pair<1>(op(v[0], v[1]), op(v[2], v[3]), op);
  }
}

// Measures the groups of a lot of `size` values, each of them one or two vectors, in the layout of fold_turn().
template <int Vectors>
[[gnu::noinline]] void measure_turns(const float* x, std::size_t size, Ranges* ranges) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  V *lows = ranges->low, *highs = ranges->high;
  for (std::size_t i = 0; i < size; i += 4 * lanes) {
    V v[4];
    for (std::size_t j = 0; j < 4; ++j) {
      v[j] = load<V>(x + i + j * lanes);
      ranges->magnitude = larger(magnitude_bits(v[j]), ranges->magnitude);
    }
    *lows++ = fold_turn<Vectors>(v, smaller);
    *highs++ = fold_turn<Vectors>(v, larger);
  }
}

// quantize_vectors() has three lots of kGroupsAtOnce groups in flight, so that a weight is read from memory once:
//
//   turn        0          1          2          3
//   measured    lot 0      lot 1      lot 2      lot 3       read from memory: range of each group
//   gridded                lot 0      lot 1      lot 2       scale, minimum and grid from the range
//   encoded                           lot 0      lot 1       read again from cache: codes, packed and written
//
// This function encodes one lot, `size` values of a row whose first group has grid g, and in the same loop measures as
// many values at `next`: measuring waits for memory while encoding computes. A turn of the loop handles four vectors,
// whose codes leave as one vector of bytes:
//
//   x      |v0|v1|v2|v3|    Vectors = 1: a group is one vector; the ranges of four groups share a vector
//   codes  |  1 vector |    Vectors = 2: a group is two vectors; the ranges of two groups share a vector
//                           Vectors = 0: a group is any number of such turns
//
// Reads are prefetched twice: far ahead into L2, as L1 cannot wait for that many lines at once, and from there into L1.
// Writes are prefetched once. The function is long because the two halves must share one loop to overlap.
template <int Vectors, bool Plain>
[[gnu::noinline]] void encode_and_measure(const float* x, std::size_t size, const QuantizedOut& q, const Grids& grids,
                                          std::size_t g, std::uint8_t* codes, const float* next, Ranges* ranges) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, far = 16384 / sizeof(float);
  constexpr float inf = __builtin_inff();
  const int bits = q.bits;
  const std::size_t bytes = kVectorBytes * static_cast<std::size_t>(bits) / 8;
  const Vec<std::uint8_t> top = broadcast<std::uint8_t>(static_cast<std::uint8_t>((1 << bits) - 1));
  V *lows = ranges->low, *highs = ranges->high;
  Vec<std::int32_t> largest = ranges->magnitude;
  for (std::size_t i = 0; i < size;) {
    const std::size_t end = Vectors == 0 ? i + q.group : size;
    V low = V{} + inf, high = V{} - inf;
    Encoder<Plain> encoder;
    encoder.use(grids, g);
    for (; i < end; i += 4 * lanes) {
      Vec<std::int32_t> code[4];
      __builtin_prefetch(codes + 2048, 1, 2);
      V seen[4];
      unroll<4>([&](auto j) {
        if constexpr (Vectors != 0) encoder.use(grids, g + j.value / Vectors);
        code[j.value] = encoder(load<V>(x + i + j.value * lanes));
        const float* const source = next + i + j.value * lanes;
        if constexpr (j.value * kVectorBytes % 64 == 0) {
          prefetch<2048>(source);
          __builtin_prefetch(source + far, 0, 2);
        }
        seen[j.value] = load<V>(source);
        largest = larger(magnitude_bits(seen[j.value]), largest);
        if constexpr (Vectors == 0) {
          low = smaller(seen[j.value], low);
          high = larger(seen[j.value], high);
        }
      });
      if constexpr (Vectors != 0) {
        *lows++ = fold_turn<Vectors>(seen, smaller);
        *highs++ = fold_turn<Vectors>(seen, larger);
        g += 4 / Vectors;
      }
      const Vec<std::uint8_t> unclamped =
          unpacked_order(pack_unsigned(pack_words(code[0], code[1]), pack_words(code[2], code[3])));
      const Vec<std::uint8_t> clamped = smaller(unclamped, top);
      const auto pack = [&](auto b) { pack_vector<b.value>(clamped, codes); };
      bits == 8 ? pack(Int<8>{}) : bits == 4 ? pack(Int<4>{}) : pack(Int<2>{});
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

// Returns true if groups and rows have a size that encode_and_measure() takes, and codes a width: to pack widths that
// do not divide 8 would cost the registers of its loop.
inline bool fills_vectors(const QuantizedOut& q) {
  constexpr std::size_t lanes = kLanes<float>;
  return 8 % q.bits == 0 && q.cols % (4 * lanes) == 0 &&
         (q.group == lanes || q.group == 2 * lanes || (q.group % (4 * lanes) == 0 && q.cols % q.group == 0));
}

// A lot: up to kGroupsAtOnce neighbouring groups of a row.
struct Lot {
  const float* x;
  std::size_t size;  // how many values
  std::uint8_t* codes;
  std::size_t param;        // index of their first scale and minimum
  const float* importance;  // of their values, or null
};

// Hands out the lots of rows [begin, end), and empty ones behind the last.
class Lots {
 public:
  Lots(const float* x, const QuantizedOut& q, const Fit& fit, std::size_t begin, std::size_t end)
      : x_(x), q_(q), fit_(fit), row_(begin), end_(end) {}

  Lot next() {
    if (row_ == end_) return {};
    const std::size_t bits = static_cast<std::size_t>(q_.bits);
    const std::size_t at = group_ * q_.group, left = q_.cols - at, most = kGroupsAtOnce * q_.group;
    const float* importance = fit_.of_row(row_);
    const Lot lot = {x_ + row_ * q_.cols + at, left < most ? left : most,
                     q_.codes + row_ * q_.row_bytes + at * bits / 8, row_ * q_.param_stride + group_,
                     importance ? importance + at : nullptr};
    group_ = left > most ? group_ + kGroupsAtOnce : 0;
    row_ += group_ == 0;
    return lot;
  }

 private:
  const float* x_;
  const QuantizedOut& q_;
  const Fit& fit_;
  std::size_t row_, end_, group_ = 0;
};

// The one grid of a matrix whose groups share their parameters.
inline Grid shared_grid(const Shared& shared, const QuantizedOut& q, float top, bool* misfit) {
  return grid_of(shared.pair, shared.range, q.half, top, q.limit, misfit);
}

// Quantizes rows [begin, end) with three lots in flight, as drawn above. The two Grids take turns: one is read by the
// lot that is encoded, the other is filled for the lot behind it. At the ends of the range, and where lots differ in
// size, a part of a lot is encoded beside values whose ranges are ignored, or measured by itself.
unsigned quantize_vectors(const float* x, const QuantizedOut& q, const Shared* shared, const Fit& fit,
                          std::size_t begin, std::size_t end) {
  const float top = static_cast<float>((1 << q.bits) - 1);
  bool misfit = false;
  Grids grids[2] = {};
  Ranges ranges = {}, ignored = {};
  if (shared) {
    grids[0].plain = true;
    grids[0].set(0, shared_grid(*shared, q, top, &misfit));
    grids[1] = grids[0];
    if (begin == 0) store_params(q, 0, grids[0], 1);
  }
  const std::size_t vectors = q.group == kLanes<float> ? 1 : q.group == 2 * kLanes<float> ? 2 : 0;
  const std::size_t folded = vectors == 0 ? 1 : 4 / vectors;  // groups that share a vector of the ranges
  const auto encode_part = [&](const Lot& lot, std::size_t from, std::size_t to, const Grids& grid, const float* next,
                               Ranges* measured) {
    const auto run = [&](auto count) {
      (grid.plain ? encode_and_measure<count.value, true>
                  : encode_and_measure<count.value, false>)(lot.x + from, to - from, q, grid, from / q.group,
                                                            lot.codes + from * static_cast<std::size_t>(q.bits) / 8,
                                                            next, measured);
    };
    vectors == 1 ? run(Int<1>{}) : vectors == 2 ? run(Int<2>{}) : run(Int<0>{});
  };
  Lots lots(x, q, fit, begin, end);
  Lot encoded, gridded = {}, measured = {};
  std::size_t turn = 0;
  do {
    encoded = gridded;
    gridded = measured;
    measured = lots.next();
    Grids& next_grids = grids[turn];
    turn = 1 - turn;
    if (gridded.size != 0 && !shared) {
      prepare_groups(gridded.x, gridded.importance, gridded.size, q, fit.least_squares, top, ranges, folded,
                     &next_grids, &misfit);
      store_params(q, gridded.param, next_grids, gridded.size / q.group);
    }
    const std::size_t both = encoded.size < measured.size ? encoded.size : measured.size;
    if (both != 0) encode_part(encoded, 0, both, grids[turn], measured.x, &ranges);
    if (both < encoded.size) encode_part(encoded, both, encoded.size, grids[turn], encoded.x + both, &ignored);
    if (both < measured.size) {
      if (vectors == 0) measure_groups(measured.x, measured.size, q.group, both / q.group, &ranges);
      if (vectors == 1) measure_turns<1>(measured.x, measured.size, &ranges);
      if (vectors == 2) measure_turns<2>(measured.x, measured.size, &ranges);
    }
  } while (gridded.size + measured.size != 0);
  return non_finite(ranges.magnitude) | (misfit ? kHalfMisfit : 0);
}

// Quantizes rows [begin, end) with groups of any size: measures kGroupsAtOnce of them, then encodes them from cache.
unsigned quantize_any(const float* x, const QuantizedOut& q, const Shared* shared, const Fit& fit, std::size_t begin,
                      std::size_t end) {
  if (fills_vectors(q)) return quantize_vectors(x, q, shared, fit, begin, end);
  const float top = static_cast<float>((1 << q.bits) - 1);
  const std::size_t ahead = q.groups > kGroupsAtOnce ? kGroupsAtOnce * q.group : q.cols;
  bool misfit = false;
  Grids grids = {};
  Ranges ranges = {};
  for (std::size_t row = begin; row < end; ++row) {
    const float *values = x + row * q.cols, *importance = fit.of_row(row);
    Packer packer(q.bits, q.codes + row * q.row_bytes, ahead);
    if (shared) {
      grids.plain = true;
      grids.set(0, shared_grid(*shared, q, top, &misfit));
      if (row == 0) store_params(q, 0, grids, 1);
      packer.add(values, q.cols, q.cols, grids);
    }
    for (std::size_t g = 0; g < q.groups && !shared; g += kGroupsAtOnce) {
      const std::size_t n = q.groups - g < kGroupsAtOnce ? q.groups - g : kGroupsAtOnce;
      const std::size_t left = q.cols - g * q.group, size = left < n * q.group ? left : n * q.group;
      measure_groups(values, size, q.group, 0, &ranges);
      prepare_groups(values, importance, size, q, fit.least_squares, top, ranges, 1, &grids, &misfit);
      store_params(q, row * q.param_stride + g, grids, n);
      packer.add(values, size, q.group, grids);
      values += size;
      if (importance) importance += size;
    }
    packer.flush();
  }
  return non_finite(ranges.magnitude) | (misfit ? kHalfMisfit : 0);
}
