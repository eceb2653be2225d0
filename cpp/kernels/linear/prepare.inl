// Rounding x to integers, and their layout beside the codes that they are multiplied with.
//
//   row of x, 32-bit floats    | 32 columns      | 32 columns      | ...      a scale for each: x ~ scale * n
//   n, limbs of one byte       | n = limbs[0] * 2^16 + limbs[1] * 2^8 + limbs[2], each limb signed
//
// A run of x holds the columns of a run of codes, in the order in which split() unpacks these. With 4 bits, byte j of
// the codes has columns 2 * j (low bits) and 2 * j + 1 (high bits):
//
//   limbs[l][0]    columns 0 2 4 ... 126      multiplied with codes[0], the low halves
//   limbs[l][1]    columns 1 3 5 ... 127      multiplied with codes[1], the high halves
//   scale[word], offset[word]                 for each of the 16 words

// Codes are counted from the middle of their range. Then the sums of codes and the share of the minimum are both small,
// and little cancels when they are added. The middle of two bits lies between two codes, so these are counted in half
// steps.
template <int Bits>
constexpr std::uint8_t kMiddle = Bits == 2 ? 3 : 1 << (Bits - 1);
template <int Bits>
constexpr float kStep = Bits == 2 ? 0.5f : 1.0f;
constexpr double middle_code(int bits) { return bits == 2 ? 1.5 : 1 << (bits - 1); }

// With three limbs and codes of more than 4 bits the sum of a span needs more than 32 bits, so the lowest limb has a
// sum of its own.
template <int Bits, int Limbs>
constexpr std::size_t kSums = Bits > 4 && Limbs == 3 ? 2 : 1;

// The part of x that is multiplied with one run of codes.
template <int Bits, int Limbs>
struct Run {
  std::int8_t limbs[Limbs][kParts<Bits>][kPart];  // bytes of n, the highest first, in the order of the codes
  float scale[kWords];  // of the span that the word is in, times the step in which codes count
  std::int32_t offset[kSums<Bits, Limbs>][kWords];  // minus the sum of middle * n over the columns of the word
};

// The runs of a row of W, the last of which may be short.
template <int Bits>
inline std::size_t runs_of(const Quantized& w) {
  return (w.row_bytes + kRunBytes<Bits> - 1) / kRunBytes<Bits>;
}

// The columns of these runs, for a width that is known at run time.
inline std::size_t run_columns(const Quantized& w) {
  const std::size_t word = 32 % w.bits == 0 ? 32 / static_cast<std::size_t>(w.bits) : 8, columns = kWords * word;
  return (w.cols + columns - 1) / columns * columns;
}

// T, or const T where Byte is const: memory that is written, or only read.
template <class Byte, class T>
using Like = std::conditional_t<std::is_const_v<Byte>, const T, T>;

// One prepared row of x, in memory of the caller.
template <int Bits, int Limbs, class Byte = const std::uint8_t>
struct Prepared {
  Like<Byte, Run<Bits, Limbs>>* runs;
  // For each group of W the sum of scale * n over its columns, filled up with zeros to 16; or, where a row of W is one
  // group, one double.
  Like<Byte, float>* group_sum;
  // For each word of each run, the place of its group among the sixteen that it belongs to.
  Like<Byte, std::uint8_t[kWords]>* lane;
  std::size_t bytes;

  Prepared() = default;
  Prepared(const Quantized& w, Byte* memory) {
    const std::size_t count = runs_of<Bits>(w), sixteens = (w.groups + kWords - 1) / kWords;
    runs = reinterpret_cast<decltype(runs)>(memory);
    group_sum = reinterpret_cast<decltype(group_sum)>(memory + count * sizeof *runs);
    lane = reinterpret_cast<decltype(lane)>(group_sum + sixteens * kWords);
    bytes = count * sizeof *runs + sixteens * kWords * sizeof(float) + (count + 3) / 4 * 4 * kWords;
  }
};

// ---- the sums of a word --------------------------------------------------------------------------------------

