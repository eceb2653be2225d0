// Optimizer steps: one pass over parameter, gradient and states, in place. A new optimizer is a rule here, a row
// in the table at the end, and a class in python/fastopt/optim.py.

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
        root_scale(static_cast<T>(h.root_scale)),
        eps(static_cast<T>(h.eps)),
        grad_scale(static_cast<T>(h.grad_scale)),
        shrink(static_cast<T>(h.shrink)),
        keep_zeros(h.keep_zeros) {}

  T step_size, weight_decay, decay, decay1, blend1, decay2, blend2, root_scale, eps, grad_scale, shrink;
  bool keep_zeros;
};

// ---- rules ---------------------------------------------------------------------------------------------------

// A rule maps (w, g) to the new w and updates its states s; V is a vector of T. Formulas are torch.optim's.

struct Sgd {
  static constexpr std::size_t states = 0;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V*) {
    return w - k.step_size * g;
  }
};

struct Momentum {
  static constexpr std::size_t states = 1;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    s[0] = k.decay1 * s[0] + k.blend1 * g;
    return w - k.step_size * s[0];
  }
};

struct Nesterov {
  static constexpr std::size_t states = 1;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    s[0] = k.decay1 * s[0] + k.blend1 * g;
    return w - k.step_size * (g + k.decay1 * s[0]);
  }
};

// Duchi, Hazan and Singer, 2011.
struct Adagrad {
  static constexpr std::size_t states = 1;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    s[0] = s[0] + g * g;
    return w - k.step_size * g / (sqrt(s[0]) + k.eps);
  }
};

// Tieleman and Hinton, 2012; centered: Graves, 2013. States: squares, momentum, mean.
template <bool HasMomentum, bool Centered>
struct RmsProp {
  static constexpr std::size_t states = 1 + HasMomentum + Centered;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    s[0] = k.decay2 * s[0] + k.blend2 * g * g;
    V variance = s[0];
    if constexpr (Centered) {
      V& mean = s[1 + HasMomentum];
      mean = mean + k.blend2 * (g - mean);
      variance = variance - mean * mean;
      variance = variance < 0 ? V{} : variance;  // below zero by rounding alone
    }
    const V direction = g / (sqrt(variance) + k.eps);
    if constexpr (HasMomentum) {
      s[1] = k.decay1 * s[1] + direction;
      return w - k.step_size * s[1];
    } else {
      return w - k.step_size * direction;
    }
  }
};

// Kingma and Ba, 2015, algorithm 1, with both bias corrections folded into scalars; AMSGrad: Reddi et al., 2018.
template <bool AmsGrad>
struct Adam {
  static constexpr std::size_t states = 2 + AmsGrad;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    s[0] = s[0] + k.blend1 * (g - s[0]);
    s[1] = k.decay2 * s[1] + k.blend2 * g * g;
    V squares = s[1];
    if constexpr (AmsGrad) squares = s[2] = s[1] <= s[2] ? s[2] : s[1];
    return w - k.step_size * s[0] / (sqrt(squares) * k.root_scale + k.eps);
  }
};

// Chen et al., 2023: the sign of a blend, which the state does not keep.
struct Lion {
  static constexpr std::size_t states = 1;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    const V blend = k.decay1 * s[0] + k.blend1 * g;
    const V sign = blend > 0 ? V{} + T{1} : (blend < 0 ? V{} - T{1} : blend);
    s[0] = k.decay2 * s[0] + k.blend2 * g;
    return w - k.step_size * sign;
  }
};

// What every optimizer shares, around its rule.
template <class R, class T, class V>
inline V regularized(const Scalars<T>& k, V w, V g, V* s) {
  const V before = w;
  g = g * k.grad_scale;
  if (k.weight_decay != 0) g = g + k.weight_decay * w;
  w = R::template update<T, V>(k, w * k.decay, g, s);
  if (k.shrink != 0) {
    const V above = w - k.shrink, below = w + k.shrink;
    w = above > 0 ? above : (below < 0 ? below : V{});
  }
  if (k.keep_zeros) w = before == 0 ? V{} : w;
  return w;
}

// ---- a range of one type -------------------------------------------------------------------------------------

template <class R, class T>
void step_wide(const Scalars<T>& k, T* w, const T* g, void* const* states, std::size_t first, std::size_t n) {
  using V = Vec<T>;
  T* state[R::states + 1];
  for (std::size_t j = 0; j < R::states; ++j) state[j] = static_cast<T*>(states[j]) + first;
  w += first;
  g += first;
  V s[R::states + 1];
  std::size_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    for (std::size_t j = 0; j < R::states; ++j) s[j] = load<V>(state[j] + i);
    store(w + i, regularized<R>(k, load<V>(w + i), load<V>(g + i), s));
    for (std::size_t j = 0; j < R::states; ++j) store(state[j] + i, s[j]);
  }
  if (i < n) {
    const std::size_t bytes = (n - i) * sizeof(T);
    for (std::size_t j = 0; j < R::states; ++j) s[j] = load_part<V>(state[j] + i, bytes);
    store_part(w + i, regularized<R>(k, load_part<V>(w + i, bytes), load_part<V>(g + i, bytes), s), bytes);
    for (std::size_t j = 0; j < R::states; ++j) store_part(state[j] + i, s[j], bytes);
  }
}

