// The step of an optimizer: one call steps all tensors in one parallel region.
#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kStepChunk = 4096;  // elements; whole state blocks
static_assert(kStepChunk % kStateBlock == 0);

struct Tensor {
  StepKernel kernel;
  const Hyper* hyper;
  StepArgs args;
  std::size_t size;
  std::size_t first_chunk;
};

// Chunks are numbered through all tensors. Calls body(tensor, begin, end) for the part of each tensor that lies in
// the chunks [begin, end).
template <class Tensors, class Body>
void for_tensor_chunks(const Tensors& tensors, std::size_t begin, std::size_t end, const Body& body) {
  auto t = std::upper_bound(tensors.begin(), tensors.end(), begin,
                            [](std::size_t chunk, const auto& tensor) { return chunk < tensor.first_chunk; }) -
           1;
  for (; t != tensors.end() && t->first_chunk < end; ++t) {
    const std::size_t from = begin > t->first_chunk ? (begin - t->first_chunk) * kStepChunk : 0;
    const std::size_t to = std::min(t->size, (end - t->first_chunk) * kStepChunk);
    if (from < to) body(*t, from, to);
  }
}

// The number of a rule in the table, which has the same order on every instruction set.
std::size_t rule(const std::string& name) {
  const Kernels& table = kernels();
  for (std::size_t i = 0; i < table.optim.rule_count; ++i) {
    if (name == table.optim.rules[i].name) return i;
  }
  throw py::value_error("rule: no optimizer is called '" + name + "'");
}

const Rule& rule_at(std::size_t number) {
  if (number >= kernels().optim.rule_count) {
    throw py::value_error("rule: no optimizer has number " + std::to_string(number));
  }
  return kernels().optim.rules[number];
}

// A bit for each state of a rule that is never negative.
unsigned positive_states(std::size_t rule) { return rule_at(rule).positive; }

// The numbers that an optimizer computes for a step. Those without a default must be given.
struct HyperField {
  const char* name;
  double Hyper::* member;
  std::optional<double> standard;
};
constexpr HyperField kHyperFields[] = {
    {"step_size", &Hyper::step_size, {}}, {"weight_decay", &Hyper::weight_decay, 0},
    {"decay", &Hyper::decay, 1},          {"decay1", &Hyper::decay1, 0},
    {"blend1", &Hyper::blend1, 1},        {"decay2", &Hyper::decay2, 0},
    {"blend2", &Hyper::blend2, 1},        {"eps", &Hyper::eps, 0},
};

// The fields of a job. Lists are over the tensors of a parameter group; those at `indices` are stepped, or all where
// that is None, and their `counts` are raised by one.
//
// A tensor is given by NumPy arrays, or by addresses (`Memory`) where Python itself has checked its memory: then its
// states are a tuple of their StateType and their addresses, and its count is the address of a float, or 0.
namespace job_field {
enum : std::size_t {
  rule,
  hyper,
  grad_scale,
  shrink,
  keep_zeros,
  stochastic,
  noise,
  names,
  params,
  grads,
  states,
  counts,
  indices,
  end
};
}  // namespace job_field
constexpr const char* kJobFields[] = {"rule",  "hyper",  "grad_scale", "shrink", "keep_zeros", "stochastic", "noise",
                                      "names", "params", "grads",      "states", "counts",     "indices"};
static_assert(std::size(kJobFields) == job_field::end);

py::handle item_of(py::handle tuple, std::size_t i) {
  return PyTuple_GET_ITEM(tuple.ptr(), static_cast<py::ssize_t>(i));
}

py::handle item(py::handle list, std::size_t i) { return PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(i)); }

std::size_t length(py::handle list) { return static_cast<std::size_t>(PyList_GET_SIZE(list.ptr())); }

