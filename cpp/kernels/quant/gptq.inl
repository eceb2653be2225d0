// Codes and parameters that make the error of a layer's outputs small: GPTQ (Frantar et al., 2022).
//
// With e = w - q for a row, and H the products of the inputs, the error of the outputs is e H e^T. Columns and groups
// are counted in the order in which they are visited; H is in that order too. Let H = M D M^T with M upper triangular
// and ones on its diagonal. Then
//
//   e H e^T = sum over p of D[p] * (e[p] + sum over i < p of e[i] * M[i][p])^2
//
// and each term is smallest where code p is the nearest to v[p] = w[p] + sum over i < p of e[i] * M[i][p]: every column
// makes good for the errors of those before it. The pair of a group is fitted to v, once all groups before it are done;
// with parameters in two levels by their codes, under floats that were fitted to w.
// Sweeps follow that give each code the value which is best beside all other codes.
//
// kStripRows rows go side by side, each in a lane of its own:
//
//   position p   row 0   row 1  ...  row 63
//          0    |  one line of e, w, v, codes  |      M and H lie in slabs of kSlabColumns positions, [slab][i][p],
//          1    |                              |      so that a tile reads one after the other
//
// Every sum runs over i in rising order, so its bits do not depend on tiles, threads or vectors.

using Strip = float[kStripRows];

// v[p] += sum over i in [begin, end) of e[i] * m[i][p], for kColumns positions next to each other in a slab.
template <std::size_t Columns>
inline void add_feedback(const Strip* e, const float* m, std::size_t begin, std::size_t end, Strip* v) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, vectors = kVectorBytes == 64 ? 4 : 2;
  for (std::size_t r = 0; r < kStripRows; r += vectors * lanes) {
    V sum[Columns][vectors];
    unroll<Columns>([&](auto c) {
      unroll<vectors>([&](auto j) { sum[c.value][j.value] = load<V>(v[c.value] + r + j.value * lanes); });
    });
    for (std::size_t i = begin; i < end; ++i) {
      const float* factors = m + i * kSlabColumns;
      V x[vectors];
      unroll<vectors>([&](auto j) { x[j.value] = load<V>(e[i] + r + j.value * lanes); });
      unroll<Columns>([&](auto c) {
        const V factor = broadcast(factors[c.value]);
        unroll<vectors>([&](auto j) { sum[c.value][j.value] += x[j.value] * factor; });
      });
    }
    unroll<Columns>([&](auto c) {
      unroll<vectors>([&](auto j) { store(v[c.value] + r + j.value * lanes, sum[c.value][j.value]); });
    });
  }
}

// The same for positions [first, last) of all slabs; v[0] is that of `first`. kFeedbackBlock lines of e, and their part
// of a slab, stay in the first cache while all positions of the slab take them.
inline void add_feedback(const Gptq& g, const float* slabs, const Strip* e, std::size_t begin, std::size_t end,
                         std::size_t first, std::size_t last, Strip* v) {
  constexpr std::size_t kFeedbackBlock = 96;
  while (first < last) {
    const std::size_t next = (first / kSlabColumns + 1) * kSlabColumns, stop = next < last ? next : last;
    const float* const slab = slabs + first / kSlabColumns * (g.cols * kSlabColumns);
    for (std::size_t from = begin; from < end; from += kFeedbackBlock) {
      const std::size_t to = from + kFeedbackBlock < end ? from + kFeedbackBlock : end;
      for (std::size_t p = first; p < stop;) {
        const float* const m = slab + p % kSlabColumns;
        if (p % 4 == 0 && p + 4 <= stop) {
          add_feedback<4>(e, m, from, to, v + (p - first));
          p += 4;
        } else {
          add_feedback<1>(e, m, from, to, v + (p - first));
          ++p;
        }
      }
    }
    v += stop - first;
    first = stop;
  }
}

// The row i of a matrix in slabs from position p on, up to the end of the slab.
inline const float* slab_row(const Gptq& g, const float* slabs, std::size_t i, std::size_t p) {
  return slabs + (p / kSlabColumns * g.cols + i) * kSlabColumns + p % kSlabColumns;
}