// ---- narrow parameters, gradients and states -----------------------------------------------------------------

// A block of them is widened to float in L1, stepped there, and narrowed again: the types do not multiply with the
// rules. Blocks are whole in L1, filled up with zeros.

using Bits = Vec<std::uint32_t>;

// MurmurHash3's last mixing step (Appleby, 2011): 32 random-looking bits from an element's index.
inline Bits random_bits(Bits index, std::uint32_t noise) {
  Bits h = index * 0x9e3779b1u ^ noise;
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

// A turn of the same bits for each thing that is rounded: parameter, then states.
inline Bits turned(Bits random, std::size_t slot) {
  const std::uint32_t by = static_cast<std::uint32_t>(8 * slot);
  return slot == 0 ? random : random >> by | random << (32 - by);
}

// Up or down by chance: the nearer, the likelier, so that the mean is the value.
inline Bits bf16_stochastic(Bits bits, Bits random) {
  const Bits rounded = bits + (random & 0xffffu);
  return ((bits & 0x7f800000u) == 0x7f800000u ? bits : rounded) >> 16;
}

inline Bits bf16_nearest(Bits bits) {
  const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return ((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16;
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

// n elements from `from` on, as float; the rest of the block zero.
inline void widen(Float type, const void* base, std::size_t from, std::size_t n, float* block) {
  if (type == Float::f32) {
    std::memcpy(block, static_cast<const float*>(base) + from, n * sizeof(float));
    std::memset(block + n, 0, (kStateBlock - n) * sizeof(float));
    return;
  }
  const std::uint16_t* half = static_cast<const std::uint16_t*>(base) + from;
  std::uint16_t last[kStateBlock];
  if (n < kStateBlock) {
    std::memcpy(last, half, n * sizeof *half);
    std::memset(last + n, 0, (kStateBlock - n) * sizeof *half);
    half = last;
  }
  for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) {
    if (type == Float::f16) {
      store(block + i, float_of_halves(half + i));
    } else {
      store(block + i, load_words(half + i) << 16);
    }
  }
}

// The other way. `round(bits, random)` narrows to the low 16 bits.
template <class Round>
inline void narrow(const float* block, std::uint16_t* to, std::size_t n, const Bits* random, Round round) {
  std::uint16_t last[kStateBlock];
  std::uint16_t* out = n < kStateBlock ? last : to;
  for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) {
    store_low_words(out + i, round(load<Bits>(block + i), random[i / kLanes<float>]));
  }
  if (n < kStateBlock) std::memcpy(to, last, n * sizeof *to);
}

inline void narrow_param(Float type, const float* block, void* base, std::size_t from, std::size_t n, bool stochastic,
                         const Bits* random) {
  if (type == Float::f32) {
    std::memcpy(static_cast<float*>(base) + from, block, n * sizeof(float));
    return;
  }
  std::uint16_t* to = static_cast<std::uint16_t*>(base) + from;
  if (type == Float::bf16) {
    if (stochastic) {
      narrow(block, to, n, random, [](Bits bits, Bits r) { return bf16_stochastic(bits, r); });
    } else {
      narrow(block, to, n, random, [](Bits bits, Bits) { return bf16_nearest(bits); });
    }
  } else if (stochastic) {
    narrow(block, to, n, random, [](Bits bits, Bits r) { return half_stochastic(bits, r); });
  } else {
    std::uint16_t all[kStateBlock];
    for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) store_halves(all + i, load<Vec<float>>(block + i));
    std::memcpy(to, all, n * sizeof *to);
  }
}

// 8-bit states: the 11 highest bits of a float (sign, exponent, 3 of mantissa), the exponent counted from `exponent`.
constexpr std::uint32_t kDropped = 20, kMantissa = 3;
constexpr std::uint32_t top_code(bool positive) { return positive ? 255 : 127; }
constexpr std::uint32_t exponents(bool positive) { return positive ? 31 : 15; }

inline void widen_u8(const std::uint8_t* codes, std::uint8_t exponent, bool positive, float* block) {
  const std::uint32_t base = std::uint32_t{exponent} << kMantissa;
  for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) {
    const Bits code = load_bytes(codes + i);
    const Bits rest = code & top_code(positive);
    const Bits sign = positive ? Bits{} : code << 24 & 0x80000000u;
    store(block + i, sign | (rest == 0 ? Bits{} : (rest + base) << kDropped));
  }
}