std::size_t number_of(py::handle object) {
  const std::size_t number = PyLong_AsSize_t(object.ptr());
  if (number == static_cast<std::size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

std::size_t number_at(py::handle tuple, std::size_t i) { return number_of(item_of(tuple, i)); }

bool truth_at(py::handle tuple, std::size_t i) {
  const int truth = PyObject_IsTrue(item_of(tuple, i).ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

double finite(py::handle number, const char* name) {
  const double value = PyFloat_AsDouble(number.ptr());
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  if (!std::isfinite(value)) fail_value({name}, "expected a finite number, got " + std::string(py::str(number)));
  return value;
}

constexpr double kSmallestNormal = std::numeric_limits<float>::min();

Hyper hyper_of(py::handle job, py::handle numbers) {
  constexpr std::size_t count = std::size(kHyperFields);
  if (!PyTuple_Check(numbers.ptr()) || PyTuple_GET_SIZE(numbers.ptr()) != static_cast<py::ssize_t>(count)) {
    throw py::value_error("hyper: expected a tuple of " + std::to_string(count) + " numbers");
  }
  Hyper hyper{};
  for (std::size_t i = 0; i < count; ++i) {
    hyper.*kHyperFields[i].member = finite(item_of(numbers, i), kHyperFields[i].name);
  }
  hyper.grad_scale = finite(item_of(job, job_field::grad_scale), "grad_scale");
  hyper.shrink = finite(item_of(job, job_field::shrink), "shrink");
  hyper.keep_zeros = truth_at(job, job_field::keep_zeros);
  if (hyper.grad_scale != 0 && std::abs(hyper.grad_scale) < kSmallestNormal) {  // float32 would flush it to zero
    hyper.rescale = kSmallestNormal;
    hyper.grad_scale /= kSmallestNormal;
  }
  return hyper;
}

// Fails if float32, in which all but float64 parameters are stepped, cannot hold a number of the step.
void require_floats(const Hyper& hyper) {
  const auto fits = [](double value) { return std::abs(value) <= std::numeric_limits<float>::max(); };
  bool fit = fits(hyper.grad_scale) && fits(hyper.shrink);
  for (const HyperField& field : kHyperFields) fit &= fits(hyper.*field.member);
  if (fit) return;
  const auto require = [&](const char* name, double value) {
    if (fits(value)) return;
    fail_value({name}, "expected a number that float32 can hold, got " + std::string(py::str(py::float_(value))));
  };
  for (const HyperField& field : kHyperFields) require(field.name, hyper.*field.member);
  require("grad_scale", hyper.grad_scale);
  require("shrink", hyper.shrink);
}

// The state arrays of one tensor: the states of the rule, the exponents of 8-bit states, then the master weights if
// any.
void add_states(const Rule& rule, const py::tuple& state, Tensor& tensor, Disjoint& memory, const Label& label) {
  const bool narrow_param = width_of(tensor.args.param_type) == 2;
  const auto add = [&](auto type, py::handle object, std::size_t size) {
    using T = decltype(type);
    const View<T> v = view<T>(object, label);
    require_size(v.size, size, label);
    memory.writes(v.data, size * sizeof(T), label);
    return v.data;
  };
  std::size_t count = rule.states;
  if (rule.states > 0 && state.size() >= rule.states) {
    const auto* first = array_of(item_of(state, 0), label);
    if (has_dtype(first, py::dtype::of<std::uint8_t>())) {
      tensor.args.state_type = StateType::u8;
      count *= 2;
    } else if (has_dtype(first, bfloat16())) {
      tensor.args.state_type = StateType::bf16;
    }
  }
  if (state.size() != count && (!narrow_param || state.size() != count + 1)) {
    fail_value(label, "expected " + std::to_string(count) + " arrays, got " + std::to_string(state.size()));
  }
  if (tensor.args.param_type == Float::f64 && tensor.args.state_type != StateType::wide) {
    fail_type(label, "expected float64, as the parameter");
  }
  for (std::size_t s = 0; s < rule.states; ++s) {
    switch (tensor.args.state_type) {
      case StateType::u8:
        tensor.args.state[s] = add(std::uint8_t{}, item_of(state, s), tensor.size);
        tensor.args.exponent[s] =
            add(std::uint8_t{}, item_of(state, rule.states + s), ceil_div(tensor.size, kStateBlock));
        break;
      case StateType::bf16: {
        const auto* array = array_of(item_of(state, s), label);
        if (!has_dtype(array, bfloat16())) fail_type(label, "expected bfloat16, got " + dtype_name(array));
        check_layout(item_of(state, s), array, Access::write, label);
        require_size(size_of(array), tensor.size, label);
        memory.writes(array->data, 2 * tensor.size, label);
        tensor.args.state[s] = array->data;
        break;
      }
      case StateType::wide:
        tensor.args.state[s] = tensor.args.param_type == Float::f64
                                   ? static_cast<void*>(add(double{}, item_of(state, s), tensor.size))
                                   : static_cast<void*>(add(float{}, item_of(state, s), tensor.size));
        break;
    }
  }
  if (state.size() > count) tensor.args.master = add(float{}, item_of(state, count), tensor.size);
}

// A gradient, or a copy of it in C order that `copies` keeps: gradients are only read.
const py::detail::PyArray_Proxy* readable(py::handle grad, const py::detail::PyArray_Proxy* array,
                                          std::vector<py::object>& copies) {
  using Api = py::detail::npy_api;
  constexpr int needed = Api::NPY_ARRAY_C_CONTIGUOUS_ | Api::NPY_ARRAY_ALIGNED_;
  if ((array->flags & needed) == needed) return array;
  copies.push_back(py::module_::import("numpy").attr("require")(grad, py::none(), "CA"));
  return py::detail::array_proxy(copies.back().ptr());
}

Tensor tensor_of(const Rule& rule, py::handle name, py::handle param, py::handle grad, py::handle state,
                 Disjoint& memory, std::vector<py::object>& copies) {
  const Label label{"parameter", name}, grad_label{"gradient of", name}, state_label{"state of", name};
  Tensor tensor{};
  StepArgs& args = tensor.args;
  const auto* w = array_of(param, label);
  args.param_type = float_of(w, label);
  check_layout(param, w, Access::write, label);
  tensor.kernel = rule.step;
  tensor.size = size_of(w);
  args.param = w->data;
  memory.writes(w->data, tensor.size * width_of(args.param_type), label);

  const auto* g = array_of(grad, grad_label);
  if (g->descr == w->descr) {
    args.grad_type = args.param_type;
  } else {
    const bool wide = args.param_type == Float::f64;
    const std::optional<Float> type = float_type(g);
    if (!type || (*type == Float::f64) != wide) {
      const char* const needed = wide ? "float64" : "float32, float16 or bfloat16";
      fail_type(grad_label, std::string("expected ") + needed + ", got " + dtype_name(g));
    }
    args.grad_type = *type;
  }
  require_same_shape(grad, param, grad_label);
  g = readable(grad, g, copies);
  args.grad = g->data;
  memory.reads(g->data, tensor.size * width_of(args.grad_type), grad_label);
  add_states(rule, py::reinterpret_borrow<py::tuple>(state), tensor, memory, state_label);
  return tensor;
}

char* pointer_to(std::size_t address) {
  return reinterpret_cast<char*>(address);  // NOLINT(performance-no-int-to-ptr)
}

// The size of a tuple, or 0 if the object is none.
std::size_t tuple_size(py::handle object) {
  return PyTuple_Check(object.ptr()) ? static_cast<std::size_t>(PyTuple_GET_SIZE(object.ptr())) : 0;
}

// Memory that Python gives as a tuple of its address, its number of elements, and their Float. Python vouches for the
// address and for that number of elements, and for nothing else.
struct Memory {
  char* data;
  std::size_t size;
  Float type;

  static bool is(py::handle object) { return PyTuple_Check(object.ptr()); }

  Memory(py::handle tuple, const Label& label) {
    if (tuple_size(tuple) != 3 || number_at(tuple, 2) > static_cast<std::size_t>(Float::f64)) {
      fail_value(label, "expected an address, a size and a float type");
    }
    data = pointer_to(number_at(tuple, 0));
    size = number_at(tuple, 1);
    type = static_cast<Float>(number_at(tuple, 2));
  }
};

Tensor tensor_at(const Rule& rule, py::handle name, py::handle param, py::handle grad, py::handle state,
                 Disjoint& memory) {
  const Label label{"parameter", name}, grad_label{"gradient of", name}, state_label{"state of", name};
  const Memory w(param, label), g(grad, grad_label);
  const bool wide = w.type == Float::f64;
  if (g.size != w.size || wide != (g.type == Float::f64)) fail_value(grad_label, "does not fit the parameter");
  const std::size_t given = tuple_size(state), state_type = given > 0 ? number_at(state, 0) : 0;
  const bool u8 = state_type == static_cast<std::size_t>(StateType::u8);
  const std::size_t needed = 1 + rule.states * (u8 ? 2 : 1);
  const bool has_master = given == needed + 1 && width_of(w.type) == 2;
  if ((given != needed && !has_master) || state_type > (wide ? 0 : static_cast<std::size_t>(StateType::u8))) {
    fail_value(state_label, "does not fit the parameter");
  }
  Tensor tensor{};
  StepArgs& args = tensor.args;
  tensor.kernel = rule.step;
  tensor.size = w.size;
  args.param = w.data;
  args.grad = g.data;
  args.param_type = w.type;
  args.grad_type = g.type;
  args.state_type = static_cast<StateType>(state_type);
  memory.writes(w.data, w.size * width_of(w.type), label);
  memory.reads(g.data, g.size * width_of(g.type), grad_label);
  auto add = [&, next = std::size_t{1}](std::size_t bytes) mutable {
    char* data = pointer_to(number_at(state, next++));
    memory.writes(data, bytes, state_label);
    return data;
  };
  const std::size_t width = wide ? 8 : width_of(args.state_type);
  for (std::size_t s = 0; s < rule.states; ++s) args.state[s] = add(w.size * width);
  for (std::size_t s = 0; u8 && s < rule.states; ++s) {
    args.exponent[s] = reinterpret_cast<std::uint8_t*>(add(ceil_div(w.size, kStateBlock)));
  }
  if (has_master) args.master = reinterpret_cast<float*>(add(w.size * sizeof(float)));
  return tensor;
}

void require_job(py::handle job) {
  if (!PyTuple_Check(job.ptr()) || PyTuple_GET_SIZE(job.ptr()) != job_field::end) {
    throw py::value_error("jobs: expected tuples of " + std::to_string(job_field::end));
  }
  const py::handle names = item_of(job, job_field::names);
  for (const std::size_t field :
       {job_field::names, job_field::params, job_field::grads, job_field::states, job_field::counts}) {
    const py::handle list = item_of(job, field);
    if (!PyList_Check(list.ptr()) || length(list) != length(names)) {
      throw py::value_error("jobs: expected lists of one length");
    }
  }
}

// Calls body(i) for each tensor of a job that is stepped.
template <class Body>
void for_indices(py::handle job, const Body& body) {
  const py::handle indices = item_of(job, job_field::indices);
  const std::size_t count = length(indices.is_none() ? item_of(job, job_field::params) : indices);
  for (std::size_t i = 0; i < count; ++i) body(indices.is_none() ? i : number_of(item(indices, i)));
}

// Replaces number i of a list by its successor.
void increment(py::handle list, std::size_t i) {
  py::int_ next(number_of(item(list, i)) + 1);
  PyList_SetItem(list.ptr(), static_cast<py::ssize_t>(i), next.release().ptr());
}

void step_tensors(std::vector<Tensor>& tensors) {
  std::size_t chunks = 0;
  double bytes = 0;
  for (Tensor& t : tensors) {
    t.first_chunk = chunks;
    chunks += ceil_div(t.size, kStepChunk);
    bytes += 16.0 * static_cast<double>(t.size);
  }
  std::optional<py::gil_scoped_release> released;
  if (bytes >= threads::kBytesPerThread) released.emplace();  // a small step would pay more for it than it gains
  parallel_for(chunks, bytes, [&](std::size_t begin, std::size_t end) {
    for_tensor_chunks(tensors, begin, end,
                      [](const Tensor& t, std::size_t from, std::size_t to) { t.kernel(*t.hyper, t.args, from, to); });
  });
}

// One step of several jobs. Everything is checked before anything is written: a call that raises has changed nothing.
// Counts, and the one number in `steps`, are raised in the same call as the weights are, so that no interrupt comes
// between.
class Step {
 public:
  explicit Step(std::size_t jobs) {
    jobs_.reserve(jobs);
    hypers_.reserve(jobs);
  }

  // Adds a job, with numbers and gradients that take the place of its own.
  void add(py::handle job, py::handle numbers, py::handle grads) {
    const Rule& rule = rule_at(number_at(job, job_field::rule));
    hypers_.push_back(hyper_of(job, numbers));
    const bool stochastic = truth_at(job, job_field::stochastic);
    const auto noise = static_cast<std::uint32_t>(number_at(job, job_field::noise));
    const py::handle names = item_of(job, job_field::names), params = item_of(job, job_field::params),
                     states = item_of(job, job_field::states);
    bool in_floats = false;
    tensors_.reserve(tensors_.size() + length(params));
    memory_.reserve(tensors_.capacity() * (2 + rule.states));
    for_indices(job, [&](std::size_t i) {
      const auto of = [&](py::handle list) { return item(list, i); };
      Tensor t = Memory::is(of(params))
                     ? tensor_at(rule, of(names), of(params), of(grads), of(states), memory_)
                     : tensor_of(rule, of(names), of(params), of(grads), of(states), memory_, copies_);
      t.hyper = &hypers_.back();
      t.args.stochastic = stochastic && t.args.master == nullptr && width_of(t.args.param_type) == 2;
      t.args.noise = noise + static_cast<std::uint32_t>(i) * 0x27d4eb2fu;
      in_floats = in_floats || t.args.param_type != Float::f64;
      tensors_.push_back(t);
    });
    if (in_floats) require_floats(hypers_.back());
    jobs_.push_back(job);
  }

  void run(py::handle steps) {
    if (length(steps) != 1) throw py::value_error("steps: expected a list of one number");
    memory_.check();
    step_tensors(tensors_);
    for (const py::handle job : jobs_) {
      for_indices(job, [&](std::size_t i) {
        const py::handle counts = item_of(job, job_field::counts);
        if (!Memory::is(item(item_of(job, job_field::params), i))) {
          increment(counts, i);
        } else if (const auto address = number_of(item(counts, i))) {
          *reinterpret_cast<float*>(pointer_to(address)) += 1;
        }
      });
    }
    increment(steps, 0);
  }

 private:
  std::vector<py::handle> jobs_;
  std::vector<Hyper> hypers_;  // never moved: tensors point to them
  std::vector<Tensor> tensors_;
  std::vector<py::object> copies_;
  Disjoint memory_;
};

// ---- functions that Python calls for every step -----------------------------------------------------------------
//
// They take their arguments as Python has them, since the dispatcher of pybind11 takes longer than the step of a small
// tensor, and so does a function of Python with many arguments.

struct Arguments {
  PyObject* const* values;  // those by position, then those by name
  std::size_t positional;
  PyObject* names;  // a tuple, or null
};

template <py::object (*Function)(const Arguments&)>
PyObject* call_fast(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  try {
    return Function({values, static_cast<std::size_t>(positional), names}).release().ptr();
#if defined(__GLIBCXX__)
  } catch (abi::__forced_unwind&) {  // the end of a thread
    throw;
#endif
  } catch (...) {
    py::detail::try_translate_exceptions();
    return nullptr;
  }
}

template <py::object (*Function)(const Arguments&)>
void def_fast(py::module_& m, const char* name) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_fast<Function>)),
                               METH_FASTCALL | METH_KEYWORDS, nullptr};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, m.attr("__name__").ptr()));
}

