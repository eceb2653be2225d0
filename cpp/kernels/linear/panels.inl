// Products for many rows of x: a panel of 16 rows of x against 8 rows of W.
//
//                     panel of x: lane b is row b of x             totals
//                     | 0 | 1 | 2 | ... | 15 |                     | 0 | 1 | ... | 15 |
//   W row 0   word -> | broadcast to all lanes | dot product  ->   | row 0            |
//   W row 1   word -> | broadcast to all lanes | dot product  ->   | row 1            |
//   ...                                                              ...
//   W row 7   word -> | broadcast to all lanes | dot product  ->   | row 7            |
//
// Each lane has a row of x, and four codes of a row of W, unpacked to bytes, are broadcast to all lanes. So the sum of
// a span is whole in its lane, and needs a scale only once. Codes are unpacked once for kPanels panels.
//
// The order of sums differs from rows.inl. The sums of a group's spans are added from left to right, and multiplied by
// the scale of the group. The value in the middle of the group, times the sum of x, is added with its first span. The
// groups of a stretch are added from left to right in float, and stretches in double.

constexpr std::size_t kBand = 8;    // rows of W that are unpacked at a time, kPanelStretch columns of each
constexpr std::size_t kPanels = 4;  // panels of x that use them
constexpr std::size_t kMaxGroups = kPanelStretch / kGrain;
constexpr int kUnrolled = kOneInstructionDot ? 8 : 1;

// A panel of x, in memory of the caller.
template <int Bits, int Limbs, class Byte = const std::uint8_t>
struct Panel {
  Like<Byte, std::int8_t>* limbs;    // [span][part of a byte][word][limb][row]: 4 bytes of n, as codes are unpacked
  Like<Byte, float>* scale;          // [span][row], times the step in which codes count
  Like<Byte, std::int32_t>* offset;  // [span][sum][row], minus the sum of middle * n
  Like<Byte, float>* group_sum;      // [group][row]; or, where a row of W is one group, a double for each row
  std::size_t bytes;

  Panel(const Quantized& w, Byte* memory) {
    const std::size_t columns = runs_of<Bits>(w) * kRunColumns<Bits>;
    const std::size_t spans = columns / span_columns(w);
    std::size_t at = 0;
    const auto take = [&](std::size_t size) {
      Byte* part = memory + at;
      at += size;
      return part;
    };
    limbs = reinterpret_cast<decltype(limbs)>(take(columns * Limbs * kPanelWidth));
    scale = reinterpret_cast<decltype(scale)>(take(spans * sizeof(float) * kPanelWidth));
    offset = reinterpret_cast<decltype(offset)>(take(spans * kSums<Bits, Limbs> * sizeof(std::int32_t) * kPanelWidth));
    group_sum =
        reinterpret_cast<decltype(group_sum)>(take((w.groups == 1 ? 2 : w.groups) * sizeof(float) * kPanelWidth));
    bytes = at;
  }
};

// Interleaves `count` rows that were prepared one by one; lanes behind them are zero.
template <int Bits, int Limbs>
void prepare_panel(const Quantized& w, const std::uint8_t* rows, std::size_t row_bytes, std::size_t count,
                   std::uint8_t* memory) {
  constexpr std::size_t parts = kParts<Bits>, sums = kSums<Bits, Limbs>;
  const Panel<Bits, Limbs, std::uint8_t> to(w, memory);
  if (count < kPanelWidth) std::memset(memory, 0, to.bytes);
  const std::size_t words = span_columns(w) / kWordColumns<Bits>, runs = runs_of<Bits>(w);
  for (std::size_t b = 0; b < count; ++b) {
    const Prepared<Bits, Limbs> source(w, rows + b * row_bytes);
    std::int8_t* limbs = to.limbs + 4 * b;
    std::size_t span = 0;
    for (std::size_t run = 0; run < runs; ++run) {
      const Run<Bits, Limbs>& x = source.runs[run];
      for (std::size_t first = 0; first < kWords; first += words, ++span) {
        to.scale[span * kPanelWidth + b] = x.scale[first];
        for (std::size_t s = 0; s < sums; ++s) {
          std::uint32_t offset = 0;  // modulo 2^32, like the sums that it joins
          for (std::size_t i = 0; i < words; ++i) offset += static_cast<std::uint32_t>(x.offset[s][first + i]);
          to.offset[(span * sums + s) * kPanelWidth + b] = static_cast<std::int32_t>(offset);
        }
        for (std::size_t p = 0; p < parts; ++p) {
          for (std::size_t i = first; i < first + words; ++i) {
            for (int l = 0; l < Limbs; ++l, limbs += 4 * kPanelWidth) std::memcpy(limbs, &x.limbs[l][p][4 * i], 4);
          }
        }
      }
    }
    if (w.groups == 1) {
      std::memcpy(to.group_sum + 2 * b, source.group_sum, sizeof(double));
    } else {
      for (std::size_t g = 0; g < w.groups; ++g) to.group_sum[g * kPanelWidth + b] = source.group_sum[g];
    }
  }
}

