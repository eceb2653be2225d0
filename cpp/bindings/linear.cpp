// Products with packed weights: checks of x, bias and out, and how a product is cut between threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

// x as [batch, cols], in a layout that kernels take.
struct Batch {
  py::object array;
  const float* data;
  std::size_t batch;
};

Batch batch_of(py::object x, std::size_t cols, const py::tuple& weight_shape) {
  if (!py::isinstance<py::array>(x)) x = py::module_::import("numpy").attr("asarray")(x);
  const auto* array = py::detail::array_proxy(x.ptr());
  if (!has_dtype(array, py::dtype::of<float>())) fail_type({"x"}, "expected float32, got " + dtype_name(array));
  if (array->nd == 0 || dimension(x, array->nd - 1) != cols) {
    fail_value({"x"}, "expected shape (..., " + std::to_string(cols) + ") for w of shape " +
                          std::string(py::str(weight_shape)) + ", got " + std::string(py::str(x.attr("shape"))));
  }
  constexpr int good = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array->flags & good) != good) {
    x = py::module_::import("numpy").attr("require")(x, py::none(), "CA");
    array = py::detail::array_proxy(x.ptr());
  }
  std::size_t batch = 1;
  for (int i = 0; i + 1 < array->nd; ++i) batch *= dimension(x, i);
  return {x, reinterpret_cast<const float*>(array->data), batch};
}

// `out`, or a new array of the shape of x with `rows` for its last axis.
py::object result_of(py::handle x, std::size_t rows, const py::object& out) {
  const auto* from = py::detail::array_proxy(x.ptr());
  std::vector<py::ssize_t> shape(from->dimensions, from->dimensions + from->nd);
  shape.back() = static_cast<py::ssize_t>(rows);
  if (out.is_none()) return py::array_t<float>(shape);
  if (!py::isinstance<py::array>(out) || !has_dtype(py::detail::array_proxy(out.ptr()), py::dtype::of<float>())) {
    const py::object got = py::hasattr(out, "dtype") ? out.attr("dtype") : py::type::of(out).attr("__name__");
    fail_type({"out"}, "expected a float32 array, got " + std::string(py::str(got)));
  }
  const auto* to = py::detail::array_proxy(out.ptr());
  if (to->nd != from->nd || !std::equal(shape.begin(), shape.end(), to->dimensions) ||
      !(to->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_)) {
    fail_value({"out"}, "expected a C-contiguous array of shape " + std::string(py::str(py::cast(shape))) +
                            ", got shape " + std::string(py::str(out.attr("shape"))));
  }
  return out;
}

const float* bias_of(const py::object& bias, std::size_t rows) {
  if (bias.is_none()) return nullptr;
  if (!py::isinstance<py::array>(bias) || !has_dtype(py::detail::array_proxy(bias.ptr()), py::dtype::of<float>())) {
    const py::object got = py::hasattr(bias, "dtype") ? bias.attr("dtype") : py::type::of(bias).attr("__name__");
    fail_type({"bias"}, "expected a float32 array, got " + std::string(py::str(got)));
  }
  const auto* array = py::detail::array_proxy(bias.ptr());
  if (array->nd != 1 || dimension(bias, 0) != rows) {
    fail_value({"bias"},
               "expected shape (" + std::to_string(rows) + ",), got " + std::string(py::str(bias.attr("shape"))));
  }
  check_layout(bias, array, Access::read, {"bias"});
  return reinterpret_cast<const float*>(array->data);
}

// What is added to some weights after decoding: rising places, which were checked when the tensor was made.
template <class Index>
struct Outliers {
  const Index* index;
  const float* value;
  std::size_t count;
};

// Product of x with one row, whose outliers are [at, next): for an x that is not finite where one of them is. What a
// code stands for and what is added to it may differ in sign; times infinity the two would then cancel.
template <class Index>
double product_of_row(const Kernels& k, const Quantized& q, const Outliers<Index>& o, const Index* at,
                      const Index* next, std::size_t row, const float* x) {
  constexpr std::size_t block = 256;
  float w[block];
  double sum = 0;
  for (std::size_t begin = 0; begin < q.cols; begin += block) {
    const std::size_t n = std::min(block, q.cols - begin);
    k.dequantize(q, row, begin, begin + n, w);
    for (; at < next && static_cast<std::size_t>(*at) - row * q.cols - begin < n; ++at) {
      w[static_cast<std::size_t>(*at) - row * q.cols - begin] += o.value[at - o.index];
    }
    for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(x[begin + i]) * static_cast<double>(w[i]);
  }
  return sum;
}

