// Scale and minimum by least squares, starting from those of the range.

// The sums of one step. With u = (x - minimum) / scale, d the code counted from the middle and r = u - code, the line
// r ~ a + b * d is fitted from the sums of d, d * d, r and r * d.
//
// Element i of each sum goes to partial sum i % kPartials, and these are added as a tree: the order is the same for
// every width of a vector. sum_groups() takes the first steps of the tree, down to one vector for each group;
// fold_groups() takes the others for all groups together.
//
// With an importance every term is multiplied by it, and n, the sum of the importance, stands for the number of values.
struct Sums {
  Vec<float> n[kGroupsAtOnce], d[kGroupsAtOnce], dd[kGroupsAtOnce], r[kGroupsAtOnce], rd[kGroupsAtOnce];
};

// How often the pairs of groups of up to `most` values are moved: with more values, codes change more slowly.
inline int fit_steps(std::size_t most, float top) {
  return top < 4 ? 8 : most <= 32 ? 3 : most <= 128 ? 4 : most <= 512 ? 5 : 8;
}

// Sums of so many values are computed with as floats; of more, as doubles.
constexpr std::size_t kFloatFit = 512;

// The pairs of up to kGroupsAtOnce groups on their way to better ones. Groups are fitted side by side, so that none
// waits for the latency of another, and without branches, so that the compiler can vectorize the loops over groups.
struct Fits {
  std::size_t groups;
  PerGroup scale, minimum, inverse, least;  // least: the smallest scale that is accepted
  PerGroup count;                           // of values, or the sum of their importance

  // A pair of scale 0 is left alone: a scale of 1 stands in for it.
  Fits(const PerGroup& scales, const PerGroup& minima, std::size_t n, std::size_t size)
      : groups((n + size - 1) / size) {
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
      scale[g] = scales[g] > 0 ? scales[g] : 1.0f;
      minimum[g] = minima[g];
      inverse[g] = 1.0f / scale[g];
      least[g] = scale[g] * 0x1p-20f;
      count[g] = static_cast<float>(size);
    }
    count[groups - 1] = static_cast<float>(n - (groups - 1) * size);
  }

  // Moves each pair towards the line r ~ a + b * d through its sums, and beyond it: twice as far. The error of the same
  // codes is a parabola along the way, so there it is what it was, and new codes only make it smaller; such steps need
  // about half as many to the same error. Only the last step stops at the line, and one that would halve a
  // scale.
  //
  // The line gives only the small change of the pair, so nothing cancels. A pair whose codes are all equal stays: a
  // spread below `noise` is nothing but rounding errors. With an importance, so does a pair where a single code has
  // nearly all of it, since every line fits that.
  template <class T>
  void move(const PerGroup& d, const PerGroup& dd, const PerGroup& r, const PerGroup& rd, T middle, T noise,
            bool to_line) {
    constexpr std::size_t lanes = kLanes<float>;
    for (std::size_t first = 0; first < groups; first += lanes) {
      for (std::size_t g = first; g < first + lanes; ++g) {
        const T n = T{count[g]}, sum_d = T{d[g]}, sum_dd = T{dd[g]}, sum_r = T{r[g]}, sum_rd = T{rd[g]},
                s = T{scale[g]};
        const T all = n * sum_dd, spread = all - sum_d * sum_d;
        const T b = (n * sum_rd - sum_d * sum_r) / spread, a = (sum_r - b * sum_d) / n;
        const T far = (to_line | (b < T{-0.25})) ? s : s + s;
        const float better = static_cast<float>(s + far * b);
        const float moved = static_cast<float>(T{minimum[g]} + far * (a - b * middle));
        const bool good = (spread > all * noise) & (better >= least[g]) & (better <= 0x1p100f);
        scale[g] = good ? better : scale[g];
        minimum[g] = good ? moved : minimum[g];
        inverse[g] = 1.0f / scale[g];
      }
    }
  }
};

