// Ranges of groups, and the grids that follow from them: the numbers that the codes of a group can stand for.

// Groups are handled side by side: divisions and folds cost as much for one group as for a vector of them.
constexpr std::size_t kGroupsAtOnce = 32;
using PerGroup = float[kGroupsAtOnce];

// Folds the lanes of n groups to one number each. A vector of `v` holds the lanes of `Folded` groups. A fold is cheap
// only for as many groups as a vector has lanes: their vectors are transposed on the way.
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

// Smallest and largest of n > 0 values, still spread over the lanes. `magnitude` is raised to the largest bits of any
// |x|: infinity and NaN come last in their order, so one test at the end finds both.
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
    largest = larger(magnitude_bits(v), largest);
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

// -0 and +0 compare equal, so the order of the fold decides which of them remains. Adding +0 makes it +0 in any order.
inline Range range_of(Extremes e) { return {fold(e.low, smaller) + 0.0f, fold(e.high, larger) + 0.0f}; }

inline unsigned non_finite(Vec<std::int32_t> magnitude) {
  return fold(magnitude, larger) >= 0x7f800000 ? kNonFinite : 0;
}

unsigned range(const float* x, std::size_t n, Range* out) {
  Vec<std::int32_t> magnitude = {};
  *out = range_of(extremes(x, n, &magnitude));
  return non_finite(magnitude);
}

// ---- grids ---------------------------------------------------------------------------------------------------

// code = round((x * half - offset) / divisor * levels), clamped to [0, top]. `half` is 1, or 1/2 where max - min would
// overflow. Against float32 parameters the divisor is max - min and levels is top; against stored parameters, which
// were rounded, the divisor is the scale and levels is 1.
struct Grid {
  float scale, minimum;  // as stored
  float half, offset, divisor, levels;
};

constexpr float kSmallestNormal = 0x1p-126f, kSmallestHalf = 0x1p-14f;

// minimum + scale * code. If scale * code could overflow although the sum does not, both are halved and the sum is
// doubled, which changes no bit of the result.
struct Decoder {
  float scale, minimum, twice;

  Decoder(float s, float m) : twice(s > 0x1p119f ? 2.0f : 1.0f) {
    scale = s * (1.0f / twice);
    minimum = m * (1.0f / twice);
  }
  template <class V>
  V operator()(V code) const {
    return (minimum + scale * code) * twice;
  }
};

inline float next_up(float f) { return bit_cast<float>(bit_cast<std::uint32_t>(f) + 1u); }

// Returns true if no code stands for a value beyond +-limit.
inline bool within(Pair p, float top, float limit) {
  return p.minimum >= -limit && Decoder(p.scale, p.minimum)(top) <= limit;
}

// The scale, lowered as little as it takes to have the largest code stand for no more than `limit`. Weights near the
// largest number of their dtype need that: they would decode to infinity where the scale was rounded up.
inline float bounded(float scale, Range r, float minimum, float top, bool half, float limit) {
  if (!(r.min >= -limit && r.max <= limit)) return scale;  // not finite, which is an error
  while (Decoder(scale, minimum)(top) > limit) {
    scale = half ? float_of_half(static_cast<std::uint16_t>(half_of_float(scale) - 1))
                 : bit_cast<float>(bit_cast<std::uint32_t>(scale) - 1u);
  }
  return scale;
}

// The grid of a range with float32 parameters.
inline Grid grid_f32(Range r, float top, float limit) {
  if (!(r.max > r.min)) return {0.0f, r.min, 0.0f, 0.0f, 1.0f, 0.0f};
  const float width = r.max - r.min;
  if (width > 0x1.fffffep127f) {
    const float half_width = r.max * 0.5f - r.min * 0.5f;
    const float wide = bounded(r.max / top - r.min / top, r, r.min, top, false, limit);
    return {wide, r.min, 0.5f, r.min * 0.5f, half_width, top};
  }
  const float scale = width / top;
  if (scale < kSmallestNormal) {  // subnormal, so too coarse: round up, and encode against the stored scale
    const float up = scale * top < width ? next_up(scale) : scale;
    return {up, r.min, 1.0f, r.min, up, 1.0f};
  }
  return {bounded(scale, r, r.min, top, false, limit), r.min, 1.0f, r.min, width, top};
}

