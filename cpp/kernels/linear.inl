// y = x @ W.T straight from packed weights.
//
// x is rounded to whole numbers first, x ~ scale * n, with a scale for every block of 16 columns; n has 24 bits, which
// is as exact as float32, or 8. Sums of code * n are then exact and do not depend on their order. What is left of the
// arithmetic is float32 in an order that no instruction set changes: a row of codes is read in runs of 64 bytes, that
// is 16 words of 32 bits, and word l of every run goes to partial sum l. So W's codes are used where and as they lie:
// instead, the few numbers of x are put into the order in which the codes come out of their bytes, once a call.

constexpr std::size_t kRun = 64, kWords = 16;  // bytes of codes in a run, and its 32-bit words
constexpr std::size_t kBlockColumns = 16;
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

void linear_floats(const Quantized& w, const Linear& io, std::size_t batch, std::size_t count, std::size_t begin,
                   std::size_t end) {
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
  std::size_t bytes;

  Prepared() = default;
  Prepared(const Quantized& w, std::uint8_t* memory) {
    const std::size_t count = (w.row_bytes + kRun - 1) / kRun;
    runs = reinterpret_cast<Run<Bits, Limbs>*>(memory);
    group_sum = reinterpret_cast<float*>(memory + count * sizeof *runs);
    bytes = count * sizeof *runs + (w.groups + kWords - 1) / kWords * kWords * sizeof(float);
  }
};

// ---- the sums of a word --------------------------------------------------------------------------------------

// For words [at, at + lanes) of a run, the sum of (code - middle) * n over the columns of each, exact but for one
// rounding to float32.
template <int Bits, int Limbs>
inline Vec<float> word_sums(const Vec<std::uint8_t> (&codes)[8 / Bits], const Run<Bits, Limbs>& x, std::size_t at) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  const Ints offset = load<Ints>(x.offset[0] + at);
  if constexpr (Limbs == 1 && Bits != 2) {
    return convert<float, lanes>(dot_words<Bits>(offset, codes, x.limbs[0][0] + 4 * at));
  } else {
    Ints sum = dot_words<Bits>(Ints{}, codes, x.limbs[0][0] + 4 * at);
    if constexpr (Limbs == 3) sum = dot_words<Bits>(sum << 8, codes, x.limbs[1][0] + 4 * at);
    if constexpr (kSums<Bits, Limbs> == 2) {
      const Ints low = dot_words<Bits>(load<Ints>(x.offset[1] + at), codes, x.limbs[2][0] + 4 * at);
      return convert<float, lanes>(sum + offset) * 256.0f + convert<float, lanes>(low);
    }
    if constexpr (Limbs == 3 && kSums<Bits, Limbs> == 1) {
      sum = dot_words<Bits>(sum << 8, codes, x.limbs[2][0] + 4 * at);
    }
    if constexpr (Bits == 2) sum += sum;
    return convert<float, lanes>(sum + offset);
  }
}

