// Products for many rows of x: a panel of 16 rows of x against a band of 16 or 32 rows of W.
//
//                        band of W: lane r is row r of W               totals
//                        | 0 | 1 | 2 | ... | 15 |                      | 0 | 1 | ... | 15 |
//   row 0 of x   word -> | broadcast to all lanes | dot product   ->   | row 0 of y       |
//   row 1 of x   word -> | broadcast to all lanes | dot product   ->   | row 1 of y       |
//   ...                                                                ...
//
// Codes are unpacked to bytes and transposed: each lane has four codes of a row of W. They are multiplied with four
// numbers of a row of x, which are broadcast to all lanes. So the sum of a span is whole in its lane and needs a scale
// only once. Codes are unpacked once for kPanels panels.
//
// The order of sums differs from rows.inl. The sums of a group's spans are added from left to right, and multiplied by
// the scale of the group. The value in the middle of the group, times the sum of x, is added with its first span. The
// groups of a stretch are added from left to right in float, and stretches in double.

// Rows of W that are unpacked at a time, kPanelStretch columns of each: two vectors, or more.
constexpr std::size_t kBand = kVectorBytes == 64 ? 2 * kWords : kWords;
constexpr std::size_t kPanels = 8;  // panels of x that use them
constexpr std::size_t kMaxGroups = kPanelStretch / kGrain;

// A slice is kSliceRows rows of a panel. Its sums with kSliceVectors vectors of rows of W fill the registers: a load of
// codes, or of x, must serve several dot products, as there are no more loads than these in a cycle.
constexpr std::size_t kSliceRows = 4, kSliceVectors = 2;
constexpr int kUnrolled = kOneInstructionDot ? 8 : 1;

// Numbers of x are multiplied as bytes, four columns in a lane of 32 bits; or as 16 bits, two columns in a lane, where
// kWide. Their bytes then make planes: the upper two limbs are one plane, the lowest one is another.
template <int Bits>
constexpr std::size_t kHalves = kWide<Bits> ? 2 : 1;  // lanes for the columns of four bytes
template <int Bits, int Limbs>
constexpr std::size_t kPlanes = kWide<Bits> ? (Limbs + 1) / 2 : Limbs;

// A width whose unpacked codes are multiplied in the same way: one function multiplies all of them.
template <int Bits>
constexpr int kAlike = Bits == 8  ? 8
                       : Bits > 4 ? 6
                                  : 4;

// Lanes of 32 bits for the columns of a span.
template <int Bits>
constexpr std::size_t span_lanes(std::size_t columns) {
  return columns / 4 * kHalves<Bits>;
}

// A panel of x, in memory of the caller.
template <int Bits, int Limbs, class Byte = const std::uint8_t>
struct Panel {
  // [slice][span][part of a byte][word][half][plane][row]: 4 bytes of n, in the order of the codes
  Like<Byte, std::int8_t>* limbs;
  Like<Byte, float>* scale;          // [span][row], times the step in which codes count
  Like<Byte, std::int32_t>* offset;  // [span][sum][row], minus the sum of middle * n
  Like<Byte, float>* group_sum;      // [group][row]; or, where a row of W is one group, a double for each row
  std::size_t slice_bytes, bytes;

  Panel(const Quantized& w, Byte* memory) {
    const std::size_t columns = run_columns(w), spans = columns / span_columns(w);
    std::size_t at = 0;
    const auto take = [&](std::size_t size) {
      Byte* part = memory + at;
      at += size;
      return part;
    };
    slice_bytes = columns * kHalves<Bits> * kPlanes<Bits, Limbs> * kSliceRows;
    limbs = reinterpret_cast<decltype(limbs)>(take(slice_bytes * kPanelWidth / kSliceRows));
    scale = reinterpret_cast<decltype(scale)>(take(spans * sizeof(float) * kPanelWidth));
    offset = reinterpret_cast<decltype(offset)>(take(spans * kSums<Bits, Limbs> * sizeof(std::int32_t) * kPanelWidth));
    group_sum =
        reinterpret_cast<decltype(group_sum)>(take((w.groups == 1 ? 2 : w.groups) * sizeof(float) * kPanelWidth));
    bytes = at;
  }
};

