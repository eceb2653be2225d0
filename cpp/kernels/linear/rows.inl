// Products for few rows of x: rows of W side by side, in their packed order.
//
//   row of W   | run 0                | run 1                | ...
//   run        | word 0 | word 1 | ... | word 15 |                    a word: 4 to 16 codes
//                  |        |               |
//   sums       | lane 0 | lane 1 | ... | lane 15 |                    16 partial sums, in kWordVectors vectors
//
// Word l of every run is multiplied with the same columns of x, which prepare.inl laid out beside it, and its sum goes
// to partial sum l: nothing moves between lanes. The sixteen are added as a tree at the end of a row.

// Prefetches `Lines` cache lines of codes into L2, far ahead and in the order of memory, a few in each step. The rows
// that are read side by side are too many short streams for the prefetcher of a core, and it would drop a burst of
// requests.
template <std::size_t Lines>
inline void fetch_codes(const std::uint8_t* codes, std::size_t step) {
  for (std::size_t i = 0; i < Lines; ++i) __builtin_prefetch(codes + (step * Lines + i) * 64, 0, 2);
}

// Prefetches sixteen scales and minima from `at` on.
inline void fetch_params(const Quantized& w, std::size_t at) {
  const std::size_t size = w.half ? 2 : 4;
  __builtin_prefetch(static_cast<const char*>(w.scale) + at * size, 0, 2);
  __builtin_prefetch(static_cast<const char*>(w.minimum) + at * size, 0, 2);
}

// Loads sixteen parameters from `at` on; zeros behind the `n` that belong to this row.
template <bool Half>
inline void load_sixteen(const void* params, std::size_t at, std::size_t n, Vec<float> (&out)[kWordVectors]) {
  constexpr std::size_t lanes = kLanes<float>;
  for (std::size_t i = 0; i < kWordVectors; ++i, at += lanes) {
    const std::size_t count = n > i * lanes ? n - i * lanes : 0;
    out[i] = Half ? first_halves(static_cast<const std::uint16_t*>(params) + at, count)
                  : first_floats(static_cast<const float*>(params) + at, count);
  }
}

inline void load_sixteen(const Quantized& q, const void* params, std::size_t at, std::size_t n,
                         Vec<float> (&out)[kWordVectors]) {
  q.half ? load_sixteen<true>(params, at, n, out) : load_sixteen<false>(params, at, n, out);
}

