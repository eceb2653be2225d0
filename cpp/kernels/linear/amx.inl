// Panels of x by AMX: one instruction multiplies a tile, 16 rows of x by 16 rows of W and all columns of a span.
//
//   plane of x                                  codes of a band                          sums of a span
//   row 0   | n of the columns of a span |      word 0 | row 0 of W | ... | row 15 |     row 0 of y | 0 ... 15 |
//   row 1   | ...                        |  *   word 1 | ...                       |  =  row 1 of y | ...      |
//   ...                                         ...                                      ...
//
// The scales, the order of sums and so the bits are those of panels.inl. Codes count from the middle of their range, so
// that sums of spans need no offset.

// How many products of tiles a span takes. n has three limbs, and each is a plane. But where codes have at most 4 bits,
// also 16 times a code is a signed byte: a plane has 12 bits of n then, upper * 16 + lower, and a tile of codes has
// 16 * code before code.
template <int Bits, int Limbs>
constexpr std::size_t kTilePlanes = Limbs == 1 ? 1
                                    : Bits > 4 ? 3
                                               : 2;

// The bytes of a row of x in a plane, and of a row of W in a tile of codes, in a span.
template <std::size_t Planes>
inline std::size_t tile_bytes(const Quantized& w) {
  return span_columns(w) * (Planes == 2 ? 2 : 1);
}

// A panel of x, in memory of the caller.
template <std::size_t Planes, class Byte = const std::uint8_t>
struct TilePanel {
  Like<Byte, std::int8_t>* planes;  // [span][plane][row][byte], bytes in the order of the codes
  Like<Byte, float>* scale;         // [span][row], times the step in which codes count
  Like<Byte, float>* group_sum;     // as in Panel
  std::size_t bytes;

  TilePanel(const Quantized& w, Byte* memory) {
    const std::size_t spans = run_columns(w) / span_columns(w);
    const std::size_t plane_bytes = spans * Planes * kPanelWidth * tile_bytes<Planes>(w);
    const std::size_t scale_bytes = spans * kPanelWidth * sizeof(float);
    planes = reinterpret_cast<decltype(planes)>(memory);
    scale = reinterpret_cast<decltype(scale)>(memory + plane_bytes);
    group_sum = reinterpret_cast<decltype(group_sum)>(memory + plane_bytes + scale_bytes);
    bytes = plane_bytes + scale_bytes + (w.groups == 1 ? 2 : w.groups) * kPanelWidth * sizeof(float);
  }
};

// The planes of 64 columns from their limbs: [plane][1 or 2 bytes].
template <std::size_t Planes>
inline void planes_of(const std::uint8_t* limbs, std::size_t limb_bytes, std::uint8_t (*out)[kPart]) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  if constexpr (Planes != 2) {
    for (std::size_t p = 0; p < Planes; ++p) std::memcpy(out[p], limbs + p * limb_bytes, kPart);
  } else {
    for (std::size_t i = 0; i < kPart; i += lanes) {
      const auto limb = [&](std::size_t l) { return load_signed_bytes(limbs + l * limb_bytes + i); };
      const Ints n = (limb(0) << 16) + (limb(1) << 8) + limb(2), upper = (n + 0x800) >> 12;
      const Ints twelve_bits[2] = {upper, n - (upper << 12)};
      for (std::size_t p = 0; p < 2; ++p) {
        store(out[2 * p] + i, convert<std::uint8_t, lanes>(twelve_bits[p] >> 4));
        store(out[2 * p + 1] + i, convert<std::uint8_t, lanes>(twelve_bits[p] & 15));
      }
    }
  }
}

// Interleaves `count` rows that were prepared one by one; rows behind them are zero.
template <std::size_t Planes>
[[gnu::noinline]] void prepare_tiles(const Quantized& w, const RowLayout& from, const std::uint8_t* rows,
                                     std::size_t row_bytes, std::size_t count, std::uint8_t* memory) {
  constexpr std::size_t halves = Planes == 2 ? 2 : 1;
  const TilePanel<Planes, std::uint8_t> to(w, memory);
  std::memset(memory, 0, count < kPanelWidth ? to.bytes : 0);
  const std::size_t in_row = tile_bytes<Planes>(w), piece = 4 * from.span_words, spans = kWords / from.span_words;
  for (std::size_t b = 0; b < count; ++b) {
    const std::uint8_t* const row = rows + b * row_bytes;
    for (std::size_t run = 0; run < from.runs; ++run) {
      const std::uint8_t* const x = row + run * from.run_bytes;
      for (std::size_t part = 0; part < from.parts; ++part) {
        alignas(64) std::uint8_t planes[Planes * halves][kPart];
        planes_of<Planes>(x + part * kPart, from.parts * kPart, planes);
        for (std::size_t i = 0; i < Planes * halves; ++i) {
          std::int8_t* out = to.planes + ((run * spans * Planes + i / halves) * kPanelWidth + b) * in_row +
                             (i % halves * from.parts + part) * piece;
          const auto copy = [&](auto bytes) {
            constexpr std::size_t size = bytes.value;
            for (std::size_t at = 0; at < kPart; at += size) {
              std::memcpy(out, planes[i] + at, size);
              out += Planes * kPanelWidth * in_row;
            }
          };
          piece == 32 ? copy(Int<32>{}) : piece == 16 ? copy(Int<16>{}) : piece == 8 ? copy(Int<8>{}) : copy(Int<4>{});
        }
      }
    }
  }
  interleave_params(w, from, rows, row_bytes, count, 0, to.scale, nullptr, to.group_sum);
}

// The products of panels by tiles, for linear_panels().
template <std::size_t Planes>
struct ByTiles;

