// Codes of one byte each to and from packed bytes, lowest bits first.

constexpr std::size_t kCodesAtOnce = 1024;  // codes in a buffer; a multiple of every packing unit

// The codes that end on a byte together are a unit. An integer, Word, holds a unit unpacked, one code to a byte. Shifts
// of this integer onto itself gather the codes in its lowest bytes, or scatter them from there:
//
//   4 bits    byte 1   byte 0            2 bits    byte 3   byte 2   byte 1   byte 0
//   codes     0000bbbb 0000aaaa          codes     000000dd 000000cc 000000bb 000000aa
//   packed             bbbbaaaa          packed                               ddccbbaa
//
// widen() and narrow() convert vectors of packed units to and from such integers.
//
// A unit of 3, 5 or 6 bits is 8 codes in as many bytes. They are gathered in three steps: two codes in each 16 bits,
// four in each 32 bits, then all.
template <int Bits>
struct Packing {
  using Word = std::uint64_t;
  static constexpr std::size_t bytes = Bits;
  static constexpr Word mask = ~Word{0};  // scatter() leaves nothing to mask
  static constexpr std::size_t lanes = kLanes<Word>, total = lanes * bytes;

  static Vec<Word> widen(const std::uint8_t* packed);
  static void narrow(Vec<Word> v, std::uint8_t* packed);

  // The lowest n bits of every part of `width` bits.
  static constexpr Word low(int width, int n) {
    Word result = 0;
    for (int at = 0; at < 64; at += width) result |= ((Word{1} << n) - 1) << at;
    return result;
  }
  // Codes take `n` bits of each half of `width` bits, and then the lowest of both halves; or the other way round.
  template <int Width, class W>
  static W join(W w) {
    constexpr int n = Width / 8 * Bits;
    return (w & low(2 * Width, n)) | (w >> (Width - n) & (low(2 * Width, n) << n));
  }
  template <int Width, class W>
  static W part(W w) {
    constexpr int n = Width / 8 * Bits;
    return (w & low(2 * Width, n)) | (w << (Width - n) & (low(2 * Width, n) << Width));
  }
  template <class W>
  static W gather(W w) {
    return join<32>(join<16>(join<8>(w)));
  }
  template <class W>
  static W scatter(W w) {
    return part<8>(part<16>(part<32>(w)));
  }
};
template <>
struct Packing<8> {
  using Word = std::uint8_t;
};
template <>
struct Packing<4> {
  using Word = std::uint16_t;
  static constexpr std::size_t bytes = 1;
  static Vec<Word> widen(const std::uint8_t* packed) {
    return convert<Word, kLanes<Word>>(load<Vec<std::uint8_t, kLanes<Word>>>(packed));
  }
  static void narrow(Vec<Word> v, std::uint8_t* packed) { store(packed, convert<std::uint8_t, kLanes<Word>>(v)); }
  static constexpr Word mask = 0x0f0f;
  template <class W>
  static W gather(W w) {
    return w | w >> 4;
  }
  template <class W>
  static W scatter(W w) {
    return w | w << 4;
  }
};
template <>
struct Packing<2> {
  using Word = std::uint32_t;
  static constexpr std::size_t bytes = 1;
  static Vec<Word> widen(const std::uint8_t* packed) { return load_bytes(packed); }
  static void narrow(Vec<Word> v, std::uint8_t* packed) { store_low_bytes(packed, v); }
  static constexpr Word mask = 0x03030303;
  template <class W>
  static W gather(W w) {
    return w | w >> 6 | w >> 12 | w >> 18;
  }
  template <class W>
  static W scatter(W w) {
    return w | w << 6 | w << 12 | w << 18;
  }
};

