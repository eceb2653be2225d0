// Checked views of NumPy arrays. Every array that Python passes is checked here, once; kernels then rely on its dtype,
// byte order, contiguity, alignment, writability and size, and on memory that does not overlap.
//
// TypeError: not an array, or the wrong dtype. ValueError: the wrong layout or size, overlap, or read-only memory.
// These functions never copy an array to make it fit, because the kernels change the caller's own memory.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/contract.hpp"

namespace fastopt {

namespace py = pybind11;

// The name of an array in a message: "codes", or "gradient of 'fc1.weight'". The text is built only for an error.
struct Label {
  const char* what;
  py::handle of = {};

  std::string text() const {
    return of ? std::string(what) + " '" + std::string(py::str(of)) + "'" : std::string(what);
  }
};

[[noreturn]] inline void fail_type(const Label& label, const std::string& message) {
  throw py::type_error(label.text() + ": " + message);
}

[[noreturn]] inline void fail_value(const Label& label, const std::string& message) {
  throw py::value_error(label.text() + ": " + message);
}

// A view that owns nothing: the caller's reference to the array keeps the memory alive.
template <class T>
struct View {
  T* data = nullptr;
  std::size_t size = 0;
};

inline const py::detail::PyArray_Proxy* array_of(py::handle object, const Label& label) {
  if (!py::isinstance<py::array>(object)) {
    fail_type(label,
              "expected a NumPy array, got " + std::string(py::str(py::type::handle_of(object).attr("__name__"))));
  }
  return py::detail::array_proxy(object.ptr());
}

inline std::size_t size_of(const py::detail::PyArray_Proxy* array) {
  std::size_t size = 1;
  for (int i = 0; i < array->nd; ++i) size *= static_cast<std::size_t>(array->dimensions[i]);
  return size;
}

inline const py::dtype& float16() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::dtype> storage;
  return storage.call_once_and_store_result([] { return py::dtype("e"); }).get_stored();
}

