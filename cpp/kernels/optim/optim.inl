// Optimizer steps: one pass over parameter, gradient and states, in place. A new optimizer is a rule here, a row
// in the table at the end, and a class in python/fastopt/optim.py.

// What a step may do without; bits of `options`.
constexpr unsigned kScaled = 1, kDecay = 2, kL2 = 4, kL1 = 8, kKeepZeros = 16;

template <class T>
struct Scalars {
  explicit Scalars(const Hyper& h)
      : step_size(static_cast<T>(h.step_size)),
        weight_decay(static_cast<T>(h.weight_decay)),
        decay(static_cast<T>(h.decay)),
        decay1(static_cast<T>(h.decay1)),
        blend1(static_cast<T>(h.blend1)),
        decay2(static_cast<T>(h.decay2)),
        blend2(static_cast<T>(h.blend2)),
        eps(static_cast<T>(h.eps)),
        grad_scale(static_cast<T>(h.grad_scale)),
        shrink(static_cast<T>(h.shrink)),
        options((h.grad_scale != 1 ? kScaled : 0) | (h.weight_decay != 0 ? kL2 : 0) | (h.decay != 1 ? kDecay : 0) |
                (h.shrink != 0 ? kL1 : 0) | (h.keep_zeros ? kKeepZeros : 0)) {}

  T step_size, weight_decay, decay, decay1, blend1, decay2, blend2, eps, grad_scale, shrink;
  unsigned options;
};

// ---- rules ---------------------------------------------------------------------------------------------------

// A rule maps (w, g) to the new w and updates its states s; V is a vector of T. Where it divides by a square root,
// squares() is what to take it of, and update() is given it. Formulas are torch.optim's.

struct Sgd {
  static constexpr std::size_t states = 0;
  static constexpr bool has_root = false;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V*, V) {
    return w - k.step_size * g;
  }
};

struct Momentum {
  static constexpr std::size_t states = 1;
  static constexpr bool has_root = false;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s, V) {
    s[0] = k.decay1 * s[0] + k.blend1 * g;
    return w - k.step_size * s[0];
  }
};

struct Nesterov {
  static constexpr std::size_t states = 1;
  static constexpr bool has_root = false;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s, V) {
    s[0] = k.decay1 * s[0] + k.blend1 * g;
    return w - k.step_size * (g + k.decay1 * s[0]);
  }
};

// Duchi, Hazan and Singer, 2011.
struct Adagrad {
  static constexpr std::size_t states = 1;
  static constexpr bool has_root = true;
  static constexpr bool late_gradient = true;  // update() takes it as well
  template <class T, class V>
  static V squares(const Scalars<T>&, V g, V* s) {
    return s[0] = s[0] + g * g;
  }
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V*, V root) {
    return w - k.step_size * g / (root + k.eps);
  }
};

// Tieleman and Hinton, 2012; centered: Graves, 2013. States: squares, momentum, mean.
template <bool HasMomentum, bool Centered>
struct RmsProp {
  static constexpr std::size_t states = 1 + HasMomentum + Centered;
  static constexpr bool has_root = true;
  static constexpr bool late_gradient = true;  // update() takes it as well
  template <class T, class V>
  static V squares(const Scalars<T>& k, V g, V* s) {
    s[0] = k.decay2 * s[0] + k.blend2 * g * g;
    if constexpr (!Centered) return s[0];
    V& mean = s[states - 1];
    mean = mean + k.blend2 * (g - mean);
    const V variance = s[0] - mean * mean;
    return variance < 0 ? V{} : variance;  // below zero by rounding alone
  }
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s, V root) {
    const V direction = g / (root + k.eps);
    if constexpr (!HasMomentum) return w - k.step_size * direction;
    s[1] = k.decay1 * s[1] + direction;
    return w - k.step_size * s[1];
  }
};

// Kingma and Ba, 2015, the faster order of their section 2: bias corrections are folded into step_size and eps.
// AMSGrad: Reddi et al., 2018.
template <bool AmsGrad>
struct Adam {
  static constexpr std::size_t states = 2 + AmsGrad;
  static constexpr bool has_root = true;
  static constexpr bool late_gradient = false;
  template <class T, class V>
  static V squares(const Scalars<T>& k, V g, V* s) {
    s[0] = s[0] + k.blend1 * (g - s[0]);
    s[1] = k.decay2 * s[1] + k.blend2 * g * g;
    if constexpr (!AmsGrad) return s[1];
    return s[2] = s[1] <= s[2] ? s[2] : s[1];
  }
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V, V* s, V root) {
    return w - k.step_size * s[0] / (root + k.eps);
  }
};

