// Dense rows to positions and numbers, and back. A row of ten columns in each layout:
//
//   dense     0 a 0 0 b 0 0 0 c 0
//   numbers   a b c
//   mask      0100 1000 | 10            a bit for each column, lowest first; rows start on a byte
//   index16   1 4 8                     columns
//   index8    1 2 3                     gaps: columns skipped before each entry
//
// A gap above 255 is bridged by entries of value zero. Rows are moved eight elements at a time: a byte of the mask
// picks a row of kBits, which says where the elements of its bits stand among eight.

// Counts the bits among the first n of a mask.
std::size_t count_bits(const std::uint8_t* mask, std::size_t n) {
  std::size_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64)
    count += static_cast<std::size_t>(__builtin_popcountll(load<std::uint64_t>(mask + i / 8)));
  const std::uint64_t rest = load_part<std::uint64_t>(mask + i / 8, (n - i + 7) / 8);
  return count + static_cast<std::size_t>(__builtin_popcountll(rest & ((std::uint64_t{1} << (n - i)) - 1)));
}

// ---- dense to sparse and back --------------------------------------------------------------------------------

// Writes the mask of n elements; returns how many are not zero.
template <class U>
std::size_t nonzero_mask(const void* from, std::size_t n, std::uint8_t* mask) {
  const U* x = static_cast<const U*>(from);
  std::size_t count = 0, i = 0;
  if constexpr (kNonzeroAtOnce<U> == 64) {
    for (; i + 64 <= n; i += 64) {
      const std::uint64_t bits = nonzero_bits_of_64(x + i);
      store(mask + i / 8, bits);
      count += static_cast<std::size_t>(__builtin_popcountll(bits));
    }
  }
  for (; i + 8 <= n; i += 8) {
    const unsigned bits = nonzero_bits(x + i);
    mask[i / 8] = static_cast<std::uint8_t>(bits);
    count += popcount(bits);
  }
  if (i < n) {
    unsigned bits = 0;
    for (std::size_t j = 0; i + j < n; ++j) bits |= static_cast<unsigned>(nonzero(x[i + j])) << j;
    mask[i / 8] = static_cast<std::uint8_t>(bits);
    count += popcount(bits);
  }
  return count;
}

// Moves the `count` elements under the mask to the front. Eight are written at a time while there is room for them.
template <class U>
void compress_row(const void* from, const std::uint8_t* mask, std::size_t cols, std::size_t count, void* values) {
  const U* x = static_cast<const U*>(from);
  U* to = static_cast<U*>(values);
  const U* const end = to + count;
  std::size_t i = 0;
  for (; i + 8 <= cols && end - to >= 8; i += 8) {
    const unsigned bits = mask[i / 8];
    gather_eight(x + i, bits, to);
    to += popcount(bits);
  }
  for (; i < cols; ++i) {
    if (mask[i / 8] >> (i % 8) & 1) *to++ = x[i];
  }
}

// The inverse of compress_row(): zeros where the mask has none. Eight are read at a time while there are so many.
template <class U>
void expand_row(const std::uint8_t* mask, const void* values, std::size_t count, std::size_t cols, void* out) {
  const U* from = static_cast<const U*>(values);
  const U* const end = from + count;
  U* x = static_cast<U*>(out);
  std::size_t i = 0;
  for (; i + 8 <= cols && end - from >= 8; i += 8) {
    const unsigned bits = mask[i / 8];
    if constexpr (sizeof(U) == 4) {
      store(x + i, spread(load<Eight>(from), bits));
    } else {
      for (int j = 0; j < 8; ++j) {
        const std::uint8_t rank = kBits.rank[bits][j];
        const U value = from[rank & 7];
        x[i + static_cast<std::size_t>(j)] = rank == kNone ? U{0} : value;
      }
    }
    from += popcount(bits);
  }
  for (; i < cols; ++i) x[i] = mask[i / 8] >> (i % 8) & 1 ? *from++ : U{0};
}

// Writes `count` elements to their columns, and zeros elsewhere.
template <class U>
void scatter_row(const std::uint16_t* columns, const void* values, std::size_t count, std::size_t cols, void* out) {
  const U* from = static_cast<const U*>(values);
  U* x = static_cast<U*>(out);
  std::memset(x, 0, cols * sizeof(U));
  for (std::size_t i = 0; i < count; ++i) x[columns[i]] = from[i];
}

