// Magnitude pruning: the exact k-th magnitude by counting, then one pass that writes zeros.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kChunk = 1 << 16;  // elements

struct Weights {
  char* data;
  std::size_t size;
  Float type;
  int width;  // bits
};

Weights weights(py::handle object, Access access, const Label& label) {
  const auto* array = array_of(object, label);
  Weights w{array->data, size_of(array), Float::f32, 32};
  if (has_dtype(array, py::dtype::of<float>())) {
  } else if (has_dtype(array, py::dtype::of<double>())) {
    w.type = Float::f64, w.width = 64;
  } else if (has_dtype(array, float16())) {
    w.type = Float::f16, w.width = 16;
  } else if (has_dtype(array, bfloat16())) {
    w.type = Float::bf16, w.width = 16;
  } else {
    fail_type(label, "expected float32, float64, float16 or bfloat16, got " + dtype_name(array));
  }
  check_layout(object, array, access, label);
  return w;
}

// Whether arrays can be changed in place, together; asked before the first of them is.
void check_weights(const py::list& names, const py::list& arrays) {
  Disjoint memory;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const Label label{"array", names[i]};
    const Weights w = weights(arrays[i], Access::write, label);
    memory.writes(w.data, w.size * static_cast<std::size_t>(w.width) / 8, label);
  }
  memory.check();
}

double bytes_of(const Weights& w) { return static_cast<double>(w.size) * w.width / 8; }

// The k-th smallest magnitude (k from 1) over all arrays, found digit by digit, 16 bits at a time. Returns its
// bits, how many magnitudes are smaller, and how many are equal to it.
py::tuple kth_magnitude(const py::list& arrays, std::uint64_t k) {
  std::vector<Weights> all;
  std::size_t total = 0;
  for (const py::handle object : arrays) {
    all.push_back(weights(object, Access::read, {"w"}));
    if (all.back().type != all.front().type)
      throw py::type_error("w: arrays that are pruned together must have one dtype");
    total += all.back().size;
  }
  if (k < 1 || k > total)
    throw py::value_error("k: expected 1 to " + std::to_string(total) + ", got " + std::to_string(k));
  const Kernels& table = kernels();
  std::uint64_t prefix = 0, below = 0, ties = 0;
  {
    const py::gil_scoped_release released;
    const std::size_t slices = static_cast<std::size_t>(num_threads());
    std::vector<std::uint64_t> bins(slices * kHistogramBins);
    for (int shift = all.front().width - 16; shift >= 0; shift -= 16) {
      std::fill(bins.begin(), bins.end(), 0);
      for (const Weights& w : all) {
        parallel_for(slices, bytes_of(w), [&](std::size_t begin, std::size_t end) {
          table.magnitude_histogram(w.type, w.data, w.size * begin / slices, w.size * end / slices, prefix, shift,
                                    bins.data() + begin * kHistogramBins);
        });
      }
      for (std::size_t digit = 0;; ++digit) {
        ties = 0;
        for (std::size_t s = 0; s < slices; ++s) ties += bins[s * kHistogramBins + digit];
        if (below + ties >= k) {
          prefix = prefix << 16 | digit;
          break;
        }
        below += ties;
      }
    }
  }
  return py::make_tuple(prefix, below, ties);
}

// Writes +0 where the magnitude is below `key`, or equal to it but for the first `keep_ties`. `kept`, an array of
// bool or None, tells what stayed. Returns how many were equal.
std::size_t prune(const py::array& w, const py::object& kept, std::uint64_t key, std::size_t keep_ties) {
  const Weights to = weights(w, Access::write, {"w"});
  std::uint8_t* flags = nullptr;
  if (!kept.is_none()) {
    const View<bool> v = view<bool>(kept, {"kept"});
    require_size(v.size, to.size, {"kept"});
    flags = reinterpret_cast<std::uint8_t*>(v.data);
  }
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  const std::size_t chunks = ceil_div(to.size, kChunk);
  const auto chunk_end = [&](std::size_t i) { return std::min((i + 1) * kChunk, to.size); };
  std::vector<std::size_t> ties(chunks);
  std::size_t total = 0;
  if (keep_ties > 0) {
    parallel_for(chunks, bytes_of(to), [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) ties[i] = k.count_ties(to.type, to.data, i * kChunk, chunk_end(i), key);
    });
    for (std::size_t& count : ties) {  // from how many there are to how many stay
      total += count;
      count = std::min(count, keep_ties);
      keep_ties -= count;
    }
  }
  parallel_for(chunks, bytes_of(to), [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      k.prune(to.type, {to.data, flags, key, ties[i]}, i * kChunk, chunk_end(i));
    }
  });
  return total;
}

}  // namespace

void bind_prune(py::module_& m) {
  m.def("check_weights", &check_weights, py::arg("names"), py::arg("arrays"));
  m.def("kth_magnitude", &kth_magnitude, py::arg("arrays"), py::arg("k"));
  m.def("prune", &prune, py::arg("w"), py::arg("kept"), py::arg("key"), py::arg("keep_ties"));
}

}  // namespace fastopt