template <int Bits>
inline void split(Vec<std::uint8_t> packed, Vec<std::uint8_t> (&codes)[8 / Bits]) {
  constexpr std::uint8_t mask = static_cast<std::uint8_t>((1 << Bits) - 1);
  for (int p = 0; p < 8 / Bits; ++p) codes[p] = packed >> static_cast<std::uint8_t>(p * Bits) & mask;
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

// Rounds 16 columns of x, of which `left` exist; writes the bytes of n, each limb to its own row of `bytes`.
template <int Limbs, std::size_t Columns>
inline void round_block(const float* x, std::size_t left, std::uint8_t (&bytes)[Limbs][Columns], std::size_t at,
                        float* scale, std::int32_t* sum) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  Vec<float> v[kWordVectors] = {};
  if (left >= kBlockColumns) {
    std::memcpy(v, x, sizeof v);
  } else {
    std::memcpy(v, x, left * sizeof(float));
  }
  Ints largest = {};
  for (Vec<float> part : v) {
    const Ints bits = bit_cast<Ints>(part) & 0x7fffffff;  // ordered like the magnitudes, NaN last
    largest = bits > largest ? bits : largest;
  }
  *scale = block_scale<Limbs>(bit_cast<float>(fold(largest, [](auto a, auto b) { return a > b ? a : b; })));
  const bool finite = *scale == *scale;  // otherwise the row goes another way, and these numbers are not looked at
  Ints total = {};
  for (std::size_t i = 0; i < kWordVectors; ++i) {
    const Ints n = finite ? round_to_int(v[i] / *scale) : Ints{};
    total += n;
    // Each limb is signed, so what is above it is rounded.
    const Ints limbs[3] = {Limbs == 1 ? n : (n + 0x8080) >> 16, (n + 0x80) >> 8, n};
    for (int l = 0; l < Limbs; ++l) store(bytes[l] + at + i * lanes, convert<std::uint8_t, lanes>(limbs[l]));
  }
  *sum = fold(total, [](auto a, auto b) { return a + b; });
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
  for (std::size_t g = w.groups; g % kWords != 0; ++g) group_sum[g] = 0.0f;
  std::size_t group_end = w.group;
  double sum_so_far = 0;

  for (std::size_t first = 0; first < w.cols; first += kRunColumns<Bits>, ++run) {
    std::uint8_t bytes[Limbs][kRunColumns<Bits>];
    for (std::size_t b = 0; b < kRunColumns<Bits>; b += kBlockColumns) {
      const std::size_t at = first + b, left = at < w.cols ? w.cols - at : 0;
      float scale;
      std::int32_t sum;
      round_block<Limbs>(x + at, left, bytes, b, &scale, &sum);
      constexpr std::size_t words = kBlockColumns * Bits / 32;
      for (std::size_t i = 0; i < words; ++i) run->scale[b * Bits / 32 + i] = scale * kStep<Bits>;
      if (left == 0) continue;
      sum_so_far += static_cast<double>(sum) * static_cast<double>(scale);
      if (w.groups == 1) {
        std::memcpy(group_sum, &sum_so_far, sizeof sum_so_far);
      } else if (at + kBlockColumns >= group_end || left <= kBlockColumns) {
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
  }
}

// ---- rows of W -----------------------------------------------------------------------------------------------

// Parameters [at, at + n) as float32, filled up with zeros to 16.
inline void load_params(const Quantized& q, const void* params, std::size_t at, std::size_t n,
                        Vec<float> (&out)[kWordVectors]) {
  constexpr std::size_t lanes = kLanes<float>;
  if (at + kWords > (q.param_stride ? q.rows * q.groups : q.groups)) {  // the last ones in memory
    float part[kWords] = {};
    for (std::size_t i = 0; i < n; ++i) part[i] = param_at(q, params, at + i);
    std::memcpy(out, part, sizeof part);
    return;
  }
  for (std::size_t i = 0; i < kWordVectors; ++i) {
    out[i] = q.half ? float_of_halves(static_cast<const std::uint16_t*>(params) + at + i * lanes)
                    : load<Vec<float>>(static_cast<const float*>(params) + at + i * lanes);
  }
  if (n < kWords) {
    for (std::size_t i = 0; i < kWordVectors; ++i) {
      out[i] =
          lane_numbers() + static_cast<std::int32_t>(i * lanes) < static_cast<std::int32_t>(n) ? out[i] : Vec<float>{};
    }
  }
}

// The scales of a stretch of a row: of word i it is at[i >> shift]. Sixteen may be read from any of them.
constexpr std::size_t kStretchWords = kStretchRuns * kWords;
struct Scales {
  float at[kStretchWords + 2 * kWords];
};

// As many words as a group has, if that is a power of two, share a scale; else each has its own.
inline int scale_shift(std::size_t group_words) {
  return (group_words & (group_words - 1)) == 0 ? __builtin_ctzll(group_words) : 0;
}

inline void load_scales(const Quantized& q, std::size_t row, std::size_t group_words, std::size_t first,
                        std::size_t words, Scales* out) {
  const std::size_t end = (first + words - 1) / group_words + 1;
  Scales groups;
  const bool shared = (group_words & (group_words - 1)) == 0;
  float* to = shared ? out->at : groups.at;
  for (std::size_t g = first / group_words; g < end; g += kWords, to += kWords) {
    const std::size_t left = g < q.groups ? q.groups - g : 0;
    Vec<float> v[kWordVectors];
    load_params(q, q.scale, row * q.param_stride + g, left < kWords ? left : kWords, v);
    std::memcpy(to, v, sizeof v);
  }
  if (shared) return;
  to = out->at;
  std::size_t count = group_words - first % group_words;
  for (const float* scale = groups.at; words > 0; ++scale, count = group_words) {
    if (count > words) count = words;
    for (std::size_t i = 0; i < count; ++i) *to++ = *scale;
    words -= count;
  }
}

// Adds `runs` runs of `Rows` rows by `Batch` rows of x to the partial sums. Kept apart so that its loop has all
// registers.
template <int Bits, int Limbs, std::size_t Rows, std::size_t Batch>
[[gnu::noinline]] void add_runs(const std::uint8_t* codes, std::size_t row_bytes, const Scales* scales, int shift,
                                const Run<Bits, Limbs>* const (&x)[Batch], std::size_t runs,
                                Vec<float> (&total)[Rows][Batch][kWordVectors]) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  const Vec<std::int32_t> index = lane_numbers() >> (shift < 4 ? shift : 4);
  V sums[Rows][Batch][kWordVectors] = {};
  for (std::size_t run = 0; run < runs; ++run) {
    for (std::size_t r = 0; r < Rows; ++r) __builtin_prefetch(codes + (Rows + r) * row_bytes);
    for (std::size_t i = 0; i < kWordVectors; ++i) {
      const std::size_t group = (run * kWords + i * lanes) >> shift;
      for (std::size_t r = 0; r < Rows; ++r) {
        Vec<std::uint8_t> parts[8 / Bits];
        split<Bits>(load<Vec<std::uint8_t>>(codes + r * row_bytes + i * kVectorBytes), parts);
        const V scale = lookup(scales[r].at + group, index);
        for (std::size_t b = 0; b < Batch; ++b) {
          const Run<Bits, Limbs>& from = x[b][run];
          sums[r][b][i] += word_sums(parts, from, i * lanes) * load<V>(from.scale + i * lanes) * scale;
        }
      }
    }
    codes += kRun;
  }
  for (std::size_t r = 0; r < Rows; ++r) {
    for (std::size_t b = 0; b < Batch; ++b) {
      for (std::size_t i = 0; i < kWordVectors; ++i) total[r][b][i] += sums[r][b][i];
    }
  }
}

// Rows [row, row + Rows) by `Batch` rows of x: the 16 partial sums of each.
template <int Bits, int Limbs, std::size_t Rows, std::size_t Batch>
inline void partial_sums(const Quantized& w, const Prepared<Bits, Limbs> (&x)[Batch], std::size_t row,
                         Vec<float> (&total)[Rows][Batch][kWordVectors]) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t runs = (w.row_bytes + kRun - 1) / kRun;
  const std::uint8_t* codes = w.codes + row * w.row_bytes;
  const std::uint8_t* const codes_end = w.codes + w.rows * w.row_bytes;
  std::memset(total, 0, sizeof total);
  const bool one_group = w.groups == 1;  // its scale multiplies the sum
  const std::size_t group_words = w.group * Bits / 32;
  const int shift = one_group ? 63 : scale_shift(group_words);

  for (std::size_t begin = 0; begin < runs; begin += kStretchRuns, codes += kStretchRuns * kRun) {
    const std::size_t count = runs - begin < kStretchRuns ? runs - begin : kStretchRuns;
    Scales scales[Rows];
    for (std::size_t r = 0; r < Rows; ++r) {
      if (one_group) {
        for (std::size_t i = 0; i < kWords; ++i) scales[r].at[i] = 1.0f;
      } else {
        load_scales(w, row + r, group_words, begin * kWords, count * kWords, &scales[r]);
      }
    }
    const Run<Bits, Limbs>* from[Batch];
    for (std::size_t b = 0; b < Batch; ++b) from[b] = x[b].runs + begin;
    const std::size_t wanted = (Rows - 1) * w.row_bytes + count * kRun;
    if (static_cast<std::size_t>(codes_end - codes) >= wanted) {
      add_runs<Bits, Limbs, Rows, Batch>(codes, w.row_bytes, scales, shift, from, count, total);
    } else {  // the last run is short: what lies behind it meets zeros of x, but must exist
      std::uint8_t copy[Rows][kStretchRuns * kRun];
      const std::size_t bytes = w.row_bytes - begin * kRun;
      for (std::size_t r = 0; r < Rows; ++r) {
        std::memset(copy[r], 0, sizeof copy[r]);
        std::memcpy(copy[r], codes + r * w.row_bytes, bytes < sizeof copy[r] ? bytes : sizeof copy[r]);
      }
      add_runs<Bits, Limbs, Rows, Batch>(copy[0], sizeof copy[0], scales, shift, from, count, total);
    }
  }
  if (one_group) return;

  // What groups add beside their codes: the value in the middle times the sum of x.
  V rest[Rows][Batch][kWordVectors] = {};
  for (std::size_t g = 0; g < w.groups; g += kWords) {
    const std::size_t n = w.groups - g < kWords ? w.groups - g : kWords;
    for (std::size_t r = 0; r < Rows; ++r) {
      V scale[kWordVectors], minimum[kWordVectors];
      load_params(w, w.scale, (row + r) * w.param_stride + g, n, scale);
      load_params(w, w.minimum, (row + r) * w.param_stride + g, n, minimum);
      for (std::size_t i = 0; i < kWordVectors; ++i) {
        const V middle = minimum[i] + scale[i] * (kMiddle<Bits> * kStep<Bits>);
        for (std::size_t b = 0; b < Batch; ++b) rest[r][b][i] += middle * load<V>(x[b].group_sum + g + i * lanes);
      }
    }
  }
  for (std::size_t r = 0; r < Rows; ++r) {
    for (std::size_t b = 0; b < Batch; ++b) {
      for (std::size_t i = 0; i < kWordVectors; ++i) total[r][b][i] += rest[r][b][i];
    }
  }
}