// The partial sums of rows [row, row + Rows) of W, which end at `row_end`, by `Batch` rows of x. The parameters of
// sixteen groups of a row are loaded at a time: their scales stay in registers for the runs that they cover. The other
// part of these groups, the value in the middle times the sum of x, is added before their codes.
//
// The function is long because the sums and scales of all rows must stay in registers across its loops; everything
// that does not hold them has a function of its own.
template <int Bits, int Limbs, std::size_t Rows, std::size_t Batch>
inline void partial_sums(const Quantized& w, const Prepared<Bits, Limbs> (&x)[Batch], std::size_t row,
                         std::size_t row_end, Vec<float> (*out)[Batch][kWordVectors]) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  constexpr std::size_t run_bytes = kRunBytes<Bits>;
  const std::size_t runs = runs_of<Bits>(w);
  const std::size_t group_runs = w.groups == 1 ? runs : w.group / kWordColumns<Bits>;  // of sixteen groups
  std::size_t rows[Rows];
  const std::uint8_t* codes[Rows];
  unroll<Rows>([&](auto r) {
    rows[r.value] = row + r.value < row_end ? row + r.value : row_end - 1;  // the last one again where there are fewer
    codes[r.value] = w.codes + rows[r.value] * w.row_bytes;
  });
  const std::uint8_t* const next_codes = w.codes + (row + 2 * Rows) * w.row_bytes;
  // The last run may be short. The codes behind it meet zeros of x, but must exist.
  alignas(64) std::uint8_t copy[Rows][run_bytes];
  std::size_t end = runs;
  if (static_cast<std::size_t>(w.codes + w.rows * w.row_bytes - codes[Rows - 1]) < runs * run_bytes) {
    end = runs - 1;
    std::memset(copy, 0, sizeof copy);
    for (std::size_t r = 0; r < Rows; ++r) {
      std::memcpy(copy[r], codes[r] + end * run_bytes, w.row_bytes - end * run_bytes);
    }
  }

  // The scale of a row that is one group multiplies the sum.
  V sums[Rows][Batch][kWordVectors], scale[Rows][kWordVectors];
  const auto start = [&] {
    unroll<Rows>([&](auto r) {
      unroll<Batch>([&](auto b) {
        for (V& sum : sums[r.value][b.value]) sum = V{};
      });
    });
  };
  start();
  unroll<Rows>([&](auto r) {
    for (V& part : scale[r.value]) part = V{} + 1.0f;
  });
  std::size_t group_run = w.groups == 1 ? runs : 0, stretch_end = runs < kRunStretch ? runs : kRunStretch;
  for (std::size_t run = 0, group = 0; run < runs;) {
    if (run == group_run) {
      const std::size_t n = w.groups - group < kWords ? w.groups - group : kWords;
      const auto next_groups = [&](auto half) {
        unroll<Rows>([&](auto r) {
          const std::size_t at = rows[r.value] * w.param_stride + group;
          fetch_params(w, at + 2 * Rows * w.param_stride);
          V middle[kWordVectors];
          load_sixteen<half.value>(w.scale, at, n, scale[r.value]);
          load_sixteen<half.value>(w.minimum, at, n, middle);
          for (std::size_t i = 0; i < kWordVectors; ++i) {
            middle[i] += scale[r.value][i] * (kMiddle<Bits> * kStep<Bits>);
            unroll<Batch>([&](auto b) {
              sums[r.value][b.value][i] += middle[i] * load<V>(x[b.value].group_sum + group + i * lanes);
            });
          }
        });
      };
      w.half ? next_groups(Int<1>{}) : next_groups(Int<0>{});
      group += kWords;
      group_run += group_runs;
    }
    if (run == end) {
      for (std::size_t r = 0; r < Rows; ++r) codes[r] = copy[r] - run * run_bytes;
      end = runs;
    }
    std::size_t stop = stretch_end < end ? stretch_end : end;
    if (group_run < stop) stop = group_run;
    for (; run < stop; ++run) {
      fetch_codes<(Rows * run_bytes + 63) / 64>(next_codes, run);
      for (std::size_t i = 0; i < kWordVectors; ++i) {
        // The groups of a vector's words are neighbours, so one vector of scales holds those of all.
        const std::uint8_t* lane = x[0].lane[run] + i * lanes;
        const std::size_t first = lane[0] < kWords - lanes ? lane[0] : kWords - lanes;
        const Vec<std::int32_t> index =
            bit_cast<Vec<std::int32_t>>(load_bytes(lane)) - static_cast<std::int32_t>(first);
        Vec<std::uint8_t> parts[Rows][kParts<Bits>];
        for (std::size_t r = 0; r < Rows; ++r) split<Bits>(codes[r] + run * run_bytes, i, parts[r]);
        unroll<Batch>([&](auto b) {
          const Run<Bits, Limbs>& from = x[b.value].runs[run];
          V product[Rows];
          word_sums(parts, from, i * lanes, product);
          unroll<Rows>([&](auto r) {
            product[r.value] *= load<V>(from.scale + i * lanes);
            sums[r.value][b.value][i] +=
                product[r.value] * lookup(reinterpret_cast<const float*>(scale[r.value]) + first, index);
          });
        });
      }
    }
    if (run == stretch_end) {
      unroll<Rows>([&](auto r) {
        unroll<Batch>([&](auto b) {
          for (std::size_t i = 0; i < kWordVectors; ++i) {
            V& to = out[r.value][b.value][i];
            to = run <= kRunStretch ? sums[r.value][b.value][i] : to + sums[r.value][b.value][i];
          }
        });
      });
      start();
      stretch_end = runs - run < kRunStretch ? runs : run + kRunStretch;
    }
  }
}