// Chen et al., 2023: the sign of a blend, which the state does not keep.
struct Lion {
  static constexpr std::size_t states = 1;
  static constexpr bool has_root = false;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s, V) {
    const V blend = k.decay1 * s[0] + k.blend1 * g;
    const V sign = blend > 0 ? V{} + T{1} : (blend < 0 ? V{} - T{1} : blend);
    s[0] = k.decay2 * s[0] + k.blend2 * g;
    return w - k.step_size * sign;
  }
};

// What every optimizer shares, before its rule and around update().
template <class T, class V>
inline V gradient_of(const Scalars<T>& k, unsigned options, V w, V g) {
  if (!options) return g;
  g = g * k.grad_scale;
  return options & kL2 ? g + k.weight_decay * w : g;
}

template <class R, class T, class V>
inline V updated(const Scalars<T>& k, unsigned options, V w, V g, V* s, V root) {
  if (!options) return R::update(k, w, g, s, root);
  const V before = w;
  w = R::update(k, w * k.decay, g, s, root);
  if (options & kL1) {
    const V most = V{} + k.shrink, below = w > most ? most : w;
    w = w - (below < -most ? -most : below);
  }
  if (options & kKeepZeros) w = before == 0 ? V{} : w;
  return w;
}

// N vectors stepped at once, so that they fill each other's waits. The last `Products` of their square roots are left
// to what multiplies, the others to what divides.
template <class R, std::size_t Products, std::size_t N, class T, class V>
inline void step_vectors(const Scalars<T>& k, unsigned options, V (&w)[N], V (&g)[N], V (&s)[N][R::states + 1]) {
  V root[N] = {};
  for (std::size_t v = 0; v < N; ++v) {
    g[v] = gradient_of(k, options, w[v], g[v]);
    if constexpr (R::has_root) root[v] = R::squares(k, g[v], s[v]);
  }
  if constexpr (R::has_root) {
    for (std::size_t v = 0; v < N - Products; ++v) root[v] = sqrt(root[v]);
    if constexpr (Products > 0) {
      for (std::size_t v = N - Products; v < N; ++v) root[v] = sqrt_by_products(root[v]);
    }
  }
  for (std::size_t v = 0; v < N; ++v) w[v] = updated<R>(k, options, w[v], g[v], s[v], root[v]);
}

// ---- a range of one type -------------------------------------------------------------------------------------

template <class R, class T>
void step_wide(const Scalars<T>& k, T* w, const T* g, void* const* states, std::size_t first, std::size_t n) {
  using V = Vec<T>;
  T* state[R::states + 1];
  for (std::size_t j = 0; j < R::states; ++j) state[j] = static_cast<T*>(states[j]) + first;
  w += first;
  g += first;
  const auto part = [&](std::size_t i, std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    V next[1] = {load_part<V>(w + i, bytes)}, grad[1] = {load_part<V>(g + i, bytes)}, s[1][R::states + 1];
    for (std::size_t j = 0; j < R::states; ++j) s[0][j] = load_part<V>(state[j] + i, bytes);
    step_vectors<R, 0>(k, k.options, next, grad, s);
    store_part(w + i, next[0], bytes);
    for (std::size_t j = 0; j < R::states; ++j) store_part(state[j] + i, s[0][j], bytes);
  };
  // Up to where w is aligned to vectors; large arrays of NumPy then all are.
  std::size_t i = reinterpret_cast<std::uintptr_t>(w) % kVectorBytes / sizeof(T);
  i = i == 0 ? 0 : kLanes<T> - i;
  i = i < n ? i : n;
  if (i > 0) part(0, i);
  const auto whole = [&](auto vectors, auto products, unsigned options) {
    constexpr std::size_t count = decltype(vectors)::value;
    V next[count], grad[count], s[count][R::states + 1];
    for (std::size_t v = 0; v < count; ++v) {
      const std::size_t at = i + v * kLanes<T>;
      repeat<R::states>([&](auto j) {
        prefetch<512>(state[j.value] + at);
        s[v][j.value] = load<V>(state[j.value] + at);
      });
      if constexpr (R::states > 0) {  // of two streams cores fetch enough ahead by themselves
        prefetch<512>(w + at);
        prefetch<512>(g + at);
      }
      next[v] = load<V>(w + at);
      grad[v] = load<V>(g + at);
    }
    step_vectors<R, decltype(products)::value>(k, options, next, grad, s);
    for (std::size_t v = 0; v < count; ++v) {
      const std::size_t at = i + v * kLanes<T>;
      store(w + at, next[v]);
      repeat<R::states>([&](auto j) { store(state[j.value] + at, s[v][j.value]); });
    }
    i += count * kLanes<T>;
  };
  if (k.options == 0) {
    if constexpr (R::has_root && kRootByProducts<T>) {
      while (i + 2 * kLanes<T> <= n) whole(Int<2>{}, Int<1>{}, 0);
    }
    while (i + kLanes<T> <= n) whole(Int<1>{}, Int<0>{}, 0);
  }
  while (i + kLanes<T> <= n) whole(Int<1>{}, Int<0>{}, k.options);
  if (i < n) part(i, n - i);
}

