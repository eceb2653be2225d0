// Optimizers: the table of all rules, for every type of parameter, gradient and state; and the norm of gradients.

#include "kernels/optim/rules.inl"
//
#include "kernels/optim/step.inl"
//
#include "kernels/optim/step_narrow.inl"

// The kernel of one rule: chooses the loop for the types of the arrays. Subnormals are flushed to zero meanwhile.
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
    StepStateBlocks blocks = step_state_blocks<R, Positive, StateType::wide>;
    if constexpr (R::states > 0) {
      if (a.state_type == StateType::bf16) blocks = step_state_blocks<R, Positive, StateType::bf16>;
      if (a.state_type == StateType::u8) blocks = step_state_blocks<R, Positive, StateType::u8>;
    }
    step_narrow(Scalars<float>(hyper), a, R::states, begin, end, blocks);
  }
}

// A row of the table. `Positive` has a bit for each state that is never negative: its 8-bit codes need no sign.
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

// The order of the sum is part of the contract: kPartials partial sums, whatever the width of a vector, then a
// tree.
//
//   x         x0 x1 ... x15 | x16 x17 ... x31 | ...      element i goes to partial sum i % kPartials
//   partial   p0 p1 ... p15                              p[j] += p[j + 8], then + 4, + 2, + 1
template <class T>
double sum_squares(const T* x, std::size_t n) {
  using V = Vec<double>;
  constexpr std::size_t lanes = kLanes<double>, vectors = kPartials / lanes;
  V sum[vectors] = {};
  std::size_t i = 0;
  for (; i + kPartials <= n; i += kPartials) {
    for (std::size_t j = 0; j < vectors; ++j) {
      const V v = convert<double, lanes>(load<Vec<T, lanes>>(x + i + j * lanes));
      sum[j] += v * v;
    }
  }
  double partial[kPartials];
  std::memcpy(partial, sum, sizeof partial);
  for (std::size_t j = 0; i + j < n; ++j) partial[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  return tree<double>(partial);
}

// Float16 and bfloat16 are widened to a buffer of floats, kStateBlock elements at a time.
double sum_squares_any(Float type, const void* x, std::size_t begin, std::size_t end) {
  if (type == Float::f64) return sum_squares(static_cast<const double*>(x) + begin, end - begin);
  if (type == Float::f32) return sum_squares(static_cast<const float*>(x) + begin, end - begin);
  double sum = 0;
  float buffer[kStateBlock];
  for (std::size_t at = begin; at < end; at += kStateBlock) {
    const std::size_t n = end - at < kStateBlock ? end - at : kStateBlock;
    const std::uint16_t* part = static_cast<const std::uint16_t*>(x) + at;
    std::uint16_t last[kStateBlock] = {};
    if (n < kStateBlock) part = static_cast<const std::uint16_t*>(std::memcpy(last, part, n * sizeof *part));
    for (std::size_t i = 0; i < kStateBlock; i += kLanes<float>) store(buffer + i, widen(type, part, i));
    sum += sum_squares(buffer, kStateBlock);
  }
  return sum;
}

constexpr OptimKernels kOptim = {
    .rules = kRules,
    .rule_count = sizeof kRules / sizeof kRules[0],
    .sum_squares = sum_squares_any,
};
