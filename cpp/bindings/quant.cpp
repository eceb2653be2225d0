// Quantize, dequantize and pack bits.
#include <pybind11/pybind11.h>

#include <atomic>
#include <limits>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kQuantChunk = 1 << 16;  // elements

unsigned range_of(const Kernels& k, const float* x, std::size_t n, Range* out) {
  std::vector<Range> parts(ceil_div(n, kQuantChunk));
  std::atomic<unsigned> flags{0};
  for_chunks(n, kQuantChunk, matrix_bytes(1, n), [&](std::size_t i, std::size_t begin, std::size_t end) {
    flags |= k.quant.range(x + begin, end - begin, &parts[i]);
  });
  *out = parts[0];
  for (const Range& part : parts) {
    out->min = std::min(out->min, part.min);
    out->max = std::max(out->max, part.max);
  }
  return flags;
}

// A fit with an importance of the shape of x or, where `one_row` may be, of one row.
Fit fit_of(const py::array& importance, bool least_squares, bool one_row, std::size_t rows, std::size_t cols,
           Disjoint& memory) {
  require_2d(importance, {"importance"});
  const View<const float> values = view<const float>(importance, {"importance"});
  one_row &= dimension(importance, 0) == 1;
  require_shape(importance, one_row ? 1 : rows, cols, {"importance"});
  memory.reads(values.data, values.size * sizeof(float), {"importance"});
  return {least_squares, values.data, one_row ? 0 : cols};
}

// Fills codes, scale and minimum; returns kNonFinite and kHalfMisfit flags.
unsigned quantize(const py::array& x, const py::array& codes, const py::array& scale, const py::array& minimum,
                  int bits, std::size_t group_size, bool least_squares, float limit, const py::object& importance) {
  require_2d(x, {"x"});
  const View<const float> from = view<const float>(x, {"x"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1);
  QuantizedOut q = quantized_of<std::uint8_t>(codes, scale, minimum, bits, cols, group_size);
  q.limit = limit;
  if (q.rows != rows)
    fail_value({"codes"}, "expected " + std::to_string(rows) + " rows, got " + std::to_string(q.rows));
  Disjoint memory;
  memory.reads(from.data, from.size * sizeof(float), {"x"});
  Fit fit{least_squares, nullptr, 0};
  if (!importance.is_none()) {
    fit = fit_of(py::cast<py::array>(importance), least_squares, group_size != 0, rows, cols, memory);
  }
  memory.writes(q.codes, rows * q.row_bytes, {"codes"});
  memory.writes(q.scale, param_bytes(q), {"scale"});
  memory.writes(q.minimum, param_bytes(q), {"minimum"});
  memory.check();

  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  if (from.size == 0) {
    if (group_size == 0) {
      std::fill_n(py::detail::array_proxy(scale.ptr())->data, param_bytes(q), '\0');
      std::fill_n(py::detail::array_proxy(minimum.ptr())->data, param_bytes(q), '\0');
    }
    return 0;
  }
  Shared all{};
  std::atomic<unsigned> flags{group_size == 0 ? range_of(k, from.data, from.size, &all.range) : 0};
  if (group_size == 0 && least_squares && flags == 0)
    all.pair = k.quant.fit(from.data, fit.importance, from.size, bits, all.range);
  const double passes = least_squares ? 16 : 1;  // least squares takes far more arithmetic than one pass over memory
  parallel_for(rows, passes * matrix_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    flags |= k.quant.quantize(from.data, q, group_size == 0 ? &all : nullptr, fit, begin, end);
  });
  return flags;
}

void dequantize(const py::array& codes, const py::object& scale, const py::array& minimum, int bits,
                std::size_t group_size, const py::array& out) {
  require_2d(out, {"out"});
  const StoredWeight weight(codes, scale, minimum, bits, dimension(out, 1), group_size);
  const Quantized& q = weight.quantized();
  const View<float> to = view<float>(out, {"out"});
  require_shape(out, q.rows, q.cols, {"out"});
  Disjoint memory;
  memory.writes(to.data, to.size * sizeof(float), {"out"});
  weight.reads(memory);
  memory.check();
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  if (to.size == 0) return;  // rows without columns take no memory, so a file may claim any number of them
  if (q.rows == 1) {         // the threads share the columns of a single row
    weight.for_one_row(k, [&](const Quantized& w) {
      parallel_chunks(w.cols, kQuantChunk, matrix_bytes(1, w.cols), [&](std::size_t begin, std::size_t end) {
        k.quant.dequantize(w, 0, begin, end, to.data + begin);
      });
    });
    return;
  }
  parallel_for(q.rows, matrix_bytes(q.rows, q.cols), [&](std::size_t begin, std::size_t end) {
    weight.for_rows(k, begin, end, 1, [&](const Quantized& w, std::size_t first, std::size_t last) {
      for (std::size_t r = first; r < last; ++r) k.quant.dequantize(w, r, 0, w.cols, to.data + r * w.cols);
    });
  });
}