// Sixteen words of sixteen rows: words[w][i] has word w of the rows in vector i. One function for all widths, since it
// is long.
[[gnu::noinline]] void load_transposed(const std::uint8_t* const (&rows)[kWords],
                                       Vec<std::uint32_t> (&words)[kWords][kWordVectors]) {
  constexpr std::size_t lanes = kLanes<float>;
  for (std::size_t i = 0; i < kWordVectors; ++i) {
    for (std::size_t j = 0; j < kWordVectors; ++j) {
      Vec<std::uint32_t> square[lanes];
#pragma GCC unroll 16
      for (std::size_t r = 0; r < lanes; ++r) {
        square[r] = load<Vec<std::uint32_t>>(rows[i * lanes + r] + j * kVectorBytes);
      }
      transpose(square);
#pragma GCC unroll 16
      for (std::size_t w = 0; w < lanes; ++w) words[j * lanes + w][i] = square[w];
    }
  }
}

// The bytes of lanes with even numbers, or with odd ones, as 16 bits.
template <bool Signed>
inline Pairs half_of(Vec<std::uint32_t> bytes, std::size_t odd) {
  if constexpr (Signed) return (odd ? bit_cast<Pairs>(bytes) : bit_cast<Pairs>(bytes) << 8) >> 8;
  const auto pairs = bit_cast<Vec<std::uint16_t>>(bytes);
  return bit_cast<Pairs>(odd ? pairs >> 8 : pairs & std::uint16_t{0xff});
}

// Where a prepared row of x has what, for functions that read those of all widths.
struct RowLayout {
  std::size_t runs, run_bytes, parts, scale, offset, span_words;
};
template <int Bits, int Limbs>
RowLayout layout_of(const Quantized& w) {
  using R = Run<Bits, Limbs>;
  const std::size_t span_words = span_columns(w) / kWordColumns<Bits>;
  return {runs_of<Bits>(w), sizeof(R), kParts<Bits>, offsetof(R, scale), offsetof(R, offset), span_words};
}

// Interleaves scales, sums of groups, and offsets, `sums` of each span.
[[gnu::noinline]] void interleave_params(const Quantized& w, const RowLayout& from, const std::uint8_t* rows,
                                         std::size_t row_bytes, std::size_t count, std::size_t sums, float* scale,
                                         std::int32_t* offset, float* group_sum) {
  const auto interleave = [&](auto span_words) {
    constexpr std::size_t words = span_words.value;
    for (std::size_t b = 0; b < count; ++b) {
      const std::uint8_t* run = rows + b * row_bytes;
      float* to_scale = scale + b;
      std::int32_t* to_offset = sums > 0 ? offset + b : nullptr;
      for (std::size_t r = 0; r < from.runs; ++r, run += from.run_bytes) {
        for (std::size_t first = 0; first < kWords; first += words) {
          *to_scale = load<float>(run + from.scale + first * sizeof(float));
          to_scale += kPanelWidth;
          for (std::size_t s = 0; s < sums; ++s) {
            std::uint32_t sum = 0;  // modulo 2^32, like the sums that it joins
            for (std::size_t i = 0; i < words; ++i) {
              sum += load<std::uint32_t>(run + from.offset + (s * kWords + first + i) * sizeof sum);
            }
            *to_offset = static_cast<std::int32_t>(sum);
            to_offset += kPanelWidth;
          }
        }
      }
      if (w.groups == 1) {
        std::memcpy(group_sum + 2 * b, run, sizeof(double));
      } else {
        for (std::size_t g = 0; g < w.groups; ++g) {
          group_sum[g * kPanelWidth + b] = load<float>(run + g * sizeof(float));
        }
      }
    }
  };
  const std::size_t words = from.span_words;
  words == 8   ? interleave(Int<8>{})
  : words == 4 ? interleave(Int<4>{})
  : words == 2 ? interleave(Int<2>{})
               : interleave(Int<1>{});
}