// Rounds by chance. What is never negative does not become zero either: it is what Adam divides by.
inline std::uint8_t narrow_u8(const float* block, bool positive, std::size_t slot, const Bits* random,
                              std::uint8_t* codes) {
  using Signed = Vec<std::int32_t>;
  Bits largest = {};
  for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) {
    const Bits rest = load<Bits>(block + i) & 0x7fffffffu;
    largest = rest > largest ? rest : largest;
  }
  std::uint32_t most = largest[0];
  for (std::size_t j = 1; j < kLanes<float>; ++j) most = largest[j] > most ? largest[j] : most;
  // Of the largest, rounded up: no code reaches past the top.
  std::uint32_t exponent = (most + (1u << kDropped)) >> 23;
  exponent = exponent > 255 ? 255 : exponent;
  exponent = exponent > exponents(positive) ? exponent - exponents(positive) : 0;

  const std::int32_t base = static_cast<std::int32_t>(exponent << kMantissa);
  const std::int32_t top = static_cast<std::int32_t>(top_code(positive));
  for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) {
    const Bits bits = load<Bits>(block + i), rest = bits & 0x7fffffffu;
    const Bits chance = turned(random[i / kLanes<float>], slot) & ((1u << kDropped) - 1);
    Signed code = bit_cast<Signed>((rest + chance) >> kDropped) - base;
    const Signed least = positive ? (rest != 0 ? Signed{} + 1 : Signed{}) : Signed{};
    code = code < least ? least : code;
    code = code > top ? Signed{} + top : code;
    const Bits sign = positive ? Bits{} : bits >> 24 & 0x80u;
    store_low_bytes(codes + i, bit_cast<Bits>(code) | sign);
  }
  return static_cast<std::uint8_t>(exponent);
}

template <class R>
void step_narrow(const Scalars<float>& k, const StepArgs& a, unsigned positive, std::size_t begin, std::size_t end) {
  float w[kStateBlock], g[kStateBlock], s[R::states + 1][kStateBlock];
  void* states[R::states + 1];
  for (std::size_t j = 0; j < R::states; ++j) states[j] = s[j];
  Bits random[kStateBlock / kLanes<float>] = {};
  Bits lane = {};
  for (std::size_t j = 0; j < kLanes<float>; ++j) lane[j] = static_cast<std::uint32_t>(j);

  for (std::size_t at = begin; at < end; at += kStateBlock) {
    const std::size_t n = end - at < kStateBlock ? end - at : kStateBlock;
    if (a.stochastic || a.state_type != StateType::wide) {
      for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) {
        random[i / kLanes<float>] = random_bits(lane + static_cast<std::uint32_t>(at + i), a.noise);
      }
    }
    widen(a.master ? Float::f32 : a.param_type, a.master ? a.master : a.param, at, n, w);
    widen(a.grad_type, a.grad, at, n, g);
    for (std::size_t j = 0; j < R::states; ++j) {
      std::uint8_t last[kStateBlock] = {};
      switch (a.state_type) {
        case StateType::wide:
          widen(Float::f32, a.state[j], at, n, s[j]);
          break;
        case StateType::bf16:
          widen(Float::bf16, a.state[j], at, n, s[j]);
          break;
        case StateType::u8:
          const std::uint8_t* codes = static_cast<const std::uint8_t*>(a.state[j]) + at;
          if (n < kStateBlock) codes = static_cast<const std::uint8_t*>(std::memcpy(last, codes, n));
          widen_u8(codes, a.exponent[j][at / kStateBlock], positive >> j & 1, s[j]);
          break;
      }
    }
    step_wide<R>(k, w, static_cast<const float*>(g), states, 0, kStateBlock);
    if (a.master) std::memcpy(a.master + at, w, n * sizeof(float));
    narrow_param(a.param_type, w, a.param, at, n, a.stochastic, random);
    for (std::size_t j = 0; j < R::states; ++j) {
      std::uint8_t last[kStateBlock];
      switch (a.state_type) {
        case StateType::wide:
          std::memcpy(static_cast<float*>(a.state[j]) + at, s[j], n * sizeof(float));
          break;
        case StateType::bf16:
          narrow(s[j], static_cast<std::uint16_t*>(a.state[j]) + at, n, random,
                 [j](Bits bits, Bits r) { return bf16_stochastic(bits, turned(r, j + 1)); });
          break;
        case StateType::u8:
          std::uint8_t* codes = static_cast<std::uint8_t*>(a.state[j]) + at;
          // Behind the end of the tensor there is no more than zeros: they do not count.
          std::memset(s[j] + n, 0, (kStateBlock - n) * sizeof(float));
          a.exponent[j][at / kStateBlock] =
              narrow_u8(s[j], positive >> j & 1, j + 1, random, n < kStateBlock ? last : codes);
          if (n < kStateBlock) std::memcpy(codes, last, n);
          break;
      }
    }
  }
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
    step_narrow<R>(Scalars<float>(hyper), a, Positive, begin, end);
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
    widen(type, x, at, end - at < kStateBlock ? end - at : kStateBlock, block);
    sum += sum_squares(block, kStateBlock);
  }
  return sum;
}
