// y = x @ W.T straight from packed weights.
//
// x is rounded to whole numbers first, x ~ scale * n, with a scale for every block of 32 columns (of 16 where a group
// is no multiple of 32); n has 24 bits, which is as exact as float32, or 8. Sums of code * n are then exact and do not
// depend on their order. What is left of the arithmetic is float32 in an order that no instruction set changes: a row
// of codes is read in runs of 64 bytes, that is 16 words of 32 bits, and word l of every run goes to partial sum l. So
// W's codes are used where and as they lie: instead, the few numbers of x are put into the order in which the codes
// come out of their bytes, once a call.

constexpr std::size_t kRun = 64, kWords = 16;  // bytes of codes in a run, and its 32-bit words
constexpr std::size_t kGrain = 16;  // groups are multiples of it, or of twice as many columns, which then share a scale
constexpr std::size_t kStretchRuns = 32;  // partial sums are added up after as many: long sums stay accurate
constexpr std::size_t kWordVectors = kWords / kLanes<float>;

// ---- float32 -------------------------------------------------------------------------------------------------
// The plain way: a stretch of a row is decoded into L1 and used for every row of x. Element c of a stretch of
// kStretch columns goes to partial sum c % 16, the sixteen are added as a tree, stretches in order.

constexpr std::size_t kStretch = 512;

inline float dot(const float* a, const float* b, std::size_t n) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, vectors = kWords / lanes;
  V sum[vectors] = {};
  std::size_t i = 0;
  for (; i + kWords <= n; i += kWords) {
    for (std::size_t j = 0; j < vectors; ++j) {
      sum[j] += load<V>(a + i + j * lanes) * load<V>(b + i + j * lanes);
    }
  }
  float partial[kWords];
  std::memcpy(partial, sum, sizeof partial);
  for (std::size_t j = 0; i + j < n; ++j) partial[j] += a[i + j] * b[i + j];
  for (std::size_t half = kWords / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

// `decode(row, begin, end, out)` gives columns [begin, end) of a row, which it is asked for in order.
template <class Decode>
void linear(std::size_t rows, std::size_t cols, const float* x, std::size_t batch, const float* bias, float* y,
            std::size_t row_begin, std::size_t row_end, Decode decode) {
  float weights[kStretch];
  for (std::size_t row = row_begin; row < row_end; ++row) {
    for (std::size_t b = 0; b < batch; ++b) y[b * rows + row] = 0.0f;
    for (std::size_t begin = 0; begin < cols; begin += kStretch) {
      const std::size_t n = cols - begin < kStretch ? cols - begin : kStretch;
      decode(row, begin, begin + n, weights);
      for (std::size_t b = 0; b < batch; ++b) y[b * rows + row] += dot(weights, x + b * cols + begin, n);
    }
    if (bias) {
      for (std::size_t b = 0; b < batch; ++b) y[b * rows + row] += bias[row];
    }
  }
}

[[gnu::noinline]] void linear_floats(const Quantized& w, const Linear& io, std::size_t batch, std::size_t count,
                                     std::size_t begin, std::size_t end) {
  linear(w.rows, w.cols, io.x + batch * w.cols, count, io.bias, io.y + batch * w.rows, begin, end,
         [&](std::size_t row, std::size_t c0, std::size_t c1, float* out) { dequantize_any(w, row, c0, c1, out); });
}

// ---- whole numbers ------------------------------------------------------------------------------------------

template <int Bits>
constexpr std::size_t kRunColumns = kRun * 8 / Bits;

// Codes count from the middle, which makes both their sums and what the minimum adds small: little cancels when the
// two are added. Two bits have their middle between two codes, so these count in half steps.
template <int Bits>
constexpr std::uint8_t kMiddle = Bits == 2 ? 3 : 1 << (Bits - 1);
template <int Bits>
constexpr float kStep = Bits == 2 ? 0.5f : 1.0f;

// With three limbs, codes of 8 bits give sums of more than 32 bits: the lowest limb is summed apart.
template <int Bits, int Limbs>
constexpr std::size_t kSums = Bits == 8 && Limbs == 3 ? 2 : 1;

// What a run of codes meets of x.
template <int Bits, int Limbs>
struct Run {
  std::int8_t limbs[Limbs][8 / Bits][kRun];  // bytes of n, the highest first, in the order of the codes
  float scale[kWords];                       // of the block that the word is in, times the step in which codes count
  std::int32_t offset[kSums<Bits, Limbs>][kWords];  // minus the sum of middle * n over the columns of the word
};

// One row of x, in the memory that the caller gave.
template <int Bits, int Limbs>
struct Prepared {
  Run<Bits, Limbs>* runs;
  float* group_sum;  // for each group of W the sum of scale * n over its columns, filled up with zeros to 16; or, where
                     // a row of W is one group, one double
  std::uint8_t (*lane)[kWords];  // of each word of each run, where its group is among the sixteen that it belongs to
  std::size_t bytes;

  Prepared() = default;
  Prepared(const Quantized& w, std::uint8_t* memory) {
    const std::size_t count = (w.row_bytes + kRun - 1) / kRun, sixteens = (w.groups + kWords - 1) / kWords;
    runs = reinterpret_cast<Run<Bits, Limbs>*>(memory);
    group_sum = reinterpret_cast<float*>(memory + count * sizeof *runs);
    lane = reinterpret_cast<std::uint8_t (*)[kWords]>(group_sum + sixteens * kWords);
    bytes = count * sizeof *runs + sixteens * kWords * sizeof(float) + (count + 3) / 4 * 4 * kWords;
  }
};

// ---- the sums of a word --------------------------------------------------------------------------------------

// For words [at, at + lanes) of a run of each row, the sum of (code - middle) * n over the columns of each, exact but
// for one rounding to float32. Rows side by side: none waits for its own last step.
template <int Bits, int Limbs, std::size_t Rows>
inline void word_sums(const Vec<std::uint8_t> (&codes)[Rows][8 / Bits], const Run<Bits, Limbs>& x, std::size_t at,
                      Vec<float> (&out)[Rows]) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  constexpr bool two_sums = kSums<Bits, Limbs> == 2;
  // Limbs above the last one by Horner's rule; the last one apart, so that sums wait less for each other.
  const auto dots = [&](Ints(&sum)[Rows], int l) {
    for (std::size_t r = 0; r < Rows; ++r) sum[r] = dot_words<Bits>(sum[r], codes[r], x.limbs[l][0] + 4 * at);
  };
  Ints last[Rows], sum[Rows] = {};
  for (Ints& row : last) row = load<Ints>(x.offset[kSums<Bits, Limbs> - 1] + at);
  for (int l = 0; l < Limbs - 1; ++l) {
    for (std::size_t r = 0; l > 0 && r < Rows; ++r) sum[r] <<= 8;
    dots(sum, l);
  }
  dots(last, Limbs - 1);
  for (std::size_t r = 0; r < Rows; ++r) {
    if constexpr (two_sums) {
      out[r] = convert<float, lanes>(sum[r] + load<Ints>(x.offset[0] + at)) * 256.0f + convert<float, lanes>(last[r]);
    } else {
      out[r] = convert<float, lanes>(Limbs == 1 ? last[r] : (sum[r] << 8) + last[r]);
    }
  }
}

