// A step where some of parameter, gradient and states are narrower than float32.

// They are widened to float in registers, stepped there, and narrowed again, a block of kStateBlock at a time, so the
// types do not multiply with the rules.

using Bits = Vec<std::uint32_t>;
constexpr std::size_t kBlockVectors = kStateBlock / kLanes<float>;

// MurmurHash3's last mixing step (Appleby, 2011).
inline std::uint32_t mixed(std::uint32_t h) {
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

// 32 bits of chance for each element: multiples of the golden ratio, from a start that differs for every step. They are
// spread more evenly than random ones, so what rounding adds to a sum is smaller.
constexpr std::uint32_t kGolden = 0x9e3779b9u;

inline Bits first_chance(std::uint32_t noise, std::size_t first) {
  Bits index = {};
  for (std::size_t j = 0; j < kLanes<float>; ++j) index[j] = static_cast<std::uint32_t>(first + j);
  return index * kGolden + mixed(noise);
}

// Other bits of it, `Count` of them, for each state; parameters are rounded by the lowest.
template <int Count>
inline Bits chance_of(Bits random, std::size_t state) {
  constexpr int skipped[kMaxStates] = {0, 12, 6};
  return random << skipped[state] >> (32 - Count);
}

// Up or down by chance: the nearer, the likelier, so that the mean is the value. Only NaN could overflow.
inline Bits raised(Vec<float> v, Bits chance) {
  const Bits bits = bit_cast<Bits>(v);
  return v == v ? bits + chance : bits;
}

inline Bits bf16_nearest(Bits bits) {
  const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
}

inline Bits half_stochastic(Bits bits, Bits random) {
  const Bits sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu, chance = random & 0x1fffu;
  const Bits normal = (rest - (112u << 23) + chance) >> 13;
  const Vec<float> steps = bit_cast<Vec<float>>(rest) * 0x1p24f + convert<float, kLanes<float>>(chance) * 0x1p-13f;
  const Bits subnormal =
      bit_cast<Bits>(convert<std::int32_t, kLanes<float>>(rest < 0x38800000u ? steps : Vec<float>{}));
  Bits half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x47800000u ? Bits{} + 0x7c00u : half;
  half = rest > 0x7f800000u ? Bits{} + 0x7e00u : half;
  return sign | half;
}

inline Vec<float> widen(Float type, const void* base, std::size_t i) {
  switch (type) {
    case Float::f16:
      return float_of_halves(static_cast<const std::uint16_t*>(base) + i);
    case Float::bf16:
      return bit_cast<Vec<float>>(load_words(static_cast<const std::uint16_t*>(base) + i) << 16);
    default:
      return load<Vec<float>>(static_cast<const float*>(base) + i);
  }
}

struct Two {
  Vec<float> v[2];
};

// Two vectors, next to each other.
__attribute__((always_inline)) inline Two widen_two(Float type, const void* base, std::size_t i) {
  if (type == Float::f32) {
    const float* const from = static_cast<const float*>(base) + i;
    prefetch<2048>(from);
    prefetch<2048>(from + kLanes<float>);
    return {load<Vec<float>>(from), load<Vec<float>>(from + kLanes<float>)};
  }
  prefetch<2048>(static_cast<const std::uint16_t*>(base) + i);
  if (type == Float::bf16) return {widen(Float::bf16, base, i), widen(Float::bf16, base, i + kLanes<float>)};
  return {widen(Float::f16, base, i), widen(Float::f16, base, i + kLanes<float>)};
}

// To float16 or bfloat16.
__attribute__((always_inline)) inline void narrow_two(Float type, void* base, std::size_t i, const Two& two,
                                                      unsigned stochastic, const Bits (&random)[2]) {
  std::uint16_t* const to = static_cast<std::uint16_t*>(base) + i;
  if (type == Float::bf16) {
    Bits bits[2];
    for (std::size_t h = 0; h < 2; ++h) {
      bits[h] = stochastic ? raised(two.v[h], random[h] & 0xffffu) : bf16_nearest(bit_cast<Bits>(two.v[h]));
    }
    store_high_words(to, bits[0], bits[1]);
    return;
  }
  for (std::size_t h = 0; h < 2; ++h) {
    if (stochastic) {
      store_low_words(to + h * kLanes<float>, half_stochastic(bit_cast<Bits>(two.v[h]), random[h]));
    } else {
      store_halves(to + h * kLanes<float>, two.v[h]);
    }
  }
}

// 8-bit states: the 11 highest bits of a float's magnitude (exponent, and 3 of mantissa), counted from the exponent of
// the block. With a sign there are 4 bits of exponent, and code 0 is zero; without one there are 5, and code 0 is not
// zero unless the whole block is: Adam divides by it.
constexpr int kDropped = 20, kMantissa = 3;

struct Masks {
  const Bits signed_code = kept(Bits{} + 0x87f00000u), code = kept(Bits{} + 0x07f00000u);  // as they lie in a float
  const Bits most = kept(Bits{} + 0x7ff00000u);  // of what is never negative: NaN that no chance can carry further
  const Words magnitude = kept(Words{} + std::int16_t{0x7ff});
  const Vec<std::uint8_t> sign = kept(Vec<std::uint8_t>{} + std::uint8_t{0x80});
};

inline Vec<float> widen_u8(const Masks& masks, const std::uint8_t* codes, Bits least, bool positive) {
  if (positive) return bit_cast<Vec<float>>((load_bytes(codes) << kDropped) + least);
  const Bits bits = bit_cast<Bits>(load_signed_bytes(codes)) << kDropped, code = bits & masks.signed_code;
  return bit_cast<Vec<float>>((bits & masks.code) == 0 ? code : code + least);
}

// A block of one state on its way to 8 bits: sign and magnitude of each element, rounded by chance. Its codes can be
// written when the largest magnitude is known.
struct Rounded {
  Words words[kBlockVectors / 2];
  std::uint8_t* codes;
  std::int16_t least;

  // Two vectors; returns their magnitudes.
  __attribute__((always_inline)) Words set(const Masks& masks, std::size_t at, const Vec<float> (&v)[2],
                                           const Bits (&random)[2], std::size_t state, bool positive) {
    Vec<std::int32_t> bits[2];
    for (std::size_t h = 0; h < 2; ++h) {
      const Bits chance = chance_of<kDropped>(random[h], state), magnitude = bit_cast<Bits>(v[h]);
      const Bits up = positive ? (magnitude < masks.most ? magnitude : masks.most) + chance : raised(v[h], chance);
      bits[h] = bit_cast<Vec<std::int32_t>>(up);
    }
    const Words both = pack_high<kDropped>(bits[0], bits[1]);
    words[at / 2] = both;
    return positive ? both : both & masks.magnitude;
  }

  // Returns the exponent that codes count from: the smallest from which all can be reached.
  std::uint8_t close(void* to, Words largest, bool positive) {
    const Bits pairs = bit_cast<Bits>(largest), low = pairs & 0xffffu, high = pairs >> 16;
    const auto greater = [](auto a, auto b) { return a > b ? a : b; };
    const std::uint32_t top = fold(greater(low, high), greater) >> kMantissa;
    const std::uint32_t exponents = positive ? 31 : 15, exponent = top > exponents ? top - exponents : 0;
    least = static_cast<std::int16_t>(exponent << kMantissa);
    codes = static_cast<std::uint8_t*>(to);
    return static_cast<std::uint8_t>(exponent);
  }

  // Codes of the four vectors from `at` on.
  __attribute__((always_inline)) void write(const Masks& masks, std::size_t at, bool positive) const {
    const Words a = words[at / 2], b = words[at / 2 + 1];
    Vec<std::uint8_t> code;
    if (positive) {
      code = pack_unsigned(a - least, b - least);
    } else {
      code = pack_unsigned((a & masks.magnitude) - least, (b & masks.magnitude) - least);
      code = (code & ~masks.sign) | (pack_signed(a, b) & masks.sign);
    }
    store(codes + at * kLanes<float>, unpacked_order(code));
  }
};

constexpr std::size_t width_of(Float type) { return type == Float::f64 ? 8 : type == Float::f32 ? 4 : 2; }
constexpr std::size_t width_of(StateType type) { return type == StateType::wide ? 4 : type == StateType::bf16 ? 2 : 1; }

// Blocks of kStateBlock elements, one after the other. Codes of 8-bit states are written while the next block is
// stepped, so that nothing waits for what they depend on.
template <class R, unsigned Positive, StateType State>
struct Blocks {
  using V = Vec<float>;
  static constexpr std::size_t lanes = kLanes<float>;

  const Scalars<float> scalars;
  Rounded rounded[2][R::states + 1];
  std::size_t count = 0;  // of blocks stepped

  // The block of `a` from element `at` on, which has the number `first` in its tensor; only `n` elements of it count.
  void step(const StepArgs& a, std::size_t at, std::size_t first, std::size_t n) {
    // Copies: a store of bytes could be one to what they refer to, as far as the compiler knows.
    const Scalars<float> k = scalars;
    const Float param_type = a.param_type, grad_type = a.grad_type, w_type = a.master ? Float::f32 : param_type;
    const unsigned stochastic = a.stochastic;
    char* const param = static_cast<char*>(a.param) + at * width_of(param_type);
    const char* const grad = static_cast<const char*>(a.grad) + at * width_of(grad_type);
    void* const w = a.master ? static_cast<void*>(a.master + at) : param;
    char* state[R::states + 1];
    for (std::size_t j = 0; j < R::states; ++j) state[j] = static_cast<char*>(a.state[j]) + at * width_of(State);
    Rounded* const now = rounded[count % 2];
    const Rounded* const before = rounded[(count + 1) % 2];
    const std::size_t to_write = count > 0 ? kBlockVectors : 0;
    const Masks masks;
    Bits least[R::states + 1] = {};
    if constexpr (State == StateType::u8) {
      for (std::size_t j = 0; j < R::states; ++j) {
        least[j] += std::uint32_t{a.exponent[j][at / kStateBlock]} << (kMantissa + kDropped);
      }
    }
    const auto gradients = [&](std::size_t i) {
      Two g = widen_two(grad_type, grad, i);
      if (k.options) {
        const Two weights = widen_two(w_type, w, i);
        repeat<2>([&](auto h) { g.v[h.value] = gradient_of(k, k.options, weights.v[h.value], g.v[h.value]); });
      }
      return g;
    };
    // All of two vectors up to their square roots.
    const auto begin_pair = [&](std::size_t i, const Two& g, V(&s)[2][R::states + 1], V(&root)[2]) {
      repeat<R::states>([&](auto j) {
        const auto* const from = state[j.value];
        prefetch_pair(from, i, width_of(State));
        repeat<2>([&](auto h) {
          const std::size_t element = i + h.value * lanes;
          V& to = s[h.value][j.value];
          if constexpr (State == StateType::wide) to = widen(Float::f32, from, element);
          if constexpr (State == StateType::bf16) to = widen(Float::bf16, from, element);
          if constexpr (State == StateType::u8) {
            const auto* const codes = reinterpret_cast<const std::uint8_t*>(from) + element;
            to = widen_u8(masks, codes, least[j.value], Positive >> j.value & 1);
          }
        });
      });
      repeat<2>([&](auto h) {
        root[h.value] = V{};
        if constexpr (R::has_root) root[h.value] = sqrt(R::squares(k, g.v[h.value], s[h.value]));
      });
    };

    // Where there are roots a block is passed twice, as what waits for them would keep up what could be done.
    constexpr bool twice = R::has_root && State == StateType::u8;
    struct Held {
      V root[2], s[2][R::states + 1];
    } held[twice ? kBlockVectors / 2 : 1];
    if constexpr (twice) {
      for (std::size_t v = 0; v < kBlockVectors; v += 2) {
        V root[2], s[2][R::states + 1];
        begin_pair(v * lanes, gradients(v * lanes), s, root);
        std::memcpy(held[v / 2].root, root, sizeof root);
        std::memcpy(held[v / 2].s, s, sizeof s);
      }
    }
    const Bits stride = kept(Bits{} + static_cast<std::uint32_t>(lanes) * kGolden);
    Bits chance = first_chance(a.noise, first);
    Words largest[R::states + 1] = {};
    for (std::size_t v = 0; v < kBlockVectors; v += 2) {
      const std::size_t begin = v * lanes;
      V root[2], s[2][R::states + 1];
      Two g = {}, next = widen_two(w_type, w, begin);
      if constexpr (!twice) {
        g = gradients(begin);
        begin_pair(begin, g, s, root);
      } else {
        if constexpr (R::late_gradient) g = gradients(begin);
        std::memcpy(root, held[v / 2].root, sizeof root);
        std::memcpy(s, held[v / 2].s, sizeof s);
      }
      repeat<2>([&](auto h) {
        V& weights = next.v[h.value];
        weights = updated<R>(k, k.options, weights, g.v[h.value], s[h.value], root[h.value]);
      });
      if (w_type == Float::f32) {
        store(static_cast<float*>(w) + begin, next.v[0]);
        store(static_cast<float*>(w) + begin + lanes, next.v[1]);
      }
      if (State == StateType::u8 && begin + 2 * lanes > n) {  // what is behind the end has no part in the exponent
        repeat<2>([&](auto h) {
          const Bits number = bit_cast<Bits>(lane_numbers()) + static_cast<std::uint32_t>(begin + h.value * lanes);
          repeat<R::states>([&](auto j) {
            V& value = s[h.value][j.value];
            value = number < static_cast<std::uint32_t>(n) ? value : V{};
          });
        });
      }
      const Bits random[2] = {chance, chance + stride};
      chance = random[1] + stride;
      if (param_type != Float::f32) narrow_two(param_type, param, begin, next, stochastic, random);
      repeat<R::states>([&](auto j) {
        constexpr std::size_t number = decltype(j)::value;
        constexpr bool positive = Positive >> number & 1;
        char* const to = state[number];
        const V pair[2] = {s[0][number], s[1][number]};
        if constexpr (State == StateType::wide) {
          store(to + begin * sizeof(float), pair[0]);
          store(to + (begin + lanes) * sizeof(float), pair[1]);
        }
        if constexpr (State == StateType::bf16) {
          store_high_words(reinterpret_cast<std::uint16_t*>(to) + begin,
                           raised(pair[0], chance_of<16>(random[0], number)),
                           raised(pair[1], chance_of<16>(random[1], number)));
        }
        if constexpr (State == StateType::u8) {
          const Words magnitude = now[number].set(masks, v, pair, random, number, positive);
          largest[number] = magnitude > largest[number] ? magnitude : largest[number];
          if (v % 4 == 2 && v < to_write) before[number].write(masks, v - 2, positive);
        }
      });
    }
    if constexpr (State == StateType::u8) {
      for (std::size_t j = 0; j < R::states; ++j) {
        a.exponent[j][at / kStateBlock] = now[j].close(state[j], largest[j], Positive >> j & 1);
      }
      ++count;
    }
  }

  // Writes the codes of the last block.
  void finish() {
    if (count == 0) return;
    const Masks masks;
    for (std::size_t v = 0; v < kBlockVectors; v += 4) {
      for (std::size_t j = 0; j < R::states; ++j) rounded[(count + 1) % 2][j].write(masks, v, Positive >> j & 1);
    }
    count = 0;
  }

  static void prefetch_pair(const void* base, std::size_t i, std::size_t width) {
    const char* const at = static_cast<const char*>(base) + i * width;
    prefetch<2048>(at);
    if (2 * lanes * width > 64) prefetch<2048>(at + 64);
  }
};

// The same arrays, from element `at` on.
inline StepArgs from(const StepArgs& a, std::size_t at) {
  StepArgs b = a;
  b.param = static_cast<char*>(a.param) + at * width_of(a.param_type);
  b.grad = static_cast<const char*>(a.grad) + at * width_of(a.grad_type);
  for (std::size_t j = 0; j < kMaxStates; ++j) {
    if (a.state[j]) b.state[j] = static_cast<char*>(a.state[j]) + at * width_of(a.state_type);
    if (a.exponent[j]) b.exponent[j] = a.exponent[j] + at / kStateBlock;
  }
  if (a.master) b.master = a.master + at;
  return b;
}

// Elements [at, at + n) of `a`, the first of which has the number `first` in its tensor.
template <class R, unsigned Positive, StateType State>
void step_blocks(const Scalars<float>& k, const StepArgs& a, std::size_t at, std::size_t first, std::size_t n) {
  Blocks<R, Positive, State> blocks{k, {}};
  for (std::size_t done = 0; done < n; done += kStateBlock) {
    blocks.step(a, at + done, first + done, n - done < kStateBlock ? n - done : kStateBlock);
  }
  blocks.finish();
}
using StepBlocks = void (*)(const Scalars<float>&, const StepArgs&, std::size_t, std::size_t, std::size_t);

void step_narrow(const Scalars<float>& k, const StepArgs& a, std::size_t states, std::size_t begin, std::size_t end,
                 StepBlocks step) {
  const std::size_t whole = (end - begin) / kStateBlock * kStateBlock, at = begin + whole, n = end - at;
  if (whole > 0) step(k, a, begin, begin, whole);
  if (n == 0) return;
  // The last block passes through memory of its own, filled up with zeros.
  const std::size_t state_width = width_of(a.state_type);
  const StepArgs real = from(a, at);
  StepArgs copy = real;
  float param[kStateBlock] = {}, grad[kStateBlock] = {}, master[kStateBlock] = {}, state[kMaxStates][kStateBlock] = {};
  std::memcpy(copy.param = param, real.param, n * width_of(a.param_type));
  copy.grad = std::memcpy(grad, real.grad, n * width_of(a.grad_type));
  for (std::size_t j = 0; j < states; ++j) {
    std::memcpy(copy.state[j] = state[j], real.state[j], n * state_width);
  }
  if (a.master) std::memcpy(copy.master = master, real.master, n * sizeof(float));
  step(k, copy, 0, at, n);
  std::memcpy(real.param, param, n * width_of(a.param_type));
  for (std::size_t j = 0; j < states; ++j) std::memcpy(real.state[j], state[j], n * state_width);
  if (a.master) std::memcpy(real.master, master, n * sizeof(float));
}
