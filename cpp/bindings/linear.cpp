// Products with packed weights: the checks of x, bias and out, and the division of the work between threads.
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

// The arguments beside the weight, checked once for every kind of weight: x [..., cols], bias [rows] or None, and out
// [..., rows] or None. The objects keep the memory alive that `io` points to.
struct Operands {
  py::object x, bias, out;
  bool out_is_new;
  std::size_t rows, cols;
  Linear io;
};

py::object in_c_order(py::object array) {
  constexpr int good = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((py::detail::array_proxy(array.ptr())->flags & good) == good) return array;
  return py::module_::import("numpy").attr("require")(array, py::none(), "CA");
}

bool is_float32(py::handle object) {
  return py::isinstance<py::array>(object) && has_dtype(py::detail::array_proxy(object.ptr()), py::dtype::of<float>());
}

// x or bias of another float type; the checks and the conversion are Python's.
py::object as_float32(const py::object& array, const char* name) {
  return py::module_::import("fastopt._checks").attr("as_float32")(array, name);
}

[[noreturn]] void fail_float32(py::handle got, const Label& label) {
  const py::object name = py::isinstance<py::array>(got) ? got.attr("dtype") : py::type::of(got).attr("__name__");
  fail_type(label, "expected a float32 array, got " + std::string(py::str(name)));
}

void set_x(Operands& o, py::object x, const py::tuple& weight_shape) {
  if (!is_float32(x)) x = as_float32(x, "x");
  const auto* array = py::detail::array_proxy(x.ptr());
  const std::size_t last = array->nd == 0 ? 0 : dimension(x, array->nd - 1);
  if (array->nd == 0 || last != o.cols) {
    fail_value({"x"}, "expected shape (..., " + std::to_string(o.cols) + ") for w of shape " +
                          std::string(py::str(weight_shape)) + ", got " + std::string(py::str(x.attr("shape"))) +
                          (last == o.rows ? "; a weight is [out, in]: pack the transpose of an [in, out] one" : ""));
  }
  o.x = in_c_order(std::move(x));
  array = py::detail::array_proxy(o.x.ptr());
  o.io.x = reinterpret_cast<const float*>(array->data);
  o.io.batch = 1;
  for (int i = 0; i + 1 < array->nd; ++i) o.io.batch *= dimension(o.x, i);
}

void set_bias(Operands& o, py::object bias) {
  if (bias.is_none()) return;
  if (!is_float32(bias)) bias = as_float32(bias, "bias");
  if (py::detail::array_proxy(bias.ptr())->nd != 1 || dimension(bias, 0) != o.rows) {
    fail_value({"bias"},
               "expected shape (" + std::to_string(o.rows) + ",), got " + std::string(py::str(bias.attr("shape"))));
  }
  o.bias = in_c_order(bias);
  o.io.bias = reinterpret_cast<const float*>(py::detail::array_proxy(o.bias.ptr())->data);
}

// A new array has the shape of x, with `rows` for its last axis.
void set_out(Operands& o, const py::object& out) {
  const auto* x = py::detail::array_proxy(o.x.ptr());
  std::vector<py::ssize_t> shape(x->dimensions, x->dimensions + x->nd);
  shape.back() = static_cast<py::ssize_t>(o.rows);
  o.out_is_new = out.is_none();
  if (o.out_is_new) {
    o.out = py::array_t<float>(shape);
  } else {
    if (!is_float32(out)) fail_float32(out, {"out"});
    const auto* array = py::detail::array_proxy(out.ptr());
    if (array->nd != x->nd || !std::equal(shape.begin(), shape.end(), array->dimensions) ||
        !(array->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_)) {
      fail_value({"out"}, "expected a C-contiguous array of shape " + std::string(py::str(py::tuple(py::cast(shape)))) +
                              ", got shape " + std::string(py::str(out.attr("shape"))));
    }
    check_layout(out, array, Access::write, {"out"});
    o.out = out;
  }
  o.io.y = reinterpret_cast<float*>(py::detail::array_proxy(o.out.ptr())->data);
}

