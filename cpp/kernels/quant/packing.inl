// Codes of one byte each to and from packed bytes, lowest bits first.

constexpr std::size_t kCodesAtOnce = 1024;  // codes in a buffer; a multiple of every packing unit

// 8 / Bits codes share a byte. An integer of as many bytes holds them unpacked, one code to a byte. Shifts of this
// integer onto itself gather the codes in its lowest byte, or scatter them from there:
//
//   4 bits    byte 1   byte 0            2 bits    byte 3   byte 2   byte 1   byte 0
//   codes     0000bbbb 0000aaaa          codes     000000dd 000000cc 000000bb 000000aa
//   packed             bbbbaaaa          packed                               ddccbbaa
//
// widen() and narrow() convert vectors of packed bytes to and from such integers.
template <int Bits>
struct Packing;
template <>
struct Packing<8> {
  using Word = std::uint8_t;
};
template <>
struct Packing<4> {
  using Word = std::uint16_t;
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

template <int Bits>
void pack(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  if constexpr (Bits == 8) {
    std::memcpy(packed, codes, n);
  } else {
    using P = Packing<Bits>;
    using Word = typename P::Word;
    constexpr std::size_t lanes = kLanes<Word>, per_byte = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * per_byte <= n; i += lanes) {
      pack_vector<Bits>(load<Vec<std::uint8_t>>(codes + i * per_byte), packed + i);
    }
    for (; i * per_byte < n; ++i) {
      const std::size_t left = n - i * per_byte;
      const Word word = load_part<Word>(codes + i * per_byte, left < per_byte ? left : per_byte);
      packed[i] = static_cast<std::uint8_t>(P::gather(std::uint32_t{word}));
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
    constexpr std::size_t lanes = kLanes<Word>, per_byte = sizeof(Word);
    std::size_t i = 0;
    for (; (i + lanes) * per_byte <= n; i += lanes) {
      store(codes + i * per_byte, P::scatter(P::widen(packed + i)) & P::mask);
    }
    for (; i * per_byte < n; ++i) {
      const Word word = static_cast<Word>(P::scatter(std::uint32_t{packed[i]}) & P::mask);
      const std::size_t left = n - i * per_byte;
      store_part(codes + i * per_byte, word, left < per_byte ? left : per_byte);
    }
  }
}

void pack_any(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  by_bits(bits, [&](auto b) { pack<b.value>(codes, n, packed); });
}

void unpack_any(int bits, const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  by_bits(bits, [&](auto b) { unpack<b.value>(packed, n, codes); });
}