// Adds to rows [begin, end) of y what outliers add; each element in double, in the order of their places.
template <class Index>
void add_outliers(const Kernels& k, const Quantized& q, const Outliers<Index>& o, const Linear& io, std::size_t begin,
                  std::size_t end) {
  const std::size_t rows = q.rows, cols = q.cols;
  const Index* const last = o.index + o.count;
  const auto from = [&](const Index* first, std::size_t row) {  // the first that is not before this row
    return std::lower_bound(first, last, row * cols,
                            [](Index place, std::size_t limit) { return static_cast<std::size_t>(place) < limit; });
  };
  const Index* at = from(o.index, begin);
  for (std::size_t row = begin; row < end && at < last; ++row) {
    const Index* const next = from(at, row + 1);
    for (std::size_t b = 0; b < io.batch && at < next; ++b) {
      double sum = static_cast<double>(io.y[b * rows + row]);
      const float* x = io.x + b * cols;
      bool finite = true;
      for (const Index* p = at; p < next; ++p) {
        const std::size_t col = static_cast<std::size_t>(*p) - row * cols;
        if (col >= cols) continue;
        finite &= std::isfinite(x[col]);
        sum += static_cast<double>(x[col]) * static_cast<double>(o.value[p - o.index]);
      }
      if (!finite) {
        sum = product_of_row(k, q, o, at, next, row, x) + (io.bias ? static_cast<double>(io.bias[row]) : 0.0);
      }
      io.y[b * rows + row] = static_cast<float>(sum);
    }
    at = next;
  }
}

template <class Index>
Outliers<Index> outliers_of(const py::tuple& pair) {
  const View<const Index> index = view<const Index>(pair[0], {"outlier_index"});
  const View<const float> value = view<const float>(pair[1], {"outlier_value"});
  require_size(index.size, value.size, {"outlier_index"});
  return {index.data, value.data, value.size};
}

// x @ W.T + bias for x of any number of axes; `limbs` is 3 (exact) or 1 (int8). All checks are here: a call from
// Python is to cost no more than the product of a small matrix.
py::object linear(const py::object& x_object, const py::array& codes, const py::array& scale, const py::array& minimum,
                  int bits, std::size_t group_size, const py::tuple& shape, const py::object& bias,
                  const py::object& out_object, int limbs, const py::object& outliers) {
  if (limbs != 1 && limbs != 3) throw py::value_error("limbs: expected 1 or 3, got " + std::to_string(limbs));
  std::size_t cols = 1;
  for (std::size_t i = shape.size() < 2 ? 0 : 1; i < shape.size(); ++i) cols *= shape[i].cast<std::size_t>();
  const Batch x = batch_of(x_object, cols, shape);
  const Quantized q = quantized_of<const std::uint8_t>(codes, scale, minimum, bits, cols, group_size);
  py::object out = result_of(x.array, q.rows, out_object);

  Outliers<std::uint32_t> narrow{};
  Outliers<std::int64_t> wide{};
  if (!outliers.is_none()) {
    const auto pair = outliers.cast<py::tuple>();
    if (has_dtype(array_of(pair[0], {"outlier_index"}), py::dtype::of<std::uint32_t>())) {
      narrow = outliers_of<std::uint32_t>(pair);
    } else {
      wide = outliers_of<std::int64_t>(pair);
    }
  }

  const Kernels& k = kernels();
  Linear io{};
  io.x = x.data;
  io.batch = x.batch;
  io.bias = bias_of(bias, q.rows);
  io.y = view<float>(out, {"out"}).data;
  io.limbs = limbs;
  if (!out_object.is_none()) {
    Disjoint memory;
    memory.writes(io.y, io.batch * q.rows * sizeof(float), {"out"});
    memory.reads(io.x, io.batch * q.cols * sizeof(float), {"x"});
    if (io.bias) memory.reads(io.bias, q.rows * sizeof(float), {"bias"});
    reads_weight(memory, q);
    memory.check();
  }
  io.prepared_bytes = k.products.prepared_bytes(q, limbs);
  const Scratch prepared(io.prepared_bytes * io.batch);
  io.prepared = prepared.data();
  const std::size_t in_panels = io.prepared_bytes > 0 ? panel_rows(io.batch) : 0;
  if (in_panels > 0) io.panel_bytes = k.products.panel_bytes(q, limbs);
  const Scratch panels(io.panel_bytes * ceil_div(in_panels, kPanelWidth));
  io.panels = panels.data();

  const py::gil_scoped_release released;
  if (io.prepared_bytes > 0) {
    parallel_for(io.batch, 3 * matrix_bytes(io.batch, q.cols), [&](std::size_t begin, std::size_t end) {
      for (std::size_t b = begin; b < end; ++b) {
        k.products.prepare_x(q, io.x + b * q.cols, limbs, prepared.data() + b * io.prepared_bytes);
      }
    });
    parallel_for(ceil_div(in_panels, kPanelWidth), matrix_bytes(in_panels, q.cols),
                 [&](std::size_t begin, std::size_t end) {
                   for (std::size_t p = begin; p < end; ++p) {
                     const std::size_t first = p * kPanelWidth;
                     k.products.prepare_panel(q, io.prepared + first * io.prepared_bytes, io.prepared_bytes,
                                              std::min(kPanelWidth, in_panels - first), limbs,
                                              panels.data() + p * io.panel_bytes);
                   }
                 });
  }
  // In cache and with many rows of x it is arithmetic that takes time: as much a product as a byte or half of one.
  const double products = matrix_bytes(q.rows, q.cols) / 4 * static_cast<double>(io.batch);
  parallel_for(q.rows, products * (limbs == 3 ? 1.0 : 0.5), [&](std::size_t begin, std::size_t end) {
    k.products.linear_quantized(q, io, begin, end);
    if (narrow.count > 0) add_outliers(k, q, narrow, io, begin, end);
    if (wide.count > 0) add_outliers(k, q, wide, io, begin, end);
  });
  return out;
}

