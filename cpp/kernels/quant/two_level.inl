// Parameters in two levels: scale and minimum of a group are small codes under the floats of a part of the row.
//
// The fit of a part, in this order; `top` is the largest code of a weight, `most` that of a parameter:
//
//   1. a pair for each group: that of its range, moved kPairSteps times by least squares
//   2. d, dm and m0 that span these pairs, and the codes of the pairs
//   3. kRounds times: d, dm and m0 by least squares, all codes as they are; then each group tries the neighbours of its
//      two codes, with new codes for its weights, and keeps those with the least error
//   4. d, dm and m0 once more, and the codes of the weights
//
// Groups are fitted side by side, each in a lane of its own: a block holds value i of kGroupsAtOnce groups in row i. So
// all sums run in the order of the columns, whatever the width of a vector, and no lane waits for another.
//
// Values are scaled by a power of two that brings the largest of the part near 1; so no square overflows.

constexpr int kPairSteps = 3, kRounds = 2;

// Number `at` of the floats.
template <class Arrays>
inline float number_of(const Arrays& t, std::size_t at) {
  return t.half ? float_of_half(static_cast<const std::uint16_t*>(t.floats)[at])
                : static_cast<const float*>(t.floats)[at];
}

// Loads n of the floats, from number `at` on, and some zeros behind them.
inline void load_numbers(const TwoLevel& t, std::size_t at, std::size_t n, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  for (std::size_t i = 0; i < n; i += lanes) {
    const std::size_t left = n - i < lanes ? n - i : lanes;
    store(out + i, t.half ? first_halves(static_cast<const std::uint16_t*>(t.floats) + at + i, left)
                          : first_floats(static_cast<const float*>(t.floats) + at + i, left));
  }
}

void decode_params(const TwoLevel& t, std::size_t row, std::size_t begin, std::size_t end, float* scale,
                   float* minimum) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  std::uint8_t scale_codes[kCodesAtOnce + lanes], minimum_codes[kCodesAtOnce + lanes];
  float numbers[3 * kCodesAtOnce + lanes];
  std::memset(scale_codes + kCodesAtOnce, 0, lanes);  // vectors may end there
  std::memset(minimum_codes + kCodesAtOnce, 0, lanes);
  // Parts of half a vector are decoded in pairs; `begin` is where one begins then.
  const bool pairs = 2 * t.part == lanes;
  const std::size_t at_once = pairs ? 2 : 1;
  for (std::size_t at = begin; at < end;) {
    const std::size_t stop = end - at < kCodesAtOnce ? end : at + kCodesAtOnce;
    const std::size_t byte = row * t.row_bytes + packed_bytes(at, t.bits);
    unpack_any(t.bits, t.scale + byte, stop - at, scale_codes);
    unpack_any(t.bits, t.minimum + byte, stop - at, minimum_codes);
    std::size_t part = at / t.part;
    load_numbers(t, (row * t.parts + part) * t.count, ((stop - 1) / t.part - part + 1) * t.count, numbers);
    const float* of_part = numbers;
    for (std::size_t g = at; g < stop; of_part += at_once * t.count) {
      part += at_once;
      const std::size_t last = part * t.part < stop ? part * t.part : stop;
      const float* const of_next = g + t.part < stop ? of_part + t.count : of_part;
      const auto number = [&](std::size_t i) {
        const V first = broadcast(of_part[i]);
        return pairs ? lane_numbers() < static_cast<std::int32_t>(lanes / 2) ? first : broadcast(of_next[i]) : first;
      };
      const V d = number(0), dm = number(1), m0 = t.count == 3 ? number(2) : V{};
      for (std::size_t i = g; i < last; i += lanes) {  // what is too much, the next part overwrites
        store(scale + (i - begin), d * float_of_bytes(scale_codes + (i - at)));
        store(minimum + (i - begin), m0 - dm * float_of_bytes(minimum_codes + (i - at)));
      }
      g = last;
    }
    at = stop;
  }
}

// ---- the fit -------------------------------------------------------------------------------------------------

// The inverse of a scale; 0 where the scale is nothing beside the values, so that all codes are 0.
inline Vec<float> inverse_of(Vec<float> scale) { return scale >= 0x1p-100f ? 1.0f / scale : Vec<float>{}; }

