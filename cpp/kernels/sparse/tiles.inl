// Products for many rows of x.

// A tile of `width` rows of x lies transposed, [cols][width]. Its part of kTile numbers stays in L1 while all rows of a
// panel use it. Entry k of a row in that stretch of kTile / width columns goes to partial sum k % (64 / width); these
// are added as a tree, stretches in order.
constexpr std::size_t kTile = 8192, kPanel = 32, kWidest = 64;

void transpose_tile(const float* x, std::size_t batch, std::size_t cols, std::size_t first, std::size_t width,
                    std::size_t begin, std::size_t end, float* tile) {
  constexpr std::size_t block = 16;
  for (std::size_t c0 = begin; c0 < end; c0 += block) {
    const std::size_t c1 = end - c0 < block ? end : c0 + block;
    for (std::size_t b = 0; b < width; ++b) {
      const float* row = x + (first + b) * cols;
      for (std::size_t c = c0; c < c1; ++c) tile[c * width + b] = first + b < batch ? row[c] : 0.0f;
    }
  }
}

// y += the sum of values[k] * x[columns[k]], for Vectors vectors of a tile's rows in so many chains of additions.
template <std::size_t Width, std::size_t Vectors>
inline void accumulate(const std::uint16_t* columns, const float* values, std::size_t n, const float* x, float* y) {
  using V = Vec<float>;
  constexpr std::size_t chains = kWidest / Width;
  V sum[chains][Vectors] = {};
  const auto add = [&](std::size_t chain, std::size_t k) {
    const float* row = x + columns[k] * Width;
    for (std::size_t v = 0; v < Vectors; ++v) sum[chain][v] += values[k] * load<V>(row + v * kLanes<float>);
  };
  std::size_t k = 0;
  for (; k + chains <= n; k += chains) {
    for (std::size_t chain = 0; chain < chains; ++chain) add(chain, k + chain);
  }
  for (std::size_t chain = 0; chain + 1 < chains; ++chain) {
    if (k + chain < n) add(chain, k + chain);
  }
  for (std::size_t v = 0; v < Vectors; ++v) {
    for (std::size_t half = chains / 2; half > 0; half /= 2) {
      for (std::size_t chain = 0; chain < half; ++chain) sum[chain][v] += sum[chain + half][v];
    }
    float* to = y + v * kLanes<float>;
    store(to, load<V>(to) + sum[0][v]);
  }
}

// As many vectors at once as there are registers for their chains.
template <std::size_t Width>
inline void accumulate_tile(const std::uint16_t* columns, const float* values, std::size_t n, const float* x,
                            float* y) {
  constexpr std::size_t lanes = kLanes<float>, most = (kVectorBytes == 64 ? 4 : 8) * Width / kWidest,
                        vectors = most < 1               ? 1
                                  : most < Width / lanes ? most
                                                         : Width / lanes;
  for (std::size_t l = 0; l < Width; l += vectors * lanes) accumulate<Width, vectors>(columns, values, n, x + l, y + l);
}

// How far a row of a panel has been read.
struct Cursor {
  std::size_t at;      // entry
  std::uint16_t next;  // index8: column behind the last one
};

// Entries of a row in columns [begin, end): n numbers and their columns, counted from `origin`.
struct Stretch {
  const std::uint16_t* columns;
  const float* values;
  std::size_t n, origin;
};

inline Stretch next_stretch(const Sparse& w, std::size_t row, std::size_t begin, std::size_t end, Cursor& cursor,
                            std::uint16_t* columns, float* scratch) {
  const std::size_t left = static_cast<std::size_t>(w.row_offsets[row + 1]) - cursor.at, at = cursor.at;
  if (w.layout == Layout::mask) {
    const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes + begin / 8;
    const std::size_t n = mask_columns(mask, end - begin, columns);
    cursor.at += n;
    return {columns, values_of(w, at, n, scratch), n, begin};
  }
  if (w.layout == Layout::block) {
    const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
    std::size_t n = 0;
    for (std::size_t c = begin; c < end; c += kBlockLength) {
      if ((mask[c / kBlockLength / 8] >> (c / kBlockLength % 8) & 1) == 0) continue;
      for (std::size_t j = 0; j < kBlockLength; ++j) columns[n++] = static_cast<std::uint16_t>(c - begin + j);
    }
    cursor.at += n / kBlockLength;
    const float* values = values_of(w, kBlockLength * at, n, scratch);
    if (n > 0 && columns[n - 1] >= w.cols - begin) n -= columns[n - 1] - (w.cols - begin) + 1;  // the last is cut short
    return {columns, values, n, begin};
  }
  if (w.layout == Layout::index8) {
    const std::uint8_t* gaps = static_cast<const std::uint8_t*>(w.positions) + at;
    std::size_t n = 0;
    for (bool inside = true; inside && n < left;) {
      const Columns c = columns_of_gaps(gaps + n, left - n, Columns{} + static_cast<std::uint16_t>(cursor.next - 1));
      store(columns + n, c);
      const std::size_t some = left - n < 8 ? left - n : 8;
      std::size_t good = some;
      while (good > 0 && columns[n + good - 1] >= end) --good;
      inside = good == some;
      n += good;
      if (good > 0) cursor.next = static_cast<std::uint16_t>(columns[n - 1] + 1);
    }
    cursor.at += n;
    return {columns, values_of(w, at, n, scratch), n, 0};
  }
  const std::uint16_t* c = static_cast<const std::uint16_t*>(w.positions) + at;
  std::size_t n = 0;
  while (n + 8 <= left && c[n + 7] < end) n += 8;
  while (n < left && c[n] < end) ++n;
  cursor.at += n;
  return {c, values_of(w, at, n, scratch), n, 0};
}