// A stretch of kBand rows of W: codes of one byte each, in the order of split(), and the scale and the value in the
// middle of each group that has some of these columns. Spans and groups are counted from the beginning of a row.
struct Unpacked {
  alignas(64) std::uint8_t codes[kBand][kPanelStretch];
  alignas(64) float scale[kBand][kMaxGroups], middle[kBand][kMaxGroups];
  std::size_t span, span_end, group, group_end;
  std::size_t group_spans;  // spans of a group; 0 where a row is one group, whose parameters are applied at the end
  std::size_t runs, row_bytes;
  const std::uint8_t* packed;  // codes of the first row, if only the first run of each row is unpacked yet; or null
};

template <int Bits>
inline void unpack_run(const std::uint8_t* from, std::uint8_t* to) {
  for (std::size_t i = 0; i < kWordVectors; ++i) {
    Vec<std::uint8_t> parts[kParts<Bits>];
    split<Bits>(from, i, parts);
    for (std::size_t p = 0; p < kParts<Bits>; ++p) store(to + p * kPart + i * kVectorBytes, parts[p]);
  }
}

// Loads the scales of `groups` groups from parameter `at` on, and the values in their middles.
template <int Bits>
inline void load_groups(const Quantized& w, std::size_t at, std::size_t groups, float* scales, float* middles) {
  fetch_params(w, at + kBand * w.param_stride);
  for (std::size_t g = 0; g < groups; g += kWords) {
    const std::size_t n = groups - g < kWords ? groups - g : kWords;
    Vec<float> scale[kWordVectors], middle[kWordVectors];
    load_sixteen(w, w.scale, at + g, n, scale);
    load_sixteen(w, w.minimum, at + g, n, middle);
    for (std::size_t i = 0; i < kWordVectors; ++i) middle[i] += scale[i] * (kMiddle<Bits> * kStep<Bits>);
    std::memcpy(scales + g, scale, sizeof scale);
    std::memcpy(middles + g, middle, sizeof middle);
  }
}

// Unpacks the columns from `begin` on of rows [row, row + kBand) of W, which end at row `end`.
template <int Bits>
[[gnu::noinline]] void unpack_stretch(const Quantized& w, std::size_t row, std::size_t end, std::size_t begin,
                                      Unpacked* out) {
  const std::size_t span = span_columns(w), stop = w.cols - begin < kPanelStretch ? w.cols : begin + kPanelStretch;
  const bool one_group = w.groups == 1;
  out->span = begin / span;
  out->span_end = (stop + span - 1) / span;
  out->group = one_group ? 0 : begin / w.group;
  out->group_end = one_group ? 1 : (stop + w.group - 1) / w.group;
  out->group_spans = one_group ? 0 : w.group / span;
  constexpr std::size_t bytes = kPanelStretch * Bits / 8;
  const std::size_t left = w.row_bytes - begin * Bits / 8, exist = left < bytes ? left : bytes;
  const std::uint8_t* const codes_end = w.codes + w.rows * w.row_bytes;
  out->runs = (exist + kRunBytes<Bits> - 1) / kRunBytes<Bits>;
  out->row_bytes = w.row_bytes;
  const std::uint8_t* const first = w.codes + row * w.row_bytes + begin * Bits / 8;
  const bool all_exist = static_cast<std::size_t>(codes_end - first) >= (kBand - 1) * w.row_bytes + bytes;
  out->packed = kUnrolled > 1 && all_exist ? first : nullptr;
  const std::size_t runs = out->packed ? 1 : out->runs;
  for (std::size_t r = 0; r < kBand; ++r) {
    const std::size_t from = row + r < end ? row + r : end - 1;  // the last one again where there are fewer
    const std::uint8_t* codes = w.codes + from * w.row_bytes + begin * Bits / 8;
    std::uint8_t copy[bytes];
    if (static_cast<std::size_t>(codes_end - codes) < bytes) {
      std::memset(copy, 0, sizeof copy);
      std::memcpy(copy, codes, exist);
      codes = copy;
    }
    for (std::size_t run = 0; run < runs; ++run) {
      unpack_run<Bits>(codes + run * kRunBytes<Bits>, out->codes[r] + run * kRunColumns<Bits>);
    }
    if (one_group) {
      out->scale[r][0] = 1.0f;
      out->middle[r][0] = 0.0f;
      continue;
    }
    load_groups<Bits>(w, from * w.param_stride + out->group, out->group_end - out->group, out->scale[r],
                      out->middle[r]);
  }
}