inline Vec<float> clamped(Vec<float> code, Vec<float> top) { return positive_part(smaller(round_even(code), top)); }

// The floats of a part, scaled as its values.
struct Floats {
  float d, dm, m0;
};

// The floats of the groups of a block, each in the lane of its group.
struct BlockFloats {
  alignas(64) float d[kGroupsAtOnce], dm[kGroupsAtOnce], m0[kGroupsAtOnce];
};

// Memory for the fit of one part, and for the codes of one row.
struct FitMemory {
  std::size_t groups;          // of a part, filled up to whole blocks
  float *x, *h;                // blocks of values and of their importance
  float *scale, *minimum;      // of each group
  float *q, *k;                // the codes of both
  float *n, *d, *dd, *r, *rd;  // sums of each group
  std::uint8_t *block, *codes, *scale_codes, *minimum_codes;
  std::size_t bytes;

  FitMemory(const QuantizedOut& w, const TwoLevelOut& t, std::uint8_t* memory) {
    const std::size_t most = t.part < w.groups ? t.part : w.groups;
    groups = (most + kGroupsAtOnce - 1) / kGroupsAtOnce * kGroupsAtOnce;
    std::size_t at = 0;
    const auto take = [&](std::size_t size) {
      std::uint8_t* const from = memory + at;
      at += (size + 63) / 64 * 64;
      return from;
    };
    const auto numbers = [&](std::size_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
    x = numbers(groups * w.group);
    h = numbers(groups * w.group);
    float** const arrays[] = {&scale, &minimum, &q, &k, &n, &d, &dd, &r, &rd};
    for (float** array : arrays) *array = numbers(groups);
    block = take(kGroupsAtOnce * w.group);
    codes = take(w.cols);
    scale_codes = take(t.parts * groups);
    minimum_codes = take(t.parts * groups);
    bytes = at;
  }
};

// One block of a part: kGroupsAtOnce groups of `size` values, and where their numbers are in the memory.
struct Block {
  const float *x, *h;
  std::size_t size, first;
};

// The sums of the line r ~ a + b * d of each group of a block, as in fit.inl, for the pairs in `memory`.
template <bool Weighted>
[[gnu::noinline]] void line_sums(const Block& block, float top, const FitMemory& m) {
  using V = Vec<float>;
  const V tops = broadcast(top);
  const float middle = top * 0.5f;
  for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
    const std::size_t g = block.first + j;
    const V minimum = load<V>(m.minimum + g), inverse = inverse_of(load<V>(m.scale + g));
    V n = {}, d = {}, dd = {}, r = {}, rd = {};
    for (std::size_t i = 0; i < block.size; ++i) {
      const V u = (load<V>(block.x + i * kGroupsAtOnce + j) - minimum) * inverse;
      const V code = clamped(u, tops), distance = code - middle, rest = u - code;
      if constexpr (Weighted) {
        const V h = load<V>(block.h + i * kGroupsAtOnce + j), hd = h * distance, hr = h * rest;
        n += h;
        d += hd;
        dd += hd * distance;
        r += hr;
        rd += hr * distance;
      } else {
        d += distance;
        dd += distance * distance;
        r += rest;
        rd += rest * distance;
      }
    }
    store(m.n + g, Weighted ? n : broadcast(static_cast<float>(block.size)));
    store(m.d + g, d);
    store(m.dd + g, dd);
    store(m.r + g, r);
    store(m.rd + g, rd);
  }
}

// Step 1: the pairs of the groups of a block.
template <bool Weighted>
[[gnu::noinline]] void first_pairs(const Block& block, float top, const FitMemory& m) {
  using V = Vec<float>;
  const float middle = top * 0.5f;
  for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
    V low = load<V>(block.x + j), high = low;
    for (std::size_t i = 1; i < block.size; ++i) {
      const V v = load<V>(block.x + i * kGroupsAtOnce + j);
      low = smaller(v, low);
      high = larger(v, high);
    }
    store(m.minimum + block.first + j, low + 0.0f);
    store(m.scale + block.first + j, (high - low) / broadcast(top));
  }
  for (int step = 0; step < kPairSteps; ++step) {
    line_sums<Weighted>(block, top, m);
    for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
      const std::size_t g = block.first + j;
      const V n = load<V>(m.n + g), d = load<V>(m.d + g), r = load<V>(m.r + g);
      const V all = n * load<V>(m.dd + g), spread = all - d * d;
      const V b = (n * load<V>(m.rd + g) - d * r) / spread, a = (r - b * d) / n;
      const V scale = load<V>(m.scale + g), minimum = load<V>(m.minimum + g);
      const V better = scale + scale * b;
      // A pair whose codes are all equal stays; below this spread there is nothing but rounding errors.
      const auto good = (spread > all * 0x1p-16f) & (better >= scale * 0x1p-10f);
      store(m.scale + g, good ? better : scale);
      store(m.minimum + g, good ? minimum + scale * (a - b * middle) : minimum);
    }
  }
}

