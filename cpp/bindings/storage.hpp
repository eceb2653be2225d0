// The arrays of a packed weight, checked and put into the structs of the contract.
#pragma once

#include <algorithm>
#include <functional>
#include <iterator>
#include <new>
#include <string>

#include "bindings/arrays.hpp"
#include "kernels/contract.hpp"
#include "parallel.hpp"

namespace fastopt {

// Uninitialized memory for one call. It is aligned to a cache line: a vector that crosses two takes twice as long.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes)
      : data_(bytes ? static_cast<std::uint8_t*>(::operator new(bytes, kAlignment)) : nullptr) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::uint8_t* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  std::uint8_t* data_;
};

// The size of a float32 matrix, in the type that parallel_for takes.
inline double matrix_bytes(std::size_t rows, std::size_t cols) {
  return 4.0 * static_cast<double>(rows) * static_cast<double>(cols);
}

inline void require_2d(py::handle object, const Label& label) {
  const int nd = array_of(object, label)->nd;
  if (nd != 2) fail_value(label, "expected 2 dimensions, got " + std::to_string(nd));
}

inline std::size_t dimension(py::handle object, int axis) {
  return static_cast<std::size_t>(py::detail::array_proxy(object.ptr())->dimensions[axis]);
}

inline void require_shape(py::handle object, std::size_t rows, std::size_t cols, const Label& label) {
  require_2d(object, label);
  if (dimension(object, 0) != rows || dimension(object, 1) != cols) {
    fail_value(label, "expected shape (" + std::to_string(rows) + ", " + std::to_string(cols) + "), got " +
                          std::string(py::str(object.attr("shape"))));
  }
}

inline void require_bits(int bits) {
  if (std::find(std::begin(kCodeBits), std::end(kCodeBits), bits) != std::end(kCodeBits)) return;
  int widths[std::size(kCodeBits)];
  std::copy(std::begin(kCodeBits), std::end(kCodeBits), widths);
  std::sort(std::begin(widths), std::end(widths), std::greater<>());
  std::string expected;
  std::size_t left = std::size(widths);
  for (const int width : widths) {
    expected += std::to_string(width);
    if (--left > 0) expected += left > 1 ? ", " : " or ";
  }
  throw py::value_error("bits: expected " + expected + ", got " + std::to_string(bits));
}

// A Quantized for Byte = const uint8_t, a QuantizedOut for uint8_t. `group_size` 0 means one scale and minimum for the
// whole matrix.
template <class Byte>
auto quantized_of(py::handle codes, py::handle scale, py::handle minimum, int bits, std::size_t cols,
                  std::size_t group_size) {
  constexpr bool reads = std::is_const_v<Byte>;
  using Single = std::conditional_t<reads, const float, float>;
  using Half = std::conditional_t<reads, const std::uint16_t, std::uint16_t>;
  require_bits(bits);
  require_2d(codes, {"codes"});
  std::conditional_t<reads, Quantized, QuantizedOut> q{};
  q.bits = bits;
  q.rows = dimension(codes, 0);
  q.cols = cols;
  q.row_bytes = packed_bytes(cols, bits);
  q.codes = view<Byte>(codes, {"codes"}).data;
  require_shape(codes, q.rows, q.row_bytes, {"codes"});

  const bool whole = group_size == 0;
  q.group = whole ? std::max<std::size_t>(cols, 1) : group_size;
  q.groups = whole ? std::min<std::size_t>(cols, 1) : ceil_div(cols, group_size);
  q.param_stride = whole ? 0 : q.groups;
  q.half = has_dtype(array_of(scale, {"scale"}), float16());
  if (q.half) {
    q.scale = view_half<Half>(scale, {"scale"}).data;
    q.minimum = view_half<Half>(minimum, {"minimum"}).data;
  } else {
    q.scale = view<Single>(scale, {"scale"}).data;
    q.minimum = view<Single>(minimum, {"minimum"}).data;
  }
  require_shape(scale, whole ? 1 : q.rows, whole ? 1 : q.groups, {"scale"});
  require_shape(minimum, whole ? 1 : q.rows, whole ? 1 : q.groups, {"minimum"});
  return q;
}

