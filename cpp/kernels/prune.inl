// Magnitude pruning. A magnitude is the integer that its bits make without the sign, so one template serves every
// float type, NaN counts as largest, and an exact k-th magnitude is found by counting, without a sort.

template <class U, U Infinity>
struct Magnitude {
  using Word = U;
  static U of(U bits) {
    const U rest = static_cast<U>(bits & static_cast<U>(static_cast<U>(~U{0}) >> 1));
    return rest > Infinity ? static_cast<U>(Infinity + 1) : rest;
  }
  static Vec<U> of(Vec<U> bits) {
    using S = Vec<std::make_signed_t<U>>;
    const S rest = bit_cast<S>(bits & static_cast<U>(static_cast<U>(~U{0}) >> 1));
    const S nan = rest > static_cast<std::make_signed_t<U>>(Infinity);
    return bit_cast<Vec<U>>((rest & ~nan) | (nan & static_cast<std::make_signed_t<U>>(Infinity + 1)));
  }
};

template <class M>
void magnitude_histogram(const void* from, std::size_t begin, std::size_t end, std::uint64_t prefix, int shift,
                         std::uint64_t* bins) {
  const auto* w = static_cast<const typename M::Word*>(from);
  constexpr int width = 8 * sizeof(typename M::Word);
  for (std::size_t i = begin; i < end; ++i) {
    const std::uint64_t key = M::of(w[i]);
    if (shift + 16 >= width || key >> (shift + 16) == prefix) ++bins[key >> shift & (kHistogramBins - 1)];
  }
}

template <class M>
std::size_t count_ties(const void* from, std::size_t begin, std::size_t end, std::uint64_t key) {
  const auto* w = static_cast<const typename M::Word*>(from);
  std::size_t count = 0;
  for (std::size_t i = begin; i < end; ++i) count += M::of(w[i]) == key;
  return count;
}

template <class M>
Collected collect_magnitudes(const void* from, std::size_t begin, std::size_t end, std::uint64_t low,
                             std::uint64_t high, void* out, std::size_t room) {
  using U = typename M::Word;
  using Signed = std::make_signed_t<U>;
  using V = Vec<U>;
  using S = Vec<Signed>;  // without their sign bit, numbers compare alike
  const U* w = static_cast<const U*>(from);
  U* const found = static_cast<U*>(out);
  Collected c = {};
  const auto take = [&](U key) {
    if (c.found < room) found[c.found] = key;
    ++c.found;
  };
  const S first = S{} + static_cast<Signed>(low), last = S{} + static_cast<Signed>(high);
  V below = {};
  std::size_t i = begin;
  for (; i + kLanes<U> <= end; i += kLanes<U>) {
    __builtin_prefetch(w + i + 2048 / sizeof(U));
    const V keys = M::of(load<V>(w + i));
    const S key = bit_cast<S>(keys);
    below -= bit_cast<V>(key < first);
    unsigned bits = lane_bits((key >= first) & (key <= last));
    if constexpr (kHasFrontLanes) {
      if (c.found + kLanes<U> <= room) {  // no branch on the bits, which cannot be predicted
        store(found + c.found, front_lanes(keys, bits));
        c.found += static_cast<std::size_t>(__builtin_popcount(bits));
        continue;
      }
    }
    for (; bits != 0; bits &= bits - 1) {
      take(M::of(w[i + static_cast<std::size_t>(__builtin_ctz(bits))]));
    }
  }
  for (std::size_t lane = 0; lane < kLanes<U>; ++lane) c.below += below[lane];
  for (; i < end; ++i) {
    const U key = M::of(w[i]);
    c.below += key < low;
    if (key >= low && key <= high) take(key);
  }
  return c;
}

template <class M>
void prune(const PruneArgs& args, std::size_t begin, std::size_t end) {
  using U = typename M::Word;
  const U* const from = static_cast<const U*>(args.from);
  U* const w = static_cast<U*>(args.w);
  std::uint8_t* const kept = args.kept;  // a byte could be part of args: compilers would load it anew each time
  const U key = static_cast<U>(args.key);
  std::size_t ties = args.keep_ties;
  std::size_t i = begin;
  for (; i < end && ties > 0; ++i) {  // until the last tie that is kept
    const U magnitude = M::of(from[i]);
    const bool tie = magnitude == key;
    const bool keep = magnitude > key || tie;
    ties -= tie;
    if (kept) kept[i] = keep;
    if (w && !keep) w[i] = 0;
  }
  constexpr std::size_t at_once = 1024;  // stay in L1 for the second loop; compilers vectorize both
  for (; i < end; i += at_once) {
    const std::size_t stop = end - i < at_once ? end : i + at_once;
    if (kept) {
      for (std::size_t j = i; j < stop; ++j) kept[j] = M::of(from[j]) > key;
    }
    if (w) {
      for (std::size_t j = i; j < stop; ++j) w[j] = M::of(w[j]) > key ? w[j] : U{0};
    }
  }
}