// Sixteen partial sums as a tree in double: the first step adds lanes 8 apart, the last neighbours.
inline double tree_sum(const Vec<float> (&partial)[kWordVectors]) {
  Vec<float, 8> halves[2];
  std::memcpy(halves, partial, sizeof halves);
  return fold(convert<double, 8>(halves[0]) + convert<double, 8>(halves[1]), [](auto a, auto b) { return a + b; });
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

template <int Bits, int Limbs, std::size_t Rows, std::size_t Batch>
inline void linear_tile(const Quantized& w, const Linear& io, std::size_t row, std::size_t batch) {
  Prepared<Bits, Limbs> x[Batch];
  for (std::size_t b = 0; b < Batch; ++b) {
    x[b] = Prepared<Bits, Limbs>(w, const_cast<std::uint8_t*>(io.prepared) + (batch + b) * io.prepared_bytes);
  }
  Vec<float> partial[Rows][Batch][kWordVectors];
  partial_sums(w, x, row, partial);
  for (std::size_t r = 0; r < Rows; ++r) {
    for (std::size_t b = 0; b < Batch; ++b) {
      double exact = tree_sum(partial[r][b]);
      if (w.groups == 1) exact = one_group_product<Bits>(w, row + r, exact, x[b].group_sum);
      const float sum = static_cast<float>(exact);
      if (sum - sum == 0.0f) {
        io.y[(batch + b) * w.rows + row + r] = io.bias ? sum + io.bias[row + r] : sum;
      } else {  // x or the sum is not finite, or beyond what whole numbers reach
        linear_floats(w, io, batch + b, 1, row + r, row + r + 1);
      }
    }
  }
}

template <int Bits, int Limbs, std::size_t Rows, std::size_t Batch>
void linear_rows(const Quantized& w, const Linear& io, std::size_t batch, std::size_t begin, std::size_t end) {
  std::size_t row = begin;
  for (; row + Rows <= end; row += Rows) linear_tile<Bits, Limbs, Rows, Batch>(w, io, row, batch);
  for (; row < end; ++row) linear_tile<Bits, Limbs, 1, Batch>(w, io, row, batch);
}

template <int Bits, int Limbs>
void linear_integers(const Quantized& w, const Linear& io, std::size_t begin, std::size_t end) {
  constexpr std::size_t rows_in_cache = 16;
  constexpr std::size_t rows = kVectorBytes == 64 ? 4 : 2;  // as many as there are registers for
  for (std::size_t row = begin; row < end; row += rows_in_cache) {
    const std::size_t stop = end - row < rows_in_cache ? end : row + rows_in_cache;
    std::size_t b = 0;
    for (; b + 4 <= io.batch; b += 4) linear_rows<Bits, Limbs, rows, 4>(w, io, b, row, stop);
    for (; b < io.batch; ++b) linear_rows<Bits, Limbs, rows, 1>(w, io, b, row, stop);
  }
}

// ---- the table's entries -------------------------------------------------------------------------------------

// A word of codes must not lie in two groups.
inline bool by_integers(const Quantized& w) { return w.groups == 1 || w.group % kBlockColumns == 0; }

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

void linear_quantized(const Quantized& w, const Linear& io, std::size_t begin, std::size_t end) {
  if (io.prepared_bytes == 0) {
    linear_floats(w, io, 0, io.batch, begin, end);
  } else {
    by_bits_and_limbs(w.bits, io.limbs, [&](auto b, auto l) { linear_integers<b.value, l.value>(w, io, begin, end); });
  }
}