// The grid of a range with float16 parameters. The minimum is rounded first, the scale follows from it, and codes are
// chosen against the rounded pair. Sets `misfit` if the rounded minimum is off by more than half a step, or float16
// cannot hold one of the two: the matrix is then quantized again with float32 parameters.
inline Grid grid_f16(Range r, float top, float limit, bool* misfit) {
  const float minimum = float_of_half(half_of_float(r.min));
  const Grid exact = grid_f32(r, top, limit);
  if (exact.scale == 0.0f) {
    *misfit |= !(minimum >= -65504.0f && minimum <= 65504.0f);
    *misfit |= r.min != 0.0f && minimum < kSmallestHalf && minimum > -kSmallestHalf;
    return {0.0f, minimum, 0.0f, 0.0f, 1.0f, 0.0f};
  }
  const float rounded = float_of_half(half_of_float((r.max - minimum) / top));
  const float moved = minimum > r.min ? minimum - r.min : r.min - minimum;
  const bool fits = rounded >= kSmallestHalf && rounded <= 65504.0f && moved <= exact.scale * 0.5f;
  *misfit |= !fits;
  const float scale = fits ? bounded(rounded, r, minimum, top, true, limit) : rounded;
  return {scale, minimum, 1.0f, minimum, scale, 1.0f};
}

// The grid of a fitted pair, which float16 rounds first; that of the range where the pair is of scale 0, or has codes
// for values beyond the limit.
inline Grid grid_of(Pair p, Range r, bool half, float top, float limit, bool* misfit) {
  const auto of_range = [&] { return half ? grid_f16(r, top, limit, misfit) : grid_f32(r, top, limit); };
  if (!(p.scale > 0) || !within(p, top, limit)) return of_range();
  if (half) {
    const Pair exact = p;
    p = {float_of_half(half_of_float(p.scale)), float_of_half(half_of_float(p.minimum))};
    const float moved = p.minimum > exact.minimum ? p.minimum - exact.minimum : exact.minimum - p.minimum;
    *misfit |= !(p.scale >= kSmallestHalf && p.scale <= 65504.0f && moved <= exact.scale * 0.5f);
    if (!within(p, top, limit)) return of_range();
  }
  return {p.scale, p.minimum, 1.0f, p.minimum, p.scale, 1.0f};
}

// The grids of kGroupsAtOnce groups, one array for each field, as encode() and make_grids() read and write them.
struct Grids {
  float scale[kGroupsAtOnce], minimum[kGroupsAtOnce];  // as stored
  float factor[kGroupsAtOnce], offset[kGroupsAtOnce], divisor[kGroupsAtOnce], inverse[kGroupsAtOnce];
  float levels[kGroupsAtOnce];
  bool plain;  // factor and levels are 1 in all of them, so encode() can leave them out

  // A power of two brings the divisor into the range where divide() is exact. It changes no code: it is exact too,
  // unless x * factor becomes subnormal, and such an x is nothing beside the width of a group that is shifted down.
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

// Rounded to float16 and back.
inline Vec<float> rounded_to_half(Vec<float> v) {
  std::uint16_t halves[kLanes<float>];
  store_halves(halves, v);
  return float_of_halves(halves);
}

// The grids of kGroupsAtOnce ranges, or of fitted pairs where the fitted scale is not 0. They are computed as vectors,
// and one by one if any of them is a special case: constant, too wide, too narrow, beyond the limit, or a misfit. Both
// ways give the same bits, as divide() by each possible top was tested with all significands.
inline void make_grids(const PerGroup& low, const PerGroup& high, const PerGroup* fitted_scale,
                       const PerGroup* fitted_minimum, bool half, float top, float limit, Grids* grids, bool* misfit) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  bool usual = true;
  const V tops = broadcast(top), inverse_top = broadcast(1.0f / top);
  grids->plain = half || fitted_scale;
  for (std::size_t i = 0; i < kGroupsAtOnce && usual; i += lanes) {
    const V l = load<V>(low + i) + 0.0f, h = load<V>(high + i) + 0.0f, width = h - l;
    const V lowest = fitted_scale ? load<V>(*fitted_minimum + i) : l;
    const V minimum = half ? rounded_to_half(lowest) : lowest;
    const V exact = fitted_scale ? load<V>(*fitted_scale + i) : divide(h - minimum, tops, inverse_top);
    const V scale = half ? rounded_to_half(exact) : exact;
    auto good = (exact >= 0x1p-60f) & (exact <= 0x1p50f) & (minimum + scale * tops <= limit);
    if (fitted_scale) good &= (lowest + exact * tops <= limit) & (lowest >= -limit) & (minimum >= -limit);
    if (half) {
      const V step = fitted_scale ? exact : width * (0.999f / top);  // a lower bound that needs no division
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
    store(grids->factor + i, broadcast(1.0f));
    store(grids->levels + i, tops);
  }
  if (usual) return;
  grids->plain = true;
  for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
    const Range r = {low[i] + 0.0f, high[i] + 0.0f};
    const Pair pair = fitted_scale ? Pair{(*fitted_scale)[i], (*fitted_minimum)[i]} : Pair{};
    grids->set(i, grid_of(pair, r, half, top, limit, misfit));
  }
}