// The codes of the pairs of a block that are nearest under its floats, in a form where minima are `free` or not above
// 0.
inline void code_pairs(const Block& block, float top, float most, bool free, const BlockFloats& f, const FitMemory& m) {
  using V = Vec<float>;
  const V mosts = broadcast(most), one = broadcast(1.0f);
  for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
    const std::size_t g = block.first + j;
    const V d = load<V>(f.d + j), scale = load<V>(m.scale + g), own = load<V>(m.minimum + g);
    const V minimum = free ? own : smaller(own, V{});
    const V q = larger(smaller(round_even(scale * inverse_of(d)), mosts), one);
    const V moved = minimum + (scale - d * q) * (top * 0.5f);
    store(m.q + g, q);
    store(m.k + g, clamped((load<V>(f.m0 + j) - moved) * inverse_of(load<V>(f.dm + j)), mosts));
  }
}

// The second half of step 3 for a block: tries the neighbours of the codes of scale and minimum. Where the scale
// changes, the minimum moves so that the middle of the codes stays.
template <bool Weighted>
[[gnu::noinline]] void try_neighbours(const Block& block, float top, float most, const BlockFloats& f,
                                      const FitMemory& m) {
  using V = Vec<float>;
  const V tops = broadcast(top), mosts = broadcast(most), one = broadcast(1.0f);
  const float middle = top * 0.5f;
  for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
    const std::size_t g = block.first + j;
    const V d = load<V>(f.d + j), dm = load<V>(f.dm + j), m0 = load<V>(f.m0 + j), inverse_dm = inverse_of(dm);
    const V q = load<V>(m.q + g), k = load<V>(m.k + g);
    const V scale = d * q, minimum = m0 - dm * k;
    V best_q = q, best_k = k, least = broadcast(__builtin_inff());
    const float steps[] = {0.0f, -1.0f, 1.0f};
    for (const float step : steps) {
      const V new_q = larger(smaller(q + step, mosts), one), new_scale = d * new_q;
      const V moved = (m0 - (minimum + (scale - new_scale) * middle)) * inverse_dm;
      const V near = step == 0.0f ? k : clamped(moved, mosts);
      const V new_k[3] = {near, positive_part(near - 1.0f), smaller(near + 1.0f, mosts)};
      const V inverse = inverse_of(new_scale);
      V low[3], error[3] = {};
      unroll<3>([&](auto c) { low[c.value] = m0 - dm * new_k[c.value]; });
      for (std::size_t i = 0; i < block.size; ++i) {
        const V v = load<V>(block.x + i * kGroupsAtOnce + j);
        unroll<3>([&](auto c) {
          const V u = (v - low[c.value]) * inverse, rest = u - clamped(u, tops);
          const V square = rest * rest;
          error[c.value] += Weighted ? load<V>(block.h + i * kGroupsAtOnce + j) * square : square;
        });
      }
      const V unit = new_scale * new_scale;
      unroll<3>([&](auto c) {
        const V found = error[c.value] * unit;
        const auto better = found < least;
        least = better ? found : least;
        best_q = better ? new_q : best_q;
        best_k = better ? new_k[c.value] : best_k;
      });
    }
    store(m.q + g, best_q);
    store(m.k + g, best_k);
  }
}

class PartFit {
 public:
  PartFit(const QuantizedOut& w, const TwoLevelOut& t, const FitMemory& memory)
      : w_(w),
        t_(t),
        m_(memory),
        top_(static_cast<float>((1 << w.bits) - 1)),
        most_(static_cast<float>((1 << t.bits) - 1)) {}