// A weight of any shape is a matrix of its first axis by all others; one with a single axis is a row.
Operands operands_of(py::object x, const py::tuple& weight_shape, const py::object& bias, const py::object& out) {
  Operands o{};
  const std::size_t axes = weight_shape.size(), first = axes < 2 ? 0 : 1;
  o.rows = first ? weight_shape[0].cast<std::size_t>() : 1;
  o.cols = 1;
  for (std::size_t i = first; i < axes; ++i) o.cols *= weight_shape[i].cast<std::size_t>();
  set_x(o, std::move(x), weight_shape);
  set_out(o, out);
  set_bias(o, bias);
  return o;
}

// Refuses an `out` that shares memory with x, bias or the weight, whose arrays `add_weight` adds.
template <class AddWeight>
void check_disjoint(const Operands& o, const AddWeight& add_weight) {
  if (o.out_is_new) return;
  Disjoint memory;
  memory.writes(o.io.y, o.io.batch * o.rows * sizeof(float), {"out"});
  memory.reads(o.io.x, o.io.batch * o.cols * sizeof(float), {"x"});
  if (o.io.bias) memory.reads(o.io.bias, o.rows * sizeof(float), {"bias"});
  add_weight(memory);
  memory.check();
}

// The checks alone, for products that NumPy computes; `weight` maps names to arrays. Returns x, bias and out.
py::tuple check_linear(const py::object& x, const py::tuple& shape, const py::object& bias, const py::object& out,
                       const py::dict& weight) {
  const Operands o = operands_of(x, shape, bias, out);
  check_disjoint(o, [&](Disjoint& memory) {
    for (const auto& [name, array] : weight) {
      const Extent extent = extent_of(py::detail::array_proxy(array.ptr()));
      memory.reads(extent.begin, extent.bytes, {PyUnicode_AsUTF8(name.ptr())});
    }
  });
  return py::make_tuple(o.x, o.bias ? o.bias : py::none(), o.out);
}

// ---- quantized weights ---------------------------------------------------------------------------------------

// Values that are added to some weights after decoding. Their places rise, which was checked when the tensor was made.
template <class Index>
struct Outliers {
  const Index* index;
  const float* value;
  std::size_t count;
};

// The product of x with one row, whose outliers are [at, next), for an x that is not finite at one of them. The decoded
// weight and the value added to it may differ in sign: multiplied by infinity one by one, they would give NaN.
template <class Index>
double product_of_row(const Kernels& k, const Quantized& q, const Outliers<Index>& o, const Index* at,
                      const Index* next, std::size_t row, const float* x) {
  constexpr std::size_t at_once = 256;
  float w[at_once];
  double sum = 0;
  for (std::size_t begin = 0; begin < q.cols; begin += at_once) {
    const std::size_t n = std::min(at_once, q.cols - begin);
    k.quant.dequantize(q, row, begin, begin + n, w);
    for (; at < next && static_cast<std::size_t>(*at) - row * q.cols - begin < n; ++at) {
      w[static_cast<std::size_t>(*at) - row * q.cols - begin] += o.value[at - o.index];
    }
    for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(x[begin + i]) * static_cast<double>(w[i]);
  }
  return sum;
}