// Codes in bytes of their own, as many steps as they count: those of two bits are doubled.
template <int Bits>
inline void split(Vec<std::uint8_t> packed, Vec<std::uint8_t> (&codes)[8 / Bits]) {
  constexpr int up = Bits == 2 ? 1 : 0;  // doubled
  constexpr std::uint8_t mask = static_cast<std::uint8_t>(((1 << Bits) - 1) << up);
  const Vec<std::uint16_t> pairs = bit_cast<Vec<std::uint16_t>>(packed);  // no set shifts bytes
  codes[0] = Bits == 8 ? packed : bit_cast<Vec<std::uint8_t>>(pairs << up) & mask;
  for (int p = 1; p < 8 / Bits; ++p) codes[p] = bit_cast<Vec<std::uint8_t>>(pairs >> (p * Bits - up)) & mask;
}

// ---- preparing x ---------------------------------------------------------------------------------------------

// Not a number where the block has no finite scale; that makes every result of the row NaN, and then it is computed
// in another way.
template <int Limbs>
inline float block_scale(float largest) {
  constexpr float nan = __builtin_nanf("");
  if constexpr (Limbs == 1) {
    const float scale = largest / 127.0f;
    return !(largest < __builtin_inff()) ? nan : scale > kSmallestNormal ? scale : kSmallestNormal;
  } else {
    // A power of two: what is exact in 24 bits stays so. A little is left free, as |n| <= 0x7f7f7f in three bytes.
    const std::uint32_t exponent = bit_cast<std::uint32_t>(largest * 1.0078125f) >> 23;
    if (exponent >= 255) return nan;
    return bit_cast<float>((exponent > 0 ? exponent : 1) << 23) * 0x1p-22f;
  }
}

// How many columns of x share a scale.
inline std::size_t block_columns(const Quantized& w) {
  return w.groups == 1 || w.group % (2 * kGrain) == 0 ? 2 * kGrain : kGrain;
}

using Grain = Vec<float>[kWordVectors];

inline void load_grain(const float* x, std::size_t left, Grain& to) {
  if (left >= kGrain) {
    std::memcpy(to, x, sizeof to);
  } else {
    std::memset(to, 0, sizeof to);
    std::memcpy(to, x, left * sizeof(float));
  }
}

// The scale of `n` columns of x, of which `left` exist.
template <int Limbs>
inline float scale_of_columns(const float* x, std::size_t n, std::size_t left) {
  using Ints = Vec<std::int32_t>;
  Ints largest = {};
  for (std::size_t at = 0; at < n; at += kGrain) {
    Grain v;
    load_grain(x + at, at < left ? left - at : 0, v);
    for (Vec<float> part : v) {
      const Ints bits = bit_cast<Ints>(part) & 0x7fffffff;  // ordered like the magnitudes, NaN last
      largest = bits > largest ? bits : largest;
    }
  }
  return block_scale<Limbs>(bit_cast<float>(fold(largest, [](auto a, auto b) { return a > b ? a : b; })));
}

// Rounds 16 columns of x, of which `left` exist; writes the bytes of n, each limb to its own row of `bytes`, and
// returns the sum of n.
template <int Limbs, std::size_t Columns>
inline std::int32_t round_grain(const float* x, std::size_t left, float scale, std::uint8_t (&bytes)[Limbs][Columns],
                                std::size_t at) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  Grain v;
  load_grain(x, left, v);
  const bool finite = scale == scale;  // otherwise the row goes another way, and these numbers are not looked at
  Ints total = {};
  for (std::size_t i = 0; i < kWordVectors; ++i) {
    const Ints n = finite ? round_to_int(v[i] / scale) : Ints{};
    total += n;
    // Each limb is signed, so what is above it is rounded.
    const Ints limbs[3] = {Limbs == 1 ? n : (n + 0x8080) >> 16, (n + 0x80) >> 8, n};
    for (int l = 0; l < Limbs; ++l) {
      store(bytes[l] + at + i * lanes, convert<std::uint8_t, lanes>(limbs[l]));
    }
  }
  return fold(total, [](auto a, auto b) { return a + b; });
}