// Calls body(first, last) for the parts of [begin, end) that lie in one slab each.
template <class Body>
inline void for_slabs(std::size_t begin, std::size_t end, const Body& body) {
  while (begin < end) {
    const std::size_t next = (begin / kSlabColumns + 1) * kSlabColumns, last = next < end ? next : end;
    body(begin, last);
    begin = last;
  }
}

// The pairs of a group, one for each row.
struct StripPairs {
  Strip scale, minimum, inverse;
};

// Memory for one strip.
struct StripMemory {
  Strip *w, *e, *v;  // v for one group
  StripPairs* pairs;
  std::uint8_t *codes, *scale_codes, *minimum_codes;  // [position or visit][row]
  FitMemory fit;                                      // for kGroupsAtOnce rows of one group
  std::size_t bytes;

  StripMemory(const Gptq& g, const QuantizedOut& q, std::uint8_t* memory)
      : w(reinterpret_cast<Strip*>(memory)),
        e(w + g.cols),
        v(e + g.cols),
        pairs(reinterpret_cast<StripPairs*>(v + g.group)),
        codes(reinterpret_cast<std::uint8_t*>(pairs + q.groups)),
        scale_codes(codes + g.cols * kStripRows),
        minimum_codes(scale_codes + q.groups * kStripRows),
        fit(q, one_group(), minimum_codes + q.groups * kStripRows),
        bytes(static_cast<std::size_t>(minimum_codes - memory) + q.groups * kStripRows + fit.bytes) {}

 private:
  static TwoLevelOut one_group() {
    TwoLevelOut t{};
    t.part = t.parts = 1;
    return t;
  }
};

// Fits the pairs of a group of n columns to v. `values` has room for kGroupsAtOnce rows of them and `importance` holds
// theirs.
inline void fit_strip(const Strip* v, std::size_t n, const QuantizedOut& q, float* values, const float* importance,
                      float top, StripPairs* pairs, bool* misfit, Vec<std::int32_t>* magnitude) {
  Grids grids = {};
  Ranges ranges = {};
  QuantizedOut as_row = q;
  as_row.group = n;
  for (std::size_t r = 0; r < kStripRows; r += kGroupsAtOnce) {
    for (std::size_t k = 0; k < kGroupsAtOnce; ++k) {
      for (std::size_t p = 0; p < n; ++p) values[k * n + p] = v[p][r + k];
    }
    measure_groups(values, kGroupsAtOnce * n, n, 0, &ranges);
    prepare_groups(values, importance, kGroupsAtOnce * n, as_row, true, top, ranges, 1, &grids, misfit);
    std::memcpy(pairs->scale + r, grids.scale, sizeof grids.scale);
    std::memcpy(pairs->minimum + r, grids.minimum, sizeof grids.minimum);
  }
  *magnitude = larger(ranges.magnitude, *magnitude);
  for (std::size_t r = 0; r < kStripRows; ++r) pairs->inverse[r] = pairs->scale[r] > 0 ? 1.0f / pairs->scale[r] : 0.0f;
}