void require_positional(const Arguments& a, std::size_t count, const char* name) {
  if (a.positional == count && a.names == nullptr) return;
  throw py::type_error(std::string(name) + ": expected " + std::to_string(count) + " arguments by position");
}

// Names of arguments, which become the items of a tuple in this order. An argument that is not given has its default,
// or is an error if that is null.
struct Fields {
  std::vector<PyObject*> names;  // interned, and kept for good
  std::vector<PyObject*> defaults;

  void add(const char* name, PyObject* otherwise) {
    names.push_back(PyUnicode_InternFromString(name));
    defaults.push_back(otherwise);
  }

  std::size_t find(PyObject* name, std::size_t from) const {
    for (std::size_t i = from; i < names.size(); ++i) {
      if (names[i] == name) return i;  // callers name them in this order
    }
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (PyUnicode_Compare(names[i], name) == 0) return i;
    }
    throw py::type_error("unexpected argument '" + std::string(py::str(name)) + "'");
  }

  py::object tuple_of(const Arguments& a) const {
    if (a.positional > 0) throw py::type_error("expected arguments by name");
    auto items = py::reinterpret_steal<py::object>(PyTuple_New(static_cast<py::ssize_t>(names.size())));
    if (!items) throw py::error_already_set();
    const auto set = [&](std::size_t i, py::handle value) {
      PyTuple_SET_ITEM(items.ptr(), static_cast<py::ssize_t>(i), value.inc_ref().ptr());
    };
    const std::size_t given = a.names ? tuple_size(a.names) : 0;
    for (std::size_t k = 0, next = 0; k < given; ++k) {
      const std::size_t i = find(item_of(a.names, k).ptr(), next);
      set(i, a.values[k]);
      next = i + 1;
    }
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (item_of(items, i)) continue;
      if (defaults[i] == nullptr) throw py::type_error("missing argument '" + std::string(py::str(names[i])) + "'");
      set(i, defaults[i]);
    }
    return items;
  }
};