// What is stored of the rows from `row` on, to be fetched in so many steps: the visits to one panel bring in the next,
// for a visit must know where its entries end before it can go on.
struct PanelAhead {
  Ahead positions, values;

  static const char* at(const void* from, std::size_t n, std::size_t bits) {
    return static_cast<const char*>(from) + n * bits / 8;
  }
  static PanelAhead of(const Sparse& w, std::size_t row, std::size_t end, std::size_t steps) {
    const std::size_t a = static_cast<std::size_t>(w.row_offsets[row]),
                      b = static_cast<std::size_t>(w.row_offsets[end]);
    const void* from = w.quantized ? w.quantized->codes : w.values;
    std::size_t bits = w.quantized ? static_cast<std::size_t>(w.quantized->bits) : w.type == Float::f32 ? 32 : 16;
    if (w.layout == Layout::block) bits *= kBlockLength;
    const Ahead values(at(from, a, bits), at(from, b, bits), steps);
    if (w.layout == Layout::mask || w.layout == Layout::block)
      return {Ahead(at(w.positions, row, 8 * w.row_bytes), at(w.positions, end, 8 * w.row_bytes), steps), values};
    bits = w.layout == Layout::index16 ? 16 : 8;
    return {Ahead(at(w.positions, a, bits), at(w.positions, b, bits), steps), values};
  }
};

template <std::size_t Width>
void linear_tile(const Sparse& w, const float* tile, std::size_t batch, std::size_t first, const float* bias, float* y,
                 std::size_t begin, std::size_t end) {
  constexpr std::size_t reach = kTile / Width;
  float scratch[reach + kSlack], sums[kPanel * Width];
  std::uint16_t columns[reach + kSlack];
  Cursor cursors[kPanel];
  for (std::size_t top = begin; top < end; top += kPanel) {
    const std::size_t rows = end - top < kPanel ? end - top : kPanel;
    for (std::size_t r = 0; r < rows; ++r) cursors[r] = {static_cast<std::size_t>(w.row_offsets[top + r]), 0};
    std::memset(sums, 0, rows * Width * sizeof(float));
    const std::size_t next = top + rows, after = w.rows - next < kPanel ? w.rows : next + kPanel;
    PanelAhead ahead = PanelAhead::of(w, next, after, rows * (w.cols / reach + 1));
    for (std::size_t c0 = 0; c0 < w.cols; c0 += reach) {
      const std::size_t c1 = w.cols - c0 < reach ? w.cols : c0 + reach;
      for (std::size_t r = 0; r < rows; ++r) {
        const Stretch s = next_stretch(w, top + r, c0, c1, cursors[r], columns, scratch);
        ahead.positions.step();
        ahead.values.step();
        accumulate_tile<Width>(s.columns, s.values, s.n, tile + s.origin * Width, sums + r * Width);
      }
    }
    for (std::size_t b = 0; b < Width && first + b < batch; ++b) {
      float* to = y + (first + b) * w.rows + top;
      for (std::size_t r = 0; r < rows; ++r) to[r] = sums[r * Width + b] + (bias ? bias[top + r] : 0.0f);
    }
  }
}

void linear_sparse_tile(const Sparse& w, const float* tile, std::size_t width, std::size_t batch, std::size_t first,
                        const float* bias, float* y, std::size_t begin, std::size_t end) {
  if (width == 64) return linear_tile<64>(w, tile, batch, first, bias, y, begin, end);
  if (width == 32) return linear_tile<32>(w, tile, batch, first, bias, y, begin, end);
  linear_tile<16>(w, tile, batch, first, bias, y, begin, end);
}