// Minus what codes in the middle would give.
template <int Bits, int Limbs>
inline void set_offsets(Run<Bits, Limbs>& run) {
  using Ints = Vec<std::int32_t>;
  Vec<std::uint8_t> middle[8 / Bits];
  for (auto& part : middle) part = Vec<std::uint8_t>{} + kMiddle<Bits>;
  for (std::size_t i = 0; i < kWords; i += kLanes<float>) {
    Ints sum = {};
    for (int l = 0; l < Limbs; ++l) {
      const bool apart = kSums<Bits, Limbs> == 2 && l == 2;
      if (apart) store(run.offset[0] + i, -sum);
      sum = dot_words<Bits>(apart ? Ints{} : sum << 8, middle, run.limbs[l][0] + 4 * i);
    }
    store(run.offset[kSums<Bits, Limbs> - 1] + i, -sum);
  }
}

template <int Bits, int Limbs>
void prepare_x(const Quantized& w, const float* x, std::uint8_t* memory) {
  const Prepared<Bits, Limbs> to(w, memory);
  Run<Bits, Limbs>* run = to.runs;
  float* group_sum = to.group_sum;
  std::uint8_t* lane = to.lane[0];
  std::size_t word = 0, group = 0;
  for (std::size_t g = w.groups; g % kWords != 0; ++g) group_sum[g] = 0.0f;
  const std::size_t block = block_columns(w);
  std::size_t group_end = w.group;
  double sum_so_far = 0;
  float scale = 0.0f;

  for (std::size_t first = 0; first < w.cols; first += kRunColumns<Bits>, ++run) {
    std::uint8_t bytes[Limbs][kRunColumns<Bits>];
    for (std::size_t b = 0; b < kRunColumns<Bits>; b += kGrain) {
      const std::size_t at = first + b, left = at < w.cols ? w.cols - at : 0;
      if (at % block == 0) scale = scale_of_columns<Limbs>(x + at, block, left);
      const std::int32_t sum = round_grain<Limbs>(x + at, left, scale, bytes, b);
      constexpr std::size_t words = kGrain * Bits / 32;
      for (std::size_t i = 0; i < words; ++i) run->scale[b * Bits / 32 + i] = scale * kStep<Bits>;
      if (left == 0) continue;
      sum_so_far += static_cast<double>(sum) * static_cast<double>(scale);
      if (w.groups == 1) {
        std::memcpy(group_sum, &sum_so_far, sizeof sum_so_far);
      } else if (at + kGrain >= group_end || left <= kGrain) {
        *group_sum++ = static_cast<float>(sum_so_far);
        group_end += w.group;
        sum_so_far = 0;
      }
    }
    // Byte j of a run holds the codes of columns j * 8 / Bits and on: their first, second ... in 64 bytes each.
    using Word = typename Packing<Bits>::Word;
    constexpr std::size_t lanes = kLanes<Word>;
    for (int l = 0; l < Limbs; ++l) {
      for (std::size_t p = 0; p < 8 / Bits; ++p) {
        for (std::size_t j = 0; j < kRun; j += lanes) {
          const Vec<Word> words = load<Vec<Word>>(bytes[l] + j * sizeof(Word)) >> static_cast<Word>(8 * p);
          store(run->limbs[l][p] + j, convert<std::uint8_t, lanes>(words));
        }
      }
    }
    set_offsets(*run);
    for (std::size_t i = 0; i < kWords; ++i) {
      *lane++ = static_cast<std::uint8_t>(group);
      if (w.groups > 1 && ++word == w.group * Bits / 32) {
        word = 0;
        group = (group + 1) % kWords;
      }
    }
  }
}

// ---- rows of W -----------------------------------------------------------------------------------------------

// Asks for `Lines` of 64 bytes of codes that are wanted soon, in the order in which they lie in memory: an even trickle
// of requests for the outer cache, far ahead. (Rows that are read side by side are too many short streams for a core to
// foresee, a burst is dropped.)
template <std::size_t Lines>
inline void fetch_codes(const std::uint8_t* codes, std::size_t step) {
  for (std::size_t i = 0; i < Lines; ++i) __builtin_prefetch(codes + (step * Lines + i) * kRun, 0, 2);
}

// The same for sixteen parameters from `at` on.
inline void fetch_params(const Quantized& w, std::size_t at) {
  const std::size_t size = w.half ? 2 : 4;
  __builtin_prefetch(static_cast<const char*>(w.scale) + at * size, 0, 2);
  __builtin_prefetch(static_cast<const char*>(w.minimum) + at * size, 0, 2);
}

// Sixteen parameters from `at` on, of which `n` are of this row; zeros behind them.
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