  // Fits `size` values; writes the codes of all, one a byte, those of the parameters, and the floats.
  unsigned fit(const float* x, const float* importance, std::size_t size, std::size_t place, std::uint8_t* codes,
               std::uint8_t* scale_codes, std::uint8_t* minimum_codes) {
    groups_ = (size + w_.group - 1) / w_.group;
    blocks_ = (groups_ + kGroupsAtOnce - 1) / kGroupsAtOnce;
    Vec<std::int32_t> magnitude = {};
    extremes(x, size, &magnitude);
    const std::int32_t largest = fold(magnitude, larger);
    if (largest >= 0x7f800000) return kNonFinite;
    int exponent = largest == 0 ? 0 : (largest >> 23) - 126;
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    up_ = bit_cast<float>((exponent + 127) << 23);
    down_ = bit_cast<float>((127 - exponent) << 23);
    weighted_ = importance != nullptr;
    short_group_ = size % (kGroupsAtOnce * w_.group) != 0;
    transpose(x, importance, size);

    for_blocks([&](auto weighted, const Block& block) { first_pairs<weighted.value>(block, top_, m_); });
    if (!first_floats_and_codes()) return kHalfMisfit;
    for (int round = 0; round < kRounds; ++round) {
      refit();
      const BlockFloats floats = of_block();
      for_blocks(
          [&](auto weighted, const Block& block) { try_neighbours<weighted.value>(block, top_, most_, floats, m_); });
    }
    refit();
    decode_pairs();
    store_codes(size, codes);
    for (std::size_t g = 0; g < groups_; ++g) {
      scale_codes[g] = static_cast<std::uint8_t>(m_.q[g]);
      minimum_codes[g] = static_cast<std::uint8_t>(m_.k[g]);
    }
    const float floats[] = {floats_.d * up_, floats_.dm * up_, floats_.m0 * up_};
    for (std::size_t i = 0; i < t_.count; ++i) {
      if (t_.half) {
        static_cast<std::uint16_t*>(t_.floats)[place + i] = half_of_float(floats[i]);
      } else {
        static_cast<float*>(t_.floats)[place + i] = floats[i];
      }
    }
    bool inside = true;
    for (std::size_t g = 0; g < groups_; ++g) {
      inside &= within({m_.scale[g] * up_, m_.minimum[g] * up_}, top_, w_.limit);
    }
    return inside ? 0 : kBeyond;
  }

 private:
  template <class Call>
  void for_blocks(const Call& call) const {
    for (std::size_t b = 0; b < blocks_; ++b) {
      const std::size_t first = b * kGroupsAtOnce, at = first * w_.group;
      const Block block = {m_.x + at, m_.h + at, w_.group, first};
      weighted_ || (short_group_ && b + 1 == blocks_) ? call(Int<1>{}, block) : call(Int<0>{}, block);
    }
  }