py::object make_hyper(const Arguments& a) {
  static const Fields fields = [] {
    Fields made;
    for (const HyperField& field : kHyperFields) {
      made.add(field.name, field.standard ? PyFloat_FromDouble(*field.standard) : nullptr);
    }
    return made;
  }();
  return fields.tuple_of(a);
}

py::object make_job(const Arguments& a) {
  static const Fields fields = [] {
    Fields made;
    for (const char* const name : kJobFields) made.add(name, nullptr);
    return made;
  }();
  return fields.tuple_of(a);
}

// Whether a dict has these objects, a tuple of keys each with its value, in this order. Floats may be equal instead: a
// pickle copies each.
bool has_items(PyObject* dict, py::handle items) {
  if (!PyDict_CheckExact(dict) || 2 * PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(items.ptr())) return false;
  Py_ssize_t at = 0;
  PyObject *key = nullptr, *value = nullptr;
  const auto same = [](PyObject* a, PyObject* b) {
    return a == b || (PyFloat_CheckExact(a) && PyFloat_CheckExact(b) && PyFloat_AS_DOUBLE(a) == PyFloat_AS_DOUBLE(b));
  };
  for (std::size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
    if (key != item_of(items, i).ptr() || !same(value, item_of(items, i + 1).ptr())) return false;
  }
  return true;
}