// Rows `row`, row + 1 ... of W, up to `row_end`, by `Batch` rows of x: the 16 partial sums of each. Sixteen groups of
// a row come at a time: their scales stay in registers for the runs that they cover, and what they add beside their
// codes, the value in the middle times the sum of x, comes before these.
template <int Bits, int Limbs, std::size_t Rows, std::size_t Batch>
inline void partial_sums(const Quantized& w, const Prepared<Bits, Limbs> (&x)[Batch], std::size_t row,
                         std::size_t row_end, Vec<float> (*out)[Batch][kWordVectors]) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t runs = (w.row_bytes + kRun - 1) / kRun;
  const std::size_t group_runs = w.groups == 1 ? runs : w.group * Bits / 32;  // of sixteen groups
  std::size_t rows[Rows];  // the last one again where there are fewer
  const std::uint8_t* codes[Rows];
  repeat<Rows>([&](auto r) {
    rows[r.value] = row + r.value < row_end ? row + r.value : row_end - 1;
    codes[r.value] = w.codes + rows[r.value] * w.row_bytes;
  });
  const std::uint8_t* const next_codes = w.codes + (row + 2 * Rows) * w.row_bytes;
  // The last run may be short: what lies behind it meets zeros of x, but must exist.
  alignas(64) std::uint8_t copy[Rows][kRun];
  std::size_t end = runs;
  if (static_cast<std::size_t>(w.codes + w.rows * w.row_bytes - codes[Rows - 1]) < runs * kRun) {
    end = runs - 1;
    std::memset(copy, 0, sizeof copy);
    for (std::size_t r = 0; r < Rows; ++r) std::memcpy(copy[r], codes[r] + end * kRun, w.row_bytes - end * kRun);
  }

  // The scale of a row that is one group multiplies the sum.
  V sums[Rows][Batch][kWordVectors], scale[Rows][kWordVectors];
  const auto start = [&] {
    repeat<Rows>([&](auto r) {
      repeat<Batch>([&](auto b) {
        for (V& sum : sums[r.value][b.value]) sum = V{};
      });
    });
  };
  start();
  repeat<Rows>([&](auto r) {
    for (V& part : scale[r.value]) part = V{} + 1.0f;
  });
  std::size_t group_run = w.groups == 1 ? runs : 0, stretch_end = runs < kStretchRuns ? runs : kStretchRuns;
  for (std::size_t run = 0, group = 0; run < runs;) {
    if (run == group_run) {
      const std::size_t n = w.groups - group < kWords ? w.groups - group : kWords;
      const auto next_groups = [&](auto half) {
        repeat<Rows>([&](auto r) {
          const std::size_t at = rows[r.value] * w.param_stride + group;
          fetch_params(w, at + 2 * Rows * w.param_stride);
          V middle[kWordVectors];
          load_sixteen<half.value>(w.scale, at, n, scale[r.value]);
          load_sixteen<half.value>(w.minimum, at, n, middle);
          for (std::size_t i = 0; i < kWordVectors; ++i) {
            middle[i] += scale[r.value][i] * (kMiddle<Bits> * kStep<Bits>);
            repeat<Batch>([&](auto b) {
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
      for (std::size_t r = 0; r < Rows; ++r) codes[r] = copy[r] - run * kRun;
      end = runs;
    }
    std::size_t stop = stretch_end < end ? stretch_end : end;
    if (group_run < stop) stop = group_run;
    for (; run < stop; ++run) {
      fetch_codes<Rows>(next_codes, run);
      for (std::size_t i = 0; i < kWordVectors; ++i) {
        // The groups of a vector's words lie among as many in a row as it has lanes.
        const std::uint8_t* lane = x[0].lane[run] + i * lanes;
        const std::size_t first = lane[0] < kWords - lanes ? lane[0] : kWords - lanes;
        const Vec<std::int32_t> index =
            bit_cast<Vec<std::int32_t>>(load_bytes(lane)) - static_cast<std::int32_t>(first);
        Vec<std::uint8_t> parts[Rows][8 / Bits];
        for (std::size_t r = 0; r < Rows; ++r) {
          split<Bits>(kept(load<Vec<std::uint8_t>>(codes[r] + run * kRun + i * kVectorBytes)), parts[r]);
        }
        repeat<Batch>([&](auto b) {
          const Run<Bits, Limbs>& from = x[b.value].runs[run];
          V product[Rows];
          word_sums(parts, from, i * lanes, product);
          repeat<Rows>([&](auto r) {
            product[r.value] *= load<V>(from.scale + i * lanes);
            sums[r.value][b.value][i] +=
                product[r.value] * lookup(reinterpret_cast<const float*>(scale[r.value]) + first, index);
          });
        });
      }
    }
    if (run == stretch_end) {
      repeat<Rows>([&](auto r) {
        repeat<Batch>([&](auto b) {
          for (std::size_t i = 0; i < kWordVectors; ++i) {
            V& to = out[r.value][b.value][i];
            to = run <= kStretchRuns ? sums[r.value][b.value][i] : to + sums[r.value][b.value][i];
          }
        });
      });
      start();
      stretch_end = runs - run < kStretchRuns ? runs : run + kStretchRuns;
    }
  }
}

// For each of four rows its sixteen partial sums as a tree in double: the first step adds lanes 8 apart, the last
// neighbours.
template <std::size_t Batch>
inline Vec<double, 4> tree_sums(const Vec<float> (&partial)[4][Batch][kWordVectors], std::size_t b) {
  using Eight = Vec<double, 8>;
  Eight row[4];
  for (std::size_t r = 0; r < 4; ++r) {
    Vec<float, 8> half[2];
    std::memcpy(half, partial[r][b], sizeof half);
    row[r] = doubles(half[0]) + doubles(half[1]);
  }
  const auto fours = [](Eight v, Eight w) {
    return __builtin_shufflevector(v, w, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v, w, 4, 5, 6, 7, 12, 13, 14, 15);
  };
  const Eight ab = fours(row[0], row[1]), cd = fours(row[2], row[3]);
  const Eight pairs = __builtin_shufflevector(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) +
                      __builtin_shufflevector(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
  return __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6) + __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7);
}

// The product with a row that is one group; in double, as nothing averages its roundings out.
template <int Bits>
inline double one_group_product(const Quantized& w, std::size_t row, double sum, const float* group_sum) {
  double x_sum;
  std::memcpy(&x_sum, group_sum, sizeof x_sum);
  const double scale = static_cast<double>(param_at(w, w.scale, row * w.param_stride));
  const double minimum = static_cast<double>(param_at(w, w.minimum, row * w.param_stride));
  return sum * scale + (minimum + scale * static_cast<double>(kMiddle<Bits> * kStep<Bits>)) * x_sum;
}

// Rows [begin, end) of W by `Batch` rows of x, four at a time.
template <int Bits, int Limbs, std::size_t Batch>
[[gnu::noinline]] void linear_rows(const Quantized& weight, const Linear& io, std::size_t batch, std::size_t begin,
                                   std::size_t end) {
  const Quantized w = weight;  // no store can change it
  // As many rows as there are registers for.
  constexpr std::size_t tile = 4, at_once = Batch > 1 && (kVectorBytes < 64 || Bits == 2) ? 2 : 4;
  Prepared<Bits, Limbs> x[Batch];
  for (std::size_t b = 0; b < Batch; ++b) {
    x[b] = Prepared<Bits, Limbs>(w, const_cast<std::uint8_t*>(io.prepared) + (batch + b) * io.prepared_bytes);
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
        exact[r] = one_group_product<Bits>(w, row + r, exact[r], x[b].group_sum);
      }
      const Vec<float, 4> sums = convert<float, 4>(exact);
      float* y = io.y + (batch + b) * w.rows + row;
      const bool finite = fold_lanes<int, 4>(sums - sums == 0.0f, [](auto l, auto m) { return l & m; }) != 0;
      if (finite && exist == tile) {
        store(y, io.bias ? sums + load<Vec<float, 4>>(io.bias + row) : sums);
        continue;
      }
      for (std::size_t r = 0; r < exist; ++r) {
        y[r] = io.bias ? sums[r] + io.bias[row + r] : sums[r];
        // x or the sum is not finite, or beyond what whole numbers reach
        if (!(sums[r] - sums[r] == 0.0f)) linear_floats(weight, io, batch + b, 1, row + r, row + r + 1);
      }
    }
  }
}

// ---- many rows of x ------------------------------------------------------------------------------------------
// Sixteen rows of x side by side, one in each lane: four codes of a row of W are spread to all lanes. So the sum of a
// block is whole in its lane, and a scale is needed for each block only. Codes are unpacked once for several such
// panels. The order of sums is another than above: blocks in order within a group; their sum times its scale and, with
// its first block, what it adds beside its codes; groups in order within stretches of kPanelStretch columns, stretches
// in order.

constexpr std::size_t kPanelRows = 8, kPanelStretch = 1024;  // rows and columns of W unpacked at a time
constexpr std::size_t kPanels = 4;                           // panels of x that use them
constexpr std::size_t kMaxGroups = kPanelStretch / kGrain;
#if defined(__AVX512VNNI__)
constexpr int kUnrolled = 8;
#else
constexpr int kUnrolled = 1;  // a dot product is many instructions
#endif

// Sixteen rows of x, in the memory that the caller gave.
template <int Bits, int Limbs>
struct Panel {
  // For each block of columns: the bytes of n of every 4 columns, in the order of unpacked codes, limb by limb.
  std::int8_t* limbs;
  float* scale;          // [block][row], times the step in which codes count
  std::int32_t* offset;  // [block][sum][row], minus the sum of middle * n
  float* group_sum;      // [group][row]; or, where a row of W is one group, a double for each row
  std::size_t bytes;

  Panel(const Quantized& w, std::uint8_t* memory) {
    const std::size_t columns = (w.row_bytes + kRun - 1) / kRun * kRunColumns<Bits>;
    const std::size_t blocks = columns / block_columns(w);
    std::size_t at = 0;
    const auto take = [&](std::size_t size) {
      std::uint8_t* part = memory + at;
      at += size;
      return part;
    };
    limbs = reinterpret_cast<std::int8_t*>(take(columns * Limbs * kPanelWidth));
    scale = reinterpret_cast<float*>(take(blocks * sizeof(float) * kPanelWidth));
    offset = reinterpret_cast<std::int32_t*>(take(blocks * kSums<Bits, Limbs> * sizeof(std::int32_t) * kPanelWidth));
    group_sum = reinterpret_cast<float*>(take((w.groups == 1 ? 2 : w.groups) * sizeof(float) * kPanelWidth));
    bytes = at;
  }
};

// From `count` rows that were prepared one by one.
template <int Bits, int Limbs>
void prepare_panel(const Quantized& w, const std::uint8_t* rows, std::size_t row_bytes, std::size_t count,
                   std::uint8_t* memory) {
  constexpr std::size_t parts = 8 / Bits, sums = kSums<Bits, Limbs>;
  const Panel<Bits, Limbs> to(w, memory);
  if (count < kPanelWidth) std::memset(memory, 0, to.bytes);
  const std::size_t words = block_columns(w) * Bits / 32, runs = (w.row_bytes + kRun - 1) / kRun;
  for (std::size_t b = 0; b < count; ++b) {
    const Prepared<Bits, Limbs> from(w, const_cast<std::uint8_t*>(rows) + b * row_bytes);
    std::int8_t* limbs = to.limbs + 4 * b;
    std::size_t block = 0;
    for (std::size_t run = 0; run < runs; ++run) {
      const Run<Bits, Limbs>& x = from.runs[run];
      for (std::size_t first = 0; first < kWords; first += words, ++block) {
        to.scale[block * kPanelWidth + b] = x.scale[first];
        for (std::size_t s = 0; s < sums; ++s) {
          std::uint32_t offset = 0;  // modulo 2^32, as what it is added to
          for (std::size_t i = 0; i < words; ++i) offset += static_cast<std::uint32_t>(x.offset[s][first + i]);
          to.offset[(block * sums + s) * kPanelWidth + b] = static_cast<std::int32_t>(offset);
        }
        for (std::size_t p = 0; p < parts; ++p) {
          for (std::size_t i = first; i < first + words; ++i) {
            for (int l = 0; l < Limbs; ++l, limbs += 4 * kPanelWidth) std::memcpy(limbs, &x.limbs[l][p][4 * i], 4);
          }
        }
      }
    }
    if (w.groups == 1) {
      std::memcpy(to.group_sum + 2 * b, from.group_sum, sizeof(double));
    } else {
      for (std::size_t g = 0; g < w.groups; ++g) to.group_sum[g * kPanelWidth + b] = from.group_sum[g];
    }
  }
}

// A stretch of kPanelRows rows of W: codes of one byte each, in the order that split() gives, and of each group that
// has some of these columns its scale and the value in its middle. Blocks and groups count from the first ones of a
// row.
struct Unpacked {
  alignas(64) std::uint8_t codes[kPanelRows][kPanelStretch];
  alignas(64) float scale[kPanelRows][kMaxGroups], middle[kPanelRows][kMaxGroups];
  std::size_t block, block_end, group, group_end;
  std::size_t group_blocks;  // as many as a group has; 0 where a row is one, whose scale and middle are not of its sums
  std::size_t runs, row_bytes;
  const std::uint8_t* packed;  // codes of the first row, only whose first run is unpacked yet; null where all are
};

template <int Bits>
inline void unpack_run(const std::uint8_t* from, std::uint8_t* to) {
  for (std::size_t i = 0; i < kRun; i += kVectorBytes) {
    Vec<std::uint8_t> parts[8 / Bits];
    split<Bits>(load<Vec<std::uint8_t>>(from + i), parts);
    for (std::size_t p = 0; p < 8 / Bits; ++p) store(to + p * kRun + i, parts[p]);
  }
}

template <int Bits>
[[gnu::noinline]] void unpack_stretch(const Quantized& w, std::size_t row, std::size_t end, std::size_t begin,
                                      Unpacked* out) {
  const std::size_t block = block_columns(w), stop = w.cols - begin < kPanelStretch ? w.cols : begin + kPanelStretch;
  const bool one_group = w.groups == 1;
  out->block = begin / block;
  out->block_end = (stop + block - 1) / block;
  out->group = one_group ? 0 : begin / w.group;
  out->group_end = one_group ? 1 : (stop + w.group - 1) / w.group;
  out->group_blocks = one_group ? 0 : w.group / block;
  constexpr std::size_t bytes = kPanelStretch * Bits / 8;
  const std::size_t left = w.row_bytes - begin * Bits / 8, exist = left < bytes ? left : bytes;
  const std::uint8_t* const codes_end = w.codes + w.rows * w.row_bytes;
  out->runs = (exist + kRun - 1) / kRun;
  out->row_bytes = w.row_bytes;
  const std::uint8_t* const first = w.codes + row * w.row_bytes + begin * Bits / 8;
  const bool all_exist = static_cast<std::size_t>(codes_end - first) >= (kPanelRows - 1) * w.row_bytes + bytes;
  out->packed = kUnrolled > 1 && all_exist ? first : nullptr;
  const std::size_t runs = out->packed ? 1 : out->runs;
  for (std::size_t r = 0; r < kPanelRows; ++r) {
    const std::size_t from = row + r < end ? row + r : end - 1;  // the last one again where there are fewer
    const std::uint8_t* codes = w.codes + from * w.row_bytes + begin * Bits / 8;
    std::uint8_t copy[bytes];
    if (static_cast<std::size_t>(codes_end - codes) < bytes) {
      std::memset(copy, 0, sizeof copy);
      std::memcpy(copy, codes, exist);
      codes = copy;
    }
    for (std::size_t run = 0; run < runs; ++run) {
      unpack_run<Bits>(codes + run * kRun, out->codes[r] + run * kRunColumns<Bits>);
    }
    if (one_group) {
      out->scale[r][0] = 1.0f;
      out->middle[r][0] = 0.0f;
      continue;
    }
    const std::size_t param = from * w.param_stride + out->group, groups = out->group_end - out->group;
    fetch_params(w, param + kPanelRows * w.param_stride);
    for (std::size_t g = 0; g < groups; g += kWords) {
      const std::size_t n = groups - g < kWords ? groups - g : kWords;
      Vec<float> scale[kWordVectors], middle[kWordVectors];
      load_sixteen(w, w.scale, param + g, n, scale);
      load_sixteen(w, w.minimum, param + g, n, middle);
      for (std::size_t i = 0; i < kWordVectors; ++i) middle[i] += scale[i] * (kMiddle<Bits> * kStep<Bits>);
      std::memcpy(out->scale[r] + g, scale, sizeof scale);
      std::memcpy(out->middle[r] + g, middle, sizeof middle);
    }
  }
}

// Totals are double: a stretch more or less costs no accuracy.
inline void add_to(double* total, const float* sums) {
  constexpr std::size_t lanes = kVectorBytes / sizeof(double);
  for (std::size_t i = 0; i < kPanelWidth; i += lanes) {
    store(total + i, load<Vec<double>>(total + i) + convert<double, lanes>(load<Vec<float, lanes>>(sums + i)));
  }
}

// Adds a stretch of `Rows` rows by a panel of x to the totals. `Words`: 32-bit words of packed codes in a block. Codes
// that are still packed are unpacked by the way, a run ahead of the products, which leave the units for it idle.
template <int Bits, int Limbs, std::size_t Words, std::size_t Rows>
[[gnu::noinline]] void add_stretch(Unpacked& w, std::size_t first_row, const Panel<Bits, Limbs>& x,
                                   const std::uint8_t* next_codes, double (*total)[kPanelWidth]) {
  using V = Vec<float>;
  using Ints = Vec<std::int32_t>;
  using Words32 = Vec<std::uint32_t>;
  constexpr std::size_t lanes = kLanes<float>, parts = 8 / Bits, sums = kSums<Bits, Limbs>;
  constexpr std::size_t block_bytes = Words * parts * Limbs * 4 * kPanelWidth;
  const auto horner = [](Ints high, Ints low) {  // modulo 2^32
    return bit_cast<Ints>((bit_cast<Words32>(high) << 8) + bit_cast<Words32>(low));
  };
  alignas(64) float stretch[Rows][kPanelWidth];
  for (std::size_t i = 0; i < kPanelWidth; i += lanes) {
    V sum[Rows] = {};
    std::size_t block = w.block;
    for (std::size_t group = w.group; group < w.group_end; ++group) {
      const bool begins = w.group_blocks > 0 && block == group * w.group_blocks;
      const std::size_t end = group + 1 < w.group_end ? (group + 1) * w.group_blocks : w.block_end;
      V group_sum[Rows] = {};
      for (; block < end; ++block) {
        const std::size_t at = (block - w.block) * Words;
        const std::uint8_t* codes = w.codes[first_row] + at / kWords * kRunColumns<Bits> + at % kWords * 4;
        const std::int8_t* limbs = x.limbs + block * block_bytes + 4 * i;
        const Ints offset = load<Ints>(x.offset + block * sums * kPanelWidth + i);
        if (i == 0) fetch_codes<Bits / 2>(next_codes, block - w.block);
        if constexpr (kUnrolled > 1) {
          constexpr std::size_t rows = Words > 1 ? Words / 2 : 1;
          const std::size_t next = at / kWords + 1, first = at % kWords / Words * rows;
          if (w.packed && next < w.runs && first < kPanelRows) {
            for (std::size_t r = first; r < first + rows; ++r) {
              unpack_run<Bits>(w.packed + r * w.row_bytes + next * kRun, w.codes[r] + next * kRunColumns<Bits>);
            }
          }
        }
        Ints part[Limbs][Rows] = {};
#pragma GCC unroll 8
        for (std::size_t r = 0; r < Rows; ++r) part[Limbs - sums][r] = offset;
        if constexpr (sums == 2) {
          const Ints low = load<Ints>(x.offset + (block * sums + 1) * kPanelWidth + i);
#pragma GCC unroll 8
          for (std::size_t r = 0; r < Rows; ++r) part[2][r] = low;
        }
#pragma GCC unroll kUnrolled
        for (std::size_t p = 0; p < parts; ++p) {
#pragma GCC unroll kUnrolled
          for (std::size_t j = 0; j < Words; ++j, limbs += Limbs * 4 * kPanelWidth) {
#pragma GCC unroll 8
            for (std::size_t r = 0; r < Rows; ++r) {
              const Words32 four = Words32{} + load<std::uint32_t>(codes + r * kPanelStretch + p * kRun + 4 * j);
              for (int l = 0; l < Limbs; ++l) {
                part[l][r] = dot<Bits>(part[l][r], bit_cast<Vec<std::uint8_t>>(four), limbs + 4 * kPanelWidth * l);
              }
            }
          }
        }
        const V scale = load<V>(x.scale + block * kPanelWidth + i);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < Rows; ++r) {
          Ints whole = part[0][r];
          for (int l = 1; l < Limbs + 1 - static_cast<int>(sums); ++l) whole = horner(whole, part[l][r]);
          V product = convert<float, lanes>(whole);
          if constexpr (sums == 2) product = product * 256.0f + convert<float, lanes>(part[2][r]);
          group_sum[r] += product * scale;
        }
      }
      const V x_sum = begins ? load<V>(x.group_sum + group * kPanelWidth + i) : V{};
      const std::size_t g = group - w.group;
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r) {
        sum[r] += group_sum[r] * w.scale[first_row + r][g] + x_sum * w.middle[first_row + r][g];
      }
    }
    for (std::size_t r = 0; r < Rows; ++r) store(stretch[r] + i, sum[r]);
  }
  for (std::size_t r = 0; r < Rows; ++r) add_to(total[r], stretch[r]);
}

