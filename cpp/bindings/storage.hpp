// The arrays of a packed weight, checked and put into the structs of the contract.
#pragma once

#include <new>

#include "bindings/arrays.hpp"
#include "kernels/contract.hpp"

namespace fastopt {

inline std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

// Memory for a call, not initialized, aligned to a cache line: a vector that crosses two takes twice as long.
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
  if (bits != 8 && bits != 4 && bits != 2) {
    throw py::value_error("bits: expected 8, 4 or 2, got " + std::to_string(bits));
  }
}

// `group_size` 0 means one scale and minimum for all. Pass const uint8_t to read codes, uint8_t to write them.
template <class Byte>
Quantized quantized_of(py::handle codes, py::handle scale, py::handle minimum, int bits, std::size_t cols,
                       std::size_t group_size) {
  constexpr bool reads = std::is_const_v<Byte>;
  using Single = std::conditional_t<reads, const float, float>;
  using Half = std::conditional_t<reads, const std::uint16_t, std::uint16_t>;
  require_bits(bits);
  require_2d(codes, {"codes"});
  Quantized q{};
  q.bits = bits;
  q.rows = dimension(codes, 0);
  q.cols = cols;
  q.row_bytes = ceil_div(cols, static_cast<std::size_t>(8 / bits));
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

inline std::size_t param_bytes(const Quantized& q) {
  return (q.param_stride == 0 ? 1 : q.rows * q.groups) * (q.half ? 2 : 4);
}

inline void reads_weight(Disjoint& memory, const Quantized& q) {
  memory.reads(q.codes, q.rows * q.row_bytes, {"codes"});
  memory.reads(q.scale, param_bytes(q), {"scale"});
  memory.reads(q.minimum, param_bytes(q), {"minimum"});
}

// What a product reads and writes beside the weight: x [batch, cols], bias [rows] or None, out [batch, rows].
struct LinearOperands {
  const float* x;
  const float* bias;
  float* y;
  std::size_t batch;
};

inline LinearOperands linear_operands(py::handle x, py::handle bias, py::handle out, std::size_t rows) {
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

}  // namespace fastopt
