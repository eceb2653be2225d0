// The limit of the memory: loops that move as many streams as a kernel and do nothing else. Prefetching this far ahead
// gains up to a fifth where lines come from the outer caches, and loses a few percent at most elsewhere.

constexpr std::size_t kAhead = 2048 / sizeof(float);

float limit_read(const float* x, std::size_t n) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  V sum[4] = {};
  std::size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (std::size_t j = 0; j < 4; ++j) {
      __builtin_prefetch(x + i + j * lanes + kAhead);
      sum[j] += load<V>(x + i + j * lanes);
    }
  }
  const V total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return total[0];
}

void limit_write(float* x, std::size_t n) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>;
  for (std::size_t i = 0; i + lanes <= n; i += lanes) {
    __builtin_prefetch(x + i + kAhead);
    store(x + i, V{} + 1.0f);
  }
}

template <std::size_t Reads, std::size_t Writes>
void update(float* const* x, std::size_t begin, std::size_t end) {
  using V = Vec<float>;
  constexpr std::size_t ahead = Reads > 2 ? kAhead / 4 : kAhead;  // nearer, where there are many streams
  for (std::size_t i = begin; i + kLanes<float> <= end; i += kLanes<float>) {
    for (std::size_t j = 0; j < Reads; ++j) __builtin_prefetch(x[j] + i + ahead);
    const V last = load<V>(x[Reads - 1] + i);
    for (std::size_t j = 0; j < Writes; ++j) store(x[j] + i, 0.5f * load<V>(x[j] + i) + last);
  }
}

void limit_update(float* const* x, std::size_t reads, std::size_t writes, std::size_t begin, std::size_t end) {
  if (reads == 2 && writes == 1) update<2, 1>(x, begin, end);
  if (reads == 3 && writes == 2) update<3, 2>(x, begin, end);
  if (reads == 4 && writes == 3) update<4, 3>(x, begin, end);
  if (reads == 1 && writes == 1) update<1, 1>(x, begin, end);
}

constexpr LimitKernels kLimits = {
    .read = limit_read,
    .write = limit_write,
    .update = limit_update,
};