// Interleaves `count` rows that were prepared one by one; lanes behind them are zero. `Bits` is one of kAlike.
template <int Bits, int Limbs>
[[gnu::noinline]] void prepare_panel(const Quantized& w, const RowLayout& from, const std::uint8_t* rows,
                                     std::size_t row_bytes, std::size_t count, std::uint8_t* memory) {
  constexpr std::size_t planes = kPlanes<Bits, Limbs>;
  const Panel<Bits, Limbs, std::uint8_t> to(w, memory);
  const std::size_t words = from.span_words, parts = from.parts;
  const std::size_t run_bytes = kWords * parts * kHalves<Bits> * planes * 4 * kSliceRows;
  alignas(64) static constexpr std::uint8_t zeros[kPart] = {};
  std::memset(memory, 0, count < kPanelWidth ? to.bytes : 0);
  for (std::size_t run = 0; run < from.runs; ++run) {
    for (std::size_t p = 0; p < parts; ++p) {
      Vec<std::uint32_t> limbs[Limbs][kWords][kWordVectors];
      for (std::size_t l = 0; l < Limbs; ++l) {
        const std::uint8_t* bytes[kPanelWidth];
        for (std::size_t b = 0; b < kPanelWidth; ++b) {
          bytes[b] = b < count ? rows + b * row_bytes + run * from.run_bytes + (l * parts + p) * kPart : zeros;
        }
        load_transposed(bytes, limbs[l]);
      }
      for (std::size_t i = 0; i < kWords; ++i) {
        alignas(64) std::uint8_t lanes[kHalves<Bits> * planes][4 * kPanelWidth];
        for (std::size_t v = 0; v < kWordVectors; ++v) {
          for (std::size_t half = 0; half < kHalves<Bits>; ++half) {
            for (std::size_t plane = 0; plane < planes; ++plane) {
              Vec<std::uint32_t> n = limbs[plane][i][v];
              if constexpr (kWide<Bits>) {
                Pairs wide = half_of<true>(limbs[Limbs == 3 ? 2 * plane : 0][i][v], half);
                if constexpr (Limbs == 3) {
                  if (plane == 0) wide = (wide << 8) + half_of<true>(limbs[1][i][v], half);
                }
                n = bit_cast<Vec<std::uint32_t>>(wide);
              }
              store(lanes[half * planes + plane] + v * kVectorBytes, n);
            }
          }
        }
        const std::size_t in_span = i & (words - 1);  // words is a power of two
        const std::size_t lane = (i - in_span) * parts + p * words + in_span;
        std::int8_t* out = to.limbs + run * run_bytes + lane * (sizeof lanes / kPanelWidth * kSliceRows);
        for (const auto& word : lanes) {
          for (std::size_t b = 0; b < kPanelWidth; b += kSliceRows) {
            std::memcpy(out + b / kSliceRows * to.slice_bytes, word + 4 * b, 4 * kSliceRows);
          }
          out += 4 * kSliceRows;
        }
      }
    }
  }
  interleave_params(w, from, rows, row_bytes, count, kSums<Bits, Limbs>, to.scale, to.offset, to.group_sum);
}

// A stretch of a band of W without its codes: the scale and the value in the middle of each group that has some of
// these columns. Spans and groups are counted from the beginning of a row.
struct Stretch {
  alignas(64) float scale[kMaxGroups][kBand], middle[kMaxGroups][kBand];
  std::size_t span, span_end, group, group_end;
  std::size_t group_spans;  // spans of a group; 0 where a row is one group, whose parameters are applied at the end
};

// The rows of a band that ends at row `end`: the last one again where there are fewer.
inline void band_rows(std::size_t row, std::size_t end, std::size_t (&rows)[kBand]) {
  for (std::size_t r = 0; r < kBand; ++r) rows[r] = row + r < end ? row + r : end - 1;
}