#if defined(__AMX_INT8__)
// The sums of a span: [vector of rows of W][plane][row of x][row of W].
template <std::size_t Planes>
using SpanSums = std::int32_t[2][Planes][kPanelWidth][kWords];

template <std::size_t Planes>
inline void multiply_span(const std::uint8_t* codes, const std::int8_t* x, std::size_t bytes, SpanSums<Planes>& out) {
  tile_load<6>(codes, kBand * 4);
  tile_load<7>(codes + kWords * 4, kBand * 4);
  unroll<Planes>([&](auto plane) {
    constexpr int p = plane.value, sum = p % 2, a = 4 + p % 2;
    tile_load<a>(x + p * kPanelWidth * bytes, bytes);
    tile_product<sum, a, 6>();
    tile_store<sum>(out[0][p], sizeof out[0][p][0]);
    tile_product<2 + sum, a, 7>();
    tile_store<2 + sum>(out[1][p], sizeof out[1][p][0]);
  });
}

// As add_stretch(), by tiles. The sums of a span are multiplied with scales while the tiles of the next one are
// multiplied.
template <std::size_t Planes>
[[gnu::noinline]] void add_stretch_by_tiles(const Quantized& w, const Stretch& stretch, const std::uint8_t* codes,
                                            const TilePanel<Planes>& x, const std::uint8_t* next_codes,
                                            std::size_t lines, double (*total)[kBand]) {
  using V = Vec<float>;
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  static_assert(lanes == kWords);
  const std::size_t bytes = tile_bytes<Planes>(w);
  alignas(64) SpanSums<Planes> turns[2];
  alignas(64) float group_sum[kPanelWidth][kBand], sum[kPanelWidth][kBand] = {};
  const auto multiply = [&](std::size_t span) {
    multiply_span<Planes>(codes + (span - stretch.span) * bytes * kBand, x.planes + span * Planes * kPanelWidth * bytes,
                          bytes, turns[span % 2]);
  };
  multiply(stretch.span);
  std::size_t span = stretch.span;
  for (std::size_t group = stretch.group; group < stretch.group_end; ++group) {
    const std::size_t begin = span,
                      end = group + 1 < stretch.group_end ? (group + 1) * stretch.group_spans : stretch.span_end;
    // A group that began in the stretch before has been given its middle.
    static constexpr float zeros[kPanelWidth] = {};
    const bool begins = stretch.group_spans > 0 && begin == group * stretch.group_spans;
    const float* const x_sum = begins ? x.group_sum + group * kPanelWidth : zeros;
    const std::size_t g = group - stretch.group;
    for (; span < end; ++span) {
      for (std::size_t line = 0; line < lines; ++line) {
        __builtin_prefetch(next_codes + ((span - stretch.span) * lines + line) * 64, 0, 2);
      }
      if (span + 1 < stretch.span_end) multiply(span + 1);
      const float* const x_scale = x.scale + span * kPanelWidth;
      const std::int8_t* const next_x = x.planes + (span + 2) * Planes * kPanelWidth * bytes;
      const std::uint8_t* const next_band = codes + (span + 2 - stretch.span) * bytes * kBand;
      for (std::size_t v = 0; v < 2; ++v) {
        const auto& products = turns[span % 2][v];
        const V scale = load<V>(stretch.scale[g] + v * lanes), middle = load<V>(stretch.middle[g] + v * lanes);
        const auto add = [&](auto is_first, auto is_last) {
#pragma GCC unroll 4
          for (std::size_t b = 0; b < kPanelWidth; ++b) {
            __builtin_prefetch(next_x + (v * kPanelWidth + b) * 64);
            __builtin_prefetch(next_band + (v * kPanelWidth + b) * 64);
            const Ints last = load<Ints>(products[Planes - 1][b]), first = load<Ints>(products[0][b]);
            V product;
            if constexpr (Planes == 1) {
              product = convert<float, lanes>(last);
            } else if constexpr (Planes == 2) {
              product = convert<float, lanes>((first << 12) + last);
            } else {
              product = convert<float, lanes>((first << 8) + load<Ints>(products[1][b])) * 256.0f +
                        convert<float, lanes>(last);
            }
            product *= x_scale[b];
            if constexpr (!is_first.value) product += load<V>(group_sum[b] + v * lanes);
            if constexpr (is_last.value) {
              store(sum[b] + v * lanes, load<V>(sum[b] + v * lanes) + (product * scale + x_sum[b] * middle));
            } else {
              store(group_sum[b] + v * lanes, product);
            }
          }
        };
        if (span == begin) {
          span + 1 == end ? add(Int<1>{}, Int<1>{}) : add(Int<1>{}, Int<0>{});
        } else {
          span + 1 == end ? add(Int<0>{}, Int<1>{}) : add(Int<0>{}, Int<0>{});
        }
      }
    }
  }
  for (std::size_t b = 0; b < kPanelWidth; ++b) {
    for (std::size_t v = 0; v < 2; ++v) add_to(total[b] + v * lanes, load<V>(sum[b] + v * lanes));
  }
}

template <std::size_t Planes>
struct ByTiles {
  using X = TilePanel<Planes>;
  struct Registers : TileRegisters {
    explicit Registers(const Quantized& w) : TileRegisters(tile_bytes<Planes>(w)) {}
  };
  static constexpr std::size_t kCodeBytes = Planes == 2 ? 2 : 1;
  static constexpr bool kTwice = Planes == 2;

  static void add(const Quantized& w, const Stretch& stretch, const std::uint8_t* codes, std::size_t, const X& x,
                  std::size_t, const std::uint8_t* next_codes, std::size_t lines, double (*total)[kBand]) {
    add_stretch_by_tiles<Planes>(w, stretch, codes, x, next_codes, lines, total);
  }
};
#endif