// Fills codes and parameters in two levels; returns kNonFinite, kHalfMisfit and kBeyond flags.
unsigned quantize_two_level(const py::array& x, const py::array& codes, const py::array& scale,
                            const py::array& minimum, const py::array& floats, int bits, std::size_t group_size,
                            int param_bits, std::size_t param_group, float limit, const py::object& importance) {
  require_2d(x, {"x"});
  const View<const float> from = view<const float>(x, {"x"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1);
  if (group_size == 0) throw py::value_error("group_size: expected a number of columns with parameters in two levels");
  QuantizedOut q = codes_of<std::uint8_t>(codes, bits, cols, group_size);
  q.limit = limit;
  require_shape(codes, rows, q.row_bytes, {"codes"});
  const TwoLevelOut t =
      two_level_of<std::uint8_t>(scale, minimum, floats, param_bits, param_group, rows, q.groups, q.group);
  Disjoint memory;
  memory.reads(from.data, from.size * sizeof(float), {"x"});
  Fit fit{true, nullptr, 0};
  if (!importance.is_none()) fit = fit_of(py::cast<py::array>(importance), true, true, rows, cols, memory);
  memory.writes(q.codes, rows * q.row_bytes, {"codes"});
  memory.writes(t.scale, rows * t.row_bytes, {"scale"});
  memory.writes(t.minimum, rows * t.row_bytes, {"minimum"});
  memory.writes(t.floats, rows * t.parts * t.count * (t.half ? 2 : 4), {"param_floats"});
  memory.check();
  if (from.size == 0) return 0;
  const Kernels& k = kernels();
  const std::size_t bytes = k.two_level.bytes(q, t);
  const py::gil_scoped_release released;
  std::atomic<unsigned> flags{0};
  parallel_for(rows, 32 * matrix_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    const Scratch scratch(bytes);
    flags |= k.two_level.quantize(from.data, q, t, fit, begin, end, scratch.data());
  });
  return flags;
}

const float* slabs_of(const py::array& array, std::size_t cols, const Label& label) {
  const View<const float> values = view<const float>(array, label);
  require_size(values.size, ceil_div(cols, kSlabColumns) * kSlabColumns * cols, label);
  return values.data;
}

// Quantizes by GPTQ: see Gptq. `scale` is an array or, for parameters in two levels, a tuple as StoredWeight takes it,
// whose floats are read. Returns kNonFinite, kHalfMisfit and kBeyond flags.
unsigned gptq(const py::array& x, const py::array& order, const py::array& group_order, const py::array& h,
              const py::array& m, const py::array& importance, const py::array& codes, const py::object& scale,
              const py::array& minimum, int bits, std::size_t group_size, int sweeps, float limit) {
  require_2d(x, {"x"});
  const View<const float> from = view<const float>(x, {"x"}), weights = view<const float>(importance, {"importance"});
  const View<const std::uint32_t> columns = view<const std::uint32_t>(order, {"order"});
  const View<const std::uint32_t> groups = view<const std::uint32_t>(group_order, {"group_order"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1);
  const bool in_two_levels = py::isinstance<py::tuple>(scale);
  QuantizedOut q = in_two_levels ? codes_of<std::uint8_t>(codes, bits, cols, group_size)
                                 : quantized_of<std::uint8_t>(codes, scale, minimum, bits, cols, group_size);
  q.limit = limit;
  TwoLevelOut two_level{};
  if (in_two_levels) two_level = two_level_of<std::uint8_t>(scale.cast<py::tuple>(), minimum, q);
  require_size(q.rows, rows, {"codes"});
  require_size(columns.size, cols, {"order"});
  require_size(groups.size, q.groups, {"group_order"});
  require_size(weights.size, cols, {"importance"});
  Gptq g{from.data, cols,    q.group,      columns.data, groups.data,
         nullptr,   nullptr, weights.data, sweeps,       in_two_levels ? &two_level : nullptr};
  g.h = slabs_of(h, cols, {"h"});
  g.m = slabs_of(m, cols, {"m"});
  for (std::size_t i = 0; i < cols; ++i) {
    if (columns.data[i] >= cols) fail_value({"order"}, "expected columns");
  }
  for (std::size_t i = 0; i < q.groups; ++i) {
    if (groups.data[i] >= q.groups) fail_value({"group_order"}, "expected groups");
  }
  if (from.size == 0) return 0;
  const Kernels& k = kernels();
  const std::size_t bytes = ceil_div(k.gptq.bytes(g, q), 64) * 64;
  const std::size_t threads = num_threads();
  const Scratch memory(bytes * threads);
  std::vector<std::atomic<bool>> taken(threads);  // the parts of the memory that a strip uses now
  const py::gil_scoped_release released;
  std::atomic<unsigned> flags{0};
  parallel_for(ceil_div(rows, kStripRows), 64 * matrix_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    std::size_t part = 0;  // no more strips run at once than there are threads
    while (taken[part].exchange(true, std::memory_order_acquire)) part = (part + 1) % threads;
    for (std::size_t i = begin; i < end; ++i) flags |= k.gptq.rows(g, q, i * kStripRows, memory.data() + bytes * part);
    taken[part].store(false, std::memory_order_release);
  });
  return flags;
}