// The sum of (code - middle) * n over the columns of each of words [at, at + lanes) of a run, for several rows of W:
// exact but for one rounding to float32. Rows are computed side by side, so that none waits for its own last step.
template <int Bits, int Limbs, std::size_t Rows>
inline void word_sums(const Vec<std::uint8_t> (&codes)[Rows][kParts<Bits>], const Run<Bits, Limbs>& x, std::size_t at,
                      Vec<float> (&out)[Rows]) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  constexpr bool two_sums = kSums<Bits, Limbs> == 2;
  // Limbs above the last one by Horner's rule; the last one apart, so that sums wait less for each other.
  const auto dots = [&](Ints(&sum)[Rows], int l) {
    for (std::size_t r = 0; r < Rows; ++r) sum[r] = dot_words<Bits>(sum[r], codes[r], x.limbs[l][0] + 4 * at);
  };
  Ints last[Rows], sum[Rows] = {};
  for (Ints& row : last) row = load<Ints>(x.offset[kSums<Bits, Limbs> - 1] + at);
  for (int l = 0; l < Limbs - 1; ++l) {
    for (std::size_t r = 0; l > 0 && r < Rows; ++r) sum[r] <<= 8;
    dots(sum, l);
  }
  dots(last, Limbs - 1);
  for (std::size_t r = 0; r < Rows; ++r) {
    if constexpr (two_sums) {
      out[r] = convert<float, lanes>(sum[r] + load<Ints>(x.offset[0] + at)) * 256.0f + convert<float, lanes>(last[r]);
    } else {
      out[r] = convert<float, lanes>(Limbs == 1 ? last[r] : (sum[r] << 8) + last[r]);
    }
  }
}

// Unpacks words of 8 codes, as many as a vector has lanes of 32 bits: the first four codes of each to codes[0].
//
// With a shuffle of bytes, two codes at a time: they lie in two bytes, whatever the width.
//
//   shuffled   the two bytes that hold codes a and b, and bits of others beside them, in each 16 bits
//   shifted    a in the lowest bits, or b in the highest ones
//   codes      a in the lower byte, b in the upper one
template <int Bits>
inline void split_units(const std::uint8_t* from, Vec<std::uint8_t> (&codes)[2]) {
  constexpr std::size_t total = kLanes<float> * Bits, width = Bits;
  using Pair16 = Vec<std::uint16_t>;
  if constexpr (kShufflesBytes) {
    // Vector `v` has codes from number `first` on of a unit in each Bytes bytes.
    const auto spread = [](Vec<std::uint8_t> v, auto bytes, auto first, auto start, auto step) {
      constexpr std::size_t size = bytes.value, skip = first.value;
      const auto bit = [](std::size_t i) { return i % 16 / size * 8 * width + (skip + i % size / 2 * 2) * width; };
      const auto index = lanes_of<std::uint8_t>([&](std::size_t i) {
        const std::size_t at = start.value + i / 16 * step.value, byte = bit(i) / 8 + i % 2;
        return 8 * byte < bit(i) + 2 * width ? byte + at - lane_source<total>(at) : 0x80;
      });
      constexpr std::uint16_t low = (1 << Bits) - 1, high = low << 8;
      const Pair16 pairs = bit_cast<Pair16>(shuffle_bytes(v, index));
      if constexpr (kShiftsApart) {
        const Pair16 a = pairs >> lanes_of<std::uint16_t>([&](std::size_t i) { return bit(2 * i) % 8; });
        return bit_cast<Vec<std::uint8_t>>((a & low) | (a << (8 - Bits) & high));
      } else {
        const Pair16 b =
            pairs * lanes_of<std::uint16_t>([&](std::size_t i) { return 1 << (16 - 2 * width - bit(2 * i) % 8); });
        return bit_cast<Vec<std::uint8_t>>((b >> (16 - 2 * Bits) & low) | (b >> (8 - Bits) & high));
      }
    };
    if constexpr (4 * width <= 16) {  // four units lie in 16 bytes
      const Vec<std::uint8_t> units = load_lanes<0, 4 * width, total>(from);
      codes[0] = spread(units, Int<4>{}, Int<0>{}, Int<0>{}, Int<4 * Bits>{});
      codes[1] = spread(units, Int<4>{}, Int<4>{}, Int<0>{}, Int<4 * Bits>{});
    } else {
      const auto two = [&](auto start) {
        const Vec<std::uint8_t> units = load_lanes<start.value, 4 * width, total>(from);
        return bit_cast<Vec<std::uint32_t>>(spread(units, Int<8>{}, Int<0>{}, start, Int<4 * Bits>{}));
      };
      const Vec<std::uint32_t> a = two(Int<0>{}), b = two(Int<2 * Bits>{});
      codes[0] = alternate<0>(a, b, std::make_index_sequence<kLanes<float>>{});
      codes[1] = alternate<1>(a, b, std::make_index_sequence<kLanes<float>>{});
    }
  } else {
    using P = Packing<Bits>;
    const auto two = [&](std::size_t at) { return bit_cast<Vec<std::uint32_t>>(P::scatter(P::widen(from + at))); };
    const Vec<std::uint32_t> a = two(0), b = two(P::total);
    codes[0] = alternate<0>(a, b, std::make_index_sequence<kLanes<float>>{});
    codes[1] = alternate<1>(a, b, std::make_index_sequence<kLanes<float>>{});
  }
}