// Unpacks a run of each of sixteen rows of a band. `words`: words of codes in a span. For amx.inl codes are counted
// from the middle of their range; with `twice` sixteen times the codes of a span come before these.
template <int Bits, bool Amx>
inline void unpack_run(const std::uint8_t* const (&from)[kWords], std::size_t run, std::size_t words, bool twice,
                       std::uint8_t* codes) {
  constexpr std::size_t parts = kParts<Bits>, halves = kHalves<Bits>;
  const auto put = [&](std::size_t i, std::size_t p, std::size_t v, Vec<std::uint32_t> four) {
    const std::size_t in_span = i & (words - 1);  // words is a power of two
    const std::size_t begin = (run * kWords + i - in_span) * parts, lane = begin + p * words + in_span;
    if constexpr (Amx) {
      std::uint8_t* to = codes + (lane + (twice ? begin : 0)) * kBand * 4 + v * kVectorBytes;
      if (twice) {
        store(to, bit_cast<Vec<std::uint8_t>>(four << 4) - static_cast<std::uint8_t>(kMiddle<Bits> << 4));
        to += words * parts * kBand * 4;
      }
      store(to, bit_cast<Vec<std::uint8_t>>(four) - kMiddle<Bits>);
      return;
    }
    std::uint8_t* to = codes + lane * halves * kBand * 4 + v * kVectorBytes;
    if constexpr (halves == 1) {
      store(to, four);
    } else {
      for (std::size_t half = 0; half < 2; ++half) store(to + half * kBand * 4, half_of<false>(four, half));
    }
  };
  Vec<std::uint32_t> rows[kWords][kWordVectors];
  if constexpr (32 % Bits == 0) {
    load_transposed(from, rows);
    for (std::size_t i = 0; i < kWords; ++i) {
      for (std::size_t v = 0; v < kWordVectors; ++v) {
        Vec<std::uint8_t> split[parts];
        split_words<Bits>(in_register(bit_cast<Vec<std::uint8_t>>(rows[i][v])), split);
        for (std::size_t p = 0; p < parts; ++p) put(i, p, v, bit_cast<Vec<std::uint32_t>>(split[p]));
      }
    }
  } else {
    alignas(64) std::uint8_t bytes[kWords][parts][kPart];
    for (std::size_t r = 0; r < kWords; ++r) {
      for (std::size_t v = 0; v < kWordVectors; ++v) {
        Vec<std::uint8_t> split_codes[parts];
        split<Bits>(from[r], v, split_codes);
        for (std::size_t p = 0; p < parts; ++p) store(bytes[r][p] + v * kVectorBytes, split_codes[p]);
      }
    }
    for (std::size_t p = 0; p < parts; ++p) {
      const std::uint8_t* of_part[kWords];
      for (std::size_t r = 0; r < kWords; ++r) of_part[r] = bytes[r][p];
      load_transposed(of_part, rows);
      for (std::size_t i = 0; i < kWords; ++i) {
        for (std::size_t v = 0; v < kWordVectors; ++v) put(i, p, v, rows[i][v]);
      }
    }
  }
}

// Loads sixteen parameters of each row of a band, of which `n` belong to it: out[g] has those of all rows for group g.
[[gnu::noinline]] void load_band(const Quantized& w, const void* params, const std::size_t (&at)[kBand], std::size_t n,
                                 float (*out)[kBand]) {
  for (std::size_t first = 0; first < kBand; first += kWords) {
    alignas(64) std::uint8_t bytes[kWords][kWords * sizeof(float)];
    const std::uint8_t* rows[kWords];
    for (std::size_t r = 0; r < kWords; ++r) {
      Vec<float> of_row[kWordVectors];
      load_sixteen(w, params, at[first + r], n, of_row);
      std::memcpy(bytes[r], of_row, sizeof of_row);
      rows[r] = bytes[r];
    }
    Vec<std::uint32_t> groups[kWords][kWordVectors];
    load_transposed(rows, groups);
    for (std::size_t g = 0; g < n; ++g) std::memcpy(out[g] + first, groups[g], sizeof *groups);
  }
}

