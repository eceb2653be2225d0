// A step where the parameter, the gradient or the states are narrower than float32.
//
// Every array is widened to float in registers, stepped there and narrowed again. The types therefore do not multiply
// with the rules: only the type of the states is a template parameter.
//
// An array is stepped in state blocks of 256 elements, and a state block in pairs of vectors. The codes of an 8-bit
// state count from the exponent of their state block, which is known only when the whole state block has been stepped.
// So its magnitudes wait in `Rounded`, and its codes are written while the next state block is stepped:
//
//              state block 0       state block 1       state block 2
//   step       |pair|pair| ... |   |pair|pair| ... |   |pair|pair| ... |
//   Rounded    [0] filled          [1] filled          [0] filled again
//   exponent            known at |          known at |          known at |
//   codes                          of number 0         of number 1          of number 2, by finish()

using UInts = Vec<std::uint32_t>;
constexpr std::size_t kBlockVectors = kStateBlock / kLanes<float>;

// The final mixing step of MurmurHash3 (Appleby, 2011): neighbouring seeds give unrelated numbers.
inline std::uint32_t mixed(std::uint32_t h) {
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

// Stochastic rounding takes 32 bits for each element: a multiple of the golden ratio, from a start that differs for
// every step. Such a sequence is spread more evenly than random numbers, so the rounding errors of a sum are smaller.
// The bits depend on nothing but the step and the element's index in its tensor, however the tensor is cut.
constexpr std::uint32_t kGolden = 0x9e3779b9u;

inline UInts first_chance(std::uint32_t noise, std::size_t first) {
  UInts index = {};
  for (std::size_t j = 0; j < kLanes<float>; ++j) index[j] = static_cast<std::uint32_t>(first + j);
  return index * kGolden + mixed(noise);
}

// `Count` of an element's bits. Each state takes different ones, and parameters take the lowest, so that the rounding
// errors of one element are not correlated.
template <int Count>
inline UInts chance_of(UInts random, std::size_t state) {
  constexpr int skipped[kMaxStates] = {0, 12, 6};
  return random << skipped[state] >> (32 - Count);
}

// Stochastic rounding to the bits above those of `chance`, which the caller drops: the nearer neighbour is the likelier
// one, so the mean is the value itself. NaN is left alone, as the sum could carry into its sign.
inline UInts raised(Vec<float> v, UInts chance) {
  const UInts bits = bit_cast<UInts>(v);
  return v == v ? bits + chance : bits;
}

// To the nearest, ties to even, in the upper half of the result; NaN becomes quiet and stays NaN.
inline UInts bf16_nearest(UInts bits) {
  const UInts rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return magnitude_bits(bits) > 0x7f800000u ? bits | 0x400000u : rounded;
}

// Stochastic rounding to float16, in the lower half of the result. A subnormal result is a whole number of steps of
// 2^-24, so a conversion that truncates rounds it.
inline UInts half_stochastic(UInts bits, UInts random) {
  const UInts sign = bits >> 16 & 0x8000u, rest = magnitude_bits(bits), chance = random & 0x1fffu;
  const UInts normal = (rest - (112u << 23) + chance) >> 13;
  const Vec<float> steps = bit_cast<Vec<float>>(rest) * 0x1p24f + convert<float, kLanes<float>>(chance) * 0x1p-13f;
  const UInts subnormal =
      bit_cast<UInts>(convert<std::int32_t, kLanes<float>>(rest < 0x38800000u ? steps : Vec<float>{}));
  UInts half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x47800000u ? UInts{} + 0x7c00u : half;
  half = rest > 0x7f800000u ? UInts{} + 0x7e00u : half;
  return sign | half;
}

// One vector of float16, bfloat16 or float32 from element i on, as float.
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

// Two neighbouring vectors. Two, as 16-bit numbers of two vectors of floats fill one vector.
__attribute__((always_inline)) inline Two widen_two(Float type, const void* base, std::size_t i) {
  if (type == Float::f32) {
    const float* const floats = static_cast<const float*>(base) + i;
    prefetch<2048>(floats);
    prefetch<2048>(floats + kLanes<float>);
    return {load<Vec<float>>(floats), load<Vec<float>>(floats + kLanes<float>)};
  }
  prefetch<2048>(static_cast<const std::uint16_t*>(base) + i);
  if (type == Float::bf16) return {widen(Float::bf16, base, i), widen(Float::bf16, base, i + kLanes<float>)};
  return {widen(Float::f16, base, i), widen(Float::f16, base, i + kLanes<float>)};
}

// Two vectors to float16 or bfloat16, rounded to the nearest or stochastically.
__attribute__((always_inline)) inline void narrow_two(Float type, void* base, std::size_t i, const Two& two,
                                                      unsigned stochastic, const UInts (&random)[2]) {
  std::uint16_t* const to = static_cast<std::uint16_t*>(base) + i;
  if (type == Float::bf16) {
    UInts bits[2];
    for (std::size_t h = 0; h < 2; ++h) {
      bits[h] = stochastic ? raised(two.v[h], random[h] & 0xffffu) : bf16_nearest(bit_cast<UInts>(two.v[h]));
    }
    store_high_words(to, bits[0], bits[1]);
    return;
  }
  for (std::size_t h = 0; h < 2; ++h) {
    if (stochastic) {
      store_low_words(to + h * kLanes<float>, half_stochastic(bit_cast<UInts>(two.v[h]), random[h]));
    } else {
      store_halves(to + h * kLanes<float>, two.v[h]);
    }
  }
}

// Takes over the parameters of a block that their owner changed since the last step: those that are not their rounded
// masters. A kept zero is one of them, though the master may only round to it. Once a block, and not in the loop of the
// step, which is there for each rule and type of state.
[[gnu::noinline]] inline void take_over(Float type, const void* param, float* master, bool keep_zeros) {
  constexpr std::size_t lanes = kLanes<float>;
  const UInts no_chance[2] = {};
  std::uint16_t rounded[kStateBlock];
  for (std::size_t i = 0; i < kStateBlock; i += 2 * lanes) {
    narrow_two(type, rounded, i, widen_two(Float::f32, master, i), 0, no_chance);
  }
  if (!keep_zeros && std::memcmp(rounded, param, sizeof rounded) == 0) return;
  for (std::size_t i = 0; i < kStateBlock; i += lanes) {
    const Vec<float> own = widen(type, param, i), held = load<Vec<float>>(master + i);
    Vec<float> next = bit_cast<UInts>(widen(type, rounded, i)) == bit_cast<UInts>(own) ? held : own;
    if (keep_zeros) next = own == 0 ? own : next;
    store(master + i, next);
  }
}

// The code of an 8-bit state is cut out of the bits of a float, after the exponent of its state block was subtracted:
//
//   float       s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
//   signed      s     eeee mmm                        code 0 is zero
//   positive         eeeee mmm                        code 0 is the smallest number that the state block can hold
//
// A code 0 without a sign is zero only if the exponent of its state block is: Adam divides by the square root of such a
// state, so a number that was not zero must not become zero.
constexpr int kDropped = 20, kMantissa = 3;

struct Masks {
  const UInts signed_code = in_register(UInts{} + 0x87f00000u),
              code = in_register(UInts{} + 0x07f00000u);  // where a float has them
  const UInts most =
      in_register(UInts{} + 0x7ff00000u);  // largest magnitude that rounding up cannot carry into the sign
  const Words magnitude = in_register(Words{} + std::int16_t{0x7ff});
  const Vec<std::uint8_t> sign = in_register(Vec<std::uint8_t>{} + std::uint8_t{0x80});
};

// A vector of codes as floats; `least` is the exponent of their state block, where a float has it.
inline Vec<float> widen_u8(const Masks& masks, const std::uint8_t* codes, UInts least, bool positive) {
  if (positive) return bit_cast<Vec<float>>((load_bytes(codes) << kDropped) + least);
  const UInts bits = bit_cast<UInts>(load_signed_bytes(codes)) << kDropped, code = bits & masks.signed_code;
  return bit_cast<Vec<float>>((bits & masks.code) == 0 ? code : code + least);
}

// The magnitudes of NaN and infinity start here; and how many elements of a block are no reason to change its exponent,
// if they are more than so many binades above what it could hold before and above all others.
constexpr std::uint32_t kNotFinite = 0x7f8;
constexpr std::size_t kOutliers = 4;
constexpr std::uint32_t binades_to_outliers(bool positive) { return positive ? 10 : 5; }

// The magnitude that the codes of a block have to reach where some elements may be outliers. `before` is what they
// could reach before this step, or 0.
[[gnu::noinline]] inline std::uint32_t reach_without_outliers(const void* magnitudes, std::uint32_t before,
                                                              std::uint32_t distance) {
  std::uint16_t words[kStateBlock];
  std::memcpy(words, magnitudes, sizeof words);
  std::uint32_t largest[kOutliers + 1] = {};  // of the finite ones, in falling order
  for (const std::uint16_t word : words) {
    std::uint32_t next = word & 0x7ffu;
    if (next >= kNotFinite) continue;
    for (std::uint32_t& rank : largest) {
      if (next > rank) std::swap(next, rank);
    }
  }
  const std::uint32_t others = before > largest[kOutliers] ? before : largest[kOutliers];
  return others > 0 && largest[0] > others + distance ? others + distance : largest[0];
}

// One state block between its step and its codes: the sign and the rounded magnitude of each element. close()
// chooses the exponent from the largest magnitude; after that write() can make the codes.
struct Rounded {
  Words words[kBlockVectors / 2];
  std::uint8_t* codes;
  std::int16_t least;

  // Rounds two vectors stochastically, keeps them, and returns their magnitudes.
  __attribute__((always_inline)) Words set(const Masks& masks, std::size_t at, const Vec<float> (&v)[2],
                                           const UInts (&random)[2], std::size_t state, bool positive) {
    Vec<std::int32_t> bits[2];
    for (std::size_t h = 0; h < 2; ++h) {
      const UInts chance = chance_of<kDropped>(random[h], state), magnitude = bit_cast<UInts>(v[h]);
      const UInts up = positive ? (magnitude < masks.most ? magnitude : masks.most) + chance : raised(v[h], chance);
      bits[h] = bit_cast<Vec<std::int32_t>>(up);
    }
    const Words both = pack_high<kDropped>(bits[0], bits[1]);
    words[at / 2] = both;
    return positive ? both : both & masks.magnitude;
  }

  // Returns the exponent of the state block: the smallest from which a code can reach the largest magnitude that is no
  // outlier. `before` is the exponent that it had.
  std::uint8_t close(void* to, Words largest, std::uint32_t before, bool positive) {
    const UInts pairs = bit_cast<UInts>(largest), low = pairs & 0xffffu, high = pairs >> 16;
    const std::uint32_t exponents = positive ? 31 : 15, binades = binades_to_outliers(positive);
    std::uint32_t reach = fold(larger(low, high), larger);
    if (reach >= kNotFinite || (reach >> kMantissa) > before + exponents + binades) {
      const std::uint32_t reached = before > 0 ? ((before + exponents) << kMantissa) + (1 << kMantissa) - 1 : 0;
      reach = reach_without_outliers(words, reached, binades << kMantissa);
    }
    const std::uint32_t top = reach >> kMantissa, exponent = top > exponents ? top - exponents : 0;
    least = static_cast<std::int16_t>(exponent << kMantissa);
    codes = static_cast<std::uint8_t*>(to);
    return static_cast<std::uint8_t>(exponent);
  }

  // Writes the codes of four vectors, from vector `at` of the state block on: bytes of four vectors fill one.
  __attribute__((always_inline)) void write(const Masks& masks, std::size_t at, bool positive) const {
    const Words a = words[at / 2], b = words[at / 2 + 1];
    Vec<std::uint8_t> code;
    if (positive) {
      code = pack_unsigned(a - least, b - least);
    } else {
      code = pack_unsigned((a & masks.magnitude) - least, (b & masks.magnitude) - least);
      code = code < masks.sign ? code : ~masks.sign;
      code = code | (pack_signed(a, b) & masks.sign);
    }
    store(codes + at * kLanes<float>, unpacked_order(code));
  }
};

// Steps state blocks one after the other. The codes of one are written while the next one is stepped, so that no
// instruction waits for the largest magnitude of its own state block.
template <class R, unsigned Positive, StateType State>
struct StateBlocks {
  using V = Vec<float>;
  static constexpr std::size_t lanes = kLanes<float>;

  const Scalars<float> scalars;
  Rounded rounded[2][R::states + 1];
  std::size_t count = 0;  // how many state blocks have been stepped

  // Steps the state block at element `at` of the arrays `a`. That element is number `first` of its tensor, and only `n`
  // elements exist. The function is long because its lambdas share two dozen vectors: as functions of their own they
  // would pass them through memory.
  void step(const StepArgs& a, std::size_t at, std::size_t first, std::size_t n) {
    // Copies of everything that the loops read: a store through a pointer to bytes may alias anything, so the compiler
    // would otherwise read the originals again after each one.
    const Scalars<float> k = scalars;
    const Float param_type = a.param_type, grad_type = a.grad_type, w_type = a.master ? Float::f32 : param_type;
    const unsigned stochastic = a.stochastic;
    char* const param = static_cast<char*>(a.param) + at * width_of(param_type);
    const char* const grad = static_cast<const char*>(a.grad) + at * width_of(grad_type);
    void* const w = a.master ? static_cast<void*>(a.master + at) : param;
    if (a.master) take_over(param_type, param, a.master + at, k.options & kKeepZeros);
    char* state[R::states + 1];
    for (std::size_t j = 0; j < R::states; ++j) state[j] = static_cast<char*>(a.state[j]) + at * width_of(State);
    Rounded* const now = rounded[count % 2];
    const Rounded* const before = rounded[(count + 1) % 2];
    const std::size_t to_write = count > 0 ? kBlockVectors : 0;
    const Masks masks;
    UInts least[R::states + 1] = {};
    if constexpr (State == StateType::u8) {
      for (std::size_t j = 0; j < R::states; ++j) {
        least[j] += std::uint32_t{a.exponent[j][at / kStateBlock]} << (kMantissa + kDropped);
      }
    }
    const auto gradients = [&](std::size_t i) {
      Two g = widen_two(grad_type, grad, i);
      if (k.options) {
        const Two weights = widen_two(w_type, w, i);
        unroll<2>([&](auto h) { g.v[h.value] = gradient_of(k, k.options, weights.v[h.value], g.v[h.value]); });
      }
      return g;
    };
    // Loads the states of two vectors and goes as far as the square roots.
    const auto begin_pair = [&](std::size_t i, const Two& g, V(&s)[2][R::states + 1], V(&root)[2]) {
      unroll<R::states>([&](auto j) {
        const auto* const source = state[j.value];
        prefetch_pair(source, i, width_of(State));
        unroll<2>([&](auto h) {
          const std::size_t element = i + h.value * lanes;
          V& to = s[h.value][j.value];
          if constexpr (State == StateType::wide) to = widen(Float::f32, source, element);
          if constexpr (State == StateType::bf16) to = widen(Float::bf16, source, element);
          if constexpr (State == StateType::u8) {
            const auto* const codes = reinterpret_cast<const std::uint8_t*>(source) + element;
            to = widen_u8(masks, codes, least[j.value], Positive >> j.value & 1);
          }
        });
      });
      unroll<2>([&](auto h) {
        root[h.value] = V{};
        if constexpr (R::has_root) root[h.value] = sqrt(R::squares(k, g.v[h.value], s[h.value]));
      });
    };

    // A rule with square roots passes over a state block twice: first all roots, then everything that uses them. In one
    // pass, independent work would be stuck behind the roots in the queue of the core.
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
    const UInts stride = in_register(UInts{} + static_cast<std::uint32_t>(lanes) * kGolden);
    UInts chance = first_chance(a.noise, first);
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
      unroll<2>([&](auto h) {
        V& weights = next.v[h.value];
        weights = updated<R>(k, k.options, weights, g.v[h.value], s[h.value], root[h.value]);
      });
      if (w_type == Float::f32) {
        store(static_cast<float*>(w) + begin, next.v[0]);
        store(static_cast<float*>(w) + begin + lanes, next.v[1]);
      }
      if (State == StateType::u8 && begin + 2 * lanes > n) {  // elements behind the end must not count
        unroll<2>([&](auto h) {
          const UInts number = bit_cast<UInts>(lane_numbers()) + static_cast<std::uint32_t>(begin + h.value * lanes);
          unroll<R::states>([&](auto j) {
            V& value = s[h.value][j.value];
            value = number < static_cast<std::uint32_t>(n) ? value : V{};
          });
        });
      }
      const UInts random[2] = {chance, chance + stride};
      chance = random[1] + stride;
      if (param_type != Float::f32) narrow_two(param_type, param, begin, next, stochastic, random);
      unroll<R::states>([&](auto j) {
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
          largest[number] = larger(magnitude, largest[number]);
          if (v % 4 == 2 && v < to_write) before[number].write(masks, v - 2, positive);
        }
      });
    }
    if constexpr (State == StateType::u8) {
      for (std::size_t j = 0; j < R::states; ++j) {
        std::uint8_t& exponent = a.exponent[j][at / kStateBlock];
        exponent = now[j].close(state[j], largest[j], exponent, Positive >> j & 1);
      }
      ++count;
    }
  }

  // Writes the codes of the last state block, which no step follows.
  void finish() {
    if (count == 0) return;
    const Masks masks;
    for (std::size_t v = 0; v < kBlockVectors; v += 4) {
      for (std::size_t j = 0; j < R::states; ++j) rounded[(count + 1) % 2][j].write(masks, v, Positive >> j & 1);
    }
    count = 0;
  }

  // Two vectors of numbers `width` bytes wide: one or two cache lines.
  static void prefetch_pair(const void* base, std::size_t i, std::size_t width) {
    const char* const at = static_cast<const char*>(base) + i * width;
    prefetch<2048>(at);
    if (2 * lanes * width > 64) prefetch<2048>(at + 64);
  }
};

