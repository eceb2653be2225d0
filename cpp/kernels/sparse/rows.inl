// Products for few rows of x: one row of x after the other.

// The order of summation is fixed, so the result has the same bits on every instruction set and for any number of
// threads. By vectors: entry k of a stretch goes to partial sum k % 16, stretches are added up, and at last the
// sixteen as a tree. Under a mask k counts columns, elsewhere it counts entries.
constexpr std::size_t kReach = 1024;

// What kernels may read behind the last number that they need.
constexpr std::size_t kSlack = 16;

// Numbers [begin, begin + n) of what is stored, n at most kReach, so that kSlack more may be read: where they are, or
// at the very end in `scratch`, which holds n + kSlack.
template <class T>
inline const T* numbers_of(const Sparse& w, std::size_t begin, std::size_t n, T* scratch) {
  const T* from = static_cast<const T*>(w.values) + begin;
  if (begin + n + kSlack <= w.count) return from;
  std::memcpy(scratch, from, n * sizeof(T));
  return scratch;
}

// Codes [begin, begin + n) of the first row, as `dequantize` gives them, but kSlack more numbers may be written: groups
// need not end with a vector.
inline void decode_codes(const Quantized& q, std::size_t begin, std::size_t n, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t per_byte = static_cast<std::size_t>(8 / q.bits), skip = begin % per_byte;
  std::uint8_t block[kReach + 4 + kSlack];
  const std::uint8_t* codes = q.codes + begin / per_byte;
  if (q.bits < 8 || begin + n + kSlack > q.cols) {
    unpack_any(q.bits, codes, skip + n, block);
    codes = block + skip;
  }
  std::size_t g = begin / q.group, next = (g + 1) * q.group - begin;
  for (std::size_t i = 0; i < n; ++g, next += q.group) {
    const std::size_t end = next < n ? next : n;
    const Decoder value(param_at(q, q.scale, g), param_at(q, q.minimum, g));
    for (; i < end; i += lanes) store(out + i, value(float_of_bytes(codes + i)));
    i = end;
  }
}

// The same as float, decoded into `scratch` if they are stored otherwise.
inline const float* values_of(const Sparse& w, std::size_t begin, std::size_t n, float* scratch) {
  const auto decode = [&](auto type) {
    decltype(type) last[kReach + kSlack];
    const auto* from = numbers_of(w, begin, n, last);
    for (std::size_t i = 0; i < n; i += 8) store(scratch + i, load_eight(from + i));
    return scratch;
  };
  if (w.quantized) {
    decode_codes(*w.quantized, begin, n, scratch);
    return scratch;
  }
  if (w.type == Float::f16) return decode(Half{});
  if (w.type == Float::bf16) return decode(Brain{});
  return numbers_of(w, begin, n, scratch);
}

