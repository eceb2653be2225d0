// Sparse storage: dense to mask and non-zeros and back, and multiplying by it.
#include <pybind11/pybind11.h>

#include <atomic>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

// Memory of any float type, seen as integers of its width.
struct Elements {
  char* data;
  std::size_t size;
  int width;
};

Elements elements(py::handle object, Access access, const Label& label) {
  const auto* array = array_of(object, label);
  const int width = static_cast<int>(py::handle(array->descr).attr("itemsize").cast<int>());
  if (width != 2 && width != 4 && width != 8) fail_type(label, "expected a float type, got " + dtype_name(array));
  check_layout(object, array, access, label);
  return {array->data, size_of(array), width};
}

// Offsets must rise from 0 to the number of values: a kernel follows them without looking.
Masked masked_of(py::handle mask, py::handle row_offsets, std::size_t cols, std::size_t values) {
  require_2d(mask, {"mask"});
  Masked m{};
  m.rows = dimension(mask, 0);
  m.cols = cols;
  m.row_bytes = ceil_div(cols, 8);
  m.mask = view<const std::uint8_t>(mask, {"mask"}).data;
  require_shape(mask, m.rows, m.row_bytes, {"mask"});
  const View<const std::int64_t> offsets = view<const std::int64_t>(row_offsets, {"row_offsets"});
  require_size(offsets.size, m.rows + 1, {"row_offsets"});
  bool rising = offsets.data[0] == 0 && offsets.data[m.rows] == static_cast<std::int64_t>(values);
  for (std::size_t r = 0; r < m.rows; ++r) rising &= offsets.data[r] <= offsets.data[r + 1];
  if (!rising) fail_value({"row_offsets"}, "must rise from 0 to the number of values, " + std::to_string(values));
  m.row_offsets = offsets.data;
  return m;
}

// The rest of what a mask must be, looked at once: bits of each row as many as it has values, none behind the last.
void check_masked(const py::array& mask, const py::array& row_offsets, std::size_t cols, std::size_t values) {
  const Masked m = masked_of(mask, row_offsets, cols, values);
  for (std::size_t r = 0; r < m.rows; ++r) {
    const std::uint8_t* row = m.mask + r * m.row_bytes;
    std::int64_t bits = 0;
    for (std::size_t i = 0; i < m.row_bytes; ++i) bits += __builtin_popcount(row[i]);
    if (bits != m.row_offsets[r + 1] - m.row_offsets[r]) {
      fail_value({"mask"}, "row " + std::to_string(r) + " has " + std::to_string(bits) + " bits set, but " +
                               std::to_string(m.row_offsets[r + 1] - m.row_offsets[r]) + " values");
    }
    if (cols % 8 != 0 && row[m.row_bytes - 1] >> (cols % 8) != 0) {
      fail_value({"mask"}, "row " + std::to_string(r) + " has bits set behind its last column");
    }
  }
}

double dense_bytes(std::size_t rows, std::size_t cols) {
  return 4.0 * static_cast<double>(rows) * static_cast<double>(cols);
}

