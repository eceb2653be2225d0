// The update rules of the optimizers. A step is one pass over parameter, gradient and states, in place. A new optimizer
// is a rule here, a row in the table of optim.inl, and a class in Python.

// Parts of a step that are off by default; bits of `options`. A step with none of them skips all tests.
constexpr unsigned kScaled = 1, kDecay = 2, kL2 = 4, kL1 = 8, kKeepZeros = 16, kRescaled = 32;

template <class T>
constexpr T kLeastNormal = sizeof(T) == 8 ? T(0x1p-1022) : T(0x1p-126);

// The numbers of a step, rounded once to the type that is computed in.
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
        eps(h.eps < double{kLeastNormal<T>} ? kLeastNormal<T> : static_cast<T>(h.eps)),
        grad_scale(static_cast<T>(h.grad_scale)),
        shrink(static_cast<T>(h.shrink)),
        rescale(static_cast<T>(h.rescale)),
        options((h.grad_scale != 1 ? kScaled : 0) | (h.weight_decay != 0 ? kL2 : 0) | (h.decay != 1 ? kDecay : 0) |
                (h.shrink != 0 ? kL1 : 0) | (h.keep_zeros ? kKeepZeros : 0) | (h.rescale != 1 ? kRescaled : 0)) {}

  T step_size, weight_decay, decay, decay1, blend1, decay2, blend2, eps, grad_scale, shrink, rescale;
  unsigned options;
};

// ---- rules ---------------------------------------------------------------------------------------------------

// A rule maps a weight w and its gradient g to the new w, and updates the states s; V is a vector of T. A rule that
// divides by a square root (`has_root`) is split in two, so that the roots of several vectors can be taken together:
// squares() updates states and returns the radicand, update() gets the root. `late_gradient` says that update() reads
// the gradient too. The formulas, and the order of their operations, are those of torch.optim.

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

// Duchi, Hazan and Singer, 2011. State: sum of squares.
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

// Tieleman and Hinton, 2012; centered: Graves, 2013. States: mean of squares, momentum, mean of gradients.
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
    // A variance that is small beside the mean of squares is but their rounding errors: measured up to 60 epsilon of
    // that mean for a decay of .99.
    constexpr T epsilons = sizeof(T) == 8 ? T(0x1p-46) : T(0x1p-17);  // 64
    const V variance = s[0] - mean * mean, least = epsilons * s[0];
    return variance < least ? least : variance;
  }
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s, V root) {
    const V direction = g / (root + k.eps);
    if constexpr (!HasMomentum) return w - k.step_size * direction;
    s[1] = k.decay1 * s[1] + direction;
    return w - k.step_size * s[1];
  }
};

// Kingma and Ba, 2015, in the faster order of their section 2: the bias corrections are folded into step_size and eps.
// AMSGrad: Reddi et al., 2018. States: mean of gradients, mean of squares, largest mean of squares so far.
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

// Chen et al., 2023. The step is the sign of one blend of state and gradient; the state keeps another blend. The sign
// of 0 is 0, and of NaN it is NaN.
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

// The gradient as the rule sees it: scaled, with the L2 penalty added.
template <class T, class V>
inline V gradient_of(const Scalars<T>& k, unsigned options, V w, V g) {
  if (!options) return g;
  g = g * k.rescale * k.grad_scale;
  return options & kL2 ? g + k.weight_decay * w : g;
}

// update() with decoupled weight decay before it, and the proximal L1 step and the mask of zeros behind it.
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

// Steps N vectors at once, so that the latency of one is hidden behind the others. The last `Products` of the square
// roots are computed by multiplications, the others by the square root instruction: the two units work in parallel.
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