// For each of four rows its sixteen partial sums as a tree in double: the first step adds lanes 8 apart, the last
// neighbours.
template <std::size_t Batch>
inline Vec<double, 4> tree_sums(const Vec<float> (&partial)[4][Batch][kWordVectors], std::size_t b) {
  using Doubles = Vec<double, 8>;
  Doubles row[4];
  for (std::size_t r = 0; r < 4; ++r) {
    Vec<float, 8> half[2];
    std::memcpy(half, partial[r][b], sizeof half);
    row[r] = doubles(half[0]) + doubles(half[1]);
  }
  const auto fours = [](Doubles v, Doubles w) {
    return __builtin_shufflevector(v, w, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v, w, 4, 5, 6, 7, 12, 13, 14, 15);
  };
  const Doubles ab = fours(row[0], row[1]), cd = fours(row[2], row[3]);
  const Doubles pairs = __builtin_shufflevector(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) +
                        __builtin_shufflevector(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
  return __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6) + __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7);
}

// The product with a row that is one group; in double, as nothing averages its roundings out.
inline double one_group_product(const Quantized& w, std::size_t row, double sum, const float* group_sum) {
  double x_sum;
  std::memcpy(&x_sum, group_sum, sizeof x_sum);
  const double scale = static_cast<double>(param_at(w, w.scale, row * w.param_stride));
  const double minimum = static_cast<double>(param_at(w, w.minimum, row * w.param_stride));
  return sum * scale + (minimum + scale * middle_code(w.bits)) * x_sum;
}

// Rows [begin, end) of W by `Batch` rows of x, four at a time.
template <int Bits, int Limbs, std::size_t Batch>
[[gnu::noinline]] void linear_rows(const Quantized& weight, const Linear& io, std::size_t batch, std::size_t begin,
                                   std::size_t end) {
  const Quantized w = weight;  // no store can change it
  // `at_once` rows fill the registers.
  constexpr std::size_t tile = 4, at_once = Batch > 1 && (kVectorBytes < 64 || Bits == 2) ? 2 : 4;
  Prepared<Bits, Limbs> x[Batch];
  for (std::size_t b = 0; b < Batch; ++b) {
    x[b] = Prepared<Bits, Limbs>(w, io.prepared + (batch + b) * io.prepared_bytes);
  }
  for (std::size_t row = begin; row < end; row += tile) {
    const std::size_t exist = end - row < tile ? end - row : tile;
    Vec<float> partial[tile][Batch][kWordVectors];
    for (std::size_t r = 0; r < tile; r += at_once) {
      partial_sums<Bits, Limbs, at_once>(w, x, row + r, end, partial + r);
    }
    for (std::size_t b = 0; b < Batch; ++b) {
      Vec<double, 4> exact = tree_sums(partial, b);
      for (std::size_t r = 0; w.groups == 1 && r < exist; ++r) {
        exact[r] = one_group_product(w, row + r, exact[r], x[b].group_sum);
      }
      const Vec<float, 4> sums = convert<float, 4>(exact);
      float* y = io.y + (batch + b) * w.rows + row;
      const bool finite = fold_lanes<int, 4>(sums - sums == 0.0f, bitwise_and) != 0;
      if (finite && exist == tile) {
        store(y, io.bias ? sums + load<Vec<float, 4>>(io.bias + row) : sums);
        continue;
      }
      for (std::size_t r = 0; r < exist; ++r) {
        y[r] = io.bias ? sums[r] + io.bias[row + r] : sums[r];
        // x or the sum is not finite, or beyond the reach of integers.
        if (!(sums[r] - sums[r] == 0.0f)) io.floats(weight, io, batch + b, 1, row + r, row + r + 1);
      }
    }
  }
}