// The bytes of neighbouring units one behind the other, or each in a Word of its own.
template <int Bits>
inline Vec<std::uint64_t> Packing<Bits>::widen(const std::uint8_t* packed) {
#if defined(__AVX512BW__)
  const auto word = [](std::size_t i) { return i / 8 * Bits + i % 8; };  // two units in each 16 bytes
  const auto byte = [](std::size_t i) { return i % 8 < bytes ? i / 8 % 2 * bytes + i % 8 : 0x80; };
  const __m512i v = _mm512_maskz_loadu_epi8((std::uint64_t{1} << total) - 1, packed);
  return bit_cast<Vec<Word>>(
      _mm512_shuffle_epi8(_mm512_permutexvar_epi16(bit_cast<__m512i>(lanes_of<std::uint16_t>(word)), v),
                          bit_cast<__m512i>(lanes_of<std::uint8_t>(byte))));
#else
  Vec<Word> v;
  if constexpr (total < 8) {
    const Word both = load<std::uint32_t>(packed) | Word{load<std::uint16_t>(packed + 4)} << 32;
    for (std::size_t l = 0; l < lanes; ++l) v[l] = both >> (8 * bytes * l);
  } else {
    for (std::size_t l = 0; l < lanes; ++l) {
      const std::size_t at = l * bytes, from = at + 8 <= total ? at : total - 8;  // no byte behind them is read
      v[l] = load<Word>(packed + from) >> (8 * (at - from));
    }
  }
  return v & low(64, 8 * Bits);
#endif
}

template <int Bits>
inline void Packing<Bits>::narrow(Vec<std::uint64_t> v, std::uint8_t* packed) {
#if defined(__AVX512BW__)
  const auto byte = [](std::size_t i) { return i % 16 < 2 * bytes ? i % 16 / bytes * 8 + i % 16 % bytes : 0x80; };
  const auto word = [](std::size_t i) { return i < 4 * bytes ? i / bytes * 8 + i % bytes : 0; };
  const __m512i pairs = _mm512_shuffle_epi8(bit_cast<__m512i>(v), bit_cast<__m512i>(lanes_of<std::uint8_t>(byte)));
  _mm512_mask_storeu_epi8(packed, (std::uint64_t{1} << total) - 1,
                          _mm512_permutexvar_epi16(bit_cast<__m512i>(lanes_of<std::uint16_t>(word)), pairs));
#else
  for (std::size_t l = 0; l < lanes; ++l) {
    const Word word = v[l];  // whole words as long as the next ones overwrite what is too much
    std::memcpy(packed + l * bytes, &word, l * bytes + 8 <= total ? 8 : bytes);
  }
#endif
}

template <int Bits>
inline void pack_vector(Vec<std::uint8_t> codes, std::uint8_t* packed) {
  if constexpr (Bits == 8) {
    store(packed, codes);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    P::narrow(P::gather(bit_cast<Vec<Word>>(codes)), packed);
  }
}

// A unit as an integer that is at least as wide as int.
template <class Word>
using Wide = std::conditional_t<(sizeof(Word) > 4), Word, std::uint32_t>;

template <int Bits>
void pack(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  if constexpr (Bits == 8) {
    std::memcpy(packed, codes, n);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    constexpr std::size_t lanes = kLanes<Word>, unit = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * unit <= n; i += lanes) {
      pack_vector<Bits>(load<Vec<std::uint8_t>>(codes + i * unit), packed + i * P::bytes);
    }
    for (; i * unit < n; ++i) {
      const std::size_t left = n - i * unit;
      const Wide<Word> gathered = P::gather(Wide<Word>{load_part<Word>(codes + i * unit, left < unit ? left : unit)});
      if constexpr (P::bytes == 1) {
        packed[i] = static_cast<std::uint8_t>(gathered);
      } else {
        store_part(packed + i * P::bytes, gathered, left < unit ? packed_bytes(left, Bits) : P::bytes);
      }
    }
  }
}

template <int Bits>
void unpack(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  if constexpr (Bits == 8) {
    std::memcpy(codes, packed, n);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    constexpr std::size_t lanes = kLanes<Word>, unit = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * unit <= n; i += lanes) {
      store(codes + i * unit, P::scatter(P::widen(packed + i * P::bytes)) & P::mask);
    }
    for (; i * unit < n; ++i) {
      const std::size_t left = n - i * unit;
      Wide<Word> gathered = packed[i * P::bytes];
      if constexpr (P::bytes > 1) {
        gathered = load_part<Word>(packed + i * P::bytes, left < unit ? packed_bytes(left, Bits) : P::bytes);
      }
      const Word word = static_cast<Word>(P::scatter(gathered) & P::mask);
      store_part(codes + i * unit, word, left < unit ? left : unit);
    }
  }
}

void pack_any(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  by_bits(bits, [&](auto b) { pack<b.value>(codes, n, packed); });
}

void unpack_any(int bits, const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  by_bits(bits, [&](auto b) { unpack<b.value>(packed, n, codes); });
}
