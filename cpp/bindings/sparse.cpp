// Sparse storage: from dense arrays to positions and values, and back.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

// ---- checks of stored positions ------------------------------------------------------------------------------

void check_mask_row(const Sparse& s, std::size_t row) {
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(s.positions) + row * s.row_bytes;
  const std::size_t bits = s.layout == Layout::mask ? s.cols : ceil_div(s.cols, kBlockLength);
  const std::size_t count = kernels().sparse.count_bits(mask, 8 * s.row_bytes);
  if (count != row_begin(s, row + 1) - row_begin(s, row)) {
    fail_value({"positions"}, "row " + std::to_string(row) + " has " + std::to_string(count) + " bits set, but " +
                                  std::to_string(row_begin(s, row + 1) - row_begin(s, row)) + " entries");
  }
  if (bits % 8 != 0 && mask[s.row_bytes - 1] >> (bits % 8) != 0) {
    fail_value({"positions"}, "row " + std::to_string(row) + " has bits set behind its last column");
  }
}

// Returns true if columns rise and stay below `cols`. Loops without branches, as tensors of any size pass them.
bool index_row_fits(const Sparse& s, std::size_t row) {
  const std::size_t begin = row_begin(s, row), end = row_begin(s, row + 1);
  if (begin == end) return true;
  if (s.layout == Layout::index8) {  // gaps always rise
    const auto* gaps = static_cast<const std::uint8_t*>(s.positions);
    std::size_t columns = end - begin;
    for (std::size_t i = begin; i < end; ++i) columns += gaps[i];
    return columns <= s.cols;
  }
  const auto* columns = static_cast<const std::uint16_t*>(s.positions);
  int gaps = 0;  // all of them or-ed: negative if one is
  for (std::size_t i = begin + 1; i < end; ++i) gaps |= columns[i] - columns[i - 1] - 1;
  return gaps >= 0 && columns[end - 1] < s.cols;
}

void check_index_row(const Sparse& s, std::size_t row) {
  if (index_row_fits(s, row)) return;
  std::size_t next = 0;
  for (std::size_t i = row_begin(s, row); i < row_begin(s, row + 1); ++i) {  // find the first fault for the message
    const std::size_t column = s.layout == Layout::index16 ? static_cast<const std::uint16_t*>(s.positions)[i]
                                                           : next + static_cast<const std::uint8_t*>(s.positions)[i];
    if (column < next) {
      fail_value({"positions"}, "row " + std::to_string(row) + ": columns must rise, got " + std::to_string(column) +
                                    " after " + std::to_string(next - 1));
    }
    if (column >= s.cols) {
      fail_value({"positions"}, "row " + std::to_string(row) + ": expected columns below " + std::to_string(s.cols) +
                                    ", got " + std::to_string(column));
    }
    next = column + 1;
  }
}

// Checks everything else that kernels rely on. Every call runs sparse_of; this runs once, when a tensor is made.
void check_sparse(const std::string& layout, const py::array& positions, const py::array& row_offsets, std::size_t cols,
                  std::size_t entries) {
  const Sparse s = sparse_of(layout, positions, row_offsets, cols, entries);
  for (std::size_t r = 0; r < s.rows; ++r) is_mask(s.layout) ? check_mask_row(s, r) : check_index_row(s, r);
}

// ---- dense to sparse and back --------------------------------------------------------------------------------

// The mask of the non-zeros, and their number in each row.
void nonzero_mask(const py::array& x, const py::array& mask, const py::array& counts) {
  require_2d(x, {"x"});
  const Elements from = elements(x, Access::read, {"x"});
  const View<std::uint8_t> bits = view<std::uint8_t>(mask, {"mask"});
  const View<std::int64_t> to = view<std::int64_t>(counts, {"counts"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1), row_bytes = ceil_div(cols, 8);
  require_shape(mask, rows, row_bytes, {"mask"});
  require_size(to.size, rows, {"counts"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(rows, matrix_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      const char* row = from.data + r * cols * static_cast<std::size_t>(from.width);
      to.data[r] = static_cast<std::int64_t>(k.sparse.nonzero_mask(from.width, row, cols, bits.data + r * row_bytes));
    }
  });
}

// Copies the elements of x that a mask selects. `row_offsets` must be the running count of its bits.
void compress(const py::array& x, const py::array& mask, const py::array& row_offsets, const py::array& values) {
  require_2d(x, {"x"});
  const Elements from = elements(x, Access::read, {"x"});
  const Elements to = elements(values, Access::write, {"values"});
  const std::size_t rows = dimension(x, 0), cols = dimension(x, 1), width = static_cast<std::size_t>(from.width);
  const Sparse s = sparse_of("mask", mask, row_offsets, cols, to.size);
  if (s.rows != rows) fail_value({"mask"}, "expected " + std::to_string(rows) + " rows, got " + std::to_string(s.rows));
  if (to.width != from.width) fail_type({"values"}, "expected the dtype of x");
  for (std::size_t r = 0; r < rows; ++r) check_mask_row(s, r);
  const auto* bits = static_cast<const std::uint8_t*>(s.positions);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(rows, matrix_bytes(rows, cols), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      const std::size_t first = row_begin(s, r);
      k.sparse.compress_row(from.width, from.data + r * cols * width, bits + r * s.row_bytes, cols,
                            row_begin(s, r + 1) - first, to.data + first * width);
    }
  });
}