// Adds the products with outliers to rows [begin, end) of y: each element in double, in the order of the places.
template <class Index>
void add_outliers(const Kernels& k, const Quantized& q, const Outliers<Index>& o, const Linear& io, std::size_t begin,
                  std::size_t end) {
  const std::size_t rows = q.rows, cols = q.cols;
  const Index* const last = o.index + o.count;
  const auto from = [&](const Index* first, std::size_t row) {  // the first outlier in this row or a later one
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

// x as the kernels for quantized weights take it: prepared rows, and panels where there are enough rows for them.
class PreparedX {
 public:
  PreparedX(const Kernels& k, const Quantized& q, Linear& io)
      : k_(k),
        q_(q),
        io_(io),
        row_bytes_(k.products.prepared_bytes(q, io.limbs)),
        in_panels_(row_bytes_ > 0 ? panel_rows(io.batch) : 0),
        panel_bytes_(in_panels_ > 0 ? k.products.panel_bytes(q, io.limbs) : 0),
        rows_at_(panel_bytes_ * ceil_div(in_panels_, kPanelWidth)),
        memory_(rows_at_ + row_bytes_ * io.batch) {
    io.panels = memory_.data();
    io.prepared = rows();
    io.prepared_bytes = row_bytes_;
    io.panel_bytes = panel_bytes_;
  }

  void fill() const {
    if (row_bytes_ == 0) return;
    parallel_for(io_.batch, 3 * matrix_bytes(io_.batch, q_.cols), [&](std::size_t begin, std::size_t end) {
      for (std::size_t b = begin; b < end; ++b) {
        k_.products.prepare_x(q_, io_.x + b * q_.cols, io_.limbs, rows() + b * row_bytes_);
      }
    });
    parallel_for(ceil_div(in_panels_, kPanelWidth), matrix_bytes(in_panels_, q_.cols),
                 [&](std::size_t begin, std::size_t end) {
                   for (std::size_t p = begin; p < end; ++p) {
                     const std::size_t first = p * kPanelWidth;
                     k_.products.prepare_panel(q_, rows() + first * row_bytes_, row_bytes_,
                                               std::min(kPanelWidth, in_panels_ - first), io_.limbs,
                                               memory_.data() + p * panel_bytes_);
                   }
                 });
  }

 private:
  std::uint8_t* rows() const { return memory_.data() + rows_at_; }

  const Kernels& k_;
  const Quantized& q_;
  const Linear& io_;
  std::size_t row_bytes_, in_panels_, panel_bytes_, rows_at_;
  Scratch memory_;
};

// `limbs` is 3 (exact) or 1 (int8). All checks are here and not in Python: a call costs no more than the product of a
// small matrix.
py::object linear_quantized(const py::object& x, const py::array& codes, const py::object& scale,
                            const py::array& minimum, int bits, std::size_t group_size, const py::tuple& shape,
                            const py::object& bias, const py::object& out, int limbs, const py::object& outliers) {
  if (limbs != 1 && limbs != 3) throw py::value_error("limbs: expected 1 or 3, got " + std::to_string(limbs));
  Operands o = operands_of(x, shape, bias, out);
  const StoredWeight weight(codes, scale, minimum, bits, o.cols, group_size);
  const Quantized& q = weight.quantized();
  if (q.rows != o.rows) {
    fail_value({"codes"}, "expected " + std::to_string(o.rows) + " rows, got " + std::to_string(q.rows));
  }
  check_disjoint(o, [&](Disjoint& memory) { weight.reads(memory); });

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
  Linear& io = o.io;
  io.limbs = limbs;
  io.floats = k.products.linear_floats;
  const PreparedX prepared(k, q, io);
  {  // a scope, since returning `o.out` counts a reference, which needs the lock
    const py::gil_scoped_release released;
    prepared.fill();
    // In cache and with many rows of x, arithmetic takes the time: each multiply-add counts as a byte, or as half of
    // one.
    const double products = matrix_bytes(q.rows, q.cols) / 4 * static_cast<double>(io.batch);
    // Rows whose parameters are decoded together: few, for they take the place of other things in the cache, but enough
    // that the panels of x are not read again for each.
    const std::size_t at_once = io.batch < kLeastPanel ? 16 : 64;
    // Panels meet up to 32 rows of W at a time, so no range should begin in the middle of these.
    const std::size_t chunk = panel_rows(io.batch) > 0 ? 32 : 1;
    parallel_chunks(q.rows, chunk, products * (limbs == 3 ? 1.0 : 0.5), [&](std::size_t begin, std::size_t end) {
      weight.for_rows(k, begin, end, at_once, [&](const Quantized& w, std::size_t first, std::size_t last) {
        k.products.linear_quantized(w, io, first, last);
        if (narrow.count > 0) add_outliers(k, w, narrow, io, first, last);
        if (wide.count > 0) add_outliers(k, w, wide, io, first, last);
      });
    });
  }
  return o.out;
}

// ---- sparse weights ------------------------------------------------------------------------------------------

// Divides the rows between `parts` threads so that all have the same work, although some rows may have many more
// entries than others. A row costs its entries and the reading of its mask.
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

void multiply_few(const Sparse& w, const Linear& io, const Kernels& k) {
  const std::size_t stride = ceil_div(w.cols, kBlockLength) * kBlockLength;
  const std::size_t together = io.batch > 1 ? kFewRows : 1;
  const Scratch padded(together * stride * sizeof(float));
  float* const x = reinterpret_cast<float*>(padded.data());
  if (together > 1 && !is_mask(w.layout)) {
    k.sparse.transpose_tile(io.x, io.batch, w.cols, 0, together, 0, w.cols, x);
  } else {
    for (std::size_t b = 0; b < together; ++b) {
      float* row = b < io.batch ? std::copy_n(io.x + b * w.cols, w.cols, x + b * stride) : x + b * stride;
      std::fill(row, x + (b + 1) * stride, 0.0f);
    }
  }
  const std::size_t parts = threads::kPieces * num_threads();
  const Shares shares(w, parts);
  const double bytes = (4.0 * static_cast<double>(w.count) + 2.0 * static_cast<double>(w.rows * w.row_bytes)) *
                       static_cast<double>(io.batch);
  parallel_for(parts, bytes, [&](std::size_t begin, std::size_t end) {
    k.sparse.linear(w, x, stride, io.batch, io.bias, io.y, shares.begin(begin), shares.begin(end));
  });
}

void multiply_many(const Sparse& w, const Linear& io, const Kernels& k) {
  constexpr std::size_t widest = 64;
  const Scratch memory(w.cols * widest * sizeof(float));
  float* const tile = reinterpret_cast<float*>(memory.data());
  const std::size_t parts = threads::kPieces * num_threads();
  const Shares shares(w, parts);
  for (std::size_t first = 0; first < io.batch;) {
    const std::size_t left = io.batch - first, width = left > 32 ? 64 : left > 16 ? 32 : 16;
    parallel_for(
        ceil_div(w.cols, 16), 4.0 * static_cast<double>(w.cols * width), [&](std::size_t begin, std::size_t end) {
          k.sparse.transpose_tile(io.x, io.batch, w.cols, first, width, 16 * begin, std::min(16 * end, w.cols), tile);
        });
    const double bytes = static_cast<double>(w.count + w.rows * 16) * static_cast<double>(width);
    parallel_for(parts, bytes, [&](std::size_t begin, std::size_t end) {
      k.sparse.linear_tile(w, tile, width, io.batch, first, io.bias, io.y, shares.begin(begin), shares.begin(end));
    });
    first += width;
  }
}

// `add_values` adds the memory of the values to that which must not overlap `out`.
template <class AddValues>
py::object multiply(const Sparse& w, const Operands& o, std::size_t entries, const AddValues& add_values) {
  if (w.rows != o.rows) {
    fail_value({"row_offsets"}, "expected " + std::to_string(o.rows) + " rows, got " + std::to_string(w.rows));
  }
  check_disjoint(o, [&](Disjoint& memory) {
    const std::size_t width = w.layout == Layout::index16 ? 2 : 1;
    memory.reads(w.positions, is_mask(w.layout) ? w.rows * w.row_bytes : entries * width, {"positions"});
    memory.reads(w.row_offsets, (w.rows + 1) * sizeof(std::int64_t), {"row_offsets"});
    add_values(memory);
  });
  const Kernels& k = kernels();
  {  // as above
    const py::gil_scoped_release released;
    o.io.batch < kLeastTile ? multiply_few(w, o.io, k) : multiply_many(w, o.io, k);
  }
  return o.out;
}

std::size_t entries_of(const std::string& layout, std::size_t values) {
  return layout == "block" ? values / kBlockLength : values;
}

py::object linear_sparse(const py::object& x, const std::string& layout, const py::array& positions,
                         const py::array& row_offsets, const py::array& values, const py::tuple& shape,
                         const py::object& bias, const py::object& out) {
  const Operands o = operands_of(x, shape, bias, out);
  const auto* array = array_of(values, {"values"});
  const Float type = float_of(array, {"values"});
  if (type == Float::f64) fail_type({"w"}, "expected values of float32, float16 or bfloat16, got float64");
  check_layout(values, array, Access::read, {"values"});
  const std::size_t count = size_of(array), entries = entries_of(layout, count);
  Sparse w = sparse_of(layout, positions, row_offsets, o.cols, entries);
  w.values = array->data;
  w.type = type;
  w.count = count;
  return multiply(w, o, entries,
                  [&](Disjoint& memory) { memory.reads(array->data, count * width_of(type), {"values"}); });
}

// The values are the `count` codes of one quantized row.
py::object linear_sparse_quantized(const py::object& x, const std::string& layout, const py::array& positions,
                                   const py::array& row_offsets, const py::array& codes, const py::object& scale,
                                   const py::array& minimum, int bits, std::size_t group_size, std::size_t count,
                                   const py::tuple& shape, const py::object& bias, const py::object& out) {
  const Operands o = operands_of(x, shape, bias, out);
  const StoredWeight values(codes, scale, minimum, bits, count, group_size);
  const std::size_t value_rows = values.quantized().rows, entries = entries_of(layout, count);
  if (value_rows != 1) fail_value({"codes"}, "expected one row of values, got " + std::to_string(value_rows));
  Sparse w = sparse_of(layout, positions, row_offsets, o.cols, entries);
  w.count = count;
  values.for_one_row(kernels(), [&](const Quantized& q) {
    w.quantized = &q;
    multiply(w, o, entries, [&](Disjoint& memory) { values.reads(memory); });
  });
  return o.out;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.attr("SUMS") = py::dict(py::arg("partials") = kPartials, py::arg("float_stretch") = kFloatStretch,
                            py::arg("run_stretch") = kRunStretch, py::arg("panel_stretch") = kPanelStretch,
                            py::arg("panel_width") = kPanelWidth, py::arg("least_panel") = kLeastPanel,
                            py::arg("sparse_stretch") = kSparseStretch, py::arg("tile_numbers") = kTileNumbers,
                            py::arg("tile_partials") = kTilePartials, py::arg("least_tile") = kLeastTile);
  m.def("check_linear", &check_linear, py::arg("x"), py::arg("shape"), py::arg("bias"), py::arg("out"),
        py::arg("weight"));
  m.def("linear_quantized", &linear_quantized, py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("minimum"),
        py::arg("bits"), py::arg("group_size"), py::arg("shape"), py::arg("bias"), py::arg("out"), py::arg("limbs"),
        py::arg("outliers") = py::none());
  m.def("linear_sparse", &linear_sparse, py::arg("x"), py::arg("layout"), py::arg("positions"), py::arg("row_offsets"),
        py::arg("values"), py::arg("shape"), py::arg("bias"), py::arg("out"));
  m.def("linear_sparse_quantized", &linear_sparse_quantized, py::arg("x"), py::arg("layout"), py::arg("positions"),
        py::arg("row_offsets"), py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("count"), py::arg("shape"), py::arg("bias"), py::arg("out"));
}

}  // namespace fastopt
