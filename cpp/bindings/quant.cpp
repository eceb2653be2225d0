// Quantize, dequantize, pack bits, and multiply by quantized weights.
#include <pybind11/pybind11.h>

#include <atomic>
#include <cmath>
#include <new>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kChunk = 1 << 16;  // elements

double matrix_bytes(std::size_t rows, std::size_t cols) {
  return 4.0 * static_cast<double>(rows) * static_cast<double>(cols);
}

unsigned range_of(const Kernels& k, const float* x, std::size_t n, Range* out) {
  std::vector<Range> parts(ceil_div(n, kChunk));
  std::atomic<unsigned> flags{0};
  parallel_for(parts.size(), matrix_bytes(1, n), [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i)
      flags |= k.range(x + i * kChunk, std::min(kChunk, n - i * kChunk), &parts[i]);
  });
  *out = parts[0];
  for (const Range& part : parts) {
    out->min = std::min(out->min, part.min);
    out->max = std::max(out->max, part.max);
  }
  return flags;
}

// Fills codes, scale and minimum; returns kNonFinite and kHalfMisfit flags.
unsigned quantize(const py::array& x, const py::array& codes, const py::array& scale, const py::array& minimum,
                  int bits, std::size_t group_size, bool refit) {
  require_2d(x, {"x"});
  const View<const float> from = view<const float>(x, {"x"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1);
  const Quantized q = quantized_of<std::uint8_t>(codes, scale, minimum, bits, cols, group_size);
  if (q.rows != rows)
    fail_value({"codes"}, "expected " + std::to_string(rows) + " rows, got " + std::to_string(q.rows));
  Disjoint memory;
  memory.reads(from.data, from.size * sizeof(float), {"x"});
  memory.writes(q.codes, rows * q.row_bytes, {"codes"});
  memory.writes(q.scale, param_bytes(q), {"scale"});
  memory.writes(q.minimum, param_bytes(q), {"minimum"});
  memory.check();

  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  if (from.size == 0) {
    if (group_size == 0) {
      std::fill_n(static_cast<char*>(const_cast<void*>(q.scale)), param_bytes(q), '\0');
      std::fill_n(static_cast<char*>(const_cast<void*>(q.minimum)), param_bytes(q), '\0');
    }
    return 0;
  }
  Shared all{};
  std::atomic<unsigned> flags{group_size == 0 ? range_of(k, from.data, from.size, &all.range) : 0};
  if (group_size == 0 && refit && flags == 0) all.pair = k.fit(from.data, from.size, bits, all.range);
  const double passes = refit ? 16 : 1;  // least squares is arithmetic, eight times over
  parallel_for(rows, passes * matrix_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    flags |= k.quantize(from.data, q, group_size == 0 ? &all : nullptr, refit, begin, end);
  });
  return flags;
}

void dequantize(const py::array& codes, const py::array& scale, const py::array& minimum, int bits,
                std::size_t group_size, const py::array& out) {
  require_2d(out, {"out"});
  const Quantized q = quantized_of<const std::uint8_t>(codes, scale, minimum, bits, dimension(out, 1), group_size);
  const View<float> to = view<float>(out, {"out"});
  require_shape(out, q.rows, q.cols, {"out"});
  Disjoint memory;
  memory.writes(to.data, to.size * sizeof(float), {"out"});
  reads_weight(memory, q);
  memory.check();
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  if (q.rows == 1) {  // a vector: cut it by columns
    parallel_for(ceil_div(q.cols, kChunk), matrix_bytes(1, q.cols), [&](std::size_t begin, std::size_t end) {
      k.dequantize(q, 0, begin * kChunk, std::min(end * kChunk, q.cols), to.data + begin * kChunk);
    });
    return;
  }
  parallel_for(q.rows, matrix_bytes(q.rows, q.cols), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) k.dequantize(q, r, 0, q.cols, to.data + r * q.cols);
  });
}

// Along one dimension: n codes of one byte to and from packed bytes.
void pack(const py::array& codes, int bits, const py::array& packed) {
  require_bits(bits);
  const View<const std::uint8_t> from = view<const std::uint8_t>(codes, {"codes"});
  const View<std::uint8_t> to = view<std::uint8_t>(packed, {"packed"});
  require_size(to.size, ceil_div(from.size, static_cast<std::size_t>(8 / bits)), {"packed"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(ceil_div(from.size, kChunk), static_cast<double>(from.size), [&](std::size_t begin, std::size_t end) {
    const std::size_t first = begin * kChunk, last = std::min(end * kChunk, from.size);
    k.pack(bits, from.data + first, last - first, to.data + first * static_cast<std::size_t>(bits) / 8);
  });
}

void unpack(const py::array& packed, int bits, const py::array& codes) {
  require_bits(bits);
  const View<const std::uint8_t> from = view<const std::uint8_t>(packed, {"packed"});
  const View<std::uint8_t> to = view<std::uint8_t>(codes, {"codes"});
  require_size(from.size, ceil_div(to.size, static_cast<std::size_t>(8 / bits)), {"packed"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(ceil_div(to.size, kChunk), static_cast<double>(to.size), [&](std::size_t begin, std::size_t end) {
    const std::size_t first = begin * kChunk, last = std::min(end * kChunk, to.size);
    k.unpack(bits, from.data + first * static_cast<std::size_t>(bits) / 8, last - first, to.data + first);
  });
}

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

}  // namespace

void bind_quant(py::module_& m) {
  m.attr("NON_FINITE") = kNonFinite;
  m.attr("HALF_MISFIT") = kHalfMisfit;
  m.def("quantize", &quantize, py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("refit") = false);
  m.def("dequantize", &dequantize, py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("out"));
  m.def("pack", &pack, py::arg("codes"), py::arg("bits"), py::arg("packed"));
  m.def("unpack", &unpack, py::arg("packed"), py::arg("bits"), py::arg("codes"));
  m.def("linear_quantized", &linear, py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("minimum"),
        py::arg("bits"), py::arg("group_size"), py::arg("shape"), py::arg("bias"), py::arg("out"), py::arg("limbs"),
        py::arg("outliers") = py::none());
}

}  // namespace fastopt