// A dtype of ml_dtypes, which every import of fastopt loads.
inline const py::dtype& bfloat16() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::dtype> storage;
  return storage
      .call_once_and_store_result(
          [] { return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")); })
      .get_stored();
}

// NumPy is asked last: it takes longer than a small kernel.
inline bool has_dtype(const py::detail::PyArray_Proxy* array, py::handle dtype) {
  if (array->descr == dtype.ptr()) return true;
  const auto got = py::reinterpret_borrow<py::dtype>(array->descr), wanted = py::reinterpret_borrow<py::dtype>(dtype);
  return got.kind() == wanted.kind() && got.itemsize() == wanted.itemsize() &&
         py::detail::npy_api::get().PyArray_EquivTypes_(got.ptr(), wanted.ptr());
}

inline std::string dtype_name(const py::detail::PyArray_Proxy* array) {
  const py::handle dtype(array->descr);
  const bool swapped = !dtype.attr("isnative").cast<bool>();
  return std::string(py::str(dtype.attr("name"))) + (swapped ? " in the other byte order" : "");
}

// Returns the float type of an array, if it has one.
inline std::optional<Float> float_type(const py::detail::PyArray_Proxy* array) {
  if (has_dtype(array, py::dtype::of<float>())) return Float::f32;
  if (has_dtype(array, py::dtype::of<double>())) return Float::f64;
  if (has_dtype(array, float16())) return Float::f16;
  if (has_dtype(array, bfloat16())) return Float::bf16;
  return std::nullopt;
}

inline Float float_of(const py::detail::PyArray_Proxy* array, const Label& label) {
  if (const std::optional<Float> type = float_type(array)) return *type;
  fail_type(label, "expected float32, float64, float16 or bfloat16, got " + dtype_name(array));
}

// The memory from the lowest to the highest element of an array with any strides.
struct Extent {
  const char* begin;
  std::size_t bytes;
};

inline Extent extent_of(const py::detail::PyArray_Proxy* array) {
  if (size_of(array) == 0) return {array->data, 0};
  const char *low = array->data, *high = array->data;
  for (int i = 0; i < array->nd; ++i) {
    const py::ssize_t reach = (array->dimensions[i] - 1) * array->strides[i];
    (reach < 0 ? low : high) += reach;
  }
  const auto item = py::reinterpret_borrow<py::dtype>(array->descr).itemsize();
  return {low, static_cast<std::size_t>(high - low + item)};
}

enum class Access { read, write };

inline void check_layout(py::handle object, const py::detail::PyArray_Proxy* array, Access access, const Label& label) {
  using Api = py::detail::npy_api;
  if (!(array->flags & Api::NPY_ARRAY_C_CONTIGUOUS_)) {
    fail_value(label, "must be C-contiguous; got shape " + std::string(py::str(object.attr("shape"))) +
                          " with strides " + std::string(py::str(object.attr("strides"))));
  }
  if (!(array->flags & Api::NPY_ARRAY_ALIGNED_)) fail_value(label, "must be aligned to its dtype");
  if (access == Access::write && !(array->flags & Api::NPY_ARRAY_WRITEABLE_)) {
    fail_value(label, "is read-only, but is to be changed in place");
  }
}

// A view of T, for writing unless T is const.
template <class T>
View<T> view(py::handle object, const Label& label) {
  const auto* array = array_of(object, label);
  const py::dtype dtype = py::dtype::of<std::remove_const_t<T>>();
  if (!has_dtype(array, dtype)) {
    fail_type(label, "expected " + std::string(py::str(dtype.attr("name"))) + ", got " + dtype_name(array));
  }
  check_layout(object, array, std::is_const_v<T> ? Access::read : Access::write, label);
  return {reinterpret_cast<T*>(array->data), size_of(array)};
}

// As view(), for float16, which C++ has no type for.
template <class T>
View<T> view_half(py::handle object, const Label& label) {
  static_assert(sizeof(T) == 2);
  const auto* array = array_of(object, label);
  if (!has_dtype(array, float16())) fail_type(label, "expected float16, got " + dtype_name(array));
  check_layout(object, array, std::is_const_v<T> ? Access::read : Access::write, label);
  return {reinterpret_cast<T*>(array->data), size_of(array)};
}

inline void require_size(std::size_t got, std::size_t needed, const Label& label) {
  if (got != needed) {
    fail_value(label, "expected " + std::to_string(needed) + " elements, got " + std::to_string(got));
  }
}

inline void require_same_shape(py::handle object, py::handle model, const Label& label) {
  const auto* a = py::detail::array_proxy(object.ptr());
  const auto* b = py::detail::array_proxy(model.ptr());
  if (a->nd != b->nd || !std::equal(a->dimensions, a->dimensions + a->nd, b->dimensions)) {
    fail_value(label, "expected shape " + std::string(py::str(model.attr("shape"))) + ", got " +
                          std::string(py::str(object.attr("shape"))));
  }
}

// Collects the memory that a call reads and writes. `check` fails if memory that is written is used twice.
class Disjoint {
 public:
  void reserve(std::size_t spans) { spans_.reserve(spans); }
  void reads(const void* data, std::size_t bytes, const Label& label) { add(data, bytes, false, label); }
  void writes(const void* data, std::size_t bytes, const Label& label) { add(data, bytes, true, label); }

  void check() {
    if (spans_.size() == 2) {  // the common call: no need to sort
      if (spans_[1].begin < spans_[0].begin) std::swap(spans_[0], spans_[1]);
    } else {
      std::sort(spans_.begin(), spans_.end(),
                [](const Span& a, const Span& b) { return std::less<>()(a.begin, b.begin); });
    }
    const Span* last = nullptr;          // of the spans before, the one that ends last
    const Span* last_written = nullptr;  // the same of those that are written
    for (const Span& span : spans_) {
      const Span* other = span.written ? last : last_written;
      if (other && std::less<>()(span.begin, other->end)) {
        fail_value(span.label, "shares memory with " + other->label.text());
      }
      if (!last || last->end < span.end) last = &span;
      if (span.written && (!last_written || last_written->end < span.end)) last_written = &span;
    }
  }

 private:
  struct Span {
    const char* begin;
    const char* end;
    bool written;
    Label label;
  };

  void add(const void* data, std::size_t bytes, bool written, const Label& label) {
    if (bytes > 0) {
      spans_.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes, written, label});
    }
  }

  std::vector<Span> spans_;
};

}  // namespace fastopt
