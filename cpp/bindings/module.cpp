// The extension module: a table of contents.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace fastopt {
void bind_optim(py::module_&);
void bind_quant(py::module_&);
void bind_prune(py::module_&);
void bind_sparse(py::module_&);
void bind_linear(py::module_&);
void bind_limits(py::module_&);
}  // namespace fastopt

PYBIND11_MODULE(_core_main, m, py::mod_gil_not_used()) {
  using namespace fastopt;
  threads::watch_fork();

  m.attr("__version__") = FASTOPT_VERSION;
  m.attr("threaded") = kThreads;
  m.attr("compiler") = __VERSION__;
  m.def("isa", [] { return kernels().isa; });
  m.def("available_isas", &available_isas);
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("get_num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("use_openmp", &threads::use_openmp, py::arg("parallel"), py::arg("max_threads"), py::arg("thread_num"));

  bind_optim(m);
  bind_quant(m);
  bind_prune(m);
  bind_sparse(m);
  bind_linear(m);
  bind_limits(m);
}

// pybind11 takes the lock of the main interpreter, and so would wait for good in another one.
// NOLINTBEGIN(bugprone-reserved-identifier): the name is that of the module.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core();
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return PyInit__core_main();
  PyErr_SetString(PyExc_ImportError, "fastopt: cannot be imported in a subinterpreter, only in the main interpreter");
  return nullptr;
}
// NOLINTEND(bugprone-reserved-identifier)
