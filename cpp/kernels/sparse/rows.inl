// Products of few rows of x with sparse rows: of one, or of up to kFewRows at a time.
//
// The numbers of a row lie without gaps; its positions say which elements of x they meet. Under a mask:
//
//   mask      1 0 0 1 | 0 1 1 0 | ...         bits of the row, lowest first
//   numbers   a b c d ...                     those of the set bits, in order
//   vector    a 0 0 b | 0 c d 0 | ...         spread: the next numbers go to the lanes whose bits are set
//   x         x x x x | x x x x | ...         loaded as it lies
//   partial   column c goes to partial sum c % 16
//
// With the column of each entry (index16), or its gap (index8), x is gathered instead:
//
//   columns   3 17 18 40 | ...                one for each entry
//   vector    a b  c  d  | ...                numbers, loaded as they lie
//   x         x[3] x[17] x[18] x[40] | ...
//   partial   entry k goes to partial sum k % 16
//
// A block is a bit of the mask and 16 numbers: both vectors are loaded as they lie.
//
// Sums have kPartials partial sums for each stretch of kSparseStretch columns (or entries). The partial sums of the
// stretches are added up one by one, and at the end as a tree.

// Kernels may read as many numbers behind the last one that they need.
constexpr std::size_t kSlack = 16;

// Returns numbers [begin, begin + n) of w, n at most kSparseStretch, so that kSlack more may be read. At the very end
// of w they are copied to `scratch`, which holds n + kSlack.
template <class T>
inline const T* numbers_of(const Sparse& w, std::size_t begin, std::size_t n, T* scratch) {
  const T* numbers = static_cast<const T*>(w.values) + begin;
  if (begin + n + kSlack <= w.count) return numbers;
  std::memcpy(scratch, numbers, n * sizeof(T));
  return scratch;
}

// Decodes codes [begin, begin + n) of the first row into `out`, which holds n + 2 * kSlack numbers, with the bits of
// dequantize(). Returns where the first of them is. Codes are decoded from a multiple of 16 on, as groups mostly are:
// so few vectors are decoded twice because a group ends in them.
inline const float* decode_codes(const Quantized& q, std::size_t begin, std::size_t n, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t skip = begin % 16, first = begin - skip, all = n + skip;
  std::uint8_t buffer[kSparseStretch + 3 * kSlack];
  const std::uint8_t* codes = q.codes + packed_bytes(first, q.bits);
  if (q.bits < 8 || first + all + kSlack > q.cols) {
    unpack_any(q.bits, codes, all, buffer);
    codes = buffer;
  }
  std::size_t g = first / q.group, next = (g + 1) * q.group - first;
  for (std::size_t i = 0; i < all; ++g, next += q.group) {
    const std::size_t end = next < all ? next : all;
    const Decoder value(param_at(q, q.scale, g), param_at(q, q.minimum, g));
    if (value.twice == 1.0f) {
      for (; i < end; i += lanes) store(out + i, value.minimum + value.scale * float_of_bytes(codes + i));
    } else {
      for (; i < end; i += lanes) store(out + i, value(float_of_bytes(codes + i)));
    }
    i = end;
  }
  return out + skip;
}

// Returns numbers_of() as float: in place if they are stored so, otherwise decoded into `scratch`, which holds
// n + 2 * kSlack.
inline const float* values_of(const Sparse& w, std::size_t begin, std::size_t n, float* scratch) {
  const auto decode = [&](auto type) {
    decltype(type) last[kSparseStretch + kSlack];
    const auto* numbers = numbers_of(w, begin, n, last);
    for (std::size_t i = 0; i < n; i += 8) store(scratch + i, load_eight(numbers + i));
    return scratch;
  };
  if (w.quantized) return decode_codes(*w.quantized, begin, n, scratch);
  if (w.type == Float::f16) return decode(Half{});
  if (w.type == Float::bf16) return decode(Brain{});
  return numbers_of(w, begin, n, scratch);
}

inline std::size_t value_bits(const Sparse& w) {
  return w.quantized ? static_cast<std::size_t>(w.quantized->bits) : w.type == Float::f32 ? 32 : 16;
}

inline const std::uint8_t* value_bytes(const Sparse& w) {
  return w.quantized ? w.quantized->codes : static_cast<const std::uint8_t*>(w.values);
}

// Partial sums, in as many vectors as they fill.
struct Partials {
  Spread part[kPartials / kSpread] = {};

  void add(const Partials& other) {
    for (std::size_t p = 0; p < kPartials / kSpread; ++p) part[p] += other.part[p];
  }
  float sum() const { return tree<float>(part); }
};