// The sums of groups of `size` values each, the last of n values with fewer.
template <bool Weighted>
[[gnu::noinline]] void sum_groups(const float* x, const float* importance, std::size_t n, std::size_t size, float top,
                                  const Fits& fits, Sums* sums) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, vectors = kPartials / lanes;
  const float middle = top * 0.5f;
  const V one = broadcast(1.0f);
  for (std::size_t g = 0; g < fits.groups; ++g) {
    const std::size_t begin = g * size, end = n - begin < size ? n : begin + size;
    const float minimum = fits.minimum[g], inverse = fits.inverse[g];
    V sum_n[vectors] = {}, sum_d[vectors] = {}, sum_dd[vectors] = {}, sum_r[vectors] = {}, sum_rd[vectors] = {};
    const auto take = [&](std::size_t j, V v, V weight, std::size_t left) {
      const V u = (v - minimum) * inverse;
      const V code = positive_part(smaller(round_even(u), broadcast(top)));
      V d = code - middle, r = u - code;
      if (left < lanes) {
        const auto exists = lane_numbers() < static_cast<std::int32_t>(left);
        d = exists ? d : V{};
        r = exists ? r : V{};
      }
      const V wd = Weighted ? weight * d : d, wr = Weighted ? weight * r : r;
      if constexpr (Weighted) sum_n[j] = add_product(sum_n[j], weight, one);
      sum_d[j] = add_product(sum_d[j], wd, one);
      sum_dd[j] = Weighted ? add_product(sum_dd[j], wd * d, one) : add_product(sum_dd[j], d, d);
      sum_r[j] = add_product(sum_r[j], wr, one);
      sum_rd[j] = add_product(sum_rd[j], wr * d, one);
    };
    std::size_t i = begin;
    for (; i + kPartials <= end; i += kPartials) {
      for (std::size_t j = 0; j < vectors; ++j) {
        const std::size_t at = i + j * lanes;
        take(j, load<V>(x + at), Weighted ? load<V>(importance + at) : V{}, lanes);
      }
    }
    for (std::size_t j = 0; i < end; ++j, i += lanes) {
      const std::size_t left = end - i < lanes ? end - i : lanes;
      const std::size_t bytes = left * sizeof(float);
      take(j, load_part<V>(x + i, bytes), Weighted ? load_part<V>(importance + i, bytes) : V{}, left);
    }
    const auto total = [&](const V(&v)[vectors]) {
      if constexpr (vectors == 4) return (v[0] + v[2]) + (v[1] + v[3]);
      return vectors == 2 ? v[0] + v[vectors - 1] : v[0];
    };
    if constexpr (Weighted) sums->n[g] = total(sum_n);
    sums->d[g] = total(sum_d);
    sums->dd[g] = total(sum_dd);
    sums->r[g] = total(sum_r);
    sums->rd[g] = total(sum_rd);
  }
}

// Fits the pairs of the groups of n values. Each step computes the codes of the present pairs, then moves the pairs
// towards those that fit these codes best.
//
// Codes of two bits are so few that a step beyond the line costs a model more than its smaller error gains.
inline void fit_groups(const float* x, const float* importance, std::size_t n, std::size_t size, std::size_t most,
                       float top, PerGroup& scales, PerGroup& minima) {
  const float middle = top * 0.5f;
  const int steps = fit_steps(most, top);
  Fits fits(scales, minima, n, size);
  Sums sums;
  PerGroup d = {}, dd = {}, r = {}, rd = {};
  for (int step = 0; step < steps; ++step) {
    importance ? sum_groups<true>(x, importance, n, size, top, fits, &sums)
               : sum_groups<false>(x, nullptr, n, size, top, fits, &sums);
    const Vec<float>* const spread_sums[] = {sums.d, sums.dd, sums.r, sums.rd, sums.n};
    PerGroup* const folded[] = {&d, &dd, &r, &rd, &fits.count};
    const std::size_t all = importance && step == 0 ? 5 : 4;
    for (std::size_t i = 0; i < all; ++i) fold_groups(spread_sums[i], fits.groups, folded[i], plus);
    const bool to_line = step + 1 == steps || top < 4;
    if (most <= kFloatFit) {
      fits.move<float>(d, dd, r, rd, middle, 0x1p-16f, to_line);
    } else {
      fits.move<double>(d, dd, r, rd, static_cast<double>(middle), importance ? 0x1p-20 : 0.0, to_line);
    }
  }
  for (std::size_t g = 0; g < fits.groups; ++g) {
    scales[g] = scales[g] > 0 ? fits.scale[g] : 0.0f;
    minima[g] = fits.minimum[g];
  }
}

// Returns true if neither the scale nor its inverse loses precision; otherwise the pair of the range stays.
inline bool can_fit(Range r, float scale) {
  return r.max - r.min <= 0x1.fffffep127f && scale >= 0x1p-100f && scale <= 0x1p100f;
}

Pair fit_any(const float* x, const float* importance, std::size_t n, int bits, Range r) {
  const float top = static_cast<float>((1 << bits) - 1);
  const Grid exact = grid_f32(r, top, 0x1.fffffep127f);
  if (!can_fit(r, exact.scale)) return {};
  PerGroup scale = {exact.scale}, minimum = {exact.minimum};
  fit_groups(x, importance, n, n, n, top, scale, minimum);
  return {scale[0], minimum[0]};
}