// Unpacks the codes of the stretch from column `begin` on, of rows [row, row + kBand) of W, which end at row `end`:
// [span][part][word][half][row].
template <int Bits, bool Amx = false>
[[gnu::noinline]] void unpack_band(const Quantized& w, std::size_t row, std::size_t end, std::size_t begin, bool twice,
                                   std::uint8_t* out) {
  std::size_t rows[kBand];
  band_rows(row, end, rows);
  constexpr std::size_t run_bytes = kRunBytes<Bits>;
  const std::size_t words = span_columns(w) / kWordColumns<Bits>, left = w.row_bytes - begin * Bits / 8;
  const std::size_t exist = left < kPanelStretch * Bits / 8 ? left : kPanelStretch * Bits / 8;
  const std::uint8_t* const codes_end = w.codes + w.rows * w.row_bytes;
  for (std::size_t at = 0, run = 0; at < exist; at += run_bytes, ++run) {
    const std::size_t from = begin * Bits / 8 + at;
    for (std::size_t first = 0; first < kBand; first += kWords) {
      const std::uint8_t* codes[kWords];
      std::uint8_t copy[kWords][run_bytes];
      for (std::size_t r = 0; r < kWords; ++r) {
        codes[r] = w.codes + rows[first + r] * w.row_bytes + from;
        if (static_cast<std::size_t>(codes_end - codes[r]) >= run_bytes) continue;
        std::memset(copy[r], 0, run_bytes);
        std::memcpy(copy[r], codes[r], exist - at);
        codes[r] = copy[r];
      }
      unpack_run<Bits, Amx>(codes, run, words, twice, out + first * 4);
    }
  }
}

// unpack_band() for a width.
using Unpack = void (*)(const Quantized&, std::size_t, std::size_t, std::size_t, bool, std::uint8_t*);

// The rest of this stretch.
[[gnu::noinline]] void load_stretch(const Quantized& w, std::size_t row, std::size_t end, std::size_t begin,
                                    Stretch* out) {
  const std::size_t span = span_columns(w), stop = w.cols - begin < kPanelStretch ? w.cols : begin + kPanelStretch;
  const bool one_group = w.groups == 1;
  out->span = begin / span;
  out->span_end = (stop + span - 1) / span;
  out->group = one_group ? 0 : begin / w.group;
  out->group_end = one_group ? 1 : (stop + w.group - 1) / w.group;
  out->group_spans = one_group ? 0 : w.group / span;
  if (one_group) {
    for (std::size_t r = 0; r < kBand; ++r) {
      out->scale[0][r] = 1.0f;
      out->middle[0][r] = 0.0f;
    }
    return;
  }
  std::size_t rows[kBand];
  band_rows(row, end, rows);
  const float middle = static_cast<float>(middle_code(w.bits));
  for (std::size_t g = out->group; g < out->group_end; g += kWords) {
    const std::size_t n = out->group_end - g < kWords ? out->group_end - g : kWords, to = g - out->group;
    std::size_t at[kBand];
    for (std::size_t r = 0; r < kBand; ++r) {
      at[r] = rows[r] * w.param_stride + g;
      fetch_params(w, at[r] + kBand * w.param_stride);
    }
    load_band(w, w.scale, at, n, out->scale + to);
    load_band(w, w.minimum, at, n, out->middle + to);
    for (std::size_t i = to; i < to + n; ++i) {
      for (std::size_t r = 0; r < kBand; ++r) out->middle[i][r] += out->scale[i][r] * middle;
    }
  }
}

inline void add_to(double* total, Vec<float> sums) {
  constexpr std::size_t lanes = kVectorBytes / sizeof(double);
  Vec<float, lanes> halves[2];
  std::memcpy(halves, &sums, sizeof halves);
  for (std::size_t i = 0; i < 2; ++i) {
    double* const to = total + i * lanes;
    store(to, load<Vec<double>>(to) + convert<double, lanes>(halves[i]));
  }
}

// The cache lines of codes that a band has in a span of 32 columns.
constexpr std::size_t span_lines(std::size_t bits) { return (kBand * 2 * kGrain * bits / 8 + 63) / 64; }

