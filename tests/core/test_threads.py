import os
import sys
import threading

import numpy as np
import pytest
from helpers import run_python, same_bits

import fastopt as fo
from fastopt import _core


def last_line(code, **env):
    """Return the last line that a new interpreter prints; an editable install may print its rebuild before."""
    result = run_python(code, env={**os.environ, **env}, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


needs_threads = pytest.mark.skipif(not _core.openmp, reason="built without OpenMP: one thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_hang():
    """libgomp's threads are gone in the child, and a parallel region there would wait for them for ever."""
    code = """
import os, numpy as np, fastopt as fo
fo.set_num_threads(2)
w, g = np.ones(4_000_000, "f4"), np.ones(4_000_000, "f4")
opt = fo.SGD(w, lr=0.5)
opt.step(g)  # wakes the threads
child = os.fork()
if child == 0:
    opt.step(g)
    os._exit(0 if fo.get_num_threads() == 1 and (w == 0).all() else 1)
_, status = os.waitpid(child, 0)
opt.step(g)
assert os.waitstatus_to_exitcode(status) == 0 and (w == 0).all()
print("done")
"""
    assert last_line(code) == "done"


def test_importing_leaves_the_environment_as_it_was():
    code = "import os; before = dict(os.environ); import fastopt; print(before == dict(os.environ))"
    assert last_line(code) == "True"
    assert last_line(code, GOMP_SPINCOUNT="5") == "True"


@needs_threads
def test_omp_num_threads_is_honoured():
    code = "import fastopt as fo; print(fo.get_num_threads())"
    assert last_line(code, OMP_NUM_THREADS="3") == "3"
    code = "import fastopt as fo; fo.set_num_threads(5); print(fo.get_num_threads())"
    assert last_line(code, OMP_NUM_THREADS="3") == "5"


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (5000, ValueError), (1.5, TypeError)])
def test_bad_numbers_of_threads(n, error):
    before = fo.get_num_threads()
    with pytest.raises(error):
        fo.set_num_threads(n)
    assert fo.get_num_threads() == before


def test_python_threads_work_side_by_side(rng):
    """The lock of the interpreter is released in kernels: calls on different arrays may overlap."""
    w = rng.standard_normal((64, 4096)).astype("f4")
    want = fo.quantize(w)
    results = [None] * 4

    def work(i):
        for _ in range(10):
            results[i] = fo.quantize(w).codes

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(same_bits(codes, want.codes) for codes in results)


def test_show_config(capsys):
    fo.show_config()
    text = capsys.readouterr().out
    assert text.startswith(f"fastopt {fo.__version__}\n")
    assert _core.isa() in text
    assert np.__version__ in text


@needs_threads
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp and the limits of Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_NPROC"])
@pytest.mark.parametrize("before", [1, 2, 64])
def test_threads_that_cannot_be_started_are_done_without(limit, before):
    """libgomp ends the process if a thread does not start."""
    code = f"""
import os, resource, threading, numpy as np, fastopt as fo
w, g = np.zeros(8 << 20, "f4"), np.ones(8 << 20, "f4")
opt = fo.SGD(w, lr=1.0)
fo.set_num_threads({before})
opt.step(g)
fo.set_num_threads(2)
opt.step(g)
if "{limit}" == "RLIMIT_AS":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
else:
    if os.getuid() == 0:
        os.setuid(54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
fo.set_num_threads(64)
opt.step(g)
fo.set_num_threads(2)
opt.step(g)
assert (w == -4).all()
print("done")
"""
    assert last_line(code) == "done"


@needs_threads
@pytest.mark.parametrize("value", ["99999999999", "100000", "4096"])
def test_omp_num_threads_has_the_bound_of_set_num_threads(value):
    assert last_line("import fastopt as fo; print(fo.get_num_threads())", OMP_NUM_THREADS=value) == "4096"


def test_a_subinterpreter_gets_an_import_error():
    """pybind11 would wait for a lock for ever."""
    code = """
try:
    import _interpreters as interpreters  # 3.13
except ImportError:
    interpreters = __import__("_xxsubinterpreters")
other = interpreters.create()
try:
    failed = interpreters.run_string(other, "import fastopt")
except interpreters.RunFailedError as error:
    failed = error
print("ImportError" in repr(failed) or "ImportError" in str(failed))
import fastopt as fo
print(fo.get_num_threads() > 0)
"""
    assert last_line(code) == "True"
    assert "True\nTrue" in run_python(code, env=dict(os.environ), timeout=60).stdout
