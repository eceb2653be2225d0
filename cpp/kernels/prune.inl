// Magnitude pruning. A magnitude is the integer that its bits make without the sign, so one template serves every
// float type, NaN counts as largest, and an exact k-th magnitude is found by counting, without a sort.

template <class U, U Infinity>
struct Magnitude {
  using Word = U;
  static U of(U bits) {
    const U rest = static_cast<U>(bits & static_cast<U>(static_cast<U>(~U{0}) >> 1));
    return rest > Infinity ? static_cast<U>(Infinity + 1) : rest;
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
void prune(const PruneArgs& args, std::size_t begin, std::size_t end) {
  using U = typename M::Word;
  U* const w = static_cast<U*>(args.w);
  const U key = static_cast<U>(args.key);
  std::size_t ties = args.keep_ties;
  std::size_t i = begin;
  for (; i < end && ties > 0; ++i) {  // until the last tie that is kept
    const U magnitude = M::of(w[i]);
    const bool tie = magnitude == key;
    const bool keep = magnitude > key || tie;
    ties -= tie;
    if (!keep) w[i] = 0;
    if (args.kept) args.kept[i] = keep;
  }
  const std::size_t first = i;
  if (args.kept) {
    for (std::size_t j = first; j < end; ++j) args.kept[j] = M::of(w[j]) > key;
  }
  for (; i < end; ++i) w[i] = M::of(w[i]) > key ? w[i] : U{0};
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
