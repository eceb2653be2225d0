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


needs_threads = pytest.mark.skipif(not _core.threaded, reason="built without threads")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_hang():
    """The parent's threads do not exist in the child, which must not wait for them."""
    code = """
import os, numpy as np, fastopt as fo
fo.set_num_threads(2)
w, g = np.ones(4_000_000, "f4"), np.ones(4_000_000, "f4")
opt = fo.SGD(w, lr=0.5)
opt.step(g)  # wakes the threads
child = os.fork()
if child == 0:
    opt.step(g)
    os._exit(0 if (w == 0).all() else 1)
_, status = os.waitpid(child, 0)
opt.step(g)
assert os.waitstatus_to_exitcode(status) == 0 and (w == 0).all()
print("done")
"""
    assert last_line(code) == "done"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_that_is_forked_in_the_middle_of_a_call():
    """Another thread of the parent is in a call, whose helpers and locks are in any state."""
    code = """
import os, threading, numpy as np, fastopt as fo
fo.set_num_threads(3)
w = np.ones(2_000_000, "f4")
running = True
def work():
    while running:
        fo.quantize(w)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
want = fo.quantize(w)
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if fo.quantize(w) == want and fo.quantize(w) == want else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
running = False
for thread in threads:
    thread.join()
print("done")
"""
    assert last_line(code) == "done"


@needs_threads
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_default_is_the_cores_that_the_process_may_use():
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import fastopt as fo
print(fo.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = run_python(code, env=environment, timeout=120)
    assert result.stdout.splitlines()[-1:] == ["1"], result.stderr


def test_importing_leaves_the_environment_as_it_was():
    code = "import os; before = dict(os.environ); import fastopt; print(before == dict(os.environ))"
    assert last_line(code) == "True"


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


def test_any_number_of_helpers_at_any_time(rng):
    """Calls from several threads, while the number of threads changes: each index is taken once."""
    w = rng.standard_normal((300, 4001)).astype("f4")
    want = fo.quantize(w)
    wrong, before = [], fo.get_num_threads()

    def work(seed):
        numbers = np.random.default_rng(seed)
        for _ in range(40):
            fo.set_num_threads(int(numbers.integers(1, 20)))
            if fo.quantize(w) != want:
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    fo.set_num_threads(before)
    assert not wrong


def test_show_config(capsys):
    fo.show_config()
    text = capsys.readouterr().out
    assert text.startswith(f"fastopt {fo.__version__}\n")
    assert _core.isa() in text
    assert np.__version__ in text


@needs_threads
@pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_NPROC"])
@pytest.mark.parametrize("before", [1, 2, 64])
def test_threads_that_cannot_be_started_are_done_without(limit, before):
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