// Chooses the codes of the pairs of group `group` of n columns, the k-th that is visited: first those nearest to pairs
// that are free, then neighbours. Each row is scaled by a power of two that brings its d near 1.
inline void fit_strip_codes(const TwoLevelOut& t, const Strip* v, std::size_t n, const QuantizedOut& q,
                            std::size_t first, std::size_t group, std::size_t k, const float* importance, float top,
                            const StripMemory& memory, unsigned* flags, Vec<std::int32_t>* magnitude) {
  using V = Vec<float>;
  const FitMemory& m = memory.fit;
  StripPairs* const pairs = memory.pairs + k;
  const float most = static_cast<float>((1 << t.bits) - 1);
  const Block block = {m.x, m.h, n, 0};
  for (std::size_t i = 0; i < n * kGroupsAtOnce; ++i) m.h[i] = importance[i / kGroupsAtOnce];
  for (std::size_t r = 0; r < kStripRows; r += kGroupsAtOnce) {
    BlockFloats own, scaled;
    alignas(64) float down[kGroupsAtOnce];
    for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
      const std::size_t row = first + r + i < q.rows ? first + r + i : q.rows - 1;
      const std::size_t place = (row * t.parts + group / t.part) * t.count;
      own.d[i] = number_of(t, place);
      own.dm[i] = number_of(t, place + 1);
      own.m0[i] = t.count == 3 ? number_of(t, place + 2) : 0.0f;
      const std::int32_t exponent = bit_cast<std::int32_t>(own.d[i]) >> 23;  // from 1 to 253 in the power below
      down[i] = own.d[i] > 0 ? bit_cast<float>((254 - (exponent < 1     ? 1
                                                       : exponent > 253 ? 253
                                                                        : exponent))
                                               << 23)
                             : 1.0f;
      scaled.d[i] = own.d[i] * down[i];
      scaled.dm[i] = own.dm[i] * down[i];
      scaled.m0[i] = own.m0[i] * down[i];
    }
    for (std::size_t p = 0; p < n; ++p) {
      for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
        const V value = load<V>(v[p] + r + j);
        *magnitude = larger(magnitude_bits(value), *magnitude);
        store(m.x + p * kGroupsAtOnce + j, value * load<V>(down + j));
      }
    }
    first_pairs<true>(block, top, m);
    code_pairs(block, top, most, t.count == 3, scaled, m);
    for (int round = 0; round < kRounds; ++round) try_neighbours<true>(block, top, most, scaled, m);
    for (std::size_t j = 0; j < kGroupsAtOnce; j += kLanes<float>) {
      const V scale_code = load<V>(m.q + j), minimum_code = load<V>(m.k + j);
      store(pairs->scale + r + j, load<V>(own.d + j) * scale_code);
      store(pairs->minimum + r + j, load<V>(own.m0 + j) - load<V>(own.dm + j) * minimum_code);
      store_bytes(memory.scale_codes + k * kStripRows + r + j, round_to_int(scale_code));
      store_bytes(memory.minimum_codes + k * kStripRows + r + j, round_to_int(minimum_code));
    }
  }
  for (std::size_t r = 0; r < kStripRows; ++r) {
    const float scale = pairs->scale[r];
    pairs->inverse[r] = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
    if (!within({scale, pairs->minimum[r]}, top, q.limit) && first + r < q.rows) *flags |= kBeyond;
  }
}

// The codes that are nearest to v; e = w - what they stand for.
inline void nearest(const float* v, const float* w, const StripPairs& pairs, float top, std::uint8_t* codes, float* e) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  for (std::size_t r = 0; r < kStripRows; r += lanes) {
    const V minimum = load<V>(pairs.minimum + r), scale = load<V>(pairs.scale + r);
    const V u = (load<V>(v + r) - minimum) * load<V>(pairs.inverse + r);
    const V code = positive_part(smaller(round_even(u), broadcast(top)));
    store(e + r, load<V>(w + r) - (minimum + scale * code));
    store_bytes(codes + r, round_to_int(code));
  }
}

// line += factor[k] * x for the lines that follow.
inline void add_to_lines(const float* x, const float* factors, std::size_t n, Strip* lines) {
  using V = Vec<float>;
  for (std::size_t k = 0; k < n; ++k) {
    for (std::size_t r = 0; r < kStripRows; r += kLanes<float>) {
      store(lines[k] + r, load<V>(lines[k] + r) + load<V>(x + r) * factors[k]);
    }
  }
}

inline std::size_t gptq_group_size(const Gptq& g, std::size_t group) {
  const std::size_t left = g.cols - group * g.group;
  return left < g.group ? left : g.group;
}

std::size_t gptq_bytes(const Gptq& g, const QuantizedOut& q) { return StripMemory(g, q, nullptr).bytes; }