  // Where there is no value, the importance is 0 and the value one that changes no range.
  void transpose(const float* x, const float* importance, std::size_t size) const {
    for_blocks([&](auto weighted, const Block& block) {
      float *to = m_.x + block.first * w_.group, *h = m_.h + block.first * w_.group;
      for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
        const std::size_t at = (block.first + g) * w_.group, left = at < size ? size - at : 0;
        const std::size_t exist = left < w_.group ? left : w_.group;
        const float other = exist > 0 ? x[at] * down_ : 0.0f;
        for (std::size_t i = 0; i < exist; ++i) to[i * kGroupsAtOnce + g] = x[at + i] * down_;
        for (std::size_t i = exist; i < w_.group; ++i) to[i * kGroupsAtOnce + g] = other;
        if constexpr (weighted.value != 0) {
          for (std::size_t i = 0; i < w_.group; ++i) {
            h[i * kGroupsAtOnce + g] = i >= exist ? 0.0f : importance ? importance[at + i] : 1.0f;
          }
        }
      }
    });
  }

  float rounded(float v) const { return t_.half ? float_of_half(half_of_float(v * up_)) * down_ : v; }

  // Step 2. Returns false if float16 cannot hold the floats closely enough.
  bool first_floats_and_codes() {
    float scale = 0.0f, high = m_.minimum[0], low = m_.minimum[0];
    for (std::size_t g = 0; g < groups_; ++g) {
      scale = m_.scale[g] > scale ? m_.scale[g] : scale;
      high = m_.minimum[g] > high ? m_.minimum[g] : high;
      low = m_.minimum[g] < low ? m_.minimum[g] : low;
    }
    if (t_.count == 2) {
      high = 0.0f;
      low = low < 0.0f ? low : 0.0f;
    }
    const auto size_of = [](float v) { return v < 0 ? -v : v; };
    const float d = scale / most_;
    floats_.m0 = rounded(high) + 0.0f;
    const float span = floats_.m0 - low, dm = span > 0.0f ? span / most_ : 0.0f;
    floats_.d = rounded(d);
    floats_.dm = rounded(dm);
    const float widest = size_of(high) > size_of(low) ? size_of(high) : size_of(low);
    const float room = scale > 0.0f ? scale * 0.5f : widest * 0x1p-11f;
    const bool fits = size_of(floats_.d - d) <= d * 0x1p-8f && size_of(floats_.m0 - high) <= room &&
                      size_of(floats_.dm - dm) * most_ <= room;
    if (!fits) return false;
    const BlockFloats floats = of_block();
    for_blocks([&](auto, const Block& block) { code_pairs(block, top_, most_, t_.count == 3, floats, m_); });
    return true;
  }

  BlockFloats of_block() const {
    BlockFloats f;
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
      f.d[g] = floats_.d;
      f.dm[g] = floats_.dm;
      f.m0[g] = floats_.m0;
    }
    return f;
  }

  void decode_pairs() const {
    using V = Vec<float>;
    for (std::size_t g = 0; g < blocks_ * kGroupsAtOnce; g += kLanes<float>) {
      store(m_.scale + g, floats_.d * load<V>(m_.q + g));
      store(m_.minimum + g, floats_.m0 - floats_.dm * load<V>(m_.k + g));
    }
  }

  // The first half of step 3: with all codes as they are, the change of d, dm and m0 that makes the sum of squares
  // least, from
  //
  //   weight - decoded = change of d * (q * code) - change of dm * k + change of m0
  //
  // The change is made where the sum, with the floats rounded, is less than before.
  void refit() {
    decode_pairs();
    for_blocks([&](auto weighted, const Block& block) { line_sums<weighted.value>(block, top_, m_); });
    // Products of q * code, -k and 1 with each other, and with the rest of the weights.
    double sums[9][kPartials] = {};
    const double middle = static_cast<double>(top_ * 0.5f), unit = static_cast<double>(floats_.d);
    for (std::size_t at = 0; at < blocks_ * kGroupsAtOnce; at += kPartials) {
      for (std::size_t i = 0; i < kPartials; ++i) {
        const std::size_t g = at + i;
        const double q = static_cast<double>(m_.q[g]), k = static_cast<double>(m_.k[g]);
        const double n = static_cast<double>(m_.n[g]), d = static_cast<double>(m_.d[g]);
        const double c = d + middle * n;
        const double cc = static_cast<double>(m_.dd[g]) + middle * (d + c);
        const double r = unit * q * static_cast<double>(m_.r[g]);
        const double rc = unit * q * static_cast<double>(m_.rd[g]) + middle * r;
        sums[0][i] += q * q * cc;
        sums[1][i] -= q * k * c;
        sums[2][i] += q * c;
        sums[3][i] += k * k * n;
        sums[4][i] -= k * n;
        sums[5][i] += n;
        sums[6][i] += q * rc;
        sums[7][i] -= k * r;
        sums[8][i] += r;
      }
    }
    double s[9];
    for (std::size_t i = 0; i < 9; ++i) s[i] = tree<double>(sums[i]);
    if (!(s[0] > 0)) return;
    // Elimination; a row that the rows before it leave nothing of changes nothing.
    const double by_d1 = s[1] / s[0], by_d2 = s[2] / s[0];
    const double a11 = s[3] - by_d1 * s[1], a12 = s[4] - by_d1 * s[2], y1 = s[7] - by_d1 * s[6];
    const bool has_dm = a11 > s[3] * 0x1p-30;
    const double by_dm = has_dm ? a12 / a11 : 0;
    const double a22 = s[5] - by_d2 * s[2] - by_dm * a12, y2 = s[8] - by_d2 * s[6] - by_dm * y1;
    const double m0 = t_.count == 3 && a22 > s[5] * 0x1p-30 ? y2 / a22 : 0;
    const double dm = has_dm ? (y1 - a12 * m0) / a11 : 0;
    const double d = (s[6] - s[1] * dm - s[2] * m0) / s[0];
    const auto moved = [&](float v, double by) { return rounded(static_cast<float>(static_cast<double>(v) + by)); };
    const Floats better = {moved(floats_.d, d), moved(floats_.dm, dm), moved(floats_.m0, m0)};
    const double z0 = static_cast<double>(better.d) - static_cast<double>(floats_.d);
    const double z1 = static_cast<double>(better.dm) - static_cast<double>(floats_.dm);
    const double z2 = static_cast<double>(better.m0) - static_cast<double>(floats_.m0);
    const double rise = z0 * (z0 * s[0] + 2 * (z1 * s[1] + z2 * s[2] - s[6])) +
                        z1 * (z1 * s[3] + 2 * (z2 * s[4] - s[7])) + z2 * (z2 * s[5] - 2 * s[8]);
    if (better.d >= floats_.d * 0.5f && better.dm >= 0.0f && rise < 0) floats_ = better;
  }

  void store_codes(std::size_t size, std::uint8_t* codes) const {
    using V = Vec<float>;
    for (std::size_t first = 0; first < groups_; first += kGroupsAtOnce) {
      const float* const x = m_.x + first * w_.group;
      for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
        const V minimum = load<V>(m_.minimum + first + j), inverse = inverse_of(load<V>(m_.scale + first + j));
        for (std::size_t i = 0; i < w_.group; ++i) {
          const V u = (load<V>(x + i * kGroupsAtOnce + j) - minimum) * inverse;
          store_bytes(m_.block + i * kGroupsAtOnce + j, round_to_int(positive_part(smaller(u, broadcast(top_)))));
        }
      }
      for (std::size_t g = 0; g < kGroupsAtOnce && first + g < groups_; ++g) {
        const std::size_t at = (first + g) * w_.group, left = size - at, exist = left < w_.group ? left : w_.group;
        for (std::size_t i = 0; i < exist; ++i) codes[at + i] = m_.block[i * kGroupsAtOnce + g];
      }
    }
  }

  const QuantizedOut& w_;
  const TwoLevelOut& t_;
  const FitMemory& m_;
  float top_, most_, up_ = 1.0f, down_ = 1.0f;
  Floats floats_ = {};
  std::size_t groups_ = 0, blocks_ = 0;
  bool weighted_ = false, short_group_ = false;
};

