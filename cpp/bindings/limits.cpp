// Loops that measure the limit of the memory, for bench/.
#include <pybind11/pybind11.h>

#include <atomic>
#include <vector>

#include "bindings/arrays.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kLimitChunk = 4096;

float limit_read(const py::array& x) {
  const View<const float> v = view<const float>(x, {"x"});
  const Kernels& k = kernels();
  std::atomic<float> sink{0};
  const py::gil_scoped_release released;
  parallel_chunks(v.size, kLimitChunk, 4.0 * static_cast<double>(v.size),
                  [&](std::size_t begin, std::size_t end) { sink.store(k.limits.read(v.data + begin, end - begin)); });
  return sink.load();
}

void limit_write(const py::array& x) {
  const View<float> v = view<float>(x, {"x"});
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_chunks(v.size, kLimitChunk, 4.0 * static_cast<double>(v.size),
                  [&](std::size_t begin, std::size_t end) { k.limits.write(v.data + begin, end - begin); });
}

void limit_update(const py::list& streams, std::size_t writes) {
  std::vector<float*> data;
  std::size_t size = 0;
  for (const py::handle stream : streams) {
    const View<float> v = view<float>(stream, {"streams"});
    if (!data.empty()) require_size(v.size, size, {"streams"});
    size = v.size;
    data.push_back(v.data);
  }
  if (data.empty() || data.size() > 4 || writes != std::max<std::size_t>(1, data.size() - 1)) {
    throw py::value_error("writes: expected one less than the 1 to 4 streams, at least 1, got " +
                          std::to_string(writes));
  }
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_chunks(
      size, kLimitChunk, 4.0 * static_cast<double>(size * data.size()),
      [&](std::size_t begin, std::size_t end) { k.limits.update(data.data(), data.size(), writes, begin, end); });
}

}  // namespace

void bind_limits(py::module_& m) {
  m.def("limit_read", &limit_read, py::arg("x"));
  m.def("limit_write", &limit_write, py::arg("x"));
  m.def("limit_update", &limit_update, py::arg("streams"), py::arg("writes"));
}

}  // namespace fastopt