// Totals are double, so adding many stretches loses no accuracy.
inline void add_to(double* total, const float* sums) {
  constexpr std::size_t lanes = kVectorBytes / sizeof(double);
  for (std::size_t i = 0; i < kPanelWidth; i += lanes) {
    store(total + i, load<Vec<double>>(total + i) + convert<double, lanes>(load<Vec<float, lanes>>(sums + i)));
  }
}

// The cache lines of codes that kBand rows have in a span of 32 columns.
template <int Bits>
constexpr std::size_t kSpanLines = (kBand * 2 * kGrain * Bits / 8 + 63) / 64;

// Adds a stretch of `Rows` rows by a panel of x to the totals. `Words`: words of codes in a span. Codes
// that are still packed are unpacked on the fly, one run ahead of the products, which leave those ports idle. The
// function is long because its sums must stay in registers across the loops.
template <int Bits, int Limbs, std::size_t Words, std::size_t Rows>
[[gnu::noinline]] void add_stretch(Unpacked& w, std::size_t first_row, const Panel<Bits, Limbs>& x,
                                   const std::uint8_t* next_codes, double (*total)[kPanelWidth]) {
  using V = Vec<float>;
  using Ints = Vec<std::int32_t>;
  using Words32 = Vec<std::uint32_t>;
  constexpr std::size_t lanes = kLanes<float>, parts = kParts<Bits>, sums = kSums<Bits, Limbs>;
  constexpr std::size_t span_bytes = Words * parts * Limbs * 4 * kPanelWidth;
  const auto horner = [](Ints high, Ints low) {  // modulo 2^32
    return bit_cast<Ints>((bit_cast<Words32>(high) << 8) + bit_cast<Words32>(low));
  };
  alignas(64) float stretch[Rows][kPanelWidth];
  for (std::size_t i = 0; i < kPanelWidth; i += lanes) {
    V sum[Rows] = {};
    std::size_t span = w.span;
    for (std::size_t group = w.group; group < w.group_end; ++group) {
      const bool begins = w.group_spans > 0 && span == group * w.group_spans;
      const std::size_t end = group + 1 < w.group_end ? (group + 1) * w.group_spans : w.span_end;
      V group_sum[Rows] = {};
      for (; span < end; ++span) {
        const std::size_t at = (span - w.span) * Words;
        const std::uint8_t* codes = w.codes[first_row] + at / kWords * kRunColumns<Bits> + at % kWords * 4;
        const std::int8_t* limbs = x.limbs + span * span_bytes + 4 * i;
        const Ints offset = load<Ints>(x.offset + span * sums * kPanelWidth + i);
        if (i == 0) fetch_codes<kSpanLines<Bits>>(next_codes, span - w.span);
        if constexpr (kUnrolled > 1) {
          constexpr std::size_t rows = Words > 1 ? Words / 2 : 1;
          const std::size_t next = at / kWords + 1, first = at % kWords / Words * rows;
          if (w.packed && next < w.runs && first < kBand) {
            for (std::size_t r = first; r < first + rows; ++r) {
              unpack_run<Bits>(w.packed + r * w.row_bytes + next * kRunBytes<Bits>,
                               w.codes[r] + next * kRunColumns<Bits>);
            }
          }
        }
        Ints part[Limbs][Rows] = {};
#pragma GCC unroll 8
        for (std::size_t r = 0; r < Rows; ++r) part[Limbs - sums][r] = offset;
        if constexpr (sums == 2) {
          const Ints low = load<Ints>(x.offset + (span * sums + 1) * kPanelWidth + i);
#pragma GCC unroll 8
          for (std::size_t r = 0; r < Rows; ++r) part[2][r] = low;
        }
        const auto add_words = [&](auto& to, auto add) {
#pragma GCC unroll kUnrolled
          for (std::size_t p = 0; p < parts; ++p) {
#pragma GCC unroll kUnrolled
            for (std::size_t j = 0; j < Words; ++j, limbs += Limbs * 4 * kPanelWidth) {
#pragma GCC unroll 8
              for (std::size_t r = 0; r < Rows; ++r) {
                const Words32 four = Words32{} + load<std::uint32_t>(codes + r * kPanelStretch + p * kPart + 4 * j);
                for (int l = 0; l < Limbs; ++l) {
                  to[l][r] = add(to[l][r], bit_cast<Vec<std::uint8_t>>(four),
                                 limbs + 4 * kPanelWidth * static_cast<std::size_t>(l));
                }
              }
            }
          }
        };
        if constexpr (kPairsFirst<Bits> && Bits < 5) {  // the pairs of a whole span stay below 2^15
          static_assert(Words * parts * 2 * (15 * 128) < 1 << 15);
          Pairs pairs[Limbs][Rows] = {};
          add_words(pairs,
                    [](Pairs old, Vec<std::uint8_t> four, const std::int8_t* n) { return old + byte_pairs(four, n); });
          for (int l = 0; l < Limbs; ++l) {
#pragma GCC unroll 8
            for (std::size_t r = 0; r < Rows; ++r) part[l][r] += sum_pairs(pairs[l][r]);
          }
        } else {
          add_words(part,
                    [](Ints old, Vec<std::uint8_t> four, const std::int8_t* n) { return dot<Bits>(old, four, n); });
        }
        const V scale = load<V>(x.scale + span * kPanelWidth + i);
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

// Turns totals into products where a row of W is one group: its scale and minimum are applied once, at the end.
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
  using Row = Vec<float, kBand>;
  float sums[kPanelWidth][kBand];
  for (std::size_t r = 0; r < kBand; ++r) {
    for (std::size_t b = 0; b < kPanelWidth; ++b) sums[b][r] = static_cast<float>(total[r][b]);
  }
  for (std::size_t b = 0; first + b < last; ++b) {
    float* y = io.y + (first + b) * w.rows + row;
    const Row sum = load<Row>(sums[b]);
    const bool finite = fold_lanes<int, kBand>(sum - sum == 0.0f, bitwise_and) != 0;
    if (finite && end - row == kBand) {
      store(y, io.bias ? sum + load<Row>(io.bias + row) : sum);
      continue;
    }
    for (std::size_t r = 0; row + r < end; ++r) {
      y[r] = io.bias ? sum[r] + io.bias[row + r] : sum[r];
      if (!(sum[r] - sum[r] == 0.0f)) linear_floats(w, io, first + b, 1, row + r, row + r + 1);
    }
  }
}

// Rows [row, end), kBand at most, by `panels` panels of x, kPanels at most, of which `count` rows exist.
template <int Bits, int Limbs>
void linear_panels(const Quantized& w, const Linear& io, std::size_t batch, std::size_t panels, std::size_t count,
                   std::size_t row, std::size_t end) {
  constexpr std::size_t rows_at_once = kUnrolled > 1 ? 8 : 2;  // fill the registers
  double total[kPanels][kBand][kPanelWidth];
  std::memset(total, 0, panels * sizeof *total);
  const auto panel = [&](std::size_t p) {
    return Panel<Bits, Limbs>(w, io.panels + (batch / kPanelWidth + p) * io.panel_bytes);
  };
  const std::uint8_t* next_codes = w.codes + (row + kBand) * w.row_bytes;
  for (std::size_t begin = 0; begin < w.cols; begin += kPanelStretch) {
    Unpacked unpacked;
    unpack_stretch<Bits>(w, row, end, begin, &unpacked);
    for (std::size_t p = 0; p < panels; ++p) {
      const Panel<Bits, Limbs> x = panel(p);
      for (std::size_t r = 0; r < kBand && row + r < end; r += rows_at_once) {
        const auto add = [&](auto words) {
          add_stretch<Bits, Limbs, words.value, rows_at_once>(unpacked, r, x, next_codes, total[p] + r);
        };
        constexpr int words = kGrain / kWordColumns<Bits>;
        span_columns(w) == 2 * kGrain ? add(Int<2 * words>{}) : add(Int<words>{});
        if (p == 0) next_codes += (unpacked.span_end - unpacked.span) * kSpanLines<Bits> * 64;
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
