// The arrays of a packed weight, checked and put into the structs of the contract.
#pragma once

#include <algorithm>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "bindings/arrays.hpp"
#include "kernels/contract.hpp"
#include "parallel.hpp"

namespace fastopt {

// Uninitialized memory for one call. It is aligned to a cache line: a vector that crosses two takes twice as long. A
// thread keeps one block for its next call, since pages that are new to a process can take longer than the call itself.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : block_(std::exchange(kept(), Block{})) {
    if (block_.bytes >= bytes) return;
    block_ = {};  // before there is another
    block_.data.reset(static_cast<std::uint8_t*>(::operator new(bytes, kAlignment)));
    block_.bytes = bytes;
  }
  ~Scratch() {
    if (block_.bytes <= kMostKept && block_.bytes > kept().bytes) kept() = std::move(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::uint8_t* data() const { return block_.data.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kMostKept = 0;  // the sanitizer sees accesses behind a block, not inside a larger one
#else
  static constexpr std::size_t kMostKept = std::size_t{1} << 24;
#endif
  struct Delete {
    void operator()(std::uint8_t* data) const { ::operator delete(data, kAlignment); }
  };
  struct Block {
    std::size_t bytes = 0;
    std::unique_ptr<std::uint8_t[], Delete> data;
  };
  static Block& kept() {
    thread_local Block block;
    return block;
  }
  Block block_;
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

// A Quantized for Byte = const uint8_t, a QuantizedOut for uint8_t, without parameters. `group_size` 0 means one scale
// and minimum for the whole matrix.
template <class Byte>
auto codes_of(py::handle codes, int bits, std::size_t cols, std::size_t group_size) {
  require_bits(bits);
  require_2d(codes, {"codes"});
  std::conditional_t<std::is_const_v<Byte>, Quantized, QuantizedOut> q{};
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
  return q;
}

// The same with scales and minima of each group.
template <class Byte>
auto quantized_of(py::handle codes, py::handle scale, py::handle minimum, int bits, std::size_t cols,
                  std::size_t group_size) {
  constexpr bool reads = std::is_const_v<Byte>;
  using Single = std::conditional_t<reads, const float, float>;
  using Half = std::conditional_t<reads, const std::uint16_t, std::uint16_t>;
  auto q = codes_of<Byte>(codes, bits, cols, group_size);
  const bool whole = group_size == 0;
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

// The arrays of parameters in two levels for `groups` groups of `columns` columns in each of `rows` rows.
// `param_group` is the number of columns that share floats, or 0 for a row.
template <class Byte>
auto two_level_of(py::handle scale, py::handle minimum, py::handle floats, int param_bits, std::size_t param_group,
                  std::size_t rows, std::size_t groups, std::size_t columns) {
  constexpr bool reads = std::is_const_v<Byte>;
  using Single = std::conditional_t<reads, const float, float>;
  using Half = std::conditional_t<reads, const std::uint16_t, std::uint16_t>;
  require_bits(param_bits);
  if (param_group % columns != 0) {
    throw py::value_error("param_group: expected a multiple of the group size, " + std::to_string(columns) + ", got " +
                          std::to_string(param_group));
  }
  std::conditional_t<reads, TwoLevel, TwoLevelOut> t{};
  t.bits = param_bits;
  t.part = param_group == 0 ? std::max<std::size_t>(groups, 1) : param_group / columns;
  t.parts = ceil_div(groups, t.part);
  t.row_bytes = packed_bytes(groups, param_bits);
  t.scale = view<Byte>(scale, {"scale"}).data;
  t.minimum = view<Byte>(minimum, {"minimum"}).data;
  require_shape(scale, rows, t.row_bytes, {"scale"});
  require_shape(minimum, rows, t.row_bytes, {"minimum"});
  t.half = has_dtype(array_of(floats, {"param_floats"}), float16());
  if (t.half) {
    t.floats = view_half<Half>(floats, {"param_floats"}).data;
  } else {
    t.floats = view<Single>(floats, {"param_floats"}).data;
  }
  require_2d(floats, {"param_floats"});
  t.count = t.parts == 0 ? 2 : dimension(floats, 1) / t.parts;
  if (t.count != 2) t.count = 3;
  require_shape(floats, rows, t.parts * t.count, {"param_floats"});
  return t;
}

// The same from a tuple: codes of scale, floats, bits and columns that share floats.
template <class Byte, class Weight>
auto two_level_of(const py::tuple& scale, py::handle minimum, const Weight& q) {
  if (scale.size() != 4) throw py::value_error("scale: expected 4 parts, got " + std::to_string(scale.size()));
  return two_level_of<Byte>(scale[0], minimum, scale[1], scale[2].cast<int>(), scale[3].cast<std::size_t>(), q.rows,
                            q.groups, q.group);
}

// A weight that is read, with parameters of either kind. Kernels take floats: those of two levels are decoded into
// memory of the call, some rows at a time.
class StoredWeight {
 public:
  // `scale` is an array or, for two levels, a tuple as in two_level_of().
  StoredWeight(const py::array& codes, const py::object& scale, const py::array& minimum, int bits, std::size_t cols,
               std::size_t group_size)
      : two_level_(py::isinstance<py::tuple>(scale)) {
    if (!two_level_) {
      q_ = quantized_of<const std::uint8_t>(codes, scale, minimum, bits, cols, group_size);
      return;
    }
    q_ = codes_of<const std::uint8_t>(codes, bits, cols, group_size);
    if (group_size == 0)
      throw py::value_error("group_size: expected a number of columns with parameters in two levels");
    t_ = two_level_of<const std::uint8_t>(scale.cast<py::tuple>(), minimum, q_);
  }

  // Without parameters, where these are in two levels.
  const Quantized& quantized() const { return q_; }

  void reads(Disjoint& memory) const {
    memory.reads(q_.codes, q_.rows * q_.row_bytes, {"codes"});
    if (two_level_) {
      memory.reads(t_.scale, q_.rows * t_.row_bytes, {"scale"});
      memory.reads(t_.minimum, q_.rows * t_.row_bytes, {"minimum"});
      memory.reads(t_.floats, q_.rows * t_.parts * t_.count * (t_.half ? 2 : 4), {"param_floats"});
    } else {
      memory.reads(q_.scale, param_bytes(q_), {"scale"});
      memory.reads(q_.minimum, param_bytes(q_), {"minimum"});
    }
  }

  // Calls call(w, first, last) for rows [begin, end), `at_once` of them at a time where parameters are decoded.
  template <class Call>
  void for_rows(const Kernels& k, std::size_t begin, std::size_t end, std::size_t at_once, const Call& call) const {
    if (!two_level_) {
      call(q_, begin, end);
      return;
    }
    const std::size_t most = std::min(at_once, end - begin), size = most * q_.groups + kBeyondParams;
    const Scratch memory(2 * size * sizeof(float));
    float* const scale = reinterpret_cast<float*>(memory.data());
    // Where no row ends within a byte or a part, all rows are as one.
    const bool one_stream = q_.groups % 8 == 0 && q_.groups % t_.part == 0;
    for (std::size_t row = begin; row < end; row += at_once) {
      const std::size_t stop = std::min(end, row + at_once);
      if (one_stream) {
        k.two_level.decode(t_, 0, row * q_.groups, stop * q_.groups, scale, scale + size);
      } else {
        for (std::size_t r = row; r < stop; ++r) {
          float* const to = scale + (r - row) * q_.groups;
          k.two_level.decode(t_, r, 0, q_.groups, to, to + size);
        }
      }
      call(with_params(scale, scale + size, row), row, stop);
    }
  }

  // Calls call(w) for a weight of one row, whose parameters the threads decode together.
  template <class Call>
  void for_one_row(const Kernels& k, const Call& call) const {
    if (!two_level_) {
      call(q_);
      return;
    }
    const std::size_t at_once = 4096, size = q_.groups + kBeyondParams;
    const Scratch memory(2 * size * sizeof(float));
    float* const scale = reinterpret_cast<float*>(memory.data());
    const std::size_t pieces = ceil_div(q_.groups, at_once);
    parallel_for(pieces, matrix_bytes(2, q_.groups), [&](std::size_t begin, std::size_t end) {
      // Numbers behind the last one would be those of another thread: the last few are decoded apart.
      float last[2][3 * kBeyondParams];
      const std::size_t first = begin * at_once, stop = std::min(end * at_once, q_.groups);
      const std::size_t apart = stop - std::min(stop - first, (stop - first) % kBeyondParams + kBeyondParams);
      k.two_level.decode(t_, 0, apart, stop, last[0], last[1]);
      if (apart > first) k.two_level.decode(t_, 0, first, apart, scale + first, scale + size + first);
      std::copy_n(last[0], stop - apart, scale + apart);
      std::copy_n(last[1], stop - apart, scale + size + apart);
    });
    call(with_params(scale, scale + size, 0));
  }

 private:
  static constexpr std::size_t kBeyondParams = 16;  // numbers that `decode` may write too many, and one more

  // The weight with parameters that begin with those of row `first`. Kernels count from row 0: the pointers are
  // moved back as integers, for there is no array before these parameters.
  Quantized with_params(const float* scale, const float* minimum, std::size_t first) const {
    const auto back = [&](const float* params) {
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(params) -
                                           first * q_.groups * sizeof(float));
    };
    Quantized q = q_;
    q.scale = back(scale);
    q.minimum = back(minimum);
    return q;
  }

  Quantized q_{};
  TwoLevel t_{};
  bool two_level_;
};

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