// Where a row of W is one group.
template <int Bits>
[[gnu::noinline]] void one_group_products(const Quantized& w, std::size_t row, std::size_t end, const float* group_sum,
                                          double (*total)[kPanelWidth]) {
  for (std::size_t r = 0; row + r < end; ++r) {
    for (std::size_t b = 0; b < kPanelWidth; ++b) {
      total[r][b] = one_group_product<Bits>(w, row + r, total[r][b], group_sum + 2 * b);
    }
  }
}

// The products of rows [row, end) of W with rows [first, last) of x.
[[gnu::noinline]] void store_panel(const Quantized& w, const Linear& io, std::size_t first, std::size_t last,
                                   std::size_t row, std::size_t end, const double (*total)[kPanelWidth]) {
  using Row = Vec<float, kPanelRows>;
  float sums[kPanelWidth][kPanelRows];
  for (std::size_t r = 0; r < kPanelRows; ++r) {
    for (std::size_t b = 0; b < kPanelWidth; ++b) sums[b][r] = static_cast<float>(total[r][b]);
  }
  for (std::size_t b = 0; first + b < last; ++b) {
    float* y = io.y + (first + b) * w.rows + row;
    const Row sum = load<Row>(sums[b]);
    const bool finite = fold_lanes<int, kPanelRows>(sum - sum == 0.0f, [](auto l, auto m) { return l & m; }) != 0;
    if (finite && end - row == kPanelRows) {
      store(y, io.bias ? sum + load<Row>(io.bias + row) : sum);
      continue;
    }
    for (std::size_t r = 0; row + r < end; ++r) {
      y[r] = io.bias ? sum[r] + io.bias[row + r] : sum[r];
      if (!(sum[r] - sum[r] == 0.0f)) linear_floats(w, io, first + b, 1, row + r, row + r + 1);
    }
  }
}