// Replaces the lower triangle of a symmetric matrix by its Cholesky factor; the rest is left undefined. Returns false
// if it is not positive definite.
bool cholesky(const py::array& a) {
  require_2d(a, {"a"});
  const View<double> matrix = view<double>(a, {"a"});
  const std::size_t n = dimension(a, 0);
  require_shape(a, n, n, {"a"});
  const Scratch before(n * kCholeskyBlock * sizeof(double)), block(kCholeskyBlock * kCholeskyBlock * sizeof(double));
  Cholesky c{matrix.data, n, 0, reinterpret_cast<double*>(before.data()), reinterpret_cast<double*>(block.data())};
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  std::atomic<bool> good{true};
  for (; c.first < n && good; c.first += kCholeskyBlock) {
    const std::size_t end = std::min(c.first + kCholeskyBlock, n);
    double* const transposed = reinterpret_cast<double*>(before.data());
    parallel_for(c.first, matrix_bytes(kCholeskyBlock, c.first), [&](std::size_t from, std::size_t to) {
      for (std::size_t i = from; i < to; ++i) {
        for (std::size_t j = 0; j < kCholeskyBlock; ++j) {
          transposed[i * kCholeskyBlock + j] = c.first + j < end ? matrix.data[(c.first + j) * n + i] : 0.0;
        }
      }
    });
    std::fill_n(c.block, kCholeskyBlock * kCholeskyBlock, 0.0);
    if (!k.gptq.cholesky(c, c.first, end)) return false;
    parallel_for(n - end, 2 * matrix_bytes(n - end, c.first), [&](std::size_t from, std::size_t to) {
      if (!k.gptq.cholesky(c, end + from, end + to)) good = false;
    });
  }
  return good;
}

// Codes of one byte each, in one dimension, to and from packed bytes.
void pack(const py::array& codes, int bits, const py::array& packed) {
  require_bits(bits);
  const View<const std::uint8_t> from = view<const std::uint8_t>(codes, {"codes"});
  const View<std::uint8_t> to = view<std::uint8_t>(packed, {"packed"});
  require_size(to.size, packed_bytes(from.size, bits), {"packed"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_chunks(from.size, kQuantChunk, static_cast<double>(from.size), [&](std::size_t begin, std::size_t end) {
    k.quant.pack(bits, from.data + begin, end - begin, to.data + begin * static_cast<std::size_t>(bits) / 8);
  });
}

void unpack(const py::array& packed, int bits, const py::array& codes) {
  require_bits(bits);
  const View<const std::uint8_t> from = view<const std::uint8_t>(packed, {"packed"});
  const View<std::uint8_t> to = view<std::uint8_t>(codes, {"codes"});
  require_size(from.size, packed_bytes(to.size, bits), {"packed"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_chunks(to.size, kQuantChunk, static_cast<double>(to.size), [&](std::size_t begin, std::size_t end) {
    k.quant.unpack(bits, from.data + begin * static_cast<std::size_t>(bits) / 8, end - begin, to.data + begin);
  });
}

}  // namespace

void bind_quant(py::module_& m) {
  m.attr("NON_FINITE") = kNonFinite;
  m.attr("HALF_MISFIT") = kHalfMisfit;
  m.attr("BEYOND") = kBeyond;
  m.def("quantize", &quantize, py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("least_squares") = false, py::arg("limit") = std::numeric_limits<float>::max(),
        py::arg("importance") = py::none());
  m.def("quantize_two_level", &quantize_two_level, py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("minimum"),
        py::arg("param_floats"), py::arg("bits"), py::arg("group_size"), py::arg("param_bits"), py::arg("param_group"),
        py::arg("limit"), py::arg("importance") = py::none());
  m.def("gptq", &gptq, py::arg("x"), py::arg("order"), py::arg("group_order"), py::arg("h"), py::arg("m"),
        py::arg("importance"), py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("sweeps"), py::arg("limit"));
  m.def("cholesky", &cholesky, py::arg("a"));
  m.attr("SLAB_COLUMNS") = kSlabColumns;
  m.def("dequantize", &dequantize, py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"),
        py::arg("group_size"), py::arg("out"));
  m.def("pack", &pack, py::arg("codes"), py::arg("bits"), py::arg("packed"));
  m.def("unpack", &unpack, py::arg("packed"), py::arg("bits"), py::arg("codes"));
}

}  // namespace fastopt