// Keeps the n largest of every m elements of a row; of equal ones, those of lower index.
template <class M>
void keep_largest(const void* from, std::size_t cols, std::size_t n, std::size_t m, std::uint8_t* kept) {
  const auto* w = static_cast<const typename M::Word*>(from);
  for (std::size_t group = 0; group < cols; group += m) {
    const std::size_t size = cols - group < m ? cols - group : m;
    for (std::size_t i = 0; i < size; ++i) {
      const auto key = M::of(w[group + i]);
      std::size_t before = 0;
      for (std::size_t j = 0; j < i; ++j) before += M::of(w[group + j]) >= key;
      for (std::size_t j = i + 1; j < size; ++j) before += M::of(w[group + j]) > key;
      kept[group + i] = before < n;
    }
  }
}

template <class U>
void clear(void* to, const std::uint8_t* kept, std::size_t begin, std::size_t end) {
  U* w = static_cast<U*>(to);
  for (std::size_t i = begin; i < end; ++i) w[i] = kept[i] ? w[i] : U{0};
}

// Calls call(U{}) with the unsigned integer that is `width` bytes wide.
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

template <class Call>
auto by_magnitude(Float type, Call call) {
  switch (type) {
    case Float::f16:
      return call(Magnitude<std::uint16_t, 0x7c00>{});
    case Float::bf16:
      return call(Magnitude<std::uint16_t, 0x7f80>{});
    case Float::f32:
      return call(Magnitude<std::uint32_t, 0x7f800000>{});
    default:
      return call(Magnitude<std::uint64_t, 0x7ff0000000000000>{});
  }
}

void magnitude_histogram_any(Float type, const void* w, std::size_t begin, std::size_t end, std::uint64_t prefix,
                             int shift, std::uint64_t* bins) {
  by_magnitude(type, [&](auto m) { magnitude_histogram<decltype(m)>(w, begin, end, prefix, shift, bins); });
}

std::size_t count_ties_any(Float type, const void* w, std::size_t begin, std::size_t end, std::uint64_t key) {
  return by_magnitude(type, [&](auto m) { return count_ties<decltype(m)>(w, begin, end, key); });
}

void prune_any(Float type, const PruneArgs& args, std::size_t begin, std::size_t end) {
  by_magnitude(type, [&](auto m) { prune<decltype(m)>(args, begin, end); });
}

// Not by_magnitude(): a 16-bit magnitude is found by one histogram, so those types need no instance.
Collected collect_magnitudes_any(Float type, const void* w, std::size_t begin, std::size_t end, std::uint64_t low,
                                 std::uint64_t high, void* out, std::size_t room) {
  if (type == Float::f64) {
    return collect_magnitudes<Magnitude<std::uint64_t, 0x7ff0000000000000>>(w, begin, end, low, high, out, room);
  }
  return collect_magnitudes<Magnitude<std::uint32_t, 0x7f800000>>(w, begin, end, low, high, out, room);
}

void keep_largest_any(Float type, const void* w, std::size_t cols, std::size_t n, std::size_t m, std::uint8_t* kept) {
  by_magnitude(type, [&](auto magnitude) { keep_largest<decltype(magnitude)>(w, cols, n, m, kept); });
}

void clear_any(int width, void* w, const std::uint8_t* kept, std::size_t begin, std::size_t end) {
  by_width(width, [&](auto u) { clear<decltype(u)>(w, kept, begin, end); });
}

constexpr PruneKernels kPrune = {
    .magnitude_histogram = magnitude_histogram_any,
    .count_ties = count_ties_any,
    .collect_magnitudes = collect_magnitudes_any,
    .prune = prune_any,
    .keep_largest = keep_largest_any,
    .clear = clear_any,
};