// Unpacks whole words of codes to bytes, counted in steps: those of two bits are doubled.
template <int Bits>
inline void split_words(Vec<std::uint8_t> packed, Vec<std::uint8_t> (&codes)[kParts<Bits>]) {
  constexpr int up = Bits == 2 ? 1 : 0;  // doubled
  constexpr std::uint8_t mask = static_cast<std::uint8_t>(((1 << Bits) - 1) << up);
  const Vec<std::uint16_t> pairs = bit_cast<Vec<std::uint16_t>>(packed);  // no set shifts bytes
  codes[0] = Bits == 8 ? packed : bit_cast<Vec<std::uint8_t>>(pairs << up) & mask;
  for (int p = 1; p < 8 / Bits; ++p) codes[p] = bit_cast<Vec<std::uint8_t>>(pairs >> (p * Bits - up)) & mask;
}

// Unpacks the words of vector i of a run.
template <int Bits>
inline void split(const std::uint8_t* run, std::size_t i, Vec<std::uint8_t> (&codes)[kParts<Bits>]) {
  if constexpr (32 % Bits != 0) {
    split_units<Bits>(run + i * kLanes<float> * Bits, codes);
  } else {
    split_words<Bits>(in_register(load<Vec<std::uint8_t>>(run + i * kVectorBytes)), codes);
  }
}

// ---- preparing x ---------------------------------------------------------------------------------------------

// The scale of a span, from its largest |x|. NaN if there is no finite one: every result of the row is then NaN, which
// is noticed, and the row is computed by linear_floats() instead.
template <int Limbs>
inline float span_scale(float largest) {
  constexpr float nan = __builtin_nanf("");
  if constexpr (Limbs == 1) {
    const float scale = largest / 127.0f;
    return !(largest < __builtin_inff()) ? nan : scale > kSmallestNormal ? scale : kSmallestNormal;
  } else {
    // A power of two: an x that has 24 bits stays exact. A little room is left, as |n| <= 0x7f7f7f in three bytes.
    const std::uint32_t exponent = bit_cast<std::uint32_t>(largest * 1.0078125f) >> 23;
    if (exponent >= 255) return nan;
    return bit_cast<float>((exponent > 0 ? exponent : 1) << 23) * 0x1p-22f;
  }
}

// The number of columns of x that share a scale.
inline std::size_t span_columns(const Quantized& w) {
  return w.groups == 1 || w.group % (2 * kGrain) == 0 ? 2 * kGrain : kGrain;
}

using Grain = Vec<float>[kWordVectors];

inline void load_grain(const float* x, std::size_t left, Grain& to) {
  if (left >= kGrain) {
    std::memcpy(to, x, sizeof to);
  } else {
    std::memset(to, 0, sizeof to);
    std::memcpy(to, x, left * sizeof(float));
  }
}

// The scale of `n` columns of x, of which `left` exist.
template <int Limbs>
inline float scale_of_columns(const float* x, std::size_t n, std::size_t left) {
  using Ints = Vec<std::int32_t>;
  Ints largest = {};
  for (std::size_t at = 0; at < n; at += kGrain) {
    Grain v;
    load_grain(x + at, at < left ? left - at : 0, v);
    for (Vec<float> part : v) {
      largest = larger(magnitude_bits(part), largest);  // NaN last
    }
  }
  return span_scale<Limbs>(bit_cast<float>(fold(largest, larger)));
}

// Rounds 16 columns of x, of which `left` exist; writes the bytes of n, each limb to its own row of `bytes`, and
// returns the sum of n.
template <int Limbs, std::size_t Columns>
inline std::int32_t round_grain(const float* x, std::size_t left, float scale, std::uint8_t (&bytes)[Limbs][Columns],
                                std::size_t at) {
  using Ints = Vec<std::int32_t>;
  constexpr std::size_t lanes = kLanes<float>;
  Grain v;
  load_grain(x, left, v);
  const bool finite = scale == scale;  // otherwise linear_floats() computes the row, and these numbers are not used
  Ints total = {};
  for (std::size_t i = 0; i < kWordVectors; ++i) {
    const Ints n = finite ? round_to_int(v[i] / scale) : Ints{};
    total += n;
    // Each limb is signed, so the limbs above it are rounded.
    const Ints limbs[3] = {Limbs == 1 ? n : (n + 0x8080) >> 16, (n + 0x80) >> 8, n};
    for (int l = 0; l < Limbs; ++l) {
      store(bytes[l] + at + i * lanes, convert<std::uint8_t, lanes>(limbs[l]));
    }
  }
  return fold(total, plus);
}