unsigned gptq_rows(const Gptq& g, const QuantizedOut& q, std::size_t first, void* memory) {
  const std::size_t groups = q.groups, cols = g.cols;
  const std::size_t rows = q.rows - first < kStripRows ? q.rows - first : kStripRows;
  const float top = static_cast<float>((1 << q.bits) - 1);
  bool misfit = false;
  unsigned flags = 0;
  Vec<std::int32_t> magnitude = {};

  const StripMemory m(g, q, static_cast<std::uint8_t*>(memory));
  Strip *const w = m.w, *const e = m.e, *const v = m.v;
  StripPairs* const pairs = m.pairs;
  std::uint8_t* const codes = m.codes;

  for (std::size_t p = 0; p < cols; ++p) {
    for (std::size_t r = 0; r < kStripRows; ++r) w[p][r] = r < rows ? g.x[(first + r) * cols + g.order[p]] : 0.0f;
  }
  std::size_t begin = 0;
  for (std::size_t k = 0; k < groups; ++k) {
    const std::size_t n = gptq_group_size(g, g.group_order[k]), end = begin + n;
    std::memcpy(v, w[begin], n * sizeof(Strip));
    add_feedback(g, g.m, e, 0, begin, begin, end, v);
    if (g.two_level) {
      fit_strip_codes(*g.two_level, v, n, q, first, g.group_order[k], k, g.importance + begin, top, m, &flags,
                      &magnitude);
    } else {
      for (std::size_t i = 0; i < kGroupsAtOnce; ++i) {
        std::memcpy(m.fit.h + i * n, g.importance + begin, n * sizeof(float));
      }
      fit_strip(v, n, q, m.fit.x, m.fit.h, top, &pairs[k], &misfit, &magnitude);
    }
    for_slabs(begin, end, [&](std::size_t from, std::size_t to) {
      add_feedback(g, g.m, e, begin, from, from, to, v + (from - begin));
      for (std::size_t p = from; p < to; ++p) {
        nearest(v[p - begin], w[p], pairs[k], top, codes + p * kStripRows, e[p]);
        add_to_lines(e[p], slab_row(g, g.m, p, p) + 1, to - p - 1, v + (p - begin) + 1);
      }
    });
    begin = end;
  }
  for (int sweep = 0; sweep < g.sweeps; ++sweep) {
    begin = 0;
    for (std::size_t k = 0; k < groups; ++k) {
      const std::size_t end = begin + gptq_group_size(g, g.group_order[k]);
      for_slabs(begin, end, [&](std::size_t from, std::size_t to) {
        std::memset(v, 0, (to - from) * sizeof(Strip));
        add_feedback(g, g.h, e, 0, cols, from, to, v);
        for (std::size_t p = from; p < to; ++p) {
          float* const at = v[p - from];
          Strip before, change;
          std::memcpy(before, e[p], sizeof before);
          const float inverse = 1.0f / *slab_row(g, g.h, p, p);
          for (std::size_t r = 0; r < kStripRows; ++r) at[r] = (w[p][r] - before[r]) + at[r] * inverse;
          nearest(at, w[p], pairs[k], top, codes + p * kStripRows, e[p]);
          for (std::size_t r = 0; r < kStripRows; ++r) change[r] = e[p][r] - before[r];
          add_to_lines(change, slab_row(g, g.h, p, p) + 1, to - p - 1, v + (p - from) + 1);
        }
      });
      begin = end;
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t p = 0; p < cols; ++p) m.fit.codes[g.order[p]] = codes[p * kStripRows + r];
    pack_any(q.bits, m.fit.codes, cols, q.codes + (first + r) * q.row_bytes);
    if (g.two_level) {
      const auto pack_params = [&](const std::uint8_t* from, std::uint8_t* to) {
        for (std::size_t k = 0; k < groups; ++k) m.fit.codes[g.group_order[k]] = from[k * kStripRows + r];
        pack_any(g.two_level->bits, m.fit.codes, groups, to + (first + r) * g.two_level->row_bytes);
      };
      pack_params(m.scale_codes, g.two_level->scale);
      pack_params(m.minimum_codes, g.two_level->minimum);
      continue;
    }
    for (std::size_t k = 0; k < groups; ++k) {
      const std::size_t at = (first + r) * q.param_stride + g.group_order[k];
      const float scale = pairs[k].scale[r], minimum = pairs[k].minimum[r];
      if (q.half) {
        static_cast<std::uint16_t*>(q.scale)[at] = half_of_float(scale);
        static_cast<std::uint16_t*>(q.minimum)[at] = half_of_float(minimum);
      } else {
        static_cast<float*>(q.scale)[at] = scale;
        static_cast<float*>(q.minimum)[at] = minimum;
      }
    }
  }
  return flags | non_finite(magnitude) | (misfit ? kHalfMisfit : 0);
}

