// y = x @ W.T straight from packed weights.
//
// x is rounded to integers first, x ~ scale * n, with a scale for every span of 32 columns (of 16 where the group size
// is no multiple of 32). n has 24 bits, which is as exact as float32, or 8. Sums of code * n are then exact and do not
// depend on their order. The rest of the arithmetic is float32, in the order that contract.hpp fixes.
//
// Codes are used where and as they lie. The numbers of x, which are few, are put into the order in which codes come out
// of their bytes, once a call. Five files say how:
//
//   floats.inl    without integers, for groups of any size and for x that is not finite
//   prepare.inl   rounds a row of x, and lays it out
//   rows.inl      few rows of x: the lanes of a vector are words of one row of W
//   panels.inl    many rows of x: the lanes of a vector are rows of W
//   amx.inl       many rows of x, by instructions that multiply whole matrices

// A run is 16 words. A word has codes for one lane of 32 bits: 32 bits of packed codes where they are whole codes, else
// 8 codes. Unpacked to bytes it has kParts<Bits> times 32 bits, and a run has as many parts of kPart bytes.
constexpr std::size_t kWords = 16, kPart = 4 * kWords;
static_assert(kWords == kPartials);
template <int Bits>
constexpr std::size_t kWordColumns = 32 % Bits == 0 ? 32 / Bits : 8;
template <int Bits>
constexpr std::size_t kParts = kWordColumns<Bits> / 4;
template <int Bits>
constexpr std::size_t kRunColumns = kWords * kWordColumns<Bits>;
template <int Bits>
constexpr std::size_t kRunBytes = kRunColumns<Bits> * Bits / 8;  // of packed codes

constexpr std::size_t kGrain = 16;  // columns; a span is one grain or two, and a group is whole spans
constexpr std::size_t kWordVectors = kWords / kLanes<float>;

#include "kernels/linear/floats.inl"
//
#include "kernels/linear/prepare.inl"
//
#include "kernels/linear/rows.inl"
//
#include "kernels/linear/panels.inl"
//
#include "kernels/linear/amx.inl"

// Rows [begin, end) of W by the first `in_panels` rows of x.
template <class By>
void linear_bands(const Quantized& w, const Linear& io, std::size_t in_panels, std::size_t begin, std::size_t end,
                  Unpack unpack) {
  [[maybe_unused]] const typename By::Registers registers(w);
  for (std::size_t b = 0; b < in_panels; b += kPanels * kPanelWidth) {
    const std::size_t count = in_panels - b < kPanels * kPanelWidth ? in_panels - b : kPanels * kPanelWidth;
    const std::size_t panels = (count + kPanelWidth - 1) / kPanelWidth;
    for (std::size_t row = begin; row < end; row += kBand) {
      const std::size_t stop = end - row < kBand ? end : row + kBand;
      linear_panels<By>(w, io, b, panels, count, row, stop, unpack);
    }
  }
}

// Chooses between panels and rows, and cuts W so that the part of x in use stays in cache.
template <int Bits, int Limbs, bool Amx>
void linear_integers(const Quantized& w, const Linear& io, std::size_t begin, std::size_t end) {
  const std::size_t in_panels = panel_rows(io.batch);
  if (in_panels > 0) {
    using By = std::conditional_t<Amx, ByTiles<kTilePlanes<Bits, Limbs>>, ByVectors<kAlike<Bits>, Limbs>>;
    linear_bands<By>(w, io, in_panels, begin, end, unpack_band<Bits, Amx>);
  }
  const std::size_t rows_in_cache = io.batch - in_panels <= 1 ? end : 16;
  for (std::size_t row = begin; row < end; row += rows_in_cache) {
    const std::size_t stop = end - row < rows_in_cache ? end : row + rows_in_cache;
    std::size_t b = in_panels;
    if constexpr (kManyRegisters) {
      for (; b + 4 <= io.batch; b += 4) linear_rows<Bits, Limbs, 4>(w, io, b, row, stop);
    }
    for (; b < io.batch; ++b) linear_rows<Bits, Limbs, 1>(w, io, b, row, stop);
  }
}

// ---- the table's entries -------------------------------------------------------------------------------------

// Returns true if x can be rounded to integers: a word of codes must not lie in two groups.
inline bool by_integers(const Quantized& w) { return w.groups == 1 || w.group % kGrain == 0; }

template <class Call>
inline auto by_bits_and_limbs(int bits, int limbs, Call call) {
  return by_bits(bits, [&](auto b) { return limbs == 1 ? call(b, Int<1>{}) : call(b, Int<3>{}); });
}

#if !defined(FASTOPT_PRODUCTS_ONLY)
std::size_t prepared_bytes(const Quantized& w, int limbs) {
  if (!by_integers(w)) return 0;
  return by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) { return Prepared<b.value, l.value>(w, nullptr).bytes; });
}

void prepare_x_any(const Quantized& w, const float* x, int limbs, std::uint8_t* out) {
  by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) { prepare_x<b.value, l.value>(w, x, out); });
}
#endif

template <bool Amx>
std::size_t panel_bytes(const Quantized& w, int limbs) {
  return by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) {
    constexpr int bits = b.value, bytes = l.value;
    const std::uint8_t* const nothing = nullptr;
    if constexpr (Amx) return TilePanel<kTilePlanes<bits, bytes>>(w, nothing).bytes;
    return Panel<kAlike<bits>, bytes>(w, nothing).bytes;
  });
}

template <bool Amx>
void prepare_panel_any(const Quantized& w, const std::uint8_t* rows, std::size_t row_bytes, std::size_t count,
                       int limbs, std::uint8_t* out) {
  by_bits_and_limbs(w.bits, limbs, [&](auto b, auto l) {
    constexpr int bits = b.value, bytes = l.value;
    const RowLayout layout = layout_of<bits, bytes>(w);
    if constexpr (Amx) {
      prepare_tiles<kTilePlanes<bits, bytes>>(w, layout, rows, row_bytes, count, out);
    } else {
      prepare_panel<kAlike<bits>, bytes>(w, layout, rows, row_bytes, count, out);
    }
  });
}

template <bool Amx>
void linear_quantized(const Quantized& w, const Linear& io, std::size_t begin, std::size_t end) {
  if (io.prepared_bytes == 0) {
    io.floats(w, io, 0, io.batch, begin, end);
  } else {
    by_bits_and_limbs(w.bits, io.limbs,
                      [&](auto b, auto l) { linear_integers<b.value, l.value, Amx>(w, io, begin, end); });
  }
}

template <bool Amx>
constexpr Products kProducts = {
#if defined(FASTOPT_PRODUCTS_ONLY)
    .prepared_bytes = nullptr,
    .prepare_x = nullptr,
    .linear_floats = nullptr,
#else
    .prepared_bytes = prepared_bytes,
    .prepare_x = prepare_x_any,
    .linear_floats = linear_floats,
#endif
    .panel_bytes = panel_bytes<Amx>,
    .prepare_panel = prepare_panel_any<Amx>,
    .linear_quantized = linear_quantized<Amx>,
};