// Rows [row, end), kPanelRows at most, by `panels` panels of x, kPanels at most, of which `count` rows exist.
template <int Bits, int Limbs>
void linear_panels(const Quantized& w, const Linear& io, std::size_t batch, std::size_t panels, std::size_t count,
                   std::size_t row, std::size_t end) {
  constexpr std::size_t rows_at_once = kUnrolled > 1 ? 8 : 2;  // as many as there are registers for
  double total[kPanels][kPanelRows][kPanelWidth];
  std::memset(total, 0, panels * sizeof *total);
  const auto panel = [&](std::size_t p) {
    return Panel<Bits, Limbs>(w, const_cast<std::uint8_t*>(io.panels) + (batch / kPanelWidth + p) * io.panel_bytes);
  };
  const std::uint8_t* next_codes = w.codes + (row + kPanelRows) * w.row_bytes;
  for (std::size_t begin = 0; begin < w.cols; begin += kPanelStretch) {
    Unpacked unpacked;
    unpack_stretch<Bits>(w, row, end, begin, &unpacked);
    for (std::size_t p = 0; p < panels; ++p) {
      const Panel<Bits, Limbs> x = panel(p);
      for (std::size_t r = 0; r < kPanelRows && row + r < end; r += rows_at_once) {
        const auto add = [&](auto words) {
          add_stretch<Bits, Limbs, words.value, rows_at_once>(unpacked, r, x, next_codes, total[p] + r);
        };
        block_columns(w) == 2 * kGrain ? add(Int<2 * kGrain * Bits / 32>{}) : add(Int<kGrain * Bits / 32>{});
        if (p == 0) next_codes += (unpacked.block_end - unpacked.block) * (Bits / 2) * kRun;
      }
      unpacked.packed = nullptr;
    }
  }
  for (std::size_t p = 0; p < panels; ++p) {
    const std::size_t first = batch + p * kPanelWidth, left = batch + count - first;
    if (w.groups == 1) one_group_products<Bits>(w, row, end, panel(p).group_sum, total[p]);
    store_panel(w, io, first, first + (left < kPanelWidth ? left : kPanelWidth), row, end, total[p]);
  }
}

