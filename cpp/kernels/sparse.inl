// Bit mask and packed non-zeros, and products with them. Elements are integers of their width: whatever the float type,
// an element is zero when all bits but the sign are.

template <class U>
inline bool nonzero(U bits) {
  return static_cast<U>(bits << 1) != 0;
}

template <class U>
std::size_t count_nonzero(const void* from, std::size_t n) {
  const U* x = static_cast<const U*>(from);
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) count += nonzero(x[i]);
  return count;
}

// Set bits among the first n of a mask.
inline std::size_t count_bits(const std::uint8_t* mask, std::size_t n) {
  std::size_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64)
    count += static_cast<std::size_t>(__builtin_popcountll(load<std::uint64_t>(mask + i / 8)));
  const std::uint64_t rest = load_part<std::uint64_t>(mask + i / 8, (n - i + 7) / 8);
  return count + static_cast<std::size_t>(__builtin_popcountll(rest & ((std::uint64_t{1} << (n - i)) - 1)));
}

template <class U>
void compress_row(const void* from, std::size_t cols, std::uint8_t* mask, void* values) {
  const U* x = static_cast<const U*>(from);
  U* to = static_cast<U*>(values);
  for (std::size_t c = 0; c < cols; c += 8) {
    const std::size_t n = cols - c < 8 ? cols - c : 8;
    unsigned bits = 0;
    for (std::size_t j = 0; j < n; ++j) {
      if (nonzero(x[c + j])) {
        bits |= 1u << j;
        *to++ = x[c + j];
      }
    }
    mask[c / 8] = static_cast<std::uint8_t>(bits);
  }
}

template <class U>
void expand(const std::uint8_t* mask, const void* values, std::size_t cols, void* out) {
  const U* from = static_cast<const U*>(values);
  U* x = static_cast<U*>(out);
  for (std::size_t c = 0; c < cols; ++c) {
    const bool set = mask[c / 8] >> (c % 8) & 1;
    x[c] = set ? *from : U{0};
    from += set;
  }
}

template <class Call>
auto by_width(int width, Call call) {
  switch (width) {
    case 2:
      return call(std::uint16_t{});
    case 4:
      return call(std::uint32_t{});
    default:
      return call(std::uint64_t{});
  }
}

std::size_t count_nonzero_any(int width, const void* x, std::size_t n) {
  return by_width(width, [&](auto u) { return count_nonzero<decltype(u)>(x, n); });
}

void compress_row_any(int width, const void* x, std::size_t cols, std::uint8_t* mask, void* values) {
  by_width(width, [&](auto u) { compress_row<decltype(u)>(x, cols, mask, values); });
}

void expand_row_any(int width, const std::uint8_t* mask, const void* values, std::size_t cols, void* out) {
  by_width(width, [&](auto u) { expand<decltype(u)>(mask, values, cols, out); });
}

void linear_masked(const Masked& w, const float* x, std::size_t batch, const float* bias, float* y, std::size_t begin,
                   std::size_t end) {
  float decoded[kStretch];
  std::size_t at = 0;
  linear(w.rows, w.cols, x, batch, bias, y, begin, end,
         [&](std::size_t row, std::size_t c0, std::size_t c1, float* out) {
           if (c0 == 0) at = static_cast<std::size_t>(w.row_offsets[row]);
           const std::uint8_t* mask = w.mask + row * w.row_bytes + c0 / 8;
           const std::size_t n = count_bits(mask, c1 - c0);
           const float* values = static_cast<const float*>(w.values) + at;
           if (w.quantized) {
             dequantize_any(*w.quantized, 0, at, at + n, decoded);
             values = decoded;
           }
           expand<std::uint32_t>(mask, values, c1 - c0, out);
           at += n;
         });
}