std::size_t nonzero_mask_any(int width, const void* x, std::size_t n, std::uint8_t* mask) {
  return by_width(width, [&](auto u) { return nonzero_mask<decltype(u)>(x, n, mask); });
}

void compress_row_any(int width, const void* x, const std::uint8_t* mask, std::size_t cols, std::size_t count,
                      void* values) {
  by_width(width, [&](auto u) { compress_row<decltype(u)>(x, mask, cols, count, values); });
}

void expand_row_any(int width, const std::uint8_t* mask, const void* values, std::size_t count, std::size_t cols,
                    void* out) {
  by_width(width, [&](auto u) { expand_row<decltype(u)>(mask, values, count, cols, out); });
}

void scatter_row_any(int width, const std::uint16_t* columns, const void* values, std::size_t count, std::size_t cols,
                     void* out) {
  by_width(width, [&](auto u) { scatter_row<decltype(u)>(columns, values, count, cols, out); });
}

// ---- columns -------------------------------------------------------------------------------------------------

// Writes the columns of a mask's set bits, and returns how many there are. There must be room for 7 more.
std::size_t mask_columns(const std::uint8_t* mask, std::size_t cols, std::uint16_t* columns) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < cols; i += 8) {
    const unsigned bits = mask[i / 8];
    store(columns + count, widen_bytes(kBits.place[bits]) + static_cast<std::uint16_t>(i));
    count += popcount(bits);
  }
  return count;
}

// Writes the gap of each entry: its distance from the one before, less one, where the first counts from column -1. Gaps
// above 255 are bridged by entries of value zero. Returns the number of entries with these; `gaps` may be null.
std::size_t column_gaps(const std::uint16_t* columns, std::size_t count, std::uint8_t* gaps) {
  if (count == 0) return 0;
  std::size_t steps = columns[0] / 256u;
  for (std::size_t i = 1; i < count; ++i) steps += static_cast<std::uint16_t>(columns[i] - columns[i - 1] - 1) / 256u;
  if (!gaps) return count + steps;
  if (steps == 0) {
    gaps[0] = static_cast<std::uint8_t>(columns[0]);
    for (std::size_t i = 1; i < count; ++i) gaps[i] = static_cast<std::uint8_t>(columns[i] - columns[i - 1] - 1);
    return count;
  }
  std::size_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t gap = columns[i] - next;
    next = columns[i] + std::size_t{1};
    for (; gap > 255; gap -= 256) *gaps++ = 255;
    *gaps++ = static_cast<std::uint8_t>(gap);
  }
  return count + steps;
}

// Eight columns from their gaps, of which `left` exist, and the column before them in all lanes. Their prefix sums take
// three steps, and the carry from eight to eight stays in a vector:
//
//   gaps + 1     a   b     c       d         ...
//   + 1 lane     a   a+b   b+c     c+d       ...
//   + 2 lanes    a   a+b   a+b+c   a+b+c+d   ...         and 4 lanes for the other four
inline Columns columns_of_gaps(const std::uint8_t* gaps, std::size_t left, Columns before) {
  std::uint8_t part[8] = {};
  if (left < 8) {
    std::memcpy(part, gaps, left);
    gaps = part;
  }
  const Columns zero = {};
  Columns c = widen_bytes(gaps) + std::uint16_t{1};
  c += __builtin_shufflevector(zero, c, 0, 8, 9, 10, 11, 12, 13, 14);
  c += __builtin_shufflevector(zero, c, 0, 1, 8, 9, 10, 11, 12, 13);
  c += __builtin_shufflevector(zero, c, 0, 1, 2, 3, 8, 9, 10, 11);
  return c + before;
}

// The last of eight columns, in all lanes.
inline Columns last_column(Columns c) { return __builtin_shufflevector(c, c, 7, 7, 7, 7, 7, 7, 7, 7); }

// Writes the columns of `count` gaps, of which the first counts from `next`.
void gap_columns(const std::uint8_t* gaps, std::size_t count, std::uint16_t next, std::uint16_t* columns) {
  Columns c = Columns{} + static_cast<std::uint16_t>(next - 1);
  for (std::size_t i = 0; i < count; i += 8) {
    c = columns_of_gaps(gaps + i, count - i, last_column(c));
    store(columns + i, c);
  }
}
