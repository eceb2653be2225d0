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

// The pairs of up to kGroupsAtOnce groups on their way to the best ones. Groups are fitted side by side, so that none
// waits for the latency of another, and without branches, so that the compiler can vectorize the loops over groups. A
// group that has its pair leaves, and those behind it move up.
struct Fits {
  std::size_t fitted, group[kGroupsAtOnce];           // how many groups are left, and their numbers
  PerGroup scale, minimum, inverse, least;            // least: the smallest scale that is accepted
  double count[kGroupsAtOnce], share[kGroupsAtOnce];  // of values or sum of their importance, and its inverse
  double spread[kGroupsAtOnce];                       // of the codes of the last step
  std::int32_t moves[kGroupsAtOnce];                  // 0 where a pair is found

  // A pair of scale 0 is left alone: a scale of 1 stands in for it.
  Fits(const PerGroup& scales, const PerGroup& minima, std::size_t n, std::size_t size)
      : fitted((n + size - 1) / size) {
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
      group[g] = g;
      scale[g] = scales[g] > 0 ? scales[g] : 1.0f;
      minimum[g] = minima[g];
      inverse[g] = 1.0f / scale[g];
      least[g] = scale[g] * 0x1p-20f;
      count[g] = static_cast<double>(size);
      spread[g] = -1.0;
    }
    count[fitted - 1] = static_cast<double>(n - (fitted - 1) * size);
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) share[g] = 1 / count[g];
  }

  // Counts the importance of the values instead of their number.
  void count_importance(const PerGroup& total) {
    for (std::size_t g = 0; g < kGroupsAtOnce; ++g) {
      count[g] = static_cast<double>(total[g]);
      share[g] = 1 / count[g];
    }
  }

  // Moves each pair to the line r ~ a + b * d through its sums. The line gives only the small change of the pair, so
  // nothing cancels. A pair whose codes are all equal stays, and so does one where a single code has nearly all
  // importance: every line fits it then, and a spread below `noise` is nothing but rounding errors. So does a pair
  // whose codes have the spread that they had a step before: these are the same codes but for rare chances, and it is
  // their best pair.
  void move(const PerGroup& d, const PerGroup& dd, const PerGroup& r, const PerGroup& rd, double middle, double noise) {
    constexpr std::size_t lanes = kLanes<float>;
    for (std::size_t first = 0; first < fitted; first += lanes) {
      for (std::size_t g = first; g < first + lanes; ++g) {
        const double sum_d = static_cast<double>(d[g]), sum_dd = static_cast<double>(dd[g]);
        const double sum_r = static_cast<double>(r[g]), sum_rd = static_cast<double>(rd[g]);
        const double of_codes = count[g] * sum_dd - sum_d * sum_d, s = static_cast<double>(scale[g]);
        const double b = (count[g] * sum_rd - sum_d * sum_r) / of_codes, a = (sum_r - b * sum_d) * share[g];
        const float better = static_cast<float>(s * (1 + b));
        const float moved = static_cast<float>(static_cast<double>(minimum[g]) + s * (a - b * middle));
        const bool good = (of_codes > count[g] * sum_dd * noise) & (of_codes != spread[g]) & (better >= least[g]) &
                          (better <= 0x1p100f);
        spread[g] = of_codes;
        scale[g] = good ? better : scale[g];
        minimum[g] = good ? moved : minimum[g];
        inverse[g] = 1.0f / scale[g];
        moves[g] = good;
      }
    }
  }

  // Writes the pairs, and lets those go that are found.
  void leave(PerGroup& scales, PerGroup& minima) {
    std::size_t left = 0;
    for (std::size_t g = 0; g < fitted; ++g) {
      scales[group[g]] = scale[g];
      minima[group[g]] = minimum[g];
      group[left] = group[g];
      scale[left] = scale[g];
      minimum[left] = minimum[g];
      inverse[left] = inverse[g];
      least[left] = least[g];
      count[left] = count[g];
      share[left] = share[g];
      spread[left] = spread[g];
      left += static_cast<std::size_t>(moves[g]);
    }
    fitted = left;
  }
};

// The sums of the groups that are left, of `size` values each, the last of n values with fewer.
template <bool Weighted>
[[gnu::noinline]] void sum_groups(const float* x, const float* importance, std::size_t n, std::size_t size, float top,
                                  const Fits& fits, Sums* sums) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, vectors = kPartials / lanes;
  const float middle = top * 0.5f;
  const V one = broadcast(1.0f);
  for (std::size_t g = 0; g < fits.fitted; ++g) {
    const std::size_t begin = fits.group[g] * size, end = n - begin < size ? n : begin + size;
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

// Fits the pairs of the groups of n values. Each of at most eight steps computes the codes of the present pairs, then
// the pairs that fit these codes best.
inline void fit_groups(const float* x, const float* importance, std::size_t n, std::size_t size, float top,
                       PerGroup& scales, PerGroup& minima) {
  constexpr std::size_t lanes = kLanes<float>;
  const double middle = static_cast<double>(top * 0.5f), noise = importance ? 0x1p-20 : 0.0;
  Fits fits(scales, minima, n, size);
  const std::size_t groups = fits.fitted;
  Sums sums;
  PerGroup total = {}, d = {}, dd = {}, r = {}, rd = {}, scale = {};
  for (int step = 0; step < 8 && fits.fitted != 0; ++step) {
    importance ? sum_groups<true>(x, importance, n, size, top, fits, &sums)
               : sum_groups<false>(x, nullptr, n, size, top, fits, &sums);
    // Vectors of groups are folded fast, with some behind the last that have left; a few groups by themselves.
    const std::size_t whole = (fits.fitted + lanes - 1) / lanes * lanes, most = whole < groups ? whole : groups;
    const std::size_t folded = fits.fitted <= lanes / 4 ? fits.fitted : most;
    if (importance && step == 0) {
      fold_groups(sums.n, folded, &total, plus);
      fits.count_importance(total);
    }
    fold_groups(sums.d, folded, &d, plus);
    fold_groups(sums.dd, folded, &dd, plus);
    fold_groups(sums.r, folded, &r, plus);
    fold_groups(sums.rd, folded, &rd, plus);
    fits.move(d, dd, r, rd, middle, noise);
    if (step > 0) fits.leave(scale, minima);  // no codes are the same before
  }
  for (std::size_t g = 0; g < groups; ++g) scales[g] = scales[g] > 0 ? scale[g] : 0.0f;
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
  fit_groups(x, importance, n, n, top, scale, minimum);
  return {scale[0], minimum[0]};
}