std::size_t two_level_bytes(const QuantizedOut& q, const TwoLevelOut& t) { return FitMemory(q, t, nullptr).bytes; }

unsigned quantize_two_level(const float* x, const QuantizedOut& q, const TwoLevelOut& t, const Fit& fit,
                            std::size_t begin, std::size_t end, void* memory) {
  const FitMemory m(q, t, static_cast<std::uint8_t*>(memory));
  PartFit part_fit(q, t, m);
  unsigned flags = 0;
  const std::size_t columns = t.part < q.groups ? t.part * q.group : q.cols;
  for (std::size_t row = begin; row < end; ++row) {
    const float *values = x + row * q.cols, *importance = fit.of_row(row);
    for (std::size_t part = 0; part < t.parts; ++part) {
      const std::size_t at = part * columns, left = q.cols - at, size = left < columns ? left : columns;
      flags |= part_fit.fit(values + at, importance ? importance + at : nullptr, size, (row * t.parts + part) * t.count,
                            m.codes + at, m.scale_codes + part * t.part, m.minimum_codes + part * t.part);
    }
    if (flags & (kNonFinite | kHalfMisfit)) return flags;
    pack_any(q.bits, m.codes, q.cols, q.codes + row * q.row_bytes);
    pack_any(t.bits, m.scale_codes, q.groups, t.scale + row * t.row_bytes);
    pack_any(t.bits, m.minimum_codes, q.groups, t.minimum + row * t.row_bytes);
  }
  return flags;
}

constexpr TwoLevelKernels kTwoLevel = {
    .decode = decode_params,
    .bytes = two_level_bytes,
    .quantize = quantize_two_level,
};