// The arrays of `a` from element `at` on.
inline StepArgs args_from(const StepArgs& a, std::size_t at) {
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

// Steps elements [at, at + n) of `a`; the first is number `first` of its tensor.
template <class R, unsigned Positive, StateType State>
void step_state_blocks(const Scalars<float>& k, const StepArgs& a, std::size_t at, std::size_t first, std::size_t n) {
  StateBlocks<R, Positive, State> blocks{k, {}};
  for (std::size_t done = 0; done < n; done += kStateBlock) {
    blocks.step(a, at + done, first + done, n - done < kStateBlock ? n - done : kStateBlock);
  }
  blocks.finish();
}
using StepStateBlocks = void (*)(const Scalars<float>&, const StepArgs&, std::size_t, std::size_t, std::size_t);

// Steps elements [begin, end). A step reads and writes whole state blocks, so the last one, if it is shorter, is
// stepped in a copy that is filled up with zeros.
void step_narrow(const Scalars<float>& k, const StepArgs& a, std::size_t states, std::size_t begin, std::size_t end,
                 StepStateBlocks step) {
  const std::size_t whole = (end - begin) / kStateBlock * kStateBlock, at = begin + whole, n = end - at;
  if (whole > 0) step(k, a, begin, begin, whole);
  if (n == 0) return;
  const std::size_t state_width = width_of(a.state_type);
  const StepArgs real = args_from(a, at);
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