// Prefetches memory into L2 in steps, every line once. The prefetcher of a core falls behind where loads overlap and
// run at an uneven pace, and one line that is left out costs as much as many.
class Prefetcher {
 public:
  Prefetcher(const void* begin, const void* end, std::size_t steps)
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

// The sums of `Rows` rows under masks with `Batch` rows of x, which are `stride` apart: sums[row][batch]. The rows
// share the loads of x, the rows of x share the spread numbers, and the chains of additions overlap. T is the type that
// numbers are loaded as: the stored one, or float where `Decoded`, for those that are decoded a stretch at a time. The
// function is long because the pointers and sums of all rows must stay in registers across its loops.
template <class T, bool Decoded, std::size_t Rows, std::size_t Batch>
void dot_masks(const Sparse& w, std::size_t row, const float* x, std::size_t stride, float* sums) {
  T scratch[Rows][kSparseStretch + 2 * kSlack];
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  std::size_t at[Rows];
  for (std::size_t r = 0; r < Rows; ++r) at[r] = static_cast<std::size_t>(w.row_offsets[row + r]);
  // While these rows are multiplied, the next ones are prefetched.
  const std::size_t next = static_cast<std::size_t>(w.row_offsets[row + Rows]),
                    far = static_cast<std::size_t>(w.row_offsets[w.rows - row < 2 * Rows ? w.rows : row + 2 * Rows]);
  const std::size_t width = value_bits(w);
  const std::uint8_t* const values = value_bytes(w);
  Prefetcher next_values(values + next * width / 8, values + far * width / 8, w.cols / 64 + 1),
      next_masks(mask + Rows * w.row_bytes, mask + 2 * Rows * w.row_bytes, w.cols / 512 + 1);

  Partials total[Rows][Batch];
  for (std::size_t begin = 0; begin < w.cols; begin += kSparseStretch) {
    const std::size_t n = w.cols - begin < kSparseStretch ? w.cols - begin : kSparseStretch;
    const T* numbers[Rows];
    for (std::size_t r = 0; r < Rows; ++r) {
      if constexpr (Decoded) {
        numbers[r] = values_of(w, at[r], count_bits(mask + r * w.row_bytes + begin / 8, n), scratch[r]);
      } else {
        const std::size_t left = static_cast<std::size_t>(w.row_offsets[row + r + 1]) - at[r];
        numbers[r] = numbers_of(w, at[r], left < n ? left : n, scratch[r]);
      }
    }
    const T* first[Rows];
    std::memcpy(first, numbers, sizeof first);
    Partials partial[Rows][Batch];
    const auto multiply = [&](std::size_t c, const std::uint64_t (&words)[Rows], std::size_t columns) {
      for (std::size_t p = 0; p < columns / kSpread; ++p) {
        const std::uint64_t below = (std::uint64_t{1} << (p * kSpread)) - 1;
        Spread xs[Batch];
        for (std::size_t b = 0; b < Batch; ++b) xs[b] = load<Spread>(x + b * stride + c + p * kSpread);
        for (std::size_t r = 0; r < Rows; ++r) {
          const unsigned bits = in_register(static_cast<unsigned>(words[r] >> (p * kSpread)) & ((1u << kSpread) - 1));
          const std::size_t before = static_cast<std::size_t>(__builtin_popcountll(words[r] & below));
          const Spread spread = spread_numbers(numbers[r] + before, bits);
          for (std::size_t b = 0; b < Batch; ++b) partial[r][b].part[p % (kPartials / kSpread)] += spread * xs[b];
        }
      }
      for (std::size_t r = 0; r < Rows; ++r) numbers[r] += __builtin_popcountll(words[r]);
    };
    std::size_t c = begin;
    for (; c + 64 <= begin + n; c += 64) {
      std::uint64_t words[Rows];
      for (std::size_t r = 0; r < Rows; ++r) words[r] = load<std::uint64_t>(mask + r * w.row_bytes + c / 8);
      next_values.step();
      if (c % 512 == 0) next_masks.step();
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
      at[r] += static_cast<std::size_t>(numbers[r] - first[r]);
      for (std::size_t b = 0; b < Batch; ++b) total[r][b].add(partial[r][b]);
    }
  }
  for (std::size_t r = 0; r < Rows; ++r) {
    for (std::size_t b = 0; b < Batch; ++b) sums[r * Batch + b] = total[r][b].sum();
  }
}

// The sum of one row of blocks. A stretch is one word of the mask: 64 blocks.
inline float dot_blocks(const Sparse& w, std::size_t row, const float* x) {
  static_assert(kSparseStretch == 64 * kBlockLength);
  float scratch[kSparseStretch + 2 * kSlack];
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(w.positions) + row * w.row_bytes;
  std::size_t at = kBlockLength * static_cast<std::size_t>(w.row_offsets[row]);
  Partials total;
  for (std::size_t begin = 0; begin < w.cols; begin += kSparseStretch, mask += 8) {
    const std::size_t left = (w.cols - begin + 8 * kBlockLength - 1) / (8 * kBlockLength);  // bytes of mask
    std::uint64_t word = load_part<std::uint64_t>(mask, left < 8 ? left : 8);
    const std::size_t count = kBlockLength * static_cast<std::size_t>(__builtin_popcountll(word));
    const float* values = values_of(w, at, count, scratch);
    at += count;
    Partials partial;
    for (; word != 0; word &= word - 1, values += kBlockLength) {
      const float* xs = x + begin + kBlockLength * static_cast<std::size_t>(__builtin_ctzll(word));
      for (std::size_t p = 0; p < kPartials / kSpread; ++p)
        partial.part[p] += load<Spread>(values + p * kSpread) * load<Spread>(xs + p * kSpread);
    }
    total.add(partial);
  }
  return total.sum();
}

// The sum of one row by columns or gaps: an Index of two bytes is a column, of one byte a gap. T and Decoded as above.
// Numbers of x are loaded one by one, which is twice as fast as the gather instruction, but for the CPUs that
// gathers_fast() names. The function is long because its lambdas share the place that gaps count from and the partial
// sums, which must stay in registers.
template <class T, bool Decoded, class Index>
float dot_columns(const Sparse& w, std::size_t row, const float* x) {
  T scratch[kSparseStretch + 2 * kSlack];
  const std::size_t first = static_cast<std::size_t>(w.row_offsets[row]),
                    end = static_cast<std::size_t>(w.row_offsets[row + 1]);
  Four total[4] = {};
  std::size_t next = 0;  // the column behind the last entry
  for (std::size_t at = first; at < end; at += kSparseStretch) {
    const std::size_t n = end - at < kSparseStretch ? end - at : kSparseStretch;
    const T* v;
    if constexpr (Decoded) {
      v = values_of(w, at, n, scratch);
    } else {
      v = static_cast<const T*>(w.values) + at;
    }
    const Index* index = static_cast<const Index*>(w.positions) + at;
    const auto prefetch_entries = [&](std::size_t i) {
      if constexpr (!Decoded) __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 8192, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(index + i) + 4096, 0, 2);
    };
    // Gathers x at four entries. `before` is how many entries lie between them and `next`: so each gap costs one
    // addition, and the ones of "less one" are added to the pointer.
    const auto gather = [&](std::size_t i, std::size_t before) {
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
    if constexpr (kHasGather && sizeof(Index) == 2) {
      if (gathers_fast()) {
        Vec<float> sums = {};
        for (; i + 16 <= n; i += 16) {
          prefetch_entries(i);
          sums += gather_sixteen(x, index + i) * load_sixteen(v + i);
        }
        std::memcpy(sum, &sums, sizeof sum);
      }
    }
    for (; i + 16 <= n; i += 16) {
      prefetch_entries(i);
      for (std::size_t j = 0; j < 4; ++j) sum[j] += gather(i + 4 * j, 4 * j) * load_four(v + i + 4 * j);
      next += 16;
    }
    prefetch_entries(i);
    const auto add_rest = [&](Four& to) {
      if (i >= n) return;
      if (i + 4 <= n) {
        to += gather(i, 0) * load_four(v + i);
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
    for (Four& to : sum) add_rest(to);
    for (std::size_t j = 0; j < 4; ++j) total[j] += sum[j];
  }
  return tree<float>(total);
}

// The sums of one row by columns or gaps with kFewRows rows of x, which lie [cols][kFewRows]. So an entry loads its
// number once, and one vector of x.
//
//   numbers   a a a a | b b b b | ...                     each one as often as there are rows of x
//   x         x[3][0] .. x[3][3] | x[17][0] .. x[17][3] | ...
//   partial   entry k goes to partial sum k % 16 of each row of x
inline void dot_columns_of_few(const Sparse& w, std::size_t row, const float* x, float* sums) {
  using V = Vec<float>;
  static_assert(kFewRows == 4);
  constexpr std::size_t at_once = kLanes<float> / kFewRows, vectors = kPartials / at_once;
  float scratch[kSparseStretch + 2 * kSlack];
  std::uint16_t memory[kSparseStretch + 8];
  const std::size_t first = static_cast<std::size_t>(w.row_offsets[row]),
                    end = static_cast<std::size_t>(w.row_offsets[row + 1]);
  Four total[kPartials] = {};
  std::uint16_t next = 0;
  for (std::size_t at = first; at < end; at += kSparseStretch) {
    const std::size_t n = end - at < kSparseStretch ? end - at : kSparseStretch;
    const float* const values = values_of(w, at, n, scratch);
    const std::uint16_t* columns = static_cast<const std::uint16_t*>(w.positions) + at;
    if (w.layout == Layout::index8) {
      gap_columns(static_cast<const std::uint8_t*>(w.positions) + at, n, next, memory);
      columns = memory;
      next = static_cast<std::uint16_t>(memory[n - 1] + 1);
    }
    V sum[vectors] = {};
    std::size_t i = 0;
    const auto add = [&](std::size_t j, std::size_t k) {
      sum[j] += load_fours(x, columns + k) * repeat_fours(values + k);
    };
    for (; i + kPartials <= n; i += kPartials) {
      __builtin_prefetch(reinterpret_cast<const char*>(values + i) + 8192, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(columns + i) + 4096, 0, 2);
      for (std::size_t j = 0; j < vectors; ++j) add(j, i + j * at_once);
    }
    const std::size_t whole = i;
    unroll<vectors>([&](auto j) {
      if (i + at_once > n) return;
      add(j.value, i);
      i += at_once;
    });
    Four part[kPartials];
    std::memcpy(part, sum, sizeof part);
    for (; i < n; ++i) part[i - whole] += load<Four>(x + kFewRows * columns[i]) * values[i];
    for (std::size_t p = 0; p < kPartials; ++p) total[p] += part[p];
  }
  for (std::size_t half = kPartials / 2; half > 0; half /= 2) {
    for (std::size_t p = 0; p < half; ++p) total[p] += total[p + half];
  }
  store(sums, total[0]);
}

// Calls call(T{}, decoded) with the type that numbers are loaded as.
template <class Call>
inline void by_numbers(const Sparse& w, Call call) {
  if (w.quantized) return call(float{}, std::true_type{});
  if (w.type == Float::f16) return call(Half{}, std::false_type{});
  if (w.type == Float::bf16) return call(Brain{}, std::false_type{});
  call(float{}, std::false_type{});
}

// One row of x: its products with rows [begin, end).
template <class T, bool Decoded>
void linear_one(const Sparse& w, const float* x, const float* bias, float* y, std::size_t begin, std::size_t end) {
  constexpr std::size_t together = 4;  // rows under masks
  for (std::size_t row = begin, rows; row < end; row += rows) {
    rows = w.layout == Layout::mask && end - row >= together ? together : 1;
    float sums[together];
    if (rows == together) {
      dot_masks<T, Decoded, together, 1>(w, row, x, 0, sums);
    } else if (w.layout == Layout::mask) {
      dot_masks<T, Decoded, 1, 1>(w, row, x, 0, sums);
    } else {
      sums[0] = w.layout == Layout::block     ? dot_blocks(w, row, x)
                : w.layout == Layout::index16 ? dot_columns<T, Decoded, std::uint16_t>(w, row, x)
                                              : dot_columns<T, Decoded, std::uint8_t>(w, row, x);
    }
    for (std::size_t r = 0; r < rows; ++r) y[row + r] = bias ? sums[r] + bias[row + r] : sums[r];
  }
}

void linear_sparse(const Sparse& w, const float* x, std::size_t stride, std::size_t batch, const float* bias, float* y,
                   std::size_t begin, std::size_t end) {
  if (batch == 1) {
    return by_numbers(w, [&](auto type, auto decoded) {
      linear_one<decltype(type), decltype(decoded)::value>(w, x, bias, y, begin, end);
    });
  }
  // Two rows under masks share the loads of x, which is too large for L1, where there are registers for their sums.
  constexpr std::size_t together = kSpread == 16 ? 2 : 1;
  for (std::size_t row = begin, rows; row < end; row += rows) {
    float sums[together][kFewRows];
    rows = 1;
    if (w.layout == Layout::block) {
      for (std::size_t b = 0; b < batch; ++b) sums[0][b] = dot_blocks(w, row, x + b * stride);
    } else if (w.layout == Layout::mask) {
      rows = end - row < together ? 1 : together;
      rows == 1 ? dot_masks<float, true, 1, kFewRows>(w, row, x, stride, sums[0])
                : dot_masks<float, true, together, kFewRows>(w, row, x, stride, sums[0]);
    } else {
      dot_columns_of_few(w, row, x, sums[0]);
    }
    for (std::size_t b = 0; b < batch; ++b) {
      for (std::size_t r = 0; r < rows; ++r) {
        y[b * w.rows + row + r] = bias ? sums[r][b] + bias[row + r] : sums[r][b];
      }
    }
  }
}