// Adds a stretch of a band, the first `rows` of which exist, by the first `count` rows of a panel to the totals, which
// are double, so that adding many stretches loses no accuracy. A span has `columns`, or `Columns` where the loop over
// them is unrolled. `lines` of `next_codes` are prefetched with each span meanwhile. The function is long because its
// sums must stay in registers across the loops.
template <int Bits, int Limbs, std::size_t Columns>
[[gnu::noinline]] void add_stretch(const Stretch& w, const std::uint8_t* band, std::size_t columns, std::size_t rows,
                                   const Panel<Bits, Limbs>& x, std::size_t count, const std::uint8_t* next_codes,
                                   std::size_t lines, double (*total)[kBand]) {
  using V = Vec<float>;
  using Ints = Vec<std::int32_t>;
  using Words32 = Vec<std::uint32_t>;
  constexpr std::size_t lanes = kLanes<float>, sums = kSums<Bits, Limbs>, planes = kPlanes<Bits, Limbs>;
  constexpr std::size_t planes_at_once = kOneInstructionDot ? planes : 1;
  const std::size_t span_words = span_lanes<Bits>(Columns > 0 ? Columns : columns);
  const auto each = [](const auto& body) {
    unroll<kSliceRows * kSliceVectors>([&](auto i) {
      constexpr std::size_t at = i.value;
      body(std::integral_constant<std::size_t, at / kSliceVectors>{},
           std::integral_constant<std::size_t, at % kSliceVectors>{});
    });
  };
  for (std::size_t first = 0; first < count; first += kSliceRows) {
    const std::int8_t* const slice = x.limbs + first / kSliceRows * x.slice_bytes;
    for (std::size_t i = 0; i * lanes < rows; i += kSliceVectors) {
      V sum[kSliceRows][kSliceVectors];
      each([&](auto b, auto v) { sum[b][v] = V{}; });
      std::size_t span = w.span;
      for (std::size_t group = w.group; group < w.group_end; ++group) {
        const bool begins = w.group_spans > 0 && span == group * w.group_spans;
        const std::size_t end = group + 1 < w.group_end ? (group + 1) * w.group_spans : w.span_end;
        V group_sum[kSliceRows][kSliceVectors];
        each([&](auto b, auto v) { group_sum[b][v] = V{}; });
        for (; span < end; ++span) {
          const std::uint8_t* const codes = band + (span - w.span) * span_words * kBand * 4 + i * kVectorBytes;
          const std::int8_t* const n = slice + span * span_words * planes * 4 * kSliceRows;
          const std::int32_t* const offset = x.offset + span * sums * kPanelWidth + first;
          for (std::size_t line = first + i == 0 ? 0 : lines; line < lines; ++line) {
            __builtin_prefetch(next_codes + ((span - w.span) * lines + line) * 64, 0, 2);
          }
          Ints upper[kSliceRows][kSliceVectors], last[kSliceRows][kSliceVectors];
          each([&](auto b, auto v) { upper[b][v] = Ints{}; });
          for (std::size_t first_plane = 0; first_plane < planes; first_plane += planes_at_once) {
            const auto each_plane = [&](const auto& body) {
              unroll<planes_at_once>([&](auto p) { each([&](auto b, auto v) { body(p, b, v); }); });
            };
            Ints part[planes_at_once][kSliceRows][kSliceVectors];
            each_plane([&](auto p, auto b, auto v) {
              const bool is_last = first_plane + p.value + 1 == planes;
              part[p.value][b][v] = is_last ? broadcast(offset[(sums - 1) * kPanelWidth + b]) : Ints{};
            });
            const auto add_words = [&](const auto& add) {
#pragma GCC unroll kUnrolled
              for (std::size_t k = 0; k < span_words; ++k) {
                Vec<std::uint8_t> four[kSliceVectors];
                for (std::size_t v = 0; v < kSliceVectors; ++v) {
                  four[v] = load<Vec<std::uint8_t>>(codes + k * kBand * 4 + v * kVectorBytes);
                }
                each_plane([&](auto p, auto b, auto v) {
                  add(p, b, v, four[v],
                      broadcast_word(n + ((k * planes + first_plane + p.value) * kSliceRows + b) * 4));
                });
              }
            };
            if constexpr (kPairsFirst<Bits> && Bits < 5) {  // the pairs of a whole span stay below 2^15
              static_assert(2 * kGrain / 4 * 2 * (15 * 128) < 1 << 15);
              Pairs pairs[planes_at_once][kSliceRows][kSliceVectors];
              each_plane([&](auto p, auto b, auto v) { pairs[p.value][b][v] = Pairs{}; });
              add_words([&](auto p, auto b, auto v, Vec<std::uint8_t> four, Vec<std::int8_t> x4) {
                pairs[p.value][b][v] += byte_pairs(four, x4);
              });
              each_plane([&](auto p, auto b, auto v) { part[p.value][b][v] += sum_pairs(pairs[p.value][b][v]); });
            } else {
              add_words([&](auto p, auto b, auto v, Vec<std::uint8_t> four, Vec<std::int8_t> x4) {
                part[p.value][b][v] =
                    kWide<Bits> ? dot_wide(part[p.value][b][v], four, x4) : dot<Bits>(part[p.value][b][v], four, x4);
              });
            }
            // Planes above the last one by Horner's rule, modulo 2^32; the last one apart, so that sums wait less for
            // each other.
            each_plane([&](auto p, auto b, auto v) {
              if (first_plane + p.value + 1 == planes) {
                last[b][v] = part[p.value][b][v];
              } else {
                upper[b][v] =
                    bit_cast<Ints>((bit_cast<Words32>(upper[b][v]) << 8) + bit_cast<Words32>(part[p.value][b][v]));
              }
            });
          }
          const float* const scale = x.scale + span * kPanelWidth + first;
          each([&](auto b, auto v) {
            V product;
            if constexpr (planes == 1) {
              product = convert<float, lanes>(last[b][v]);
            } else if constexpr (sums == 1) {
              const Words32 whole = (bit_cast<Words32>(upper[b][v]) << 8) + bit_cast<Words32>(last[b][v]);
              product = convert<float, lanes>(bit_cast<Ints>(whole));
            } else {
              const Words32 whole = bit_cast<Words32>(upper[b][v]) + static_cast<std::uint32_t>(offset[b]);
              product = convert<float, lanes>(bit_cast<Ints>(whole)) * 256.0f + convert<float, lanes>(last[b][v]);
            }
            group_sum[b][v] += product * scale[b];
          });
        }
        const std::size_t g = group - w.group;
        const float* const x_sum = x.group_sum + group * kPanelWidth + first;
        each([&](auto b, auto v) {
          const V scale = load<V>(w.scale[g] + (i + v) * lanes), middle = load<V>(w.middle[g] + (i + v) * lanes);
          sum[b][v] += group_sum[b][v] * scale + (begins ? x_sum[b] : 0.0f) * middle;
        });
      }
      each([&](auto b, auto v) { add_to(total[first + b] + (i + v) * lanes, sum[b][v]); });
    }
  }
}