bool is_array(PyObject* object) { return Py_TYPE(object) == py::detail::npy_api::get().PyArray_Type_; }

// The gradients of parameters `tree`, an array or a list or dict of the arrays `leaves`, as a list; null if the tree
// has other arrays by now, or the gradients are not arrays in such a tree.
py::object plain_gradients(PyObject* tree, py::handle leaves, PyObject* grads) {
  const std::size_t count = length(leaves);
  const auto is_leaf = [&](std::size_t i, PyObject* object) { return object == item(leaves, i).ptr(); };
  if (PyList_CheckExact(tree) && PyList_CheckExact(grads)) {
    bool plain = length(tree) >= count && length(grads) == count;
    for (std::size_t i = 0; plain && i < count; ++i) {
      plain = is_leaf(i, item(tree, i).ptr()) && is_array(item(grads, i).ptr());
    }
    if (!plain) return {};
    PyObject* const copy = PyList_GetSlice(grads, 0, static_cast<py::ssize_t>(count));  // it keeps the arrays alive
    if (copy == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(copy);
  }
  py::list found;
  if (PyDict_CheckExact(tree) && PyDict_CheckExact(grads)) {
    Py_ssize_t at = 0;
    PyObject *name = nullptr, *leaf = nullptr;
    bool plain = static_cast<std::size_t>(PyDict_GET_SIZE(grads)) == count;
    for (std::size_t i = 0; plain && i < count; ++i) {
      plain = PyDict_Next(tree, &at, &name, &leaf) && is_leaf(i, leaf);
      PyObject* const grad = plain ? PyDict_GetItemWithError(grads, name) : nullptr;
      if (PyErr_Occurred()) throw py::error_already_set();
      plain = grad != nullptr && is_array(grad);
      if (plain) found.append(py::handle(grad));
    }
    return plain ? std::move(found) : py::object();
  }
  if (count != 1 || !is_leaf(0, tree) || !is_array(grads)) return {};
  found.append(py::handle(grads));
  return std::move(found);
}

// The steps that all tensors of a group have taken, if they have taken the same.
std::optional<std::size_t> common_count(py::handle counts) {
  const auto first = number_of(item(counts, 0));
  for (std::size_t i = 1; i < length(counts); ++i) {
    if (number_of(item(counts, i)) != first) return {};
  }
  return first;
}

// The places in what is kept of a group: a job that lacks hyper and grads; the options that were checked; the function
// that computes hyper, and the learning rate; the parameters as they were given, and their arrays.
namespace kept_field {
enum : std::size_t { job, items, hyper, lr, tree, leaves };
}

// Steps an optimizer whose groups are as they were when they were checked. Returns False, without a step, where that
// is not so or gradients are not plain arrays: Python then looks closer.
py::object step_unchanged(const Arguments& a) {
  require_positional(a, 4, "step_unchanged");
  const py::handle kept = a.values[0], param_groups = a.values[1], grads = a.values[2], steps = a.values[3];
  if (!PyList_Check(kept.ptr()) || !PyList_Check(steps.ptr())) throw py::type_error("step_unchanged: expected lists");
  const std::size_t count = length(kept);
  const bool several = count != 1;
  const auto is_list = [&](py::handle list) { return PyList_CheckExact(list.ptr()) && length(list) == count; };
  struct Ready {
    py::handle job;
    py::object hyper, grads;
  };
  std::vector<Ready> ready;
  ready.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    // Python ran for the group before, and could change these.
    if (!is_list(param_groups) || (several && !is_list(grads))) return py::bool_(false);
    const py::handle group = item(kept, i);
    const auto options = py::reinterpret_borrow<py::object>(item(param_groups, i));
    if (group.is_none() || !has_items(options.ptr(), item_of(group, kept_field::items))) return py::bool_(false);
    const py::handle job = item_of(group, kept_field::job), tree = item_of(group, kept_field::tree);
    py::object mine =
        plain_gradients(tree.ptr(), item_of(group, kept_field::leaves), several ? item(grads, i).ptr() : grads.ptr());
    const auto taken = mine ? common_count(item_of(job, job_field::counts)) : std::nullopt;
    if (!taken) return py::bool_(false);
    const py::int_ number(*taken + 1);
    PyObject* const arguments[] = {options.ptr(), item_of(group, kept_field::lr).ptr(), number.ptr()};
    PyObject* const hyper = PyObject_Vectorcall(item_of(group, kept_field::hyper).ptr(), arguments, 3, nullptr);
    if (hyper == nullptr) throw py::error_already_set();
    ready.push_back({job, py::reinterpret_steal<py::object>(hyper), std::move(mine)});
  }
  Step step(count);  // from here on the lists of `ready` keep the gradients
  for (const Ready& group : ready) step.add(group.job, group.hyper, group.grads);
  step.run(steps);
  return py::bool_(true);
}