template <int Bits, int Limbs>
void linear_integers(const Quantized& w, const Linear& io, std::size_t begin, std::size_t end) {
  const std::size_t in_panels = panel_rows(io.batch);
  for (std::size_t b = 0; b < in_panels; b += kPanels * kPanelWidth) {
    const std::size_t count = in_panels - b < kPanels * kPanelWidth ? in_panels - b : kPanels * kPanelWidth;
    const std::size_t panels = (count + kPanelWidth - 1) / kPanelWidth;
    for (std::size_t row = begin; row < end; row += kPanelRows) {
      const std::size_t stop = end - row < kPanelRows ? end : row + kPanelRows;
      linear_panels<Bits, Limbs>(w, io, b, panels, count, row, stop);
    }
  }
  const std::size_t rows_in_cache = io.batch - in_panels <= 1 ? end : 16;
  for (std::size_t row = begin; row < end; row += rows_in_cache) {
    const std::size_t stop = end - row < rows_in_cache ? end : row + rows_in_cache;
    std::size_t b = in_panels;
#if !defined(__SSE2__) || defined(__AVX2__)  // too few registers
    for (; b + 4 <= io.batch; b += 4) linear_rows<Bits, Limbs, 4>(w, io, b, row, stop);
#endif
    for (; b < io.batch; ++b) linear_rows<Bits, Limbs, 1>(w, io, b, row, stop);
  }
}

