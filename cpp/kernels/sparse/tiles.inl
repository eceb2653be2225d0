// Products of many rows of x with sparse rows: a tile of 16, 32 or 64 rows of x against a band of rows of W.
//
//   tile      lane b is row b of x, [cols][width]         sums of the band, [row][width]
//
//   column 0  | 0 | 1 | ... | width - 1 |                 | 0 | 1 | ... | width - 1 |   row 0
//   column 1  | 0 | 1 | ... | width - 1 |   entry (c, v)  | 0 | 1 | ... | width - 1 |   row 1
//   ...                                     of row r:     ...
//   column c  | 0 | 1 | ... | width - 1 |   * v, + -->    | 0 | 1 | ... | width - 1 |   row r
//   ...                                                   ...
//
// So an entry costs one broadcast, and no lane is lost to the zeros between entries. A stretch is the columns whose
// part of the tile, kTileNumbers numbers, stays in L1 while all rows of the band use it. Entry k of a row in a stretch
// goes to partial sum k % (kTilePartials / width); these are added as a tree, stretches in order.

constexpr std::size_t kTileBand = 32;  // rows

void transpose_tile(const float* x, std::size_t batch, std::size_t cols, std::size_t first, std::size_t width,
                    std::size_t begin, std::size_t end, float* tile) {
  constexpr std::size_t at_once = 16;  // columns: a cache line of each row of x
  for (std::size_t c0 = begin; c0 < end; c0 += at_once) {
    const std::size_t c1 = end - c0 < at_once ? end : c0 + at_once;
    for (std::size_t b = 0; b < width; ++b) {
      const float* row = x + (first + b) * cols;
      for (std::size_t c = c0; c < c1; ++c) tile[c * width + b] = first + b < batch ? row[c] : 0.0f;
    }
  }
}