// ---- narrow parameters, gradients and states -----------------------------------------------------------------

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

// ---- the table -----------------------------------------------------------------------------------------------

template <class R, unsigned Positive>
void step(const Hyper& hyper, const StepArgs& a, std::size_t begin, std::size_t end) {
  const FlushSubnormals flush;
  const auto wide = [&](auto type) {
    using T = decltype(type);
    step_wide<R>(Scalars<T>(hyper), static_cast<T*>(a.param), static_cast<const T*>(a.grad), a.state, begin,
                 end - begin);
  };
  if (a.param_type == Float::f64) {
    wide(double{});
  } else if (a.param_type == Float::f32 && a.grad_type == Float::f32 && a.state_type == StateType::wide) {
    wide(float{});
  } else {
    StepBlocks blocks = step_blocks<R, Positive, StateType::wide>;
    if constexpr (R::states > 0) {
      if (a.state_type == StateType::bf16) blocks = step_blocks<R, Positive, StateType::bf16>;
      if (a.state_type == StateType::u8) blocks = step_blocks<R, Positive, StateType::u8>;
    }
    step_narrow(Scalars<float>(hyper), a, R::states, begin, end, blocks);
  }
}

// `Positive`: a bit for each state that is never negative.
template <class R, unsigned Positive = 0>
constexpr Rule rule(const char* name) {
  return {name, R::states, Positive, step<R, Positive>};
}

constexpr Rule kRules[] = {
    rule<Sgd>("sgd"),
    rule<Momentum>("momentum"),
    rule<Nesterov>("nesterov"),
    rule<Adagrad, 1>("adagrad"),
    rule<RmsProp<false, false>, 1>("rmsprop"),
    rule<RmsProp<true, false>, 1>("rmsprop_momentum"),
    rule<RmsProp<false, true>, 1>("rmsprop_centered"),
    rule<RmsProp<true, true>, 1>("rmsprop_centered_momentum"),
    rule<Adam<false>, 2>("adam"),
    rule<Adam<true>, 6>("amsgrad"),
    rule<Lion>("lion"),
};

// ---- the norm of gradients -----------------------------------------------------------------------------------

constexpr std::size_t kNormPartials = 16;

template <class T>
double sum_squares(const T* x, std::size_t n) {
  using V = Vec<double>;
  constexpr std::size_t lanes = kLanes<double>, vectors = kNormPartials / lanes;
  V sum[vectors] = {};
  std::size_t i = 0;
  for (; i + kNormPartials <= n; i += kNormPartials) {
    for (std::size_t j = 0; j < vectors; ++j) {
      const V v = convert<double, lanes>(load<Vec<T, lanes>>(x + i + j * lanes));
      sum[j] += v * v;
    }
  }
  double partial[kNormPartials];
  std::memcpy(partial, sum, sizeof partial);
  for (std::size_t j = 0; i + j < n; ++j) partial[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  for (std::size_t half = kNormPartials / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

// Narrow types pass through a block of floats.
double sum_squares_any(Float type, const void* x, std::size_t begin, std::size_t end) {
  if (type == Float::f64) return sum_squares(static_cast<const double*>(x) + begin, end - begin);
  if (type == Float::f32) return sum_squares(static_cast<const float*>(x) + begin, end - begin);
  double sum = 0;
  float block[kStateBlock];
  for (std::size_t at = begin; at < end; at += kStateBlock) {
    const std::size_t n = end - at < kStateBlock ? end - at : kStateBlock;
    const std::uint16_t* part = static_cast<const std::uint16_t*>(x) + at;
    std::uint16_t last[kStateBlock] = {};
    if (n < kStateBlock) part = static_cast<const std::uint16_t*>(std::memcpy(last, part, n * sizeof *part));
    for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) store(block + i, widen(type, part, i));
    sum += sum_squares(block, kStateBlock);
  }
  return sum;
}