// Turns totals into products where a row of W is one group: its scale and minimum are applied once, at the end.
[[gnu::noinline]] void one_group_products(const Quantized& w, std::size_t row, std::size_t end, const float* group_sum,
                                          double (*total)[kBand]) {
  for (std::size_t r = 0; row + r < end; ++r) {
    for (std::size_t b = 0; b < kPanelWidth; ++b) {
      total[b][r] = one_group_product(w, row + r, total[b][r], group_sum + 2 * b);
    }
  }
}

// The products of rows [row, end) of W with rows [first, last) of x.
[[gnu::noinline]] void store_panel(const Quantized& w, const Linear& io, std::size_t first, std::size_t last,
                                   std::size_t row, std::size_t end, const double (*total)[kBand]) {
  using Sixteen = Vec<float, kWords>;
  for (std::size_t b = 0; first + b < last; ++b) {
    for (std::size_t begin = row, r = 0; begin < end; begin += kWords, r += kWords) {
      const std::size_t exist = end - begin < kWords ? end - begin : kWords;
      float* y = io.y + (first + b) * w.rows + begin;
      float sums[kWords];
      for (std::size_t i = 0; i < kWords; ++i) sums[i] = static_cast<float>(total[b][r + i]);
      const Sixteen sum = load<Sixteen>(sums);
      const bool finite = fold_lanes<int, kWords>(sum - sum == 0.0f, bitwise_and) != 0;
      if (finite && exist == kWords) {
        store(y, io.bias ? sum + load<Sixteen>(io.bias + begin) : sum);
        continue;
      }
      for (std::size_t i = 0; i < exist; ++i) {
        y[i] = io.bias ? sums[i] + io.bias[begin + i] : sums[i];
        if (!(sums[i] - sums[i] == 0.0f)) io.floats(w, io, first + b, 1, begin + i, begin + i + 1);
      }
    }
  }
}