py::object step_jobs(const Arguments& a) {
  require_positional(a, 2, "step");
  const py::handle jobs = a.values[0], steps = a.values[1];
  if (!PyList_Check(jobs.ptr()) || !PyList_Check(steps.ptr())) throw py::type_error("step: expected two lists");
  Step step(length(jobs));
  for (std::size_t i = 0; i < length(jobs); ++i) {
    const py::handle job = item(jobs, i);
    require_job(job);
    step.add(job, item_of(job, job_field::hyper), item_of(job, job_field::grads));
  }
  step.run(steps);
  return py::none();
}

// Sum of squares of all gradients but None, in double, chunk by chunk in order: the same for any number of threads.
double sum_squares(const py::list& names, const py::list& grads) {
  struct Part {
    Float type;
    const char* data;
    std::size_t size, first_chunk;
  };
  if (names.size() != grads.size()) throw py::value_error("grads: expected as many as names");
  std::vector<Part> parts;
  std::vector<py::object> copies;
  std::size_t chunks = 0;
  double bytes = 0;
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const py::handle grad = item(grads, i);
    if (grad.is_none()) continue;
    const Label label{"gradient of", item(names, i)};
    if (Memory::is(grad)) {
      const Memory g(grad, label);
      parts.push_back({g.type, g.data, g.size, chunks});
    } else {
      const auto* array = array_of(grad, label);
      const Float type = float_of(array, label);
      array = readable(grad, array, copies);
      parts.push_back({type, array->data, size_of(array), chunks});
    }
    chunks += ceil_div(parts.back().size, kStepChunk);
    bytes += static_cast<double>(parts.back().size * width_of(parts.back().type));
  }
  std::vector<double> sums(chunks);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(chunks, bytes, [&](std::size_t begin, std::size_t end) {
    for_tensor_chunks(parts, begin, end, [&](const Part& part, std::size_t from, std::size_t to) {
      for (std::size_t at = from; at < to; at += kStepChunk) {
        sums[part.first_chunk + at / kStepChunk] =
            k.optim.sum_squares(part.type, part.data, at, std::min(at + kStepChunk, to));
      }
    });
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

}  // namespace

void bind_optim(py::module_& m) {
  def_fast<make_hyper>(m, "hyper");
  def_fast<make_job>(m, "job");
  def_fast<step_jobs>(m, "step");
  def_fast<step_unchanged>(m, "step_unchanged");
  m.def("rule", &rule, py::arg("name"));
  m.def("positive_states", &positive_states, py::arg("rule"));
  m.def("sum_squares", &sum_squares, py::arg("names"), py::arg("grads"));
}

}  // namespace fastopt
