// Products in float32, the plain way: kFloatStretch columns of a row of W are decoded into L1 and used for every row of
// x. Column c of a stretch goes to partial sum c % kPartials, these are added as a tree, and the stretches in order.

inline float dot(const float* a, const float* b, std::size_t n) {
  using V = Vec<float>;
  constexpr std::size_t lanes = kLanes<float>, vectors = kPartials / lanes;
  V sum[vectors] = {};
  std::size_t i = 0;
  for (; i + kPartials <= n; i += kPartials) {
    for (std::size_t j = 0; j < vectors; ++j) {
      sum[j] += load<V>(a + i + j * lanes) * load<V>(b + i + j * lanes);
    }
  }
  float partial[kPartials];
  std::memcpy(partial, sum, sizeof partial);
  for (std::size_t j = 0; i + j < n; ++j) partial[j] += a[i + j] * b[i + j];
  return tree<float>(partial);
}

// `decode(row, begin, end, out)` writes columns [begin, end) of a row to `out`; it is called with ascending columns.
template <class Decode>
void linear(std::size_t rows, std::size_t cols, const float* x, std::size_t batch, const float* bias, float* y,
            std::size_t row_begin, std::size_t row_end, Decode decode) {
  float weights[kFloatStretch];
  for (std::size_t row = row_begin; row < row_end; ++row) {
    for (std::size_t b = 0; b < batch; ++b) y[b * rows + row] = 0.0f;
    for (std::size_t begin = 0; begin < cols; begin += kFloatStretch) {
      const std::size_t n = cols - begin < kFloatStretch ? cols - begin : kFloatStretch;
      decode(row, begin, begin + n, weights);
      for (std::size_t b = 0; b < batch; ++b) y[b * rows + row] += dot(weights, x + b * cols + begin, n);
    }
    if (bias) {
      for (std::size_t b = 0; b < batch; ++b) y[b * rows + row] += bias[row];
    }
  }
}

// Rows [batch, batch + count) of x by rows [begin, end) of W.
[[gnu::noinline]] void linear_floats(const Quantized& w, const Linear& io, std::size_t batch, std::size_t count,
                                     std::size_t begin, std::size_t end) {
  linear(w.rows, w.cols, io.x + batch * w.cols, count, io.bias, io.y + batch * w.rows, begin, end,
         [&](std::size_t row, std::size_t c0, std::size_t c1, float* out) { dequantize_any(w, row, c0, c1, out); });
}