inline float tree(const Four (&s)[4]) {
  const Four four = (s[0] + s[2]) + (s[1] + s[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Sixteen partial sums.
struct Sixteen {
  Spread part[16 / kSpread] = {};

  void add(const Sixteen& other) {
    for (std::size_t p = 0; p < 16 / kSpread; ++p) part[p] += other.part[p];
  }
  float sum() const {
    Four s[4];
    std::memcpy(s, part, sizeof s);
    return tree(s);
  }
};

// Fetches memory into the outer cache in steps, every line once: the cores' own prefetching falls behind where loads
// overlap and run at an uneven pace, and a line that is left out costs as much as many that are not.
class Ahead {
 public:
  Ahead(const void* begin, const void* end, std::size_t steps)
      : at_(static_cast<const char*>(begin)),
        left_((static_cast<std::size_t>(static_cast<const char*>(end) - at_) + 127) / 64),
        lines_((left_ + steps - 1) / steps) {}

  void step() {
    if (left_ < lines_) return;
    for (std::size_t i = 0; i < lines_; ++i) __builtin_prefetch(at_ + 64 * i, 0, 2);
    at_ += 64 * lines_;
    left_ -= lines_;
  }

 private:
  const char* at_;
  std::size_t left_, lines_;
};

// The sums of `Rows` rows under their masks: they share the loads of x, and their chains of additions overlap.
// T is what the numbers are stored as; or float where `Decoded`, for those that are decoded a stretch at a time.
template <class T, bool Decoded, std::size_t Rows>
void dot_masks(const Sparse& w, std::size_t row, const float* x, float* sums) {
  T scratch[Rows][kReach + kSlack];
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  std::size_t at[Rows];
  for (std::size_t r = 0; r < Rows; ++r) at[r] = static_cast<std::size_t>(w.row_offsets[row + r]);
  const std::size_t next = static_cast<std::size_t>(w.row_offsets[row + Rows]),
                    far = static_cast<std::size_t>(w.row_offsets[w.rows - row < 2 * Rows ? w.rows : row + 2 * Rows]);
  const std::size_t width = Decoded ? static_cast<std::size_t>(w.quantized->bits) : 8 * sizeof(T);
  const std::uint8_t* const values = Decoded ? w.quantized->codes : static_cast<const std::uint8_t*>(w.values);
  Ahead ahead(values + next * width / 8, values + far * width / 8, w.cols / 64 + 1),
      ahead_mask(mask + Rows * w.row_bytes, mask + 2 * Rows * w.row_bytes, w.cols / 512 + 1);

  Sixteen total[Rows];
  for (std::size_t begin = 0; begin < w.cols; begin += kReach) {
    const std::size_t n = w.cols - begin < kReach ? w.cols - begin : kReach;
    const T* from[Rows];
    for (std::size_t r = 0; r < Rows; ++r) {
      if constexpr (Decoded) {
        from[r] = values_of(w, at[r], count_bits(mask + r * w.row_bytes + begin / 8, n), scratch[r]);
      } else {
        const std::size_t left = static_cast<std::size_t>(w.row_offsets[row + r + 1]) - at[r];
        from[r] = numbers_of(w, at[r], left < n ? left : n, scratch[r]);
      }
    }
    const T* first[Rows];
    std::memcpy(first, from, sizeof first);
    Sixteen partial[Rows];
    const auto multiply = [&](std::size_t c, const std::uint64_t (&words)[Rows], std::size_t columns) {
      for (std::size_t p = 0; p < columns / kSpread; ++p) {
        const std::uint64_t below = (std::uint64_t{1} << (p * kSpread)) - 1;
        const Spread xs = load<Spread>(x + c + p * kSpread);
        for (std::size_t r = 0; r < Rows; ++r) {
          const unsigned bits = in_register(static_cast<unsigned>(words[r] >> (p * kSpread)) & ((1u << kSpread) - 1));
          const std::size_t before = static_cast<std::size_t>(__builtin_popcountll(words[r] & below));
          partial[r].part[p % (16 / kSpread)] += spread_numbers(from[r] + before, bits) * xs;
        }
      }
      for (std::size_t r = 0; r < Rows; ++r) from[r] += __builtin_popcountll(words[r]);
    };
    std::size_t c = begin;
    for (; c + 64 <= begin + n; c += 64) {
      std::uint64_t words[Rows];
      for (std::size_t r = 0; r < Rows; ++r) words[r] = load<std::uint64_t>(mask + r * w.row_bytes + c / 8);
      ahead.step();
      if (c % 512 == 0) ahead_mask.step();
      multiply(c, words, 64);
    }
    for (; c < begin + n; c += 16) {
      std::uint64_t words[Rows];
      for (std::size_t r = 0; r < Rows; ++r) {
        const std::uint8_t* bytes = mask + r * w.row_bytes + c / 8;
        words[r] = c + 8 < w.cols ? bytes[0] | std::uint64_t{bytes[1]} << 8 : bytes[0];
      }
      multiply(c, words, 16);
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      at[r] += static_cast<std::size_t>(from[r] - first[r]);
      total[r].add(partial[r]);
    }
  }
  for (std::size_t r = 0; r < Rows; ++r) sums[r] = total[r].sum();
}

inline float dot_blocks(const Sparse& w, std::size_t row, const float* x) {
  float scratch[kReach + kSlack];
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  std::size_t at = kBlockLength * static_cast<std::size_t>(w.row_offsets[row]);
  Sixteen total;
  for (std::size_t begin = 0; begin < w.cols; begin += kReach, mask += 8) {
    const std::size_t left = (w.cols - begin + 8 * kBlockLength - 1) / (8 * kBlockLength);  // bytes of mask
    std::uint64_t word = load_part<std::uint64_t>(mask, left < 8 ? left : 8);
    const std::size_t count = kBlockLength * static_cast<std::size_t>(__builtin_popcountll(word));
    const float* from = values_of(w, at, count, scratch);
    at += count;
    Sixteen partial;
    for (; word != 0; word &= word - 1, from += kBlockLength) {
      const float* xs = x + begin + kBlockLength * static_cast<std::size_t>(__builtin_ctzll(word));
      for (std::size_t p = 0; p < 16 / kSpread; ++p)
        partial.part[p] += load<Spread>(from + p * kSpread) * load<Spread>(xs + p * kSpread);
    }
    total.add(partial);
  }
  return total.sum();
}

// Loading the numbers of x one by one is twice as fast as the gather instruction. T and Decoded as above; an Index is
// a column, or in a byte the distance from the one before less one.
template <class T, bool Decoded, class Index>
float dot_columns(const Sparse& w, std::size_t row, const float* x) {
  T scratch[kReach + kSlack];
  const std::size_t first = static_cast<std::size_t>(w.row_offsets[row]),
                    end = static_cast<std::size_t>(w.row_offsets[row + 1]);
  Four total[4] = {};
  std::size_t next = 0;
  for (std::size_t at = first; at < end; at += kReach) {
    const std::size_t n = end - at < kReach ? end - at : kReach;
    const T* v;
    if constexpr (Decoded) {
      v = values_of(w, at, n, scratch);
    } else {
      v = static_cast<const T*>(w.values) + at;
    }
    const Index* index = static_cast<const Index*>(w.positions) + at;
    const auto fetch = [&](std::size_t i) {
      if constexpr (!Decoded) __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 8192, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(index + i) + 4096, 0, 2);
    };
    // Numbers of x at four entries, `before` of them behind those that `next` is for: then a byte takes one addition.
    const auto four = [&](std::size_t i, std::size_t before) {
      const Index* q = index + i;
      if constexpr (sizeof(Index) == 2) {
        const std::uint64_t c = load<std::uint64_t>(q);
        return Four{x[c & 0xffff], x[c >> 16 & 0xffff], x[c >> 32 & 0xffff], x[c >> 48]};
      } else {
        const float* xs = x + before;
        const std::size_t c0 = next + q[0], c1 = c0 + q[1], c2 = c1 + q[2], c3 = c2 + q[3];
        next = c3;
        return Four{xs[c0], xs[c1 + 1], xs[c2 + 2], xs[c3 + 3]};
      }
    };
    Four sum[4] = {};
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
      fetch(i);
      for (std::size_t j = 0; j < 4; ++j) sum[j] += four(i + 4 * j, 4 * j) * load_four(v + i + 4 * j);
      next += 16;
    }
    fetch(i);
    const auto rest = [&](Four& to) {
      if (i >= n) return;
      if (i + 4 <= n) {
        to += four(i, 0) * load_four(v + i);
        next += 4;
      } else {
        Four xs = {}, vs = {};
        for (std::size_t j = 0; i + j < n; ++j) {
          const std::size_t column = sizeof(Index) == 2 ? index[i + j] : next + index[i + j];
          next = column + 1;
          xs[j] = x[column];
          vs[j] = number(v + i + j);
        }
        to += xs * vs;
      }
      i += 4;
    };
    for (Four& to : sum) rest(to);
    for (std::size_t j = 0; j < 4; ++j) total[j] += sum[j];
  }
  return tree(total);
}

// Calls call(T{}, decoded) with the type that numbers are loaded as.
template <class Call>
inline void by_numbers(const Sparse& w, Call call) {
  if (w.quantized) return call(float{}, std::true_type{});
  if (w.type == Float::f16) return call(Half{}, std::false_type{});
  if (w.type == Float::bf16) return call(Brain{}, std::false_type{});
  call(float{}, std::false_type{});
}

void linear_sparse(const Sparse& w, const float* x, std::size_t stride, std::size_t batch, const float* bias, float* y,
                   std::size_t begin, std::size_t end) {
  constexpr std::size_t together = 4;
  by_numbers(w, [&](auto type, auto decoded) {
    using T = decltype(type);
    constexpr bool Decoded = decltype(decoded)::value;
    for (std::size_t row = begin, rows; row < end; row += rows) {
      rows = w.layout == Layout::mask && end - row >= together ? together : 1;
      for (std::size_t b = 0; b < batch; ++b) {
        const float* xs = x + b * stride;
        float sums[together];
        if (rows == together) {
          dot_masks<T, Decoded, together>(w, row, xs, sums);
        } else if (w.layout == Layout::mask) {
          dot_masks<T, Decoded, 1>(w, row, xs, sums);
        } else {
          sums[0] = w.layout == Layout::block     ? dot_blocks(w, row, xs)
                    : w.layout == Layout::index16 ? dot_columns<T, Decoded, std::uint16_t>(w, row, xs)
                                                  : dot_columns<T, Decoded, std::uint8_t>(w, row, xs);
        }
        for (std::size_t r = 0; r < rows; ++r) {
          y[b * w.rows + row + r] = bias ? sums[r] + bias[row + r] : sums[r];
        }
      }
    }
  });
}
