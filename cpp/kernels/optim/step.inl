// A step where parameter, gradient and states all have the type that is computed in.
//
//   element   0      i                                     n
//   w         |part| whole | whole | whole | ... |  part  |      part: fewer lanes than a vector has
//                  ^ aligned to a vector                         whole: one vector, or two to share the square roots

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
  // A first part brings w to the alignment of a vector. Large NumPy arrays start at the same distance from one, so the
  // other arrays are then aligned too.
  std::size_t i = reinterpret_cast<std::uintptr_t>(w) % kVectorBytes / sizeof(T);
  i = i == 0 ? 0 : kLanes<T> - i;
  i = i < n ? i : n;
  if (i > 0) part(0, i);
  const auto whole = [&](auto vectors, auto products, unsigned options) {
    constexpr std::size_t count = decltype(vectors)::value;
    V next[count], grad[count], s[count][R::states + 1];
    for (std::size_t v = 0; v < count; ++v) {
      const std::size_t at = i + v * kLanes<T>;
      unroll<R::states>([&](auto j) {
        prefetch<512>(state[j.value] + at);
        s[v][j.value] = load<V>(state[j.value] + at);
      });
      if constexpr (R::states > 0) {  // cores prefetch two streams well enough themselves
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
      unroll<R::states>([&](auto j) { store(state[j.value] + at, s[v][j.value]); });
    }
    i += count * kLanes<T>;
  };
  // Without options the compiler gets a constant 0, and drops the code of all of them. Where the unit that divides is
  // the limit, one of two vectors takes its roots by products instead.
  if (k.options == 0) {
    if constexpr (R::has_root && kRootByProducts<T>) {
      while (i + 2 * kLanes<T> <= n) whole(Int<2>{}, Int<1>{}, 0);
    }
    while (i + kLanes<T> <= n) whole(Int<1>{}, Int<0>{}, 0);
  }
  while (i + kLanes<T> <= n) whole(Int<1>{}, Int<0>{}, k.options);
  if (i < n) part(i, n - i);
}