// Adds the sum of values[k] * x[columns[k]] to y, for `Vectors` vectors of a tile's rows. Each partial sum is a chain
// of additions of its own.
template <std::size_t Width, std::size_t Vectors>
inline void accumulate(const std::uint16_t* columns, const float* values, std::size_t n, const float* x, float* y) {
  using V = Vec<float>;
  constexpr std::size_t chains = kTilePartials / Width;
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

// accumulate() for all rows of a tile, with as many vectors at a time as there are registers for their chains.
template <std::size_t Width>
inline void accumulate_tile(const std::uint16_t* columns, const float* values, std::size_t n, const float* x,
                            float* y) {
  constexpr std::size_t lanes = kLanes<float>, most = (kVectorBytes == 64 ? 4 : 8) * Width / kTilePartials,
                        vectors = most < 1               ? 1
                                  : most < Width / lanes ? most
                                                         : Width / lanes;
  for (std::size_t l = 0; l < Width; l += vectors * lanes) accumulate<Width, vectors>(columns, values, n, x + l, y + l);
}

// ---- the entries of a stretch --------------------------------------------------------------------------------

// The place in a row up to which its entries have been read.
struct Cursor {
  std::size_t at;      // entry
  std::uint16_t next;  // index8: column behind the last one
};

// The entries of a row in columns [begin, end): n numbers and their columns, counted from `origin`.
struct Entries {
  const std::uint16_t* columns;
  const float* values;
  std::size_t n, origin;
};

inline Entries entries_of_mask(const Sparse& w, std::size_t row, std::size_t begin, std::size_t end, Cursor& cursor,
                               std::uint16_t* columns, float* scratch) {
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes + begin / 8;
  const std::size_t n = mask_columns(mask, end - begin, columns), at = cursor.at;
  cursor.at += n;
  return {columns, values_of(w, at, n, scratch), n, begin};
}

inline Entries entries_of_blocks(const Sparse& w, std::size_t row, std::size_t begin, std::size_t end, Cursor& cursor,
                                 std::uint16_t* columns, float* scratch) {
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  const std::size_t at = cursor.at;
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

// Columns are computed eight at a time. The first eight that reach behind the stretch end it.
inline Entries entries_of_gaps(const Sparse& w, std::size_t left, std::size_t end, Cursor& cursor,
                               std::uint16_t* columns, float* scratch) {
  const std::size_t at = cursor.at;
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

inline Entries entries_of_columns(const Sparse& w, std::size_t left, std::size_t end, Cursor& cursor, float* scratch) {
  const std::size_t at = cursor.at;
  const std::uint16_t* c = static_cast<const std::uint16_t*>(w.positions) + at;
  std::size_t n = 0;
  while (n + 8 <= left && c[n + 7] < end) n += 8;
  while (n < left && c[n] < end) ++n;
  cursor.at += n;
  return {c, values_of(w, at, n, scratch), n, 0};
}

// The entries of a row in columns [begin, end), of which the cursor stands before the first. Columns and numbers that
// are not stored as such are written to `columns` and `scratch`.
inline Entries next_entries(const Sparse& w, std::size_t row, std::size_t begin, std::size_t end, Cursor& cursor,
                            std::uint16_t* columns, float* scratch) {
  const std::size_t left = static_cast<std::size_t>(w.row_offsets[row + 1]) - cursor.at;
  switch (w.layout) {
    case Layout::mask:
      return entries_of_mask(w, row, begin, end, cursor, columns, scratch);
    case Layout::block:
      return entries_of_blocks(w, row, begin, end, cursor, columns, scratch);
    case Layout::index8:
      return entries_of_gaps(w, left, end, cursor, columns, scratch);
    default:
      return entries_of_columns(w, left, end, cursor, scratch);
  }
}

// ---- bands ---------------------------------------------------------------------------------------------------

// Prefetches the positions and numbers of the next band while one is multiplied: a visit to a row must know where its
// entries end before it can go on, so a miss would stop everything.
struct BandPrefetcher {
  Prefetcher positions, values;

  static const char* at(const void* base, std::size_t n, std::size_t bits) {
    return static_cast<const char*>(base) + n * bits / 8;
  }
  static BandPrefetcher of(const Sparse& w, std::size_t row, std::size_t end, std::size_t steps) {
    const std::size_t a = static_cast<std::size_t>(w.row_offsets[row]),
                      b = static_cast<std::size_t>(w.row_offsets[end]);
    const void* base = value_bytes(w);
    std::size_t bits = value_bits(w);
    if (w.layout == Layout::block) bits *= kBlockLength;
    const Prefetcher values(at(base, a, bits), at(base, b, bits), steps);
    if (w.layout == Layout::mask || w.layout == Layout::block)
      return {Prefetcher(at(w.positions, row, 8 * w.row_bytes), at(w.positions, end, 8 * w.row_bytes), steps), values};
    bits = w.layout == Layout::index16 ? 16 : 8;
    return {Prefetcher(at(w.positions, a, bits), at(w.positions, b, bits), steps), values};
  }
};

template <std::size_t Width>
void linear_tile(const Sparse& w, const float* tile, std::size_t batch, std::size_t first, const float* bias, float* y,
                 std::size_t begin, std::size_t end) {
  constexpr std::size_t stretch = kTileNumbers / Width;
  float scratch[stretch + 2 * kSlack], sums[kTileBand * Width];
  std::uint16_t columns[stretch + kSlack];
  Cursor cursors[kTileBand];
  for (std::size_t top = begin; top < end; top += kTileBand) {
    const std::size_t rows = end - top < kTileBand ? end - top : kTileBand;
    for (std::size_t r = 0; r < rows; ++r) cursors[r] = {static_cast<std::size_t>(w.row_offsets[top + r]), 0};
    std::memset(sums, 0, rows * Width * sizeof(float));
    const std::size_t next = top + rows, after = w.rows - next < kTileBand ? w.rows : next + kTileBand;
    BandPrefetcher next_band = BandPrefetcher::of(w, next, after, rows * (w.cols / stretch + 1));
    for (std::size_t c0 = 0; c0 < w.cols; c0 += stretch) {
      const std::size_t c1 = w.cols - c0 < stretch ? w.cols : c0 + stretch;
      for (std::size_t r = 0; r < rows; ++r) {
        const Entries e = next_entries(w, top + r, c0, c1, cursors[r], columns, scratch);
        next_band.positions.step();
        next_band.values.step();
        accumulate_tile<Width>(e.columns, e.values, e.n, tile + e.origin * Width, sums + r * Width);
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