// ---- the Cholesky factor -----------------------------------------------------------------------------------------

// acc[r][j] -= sum over k < n of a[r][k] * other[k][j], for Rows rows of a matrix of `stride` columns.
template <std::size_t Rows>
inline void subtract_products(const double* a, std::size_t stride, std::size_t n, const double* other,
                              double (*acc)[kCholeskyBlock]) {
  using V = Vec<double>;
  constexpr std::size_t lanes = kLanes<double>, vectors = kVectorBytes == 64 ? 4 : 2;
  for (std::size_t j = 0; j < kCholeskyBlock; j += vectors * lanes) {
    V sum[Rows][vectors];
    unroll<Rows>([&](auto r) {
      unroll<vectors>([&](auto i) { sum[r.value][i.value] = load<V>(acc[r.value] + j + i.value * lanes); });
    });
    for (std::size_t k = 0; k < n; ++k) {
      V x[vectors];
      unroll<vectors>([&](auto i) { x[i.value] = load<V>(other + k * kCholeskyBlock + j + i.value * lanes); });
      unroll<Rows>([&](auto r) {
        const V factor = broadcast(a[r.value * stride + k]);
        unroll<vectors>([&](auto i) { sum[r.value][i.value] -= x[i.value] * factor; });
      });
    }
    unroll<Rows>([&](auto r) {
      unroll<vectors>([&](auto i) { store(acc[r.value] + j + i.value * lanes, sum[r.value][i.value]); });
    });
  }
}

// Computes the entries of one row in the columns of a block, once the products with all columns before are subtracted.
// In the block's own rows, its entries are added to `c.block`. Returns false if the matrix is not positive definite.
inline bool finish_row(const Cholesky& c, std::size_t row, double* acc) {
  const std::size_t n = c.n - c.first < kCholeskyBlock ? c.n - c.first : kCholeskyBlock;
  double* const out = c.a + row * c.n + c.first;
  for (std::size_t k = 0; k < n; ++k) {
    if (c.first + k == row) {
      if (!(acc[k] > 0)) return false;
      out[k] = sqrt(Vec<double>{} + acc[k])[0];
      c.block[k * kCholeskyBlock + k] = out[k];
      return true;
    }
    out[k] = acc[k] / c.block[k * kCholeskyBlock + k];
    if (row < c.first + n) c.block[k * kCholeskyBlock + (row - c.first)] = out[k];
    for (std::size_t j = k + 1; j < kCholeskyBlock; ++j) acc[j] -= out[k] * c.block[k * kCholeskyBlock + j];
  }
  return true;
}

bool cholesky_rows(const Cholesky& c, std::size_t begin, std::size_t end) {
  const std::size_t n = c.n - c.first < kCholeskyBlock ? c.n - c.first : kCholeskyBlock;
  double acc[4][kCholeskyBlock] = {};
  bool good = true;
  for (std::size_t row = begin; row < end;) {
    const std::size_t count = end - row >= 4 ? 4 : 1;
    for (std::size_t r = 0; r < count; ++r) {
      std::memcpy(acc[r], c.a + (row + r) * c.n + c.first, n * sizeof(double));
    }
    const double* const a = c.a + row * c.n;
    count == 4 ? subtract_products<4>(a, c.n, c.first, c.before, acc)
               : subtract_products<1>(a, c.n, c.first, c.before, acc);
    for (std::size_t r = 0; r < count; ++r) good &= finish_row(c, row + r, acc[r]);
    row += count;
  }
  return good;
}

constexpr GptqKernels kGptq = {
    .bytes = gptq_bytes,
    .rows = gptq_rows,
    .cholesky = cholesky_rows,
};