// ---- the table's entries -------------------------------------------------------------------------------------

// A word of codes must not lie in two groups.
inline bool by_integers(const Quantized& w) { return w.groups == 1 || w.group % kGrain == 0; }

template <class Call>
inline auto by_bits_and_limbs(int bits, int limbs, Call call) {
  if (limbs == 1) {
    return bits == 8 ? call(Int<8>{}, Int<1>{}) : bits == 4 ? call(Int<4>{}, Int<1>{}) : call(Int<2>{}, Int<1>{});
  }
  return bits == 8 ? call(Int<8>{}, Int<3>{}) : bits == 4 ? call(Int<4>{}, Int<3>{}) : call(Int<2>{}, Int<3>{});
}

std::size_t prepared_bytes(const Quantized& w, int limbs) {
  if (!by_integers(w)) return 0;
  return by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) { return Prepared<b.value, l.value>(w, nullptr).bytes; });
}

void prepare_x_any(const Quantized& w, const float* x, int limbs, std::uint8_t* out) {
  by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) { prepare_x<b.value, l.value>(w, x, out); });
}

std::size_t panel_bytes(const Quantized& w, int limbs) {
  return by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) { return Panel<b.value, l.value>(w, nullptr).bytes; });
}

void prepare_panel_any(const Quantized& w, const std::uint8_t* rows, std::size_t row_bytes, std::size_t count,
                       int limbs, std::uint8_t* out) {
  by_bits_and_limbs(w.bits, limbs,
                    [&](auto b, auto l) { prepare_panel<b.value, l.value>(w, rows, row_bytes, count, out); });
}

void linear_quantized(const Quantized& w, const Linear& io, std::size_t begin, std::size_t end) {
  if (io.prepared_bytes == 0) {
    linear_floats(w, io, 0, io.batch, begin, end);
  } else {
    by_bits_and_limbs(w.bits, io.limbs, [&](auto b, auto l) { linear_integers<b.value, l.value>(w, io, begin, end); });
  }
}