// What a product reads and writes beside the weight: x [batch, cols], bias [rows] or None, out [batch, rows].
struct LinearOperands {
  const float* x;
  const float* bias;
  float* y;
  std::size_t batch;
};

LinearOperands linear_operands(py::handle x, py::handle bias, py::handle out, std::size_t rows) {
  LinearOperands io{};
  const View<const float> from = view<const float>(x, {"x"});
  const View<float> to = view<float>(out, {"out"});
  io.x = from.data;
  io.y = to.data;
  io.batch = dimension(x, 0);
  require_shape(out, io.batch, rows, {"out"});
  Disjoint memory;
  memory.writes(to.data, to.size * sizeof(float), {"out"});
  memory.reads(from.data, from.size * sizeof(float), {"x"});
  if (!bias.is_none()) {
    const View<const float> b = view<const float>(bias, {"bias"});
    require_size(b.size, rows, {"bias"});
    memory.reads(b.data, b.size * sizeof(float), {"bias"});
    io.bias = b.data;
  }
  memory.check();
  return io;
}

constexpr std::size_t kFewVectors = 5;  // below, each x is multiplied for itself

// Cuts the rows between `parts` threads so that each has as much work, where some rows have many more entries than
// others. A row costs its entries, and looking at its mask.
class Shares {
 public:
  Shares(const Sparse& s, std::size_t parts) : s_(s), parts_(parts) {
    per_row_ = 16 + (is_mask(s.layout) ? s.row_bytes * 2 : 0);
  }

