// One call steps every tensor of an optimizer in one parallel region.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bindings/arrays.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kChunk = 4096;  // elements; what a thread takes at a time

struct Tensor {
  StepKernel kernel;
  Hyper hyper;
  StepArgs args;
  std::size_t size;
  std::size_t first_chunk;
};

const Rule& find_rule(const std::string& name) {
  const Kernels& table = kernels();
  for (std::size_t i = 0; i < table.rule_count; ++i) {
    if (name == table.rules[i].name) return table.rules[i];
  }
  throw py::value_error("rule: no optimizer is called '" + name + "'");
}

Hyper hyper_of(const py::tuple& t) {
  if (t.size() != 12) throw py::value_error("hyper: expected 12 numbers, got " + std::to_string(t.size()));
  const auto number = [&](std::size_t i) { return t[i].cast<double>(); };
  return {number(0), number(1), number(2), number(3), number(4),  number(5),
          number(6), number(7), number(8), number(9), number(10), t[11].cast<bool>()};
}

// Adds the tensors of one job: (rule, hyper, names, params, grads, states), where states is one tuple a tensor.
void add_job(const py::tuple& job, std::vector<Tensor>& tensors, Disjoint& memory) {
  const Rule& rule = find_rule(job[0].cast<std::string>());
  const Hyper hyper = hyper_of(job[1].cast<py::tuple>());
  const auto names = job[2].cast<py::list>(), params = job[3].cast<py::list>(), grads = job[4].cast<py::list>(),
             states = job[5].cast<py::list>();
  const std::size_t count = params.size();
  if (names.size() != count || grads.size() != count || states.size() != count) {
    throw py::value_error("job: names, params, grads and states differ in number");
  }
  for (std::size_t i = 0; i < count; ++i) {
    // Borrowed: the lists of the job hold the references for as long as the call lasts.
    const py::handle param = PyList_GET_ITEM(params.ptr(), static_cast<py::ssize_t>(i));
    const py::handle grad = PyList_GET_ITEM(grads.ptr(), static_cast<py::ssize_t>(i));
    const py::handle name = PyList_GET_ITEM(names.ptr(), static_cast<py::ssize_t>(i));
    const auto state = py::reinterpret_borrow<py::tuple>(PyList_GET_ITEM(states.ptr(), static_cast<py::ssize_t>(i)));
    const Label label{"parameter", name}, grad_label{"gradient of", name}, state_label{"state of", name};
    Tensor tensor{};
    tensor.hyper = hyper;

    const auto add = [&](auto type, StepKernel kernel) {
      using T = decltype(type);
      const View<T> w = view<T>(param, label);
      const View<const T> g = view<const T>(grad, grad_label);
      require_same_shape(grad, param, grad_label);
      const std::size_t bytes = w.size * sizeof(T);
      memory.writes(w.data, bytes, label);
      memory.reads(g.data, bytes, grad_label);
      tensor.kernel = kernel;
      tensor.size = w.size;
      tensor.args.param = w.data;
      tensor.args.grad = g.data;
      require_size(state.size(), rule.states, state_label);
      for (std::size_t s = 0; s < rule.states; ++s) {
        const py::handle object = PyTuple_GET_ITEM(state.ptr(), static_cast<py::ssize_t>(s));
        const View<T> v = view<T>(object, state_label);
        require_size(v.size, w.size, state_label);
        memory.writes(v.data, bytes, state_label);
        tensor.args.state[s] = v.data;
      }
    };
    const auto* array = array_of(param, label);
    if (has_dtype(array, py::dtype::of<float>())) {
      add(float{}, rule.f32);
    } else if (has_dtype(array, py::dtype::of<double>())) {
      add(double{}, rule.f64);
    } else {
      fail_type(label, "expected float32 or float64, got " + dtype_name(array));
    }
    tensors.push_back(tensor);
  }
}

// Everything is checked before anything is written: a call that raises has changed nothing.
void step(const py::list& jobs) {
  std::vector<Tensor> tensors;
  Disjoint memory;
  for (const py::handle job : jobs) add_job(job.cast<py::tuple>(), tensors, memory);
  memory.check();

  std::size_t chunks = 0;
  double bytes = 0;
  for (Tensor& t : tensors) {
    t.first_chunk = chunks;
    chunks += (t.size + kChunk - 1) / kChunk;
    bytes += 16.0 * static_cast<double>(t.size);
  }
  const py::gil_scoped_release released;
  parallel_for(chunks, bytes, [&](std::size_t begin, std::size_t end) {
    auto t = std::upper_bound(tensors.begin(), tensors.end(), begin,
                              [](std::size_t chunk, const Tensor& tensor) { return chunk < tensor.first_chunk; }) -
             1;
    for (; t != tensors.end() && t->first_chunk < end; ++t) {
      const std::size_t from = begin > t->first_chunk ? (begin - t->first_chunk) * kChunk : 0;
      const std::size_t to = std::min(t->size, (end - t->first_chunk) * kChunk);
      if (from < to) t->kernel(t->hyper, t->args, from, to);
    }
  });
}

}  // namespace

void bind_optim(py::module_& m) { m.def("step", &step, py::arg("jobs")); }

}  // namespace fastopt