void count_nonzero(const py::array& x, const py::array& counts) {
  require_2d(x, {"x"});
  const Elements from = elements(x, Access::read, {"x"});
  const View<std::int64_t> to = view<std::int64_t>(counts, {"counts"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1);
  require_size(to.size, rows, {"counts"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(rows, dense_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      const char* row = from.data + r * cols * static_cast<std::size_t>(from.width);
      to.data[r] = static_cast<std::int64_t>(k.count_nonzero(from.width, row, cols));
    }
  });
}

// `row_offsets` are the sums of what count_nonzero gave for x.
void compress(const py::array& x, const py::array& row_offsets, const py::array& mask, const py::array& values) {
  require_2d(x, {"x"});
  const Elements from = elements(x, Access::read, {"x"});
  const Elements to = elements(values, Access::write, {"values"});
  const View<std::uint8_t> bits = view<std::uint8_t>(mask, {"mask"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1), width = static_cast<std::size_t>(from.width);
  const Masked m = masked_of(mask, row_offsets, cols, to.size);
  if (m.rows != rows) fail_value({"mask"}, "expected " + std::to_string(rows) + " rows, got " + std::to_string(m.rows));
  if (to.width != from.width) fail_type({"values"}, "expected the dtype of x");
  const Kernels& k = kernels();
  std::atomic<bool> fits{true};
  {
    const py::gil_scoped_release released;
    parallel_for(rows, dense_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
      for (std::size_t r = begin; r < end; ++r) {
        const char* row = from.data + r * cols * width;
        const std::size_t first = static_cast<std::size_t>(m.row_offsets[r]);
        if (k.count_nonzero(from.width, row, cols) != static_cast<std::size_t>(m.row_offsets[r + 1]) - first) {
          fits = false;
          continue;
        }
        k.compress_row(from.width, row, cols, bits.data + r * m.row_bytes, to.data + first * width);
      }
    });
  }
  if (!fits) throw py::value_error("row_offsets: do not match the non-zeros of x");
}

void expand(const py::array& mask, const py::array& row_offsets, const py::array& values, const py::array& out) {
  require_2d(out, {"out"});
  const Elements from = elements(values, Access::read, {"values"});
  const Elements to = elements(out, Access::write, {"out"});
  const std::size_t cols = dimension(out, 1), width = static_cast<std::size_t>(to.width);
  const Masked m = masked_of(mask, row_offsets, cols, from.size);
  require_shape(out, m.rows, cols, {"out"});
  if (to.width != from.width) fail_type({"out"}, "expected the dtype of values");
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(m.rows, dense_bytes(m.rows, cols), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      k.expand_row(from.width, m.mask + r * m.row_bytes, from.data + static_cast<std::size_t>(m.row_offsets[r]) * width,
                   cols, to.data + r * cols * width);
    }
  });
}

void multiply(Masked m, const py::array& x, const py::object& bias, const py::array& out) {
  const LinearOperands io = linear_operands(x, bias, out, m.rows);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(
      m.rows, dense_bytes(m.rows, m.cols) * static_cast<double>(1 + io.batch / 8),
      [&](std::size_t begin, std::size_t end) { k.linear_masked(m, io.x, io.batch, io.bias, io.y, begin, end); });
}

void linear_masked(const py::array& x, const py::array& mask, const py::array& row_offsets, const py::array& values,
                   const py::object& bias, const py::array& out) {
  require_2d(x, {"x"});
  const View<const float> v = view<const float>(values, {"values"});
  Masked m = masked_of(mask, row_offsets, dimension(x, 1), v.size);
  m.values = v.data;
  multiply(m, x, bias, out);
}

// The non-zeros as one quantized row of `count` codes.
void linear_masked_quantized(const py::array& x, const py::array& mask, const py::array& row_offsets,
                             const py::array& codes, const py::array& scale, const py::array& minimum, int bits,
                             std::size_t group_size, std::size_t count, const py::object& bias, const py::array& out) {
  require_2d(x, {"x"});
  const Quantized q = quantized_of<const std::uint8_t>(codes, scale, minimum, bits, count, group_size);
  if (q.rows != 1) fail_value({"codes"}, "expected one row of values, got " + std::to_string(q.rows));
  Masked m = masked_of(mask, row_offsets, dimension(x, 1), count);
  m.quantized = &q;
  multiply(m, x, bias, out);
}

}  // namespace

void bind_sparse(py::module_& m) {
  m.def("check_masked", &check_masked, py::arg("mask"), py::arg("row_offsets"), py::arg("cols"), py::arg("values"));
  m.def("count_nonzero", &count_nonzero, py::arg("x"), py::arg("counts"));
  m.def("compress", &compress, py::arg("x"), py::arg("row_offsets"), py::arg("mask"), py::arg("values"));
  m.def("expand", &expand, py::arg("mask"), py::arg("row_offsets"), py::arg("values"), py::arg("out"));
  m.def("linear_masked", &linear_masked, py::arg("x"), py::arg("mask"), py::arg("row_offsets"), py::arg("values"),
        py::arg("bias"), py::arg("out"));
  m.def("linear_masked_quantized", &linear_masked_quantized, py::arg("x"), py::arg("mask"), py::arg("row_offsets"),
        py::arg("codes"), py::arg("scale"), py::arg("minimum"), py::arg("bits"), py::arg("group_size"),
        py::arg("count"), py::arg("bias"), py::arg("out"));
}

}  // namespace fastopt