  // The first row of a part.
  std::size_t begin(std::size_t part) const {
    if (part >= parts_) return s_.rows;
    const std::size_t goal = work(s_.rows) / parts_ * part;
    std::size_t low = 0, high = s_.rows;
    while (low < high) {
      const std::size_t middle = low + (high - low) / 2;
      if (work(middle) < goal) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  std::size_t work(std::size_t rows) const { return row_begin(s_, rows) + rows * per_row_; }

  const Sparse& s_;
  std::size_t parts_, per_row_;
};

void multiply_few(const Sparse& w, const LinearOperands& io, const Kernels& k) {
  const std::size_t stride = ceil_div(w.cols, kBlockLength) * kBlockLength;
  const Scratch padded(io.batch * stride * sizeof(float));
  float* const x = reinterpret_cast<float*>(padded.data());
  for (std::size_t b = 0; b < io.batch; ++b) {
    float* row = std::copy_n(io.x + b * w.cols, w.cols, x + b * stride);
    std::fill_n(row, stride - w.cols, 0.0f);
  }
  const Shares shares(w, static_cast<std::size_t>(num_threads()));
  const double bytes = (4.0 * static_cast<double>(w.count) + 2.0 * static_cast<double>(w.rows * w.row_bytes)) *
                       static_cast<double>(io.batch);
  parallel_for(static_cast<std::size_t>(num_threads()), bytes, [&](std::size_t begin, std::size_t end) {
    k.linear_sparse(w, x, stride, io.batch, io.bias, io.y, shares.begin(begin), shares.begin(end));
  });
}

void multiply_many(const Sparse& w, const LinearOperands& io, const Kernels& k) {
  constexpr std::size_t widest = 64;
  const Scratch memory(w.cols * widest * sizeof(float));
  float* const tile = reinterpret_cast<float*>(memory.data());
  const std::size_t parts = static_cast<std::size_t>(num_threads());
  const Shares shares(w, parts);
  for (std::size_t first = 0; first < io.batch;) {
    const std::size_t left = io.batch - first, width = left > 32 ? 64 : left > 16 ? 32 : 16;
    parallel_for(ceil_div(w.cols, 16), 4.0 * static_cast<double>(w.cols * width),
                 [&](std::size_t begin, std::size_t end) {
                   k.transpose_tile(io.x, io.batch, w.cols, first, width, 16 * begin, std::min(16 * end, w.cols), tile);
                 });
    const double bytes = static_cast<double>(w.count + w.rows * 16) * static_cast<double>(width);
    parallel_for(parts, bytes, [&](std::size_t begin, std::size_t end) {
      k.linear_sparse_tile(w, tile, width, io.batch, first, io.bias, io.y, shares.begin(begin), shares.begin(end));
    });
    first += width;
  }
}

void multiply(const Sparse& w, const py::array& x, const py::object& bias, const py::array& out) {
  const LinearOperands io = linear_operands(x, bias, out, w.rows);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  io.batch < kFewVectors ? multiply_few(w, io, k) : multiply_many(w, io, k);
}

std::size_t entries_of(const std::string& layout, std::size_t numbers) {
  return layout == "block" ? numbers / kBlockLength : numbers;
}

void linear_sparse(const py::array& x, const std::string& layout, const py::array& positions,
                   const py::array& row_offsets, const py::array& values, const py::object& bias,
                   const py::array& out) {
  require_2d(x, {"x"});
  const Elements v = elements(values, Access::read, {"values"});
  Sparse w = sparse_of(layout, positions, row_offsets, dimension(x, 1), entries_of(layout, v.size));
  const auto* array = array_of(values, {"values"});
  w.values = v.data;
  w.count = v.size;
  if (has_dtype(array, py::dtype::of<float>())) {
    w.type = Float::f32;
  } else if (has_dtype(array, py::dtype("e"))) {
    w.type = Float::f16;
  } else if (has_dtype(array, bfloat16())) {
    w.type = Float::bf16;
  } else {
    fail_type({"values"}, "expected float32, float16 or bfloat16, got " + dtype_name(array));
  }
  multiply(w, x, bias, out);
}

// The numbers as one quantized row of `count` codes.
void linear_sparse_quantized(const py::array& x, const std::string& layout, const py::array& positions,
                             const py::array& row_offsets, const py::array& codes, const py::array& scale,
                             const py::array& minimum, int bits, std::size_t group_size, std::size_t count,
                             const py::object& bias, const py::array& out) {
  require_2d(x, {"x"});
  const Quantized q = quantized_of<const std::uint8_t>(codes, scale, minimum, bits, count, group_size);
  if (q.rows != 1) fail_value({"codes"}, "expected one row of values, got " + std::to_string(q.rows));
  Sparse w = sparse_of(layout, positions, row_offsets, dimension(x, 1), entries_of(layout, count));
  w.quantized = &q;
  w.count = count;
  multiply(w, x, bias, out);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_quantized", &linear, py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("minimum"),
        py::arg("bits"), py::arg("group_size"), py::arg("shape"), py::arg("bias"), py::arg("out"), py::arg("limbs"),
        py::arg("outliers") = py::none());
  m.def("linear_sparse", &linear_sparse, py::arg("x"), py::arg("layout"), py::arg("positions"), py::arg("row_offsets"),
        py::arg("values"), py::arg("bias"), py::arg("out"));
  m.def("linear_sparse_quantized", &linear_sparse_quantized, py::arg("x"), py::arg("layout"), py::arg("positions"),
        py::arg("row_offsets"), py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("count"), py::arg("bias"), py::arg("out"));
}

}  // namespace fastopt