// The offsets of a run: minus the sums that codes in the middle of their range would give.
template <int Bits, int Limbs>
inline void set_offsets(Run<Bits, Limbs>& run) {
  using Ints = Vec<std::int32_t>;
  Vec<std::uint8_t> middle[kParts<Bits>];
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

// Writes the limbs of a run in the order of the codes. Byte j of packed codes holds the columns from j * 8 / Bits on:
// their first ones go to the first part of the run, their second ones to the next, and so on. Of the 8 columns of a
// word whose width does not divide 32, the first four go to the first part.
template <int Bits, int Limbs>
inline void set_limbs(Run<Bits, Limbs>& run, const std::uint8_t (&bytes)[Limbs][kRunColumns<Bits>]) {
  using Word = typename Packing<Bits>::Word;
  constexpr std::size_t lanes = kLanes<Word>;
  for (int l = 0; l < Limbs; ++l) {
    for (std::size_t p = 0; p < kParts<Bits>; ++p) {
      if constexpr (32 % Bits != 0) {
        for (std::size_t i = 0; i < kWords; ++i) std::memcpy(run.limbs[l][p] + 4 * i, bytes[l] + 8 * i + 4 * p, 4);
        continue;
      }
      for (std::size_t j = 0; j < kPart; j += lanes) {
        const Vec<Word> words = load<Vec<Word>>(bytes[l] + j * sizeof(Word)) >> static_cast<Word>(8 * p);
        store(run.limbs[l][p] + j, convert<std::uint8_t, lanes>(words));
      }
    }
  }
}

// Writes for each word of `runs` runs the place of its group among the sixteen that it belongs to.
template <int Bits>
inline void set_lanes(const Quantized& w, std::size_t runs, std::uint8_t* lane) {
  std::size_t word = 0, group = 0;
  for (std::size_t i = 0; i < runs * kWords; ++i) {
    lane[i] = static_cast<std::uint8_t>(group);
    if (w.groups > 1 && ++word == w.group / kWordColumns<Bits>) {
      word = 0;
      group = (group + 1) % kWords;
    }
  }
}

template <int Bits, int Limbs>
void prepare_x(const Quantized& w, const float* x, std::uint8_t* memory) {
  const Prepared<Bits, Limbs, std::uint8_t> to(w, memory);
  Run<Bits, Limbs>* run = to.runs;
  float* group_sum = to.group_sum;
  for (std::size_t g = w.groups; g % kWords != 0; ++g) group_sum[g] = 0.0f;
  const std::size_t span = span_columns(w);
  std::size_t group_end = w.group;
  double sum_so_far = 0;
  float scale = 0.0f;

  for (std::size_t first = 0; first < w.cols; first += kRunColumns<Bits>, ++run) {
    std::uint8_t bytes[Limbs][kRunColumns<Bits>];
    for (std::size_t b = 0; b < kRunColumns<Bits>; b += kGrain) {
      const std::size_t at = first + b, left = at < w.cols ? w.cols - at : 0;
      if (at % span == 0) scale = scale_of_columns<Limbs>(x + at, span, left);
      const std::int32_t sum = round_grain<Limbs>(x + at, left, scale, bytes, b);
      constexpr std::size_t columns = kWordColumns<Bits>;
      for (std::size_t i = 0; i < kGrain / columns; ++i) run->scale[b / columns + i] = scale * kStep<Bits>;
      if (left == 0) continue;
      sum_so_far += static_cast<double>(sum) * static_cast<double>(scale);
      if (w.groups == 1) {
        std::memcpy(group_sum, &sum_so_far, sizeof sum_so_far);
      } else if (at + kGrain >= group_end || left <= kGrain) {
        *group_sum++ = static_cast<float>(sum_so_far);
        group_end += w.group;
        sum_so_far = 0;
      }
    }
    set_limbs(*run, bytes);
    set_offsets(*run);
  }
  set_lanes<Bits>(w, static_cast<std::size_t>(run - to.runs), to.lane[0]);
}
