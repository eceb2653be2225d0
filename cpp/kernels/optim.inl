// Optimizer steps: one pass over parameter, gradient and states, in place. A new optimizer is a rule here, a row
// in the table at the end, and a class in python/fastopt/optim.py.

template <class T>
struct Scalars {
  explicit Scalars(const Hyper& h)
      : step_size(static_cast<T>(h.step_size)),
        grad_scale(static_cast<T>(h.grad_scale)),
        weight_decay(static_cast<T>(h.weight_decay)),
        decay(static_cast<T>(h.decay)),
        shrink(static_cast<T>(h.shrink)),
        decay1(static_cast<T>(h.decay1)),
        blend1(static_cast<T>(h.blend1)),
        decay2(static_cast<T>(h.decay2)),
        blend2(static_cast<T>(h.blend2)),
        root_scale(static_cast<T>(h.root_scale)),
        eps(static_cast<T>(h.eps)) {}

  T step_size, grad_scale, weight_decay, decay, shrink, decay1, blend1, decay2, blend2, root_scale, eps;
};

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

// Kingma and Ba, 2015, algorithm 1, with both bias corrections folded into scalars.
struct Adam {
  static constexpr std::size_t states = 2;
  template <class T, class V>
  static V update(const Scalars<T>& k, V w, V g, V* s) {
    s[0] = s[0] + k.blend1 * (g - s[0]);
    s[1] = k.decay2 * s[1] + k.blend2 * g * g;
    return w - k.step_size * s[0] / (sqrt(s[1]) * k.root_scale + k.eps);
  }
};

// What every optimizer shares, around its rule.
template <class R, class T, class V>
inline V regularized(const Scalars<T>& k, bool keep_zeros, V w, V g, V* s) {
  const V before = w;
  g = g * k.grad_scale;
  if (k.weight_decay != 0) g = g + k.weight_decay * w;
  w = R::template update<T, V>(k, w * k.decay, g, s);
  if (k.shrink != 0) {
    const V above = w - k.shrink, below = w + k.shrink;
    w = above > 0 ? above : (below < 0 ? below : V{});
  }
  if (keep_zeros) w = before == 0 ? V{} : w;
  return w;
}

template <class R, class T>
void step(const Hyper& hyper, const StepArgs& args, std::size_t begin, std::size_t end) {
  using V = Vec<T>;
  const FlushSubnormals flush;
  const Scalars<T> k(hyper);
  const bool keep_zeros = hyper.keep_zeros;
  T* const w = static_cast<T*>(args.param);
  const T* const g = static_cast<const T*>(args.grad);
  V s[R::states + 1];

  std::size_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) {
    for (std::size_t j = 0; j < R::states; ++j) s[j] = load<V>(static_cast<T*>(args.state[j]) + i);
    store(w + i, regularized<R>(k, keep_zeros, load<V>(w + i), load<V>(g + i), s));
    for (std::size_t j = 0; j < R::states; ++j) store(static_cast<T*>(args.state[j]) + i, s[j]);
  }
  if (i < end) {
    const std::size_t bytes = (end - i) * sizeof(T);
    for (std::size_t j = 0; j < R::states; ++j) s[j] = load_part<V>(static_cast<T*>(args.state[j]) + i, bytes);
    const V next = regularized<R>(k, keep_zeros, load_part<V>(w + i, bytes), load_part<V>(g + i, bytes), s);
    store_part(w + i, next, bytes);
    for (std::size_t j = 0; j < R::states; ++j) store_part(static_cast<T*>(args.state[j]) + i, s[j], bytes);
  }
}

template <class R>
constexpr Rule rule(const char* name) {
  return {name, R::states, step<R, float>, step<R, double>};
}

constexpr Rule kRules[] = {
    rule<Sgd>("sgd"),
    rule<Momentum>("momentum"),
    rule<Nesterov>("nesterov"),
    rule<Adam>("adam"),
};