// Memory for the columns of a row, with room behind them: the kernels write whole vectors.
std::unique_ptr<std::uint16_t[]> column_scratch(std::size_t cols) {
  return std::unique_ptr<std::uint16_t[]>(new std::uint16_t[cols + 8]);
}

// The columns of the set bits of a mask, as index16 stores them.
void mask_columns(const py::array& mask, const py::array& row_offsets, std::size_t cols, const py::array& columns) {
  const View<std::uint16_t> to = view<std::uint16_t>(columns, {"columns"});
  const Sparse s = sparse_of("mask", mask, row_offsets, cols, to.size);
  for (std::size_t r = 0; r < s.rows; ++r) check_mask_row(s, r);
  const auto* bits = static_cast<const std::uint8_t*>(s.positions);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(s.rows, matrix_bytes(s.rows, cols) / 4, [&](std::size_t begin, std::size_t end) {
    const auto scratch = column_scratch(cols);
    for (std::size_t r = begin; r < end; ++r) {
      const std::size_t n = k.sparse.mask_columns(bits + r * s.row_bytes, cols, scratch.get());
      std::copy_n(scratch.get(), n, to.data + row_begin(s, r));
    }
  });
}

// Counts the entries that each row of index16 needs as index8.
void count_gaps(const py::array& columns, const py::array& row_offsets, std::size_t cols, const py::array& counts) {
  const View<const std::uint16_t> from = view<const std::uint16_t>(columns, {"columns"});
  const Sparse s = sparse_of("index16", columns, row_offsets, cols, from.size);
  const View<std::int64_t> to = view<std::int64_t>(counts, {"counts"});
  require_size(to.size, s.rows, {"counts"});
  for (std::size_t r = 0; r < s.rows; ++r) check_index_row(s, r);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(s.rows, 8.0 * static_cast<double>(from.size), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      const std::size_t first = row_begin(s, r);
      to.data[r] =
          static_cast<std::int64_t>(k.sparse.column_gaps(from.data + first, row_begin(s, r + 1) - first, nullptr));
    }
  });
}

// Converts index16 to index8, whose offsets are the running sum of the counts of count_gaps. Values move to their new
// places; those of entries that only fill a distance above 255 are left as they are.
void column_gaps(const py::array& columns, const py::array& row_offsets, std::size_t cols, const py::array& values,
                 const py::array& gap_offsets, const py::array& gaps, const py::array& gap_values) {
  const View<const std::uint16_t> from = view<const std::uint16_t>(columns, {"columns"});
  const Sparse s = sparse_of("index16", columns, row_offsets, cols, from.size);
  const View<std::uint8_t> to = view<std::uint8_t>(gaps, {"gaps"});
  const Sparse t = sparse_of("index8", gaps, gap_offsets, cols, to.size);
  const Elements v = elements(values, Access::read, {"values"});
  const Elements tv = elements(gap_values, Access::write, {"gap_values"});
  require_size(v.size, from.size, {"values"});
  require_size(tv.size, to.size, {"gap_values"});
  if (v.width != tv.width) fail_type({"gap_values"}, "expected the dtype of values");
  if (s.rows != t.rows) fail_value({"gap_offsets"}, "expected as many rows as row_offsets");
  const Kernels& k = kernels();
  for (std::size_t r = 0; r < s.rows; ++r) {
    check_index_row(s, r);
    const std::size_t first = row_begin(s, r);
    if (k.sparse.column_gaps(from.data + first, row_begin(s, r + 1) - first, nullptr) !=
        row_begin(t, r + 1) - row_begin(t, r))
      fail_value({"gap_offsets"}, "do not match the columns");
  }
  const std::size_t width = static_cast<std::size_t>(v.width);
  const py::gil_scoped_release released;
  parallel_for(s.rows, 8.0 * static_cast<double>(from.size), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      const std::size_t first = row_begin(s, r), n = row_begin(s, r + 1) - first;
      std::size_t at = row_begin(t, r), next = 0;
      if (k.sparse.column_gaps(from.data + first, n, to.data + at) == n) {
        std::memcpy(tv.data + at * width, v.data + first * width, n * width);
        continue;
      }
      for (std::size_t i = 0; i < n; ++i, ++at) {
        const std::size_t column = from.data[first + i];
        at += (column - next) / 256;
        next = column + 1;
        std::memcpy(tv.data + at * width, v.data + (first + i) * width, width);
      }
    }
  });
}