template <class Arrays>
std::size_t param_bytes(const Arrays& q) {
  return (q.param_stride == 0 ? 1 : q.rows * q.groups) * (q.half ? 2 : 4);
}

inline void reads_weight(Disjoint& memory, const Quantized& q) {
  memory.reads(q.codes, q.rows * q.row_bytes, {"codes"});
  memory.reads(q.scale, param_bytes(q), {"scale"});
  memory.reads(q.minimum, param_bytes(q), {"minimum"});
}

// The elements of an array of any float type, seen as integers of the same width.
struct Elements {
  char* data;
  std::size_t size;
  int width;
};

inline Elements elements(py::handle object, Access access, const Label& label) {
  const auto* array = array_of(object, label);
  const int width = static_cast<int>(py::handle(array->descr).attr("itemsize").cast<int>());
  if (width != 2 && width != 4 && width != 8) fail_type(label, "expected a float type, got " + dtype_name(array));
  check_layout(object, array, access, label);
  return {array->data, size_of(array), width};
}

inline Layout layout_of(const std::string& name) {
  if (name == "mask") return Layout::mask;
  if (name == "block") return Layout::block;
  if (name == "index16") return Layout::index16;
  if (name == "index8") return Layout::index8;
  throw py::value_error("layout: expected 'mask', 'block', 'index16' or 'index8', got '" + name + "'");
}

inline bool is_mask(Layout layout) { return layout == Layout::mask || layout == Layout::block; }

// Positions and row offsets for `entries` entries. Offsets must rise from 0 to `entries`: the kernels do not check
// them.
inline Sparse sparse_of(const std::string& layout, py::handle positions, py::handle row_offsets, std::size_t cols,
                        std::size_t entries) {
  Sparse s{};
  s.layout = layout_of(layout);
  s.cols = cols;
  const View<const std::int64_t> offsets = view<const std::int64_t>(row_offsets, {"row_offsets"});
  if (is_mask(s.layout)) {
    require_2d(positions, {"positions"});
    s.rows = dimension(positions, 0);
    s.row_bytes = ceil_div(s.layout == Layout::mask ? cols : ceil_div(cols, kBlockLength), 8);
    s.positions = view<const std::uint8_t>(positions, {"positions"}).data;
    require_shape(positions, s.rows, s.row_bytes, {"positions"});
    require_size(offsets.size, s.rows + 1, {"row_offsets"});
  } else {
    if (cols > kIndexColumns) {
      throw py::value_error("layout: " + layout + " has up to 65536 columns, got " + std::to_string(cols));
    }
    if (offsets.size == 0) fail_value({"row_offsets"}, "expected at least one");
    s.rows = offsets.size - 1;
    if (s.layout == Layout::index16) {
      const View<const std::uint16_t> columns = view<const std::uint16_t>(positions, {"positions"});
      require_size(columns.size, entries, {"positions"});
      s.positions = columns.data;
    } else {
      const View<const std::uint8_t> gaps = view<const std::uint8_t>(positions, {"positions"});
      require_size(gaps.size, entries, {"positions"});
      s.positions = gaps.data;
    }
  }
  bool rising = offsets.data[0] == 0 && offsets.data[s.rows] == static_cast<std::int64_t>(entries);
  for (std::size_t r = 0; r < s.rows; ++r) rising &= offsets.data[r] <= offsets.data[r + 1];
  if (!rising) fail_value({"row_offsets"}, "must rise from 0 to the number of entries, " + std::to_string(entries));
  s.row_offsets = offsets.data;
  return s;
}

inline std::size_t row_begin(const Sparse& s, std::size_t row) { return static_cast<std::size_t>(s.row_offsets[row]); }

}  // namespace fastopt