// The products of panels by vectors, for linear_panels().
template <int Bits, int Limbs>
struct ByVectors {
  using X = Panel<Bits, Limbs>;
  struct Registers {  // nothing to set up
    explicit Registers(const Quantized&) {}
  };
  static constexpr std::size_t kCodeBytes = kHalves<Bits>;
  static constexpr bool kTwice = false;

  static void add(const Quantized& w, const Stretch& stretch, const std::uint8_t* codes, std::size_t rows, const X& x,
                  std::size_t count, const std::uint8_t* next_codes, std::size_t lines, double (*total)[kBand]) {
    const auto add = [&](auto columns) {
      add_stretch<Bits, Limbs, columns.value>(stretch, codes, span_columns(w), rows, x, count, next_codes, lines,
                                              total);
    };
    constexpr int unrolled = kUnrolled > 1 ? kGrain : 0;
    span_columns(w) == 2 * kGrain ? add(Int<2 * unrolled>{}) : add(Int<unrolled>{});
  }
};

// Rows [row, end), kBand at most, by `panels` panels of x, kPanels at most, of which `count` rows exist. `unpack` is
// the function for the width of the codes; the rest is the same for many.
template <class By>
[[gnu::noinline]] void linear_panels(const Quantized& w, const Linear& io, std::size_t batch, std::size_t panels,
                                     std::size_t count, std::size_t row, std::size_t end, Unpack unpack) {
  double total[kPanels][kPanelWidth][kBand];
  std::memset(total, 0, panels * sizeof *total);
  const auto panel = [&](std::size_t p) {
    return typename By::X(w, io.panels + (batch / kPanelWidth + p) * io.panel_bytes);
  };
  const auto rows_of = [&](std::size_t p) {
    const std::size_t left = count - p * kPanelWidth;
    return left < kPanelWidth ? left : kPanelWidth;
  };
  const std::size_t lines = span_lines(static_cast<std::size_t>(w.bits));
  const std::uint8_t* next_codes = w.codes + (row + kBand) * w.row_bytes;
  for (std::size_t begin = 0; begin < w.cols; begin += kPanelStretch) {
    Stretch stretch;
    alignas(64) std::uint8_t codes[kPanelStretch * kBand * By::kCodeBytes];
    load_stretch(w, row, end, begin, &stretch);
    unpack(w, row, end, begin, By::kTwice, codes);
    for (std::size_t p = 0; p < panels; ++p) {
      By::add(w, stretch, codes, end - row, panel(p), rows_of(p), next_codes, p == 0 ? lines : 0, total[p]);
    }
    next_codes += (stretch.span_end - stretch.span) * lines * 64;
  }
  for (std::size_t p = 0; p < panels; ++p) {
    const std::size_t first = batch + p * kPanelWidth;
    if (w.groups == 1) one_group_products(w, row, end, panel(p).group_sum, total[p]);
    store_panel(w, io, first, first + rows_of(p), row, end, total[p]);
  }
}