// The columns of the entries of index8.
void gap_columns(const py::array& gaps, const py::array& row_offsets, std::size_t cols, const py::array& columns) {
  const View<std::uint16_t> to = view<std::uint16_t>(columns, {"columns"});
  const Sparse s = sparse_of("index8", gaps, row_offsets, cols, to.size);
  const auto* from = static_cast<const std::uint8_t*>(s.positions);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  const auto scratch = column_scratch(cols);
  for (std::size_t r = 0; r < s.rows; ++r) {
    const std::size_t first = row_begin(s, r), n = std::min(row_begin(s, r + 1) - first, cols);
    k.sparse.gap_columns(from + first, n, 0, scratch.get());
    std::copy_n(scratch.get(), n, to.data + first);
  }
}

// From sparse to dense, for every layout but blocks. check_sparse has checked the positions.
void expand(const std::string& layout, const py::array& positions, const py::array& row_offsets,
            const py::array& values, const py::array& out) {
  require_2d(out, {"out"});
  const Elements from = elements(values, Access::read, {"values"});
  const Elements to = elements(out, Access::write, {"out"});
  const std::size_t cols = dimension(out, 1), width = static_cast<std::size_t>(to.width);
  const Sparse s = sparse_of(layout, positions, row_offsets, cols, from.size);
  if (s.layout == Layout::block) throw py::value_error("layout: blocks are not expanded here");
  require_shape(out, s.rows, cols, {"out"});
  if (to.width != from.width) fail_type({"out"}, "expected the dtype of values");
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(s.rows, matrix_bytes(s.rows, cols), [&](std::size_t begin, std::size_t end) {
    const auto scratch = column_scratch(s.layout == Layout::index8 ? cols : 0);
    for (std::size_t r = begin; r < end; ++r) {
      const std::size_t first = row_begin(s, r), n = row_begin(s, r + 1) - first;
      const char* v = from.data + first * width;
      char* row = to.data + r * cols * width;
      if (s.layout == Layout::mask) {
        k.sparse.expand_row(to.width, static_cast<const std::uint8_t*>(s.positions) + r * s.row_bytes, v, n, cols, row);
      } else if (s.layout == Layout::index8) {
        k.sparse.gap_columns(static_cast<const std::uint8_t*>(s.positions) + first, n, 0, scratch.get());
        k.sparse.scatter_row(to.width, scratch.get(), v, n, cols, row);
      } else {
        k.sparse.scatter_row(to.width, static_cast<const std::uint16_t*>(s.positions) + first, v, n, cols, row);
      }
    }
  });
}

}  // namespace

void bind_sparse(py::module_& m) {
  m.def("check_sparse", &check_sparse, py::arg("layout"), py::arg("positions"), py::arg("row_offsets"), py::arg("cols"),
        py::arg("entries"));
  m.def("nonzero_mask", &nonzero_mask, py::arg("x"), py::arg("mask"), py::arg("counts"));
  m.def("compress", &compress, py::arg("x"), py::arg("mask"), py::arg("row_offsets"), py::arg("values"));
  m.def("mask_columns", &mask_columns, py::arg("mask"), py::arg("row_offsets"), py::arg("cols"), py::arg("columns"));
  m.def("count_gaps", &count_gaps, py::arg("columns"), py::arg("row_offsets"), py::arg("cols"), py::arg("counts"));
  m.def("column_gaps", &column_gaps, py::arg("columns"), py::arg("row_offsets"), py::arg("cols"), py::arg("values"),
        py::arg("gap_offsets"), py::arg("gaps"), py::arg("gap_values"));
  m.def("gap_columns", &gap_columns, py::arg("gaps"), py::arg("row_offsets"), py::arg("cols"), py::arg("columns"));
  m.def("expand", &expand, py::arg("layout"), py::arg("positions"), py::arg("row_offsets"), py::arg("values"),
        py::arg("out"));
}

}  // namespace fastopt
