"""Kernels run on the threads of torch's OpenMP runtime, where torch brings GNU's."""

import os
import sys

import pytest
from helpers import run_python

torch = pytest.importorskip("torch", reason="torch is not installed")

SETUP = """
import os, numpy as np, torch, fastopt as fo
alone = fo.get_num_threads()
import fastopt.torch
from fastopt import _core
rng = np.random.default_rng(0)
w = fo.quantize(rng.standard_normal((256, 1024)).astype("f4"), bits=4, group_size=64)
x = rng.standard_normal((64, 1024)).astype("f4")
"""


def last_line(code):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = run_python(SETUP + code, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP on Linux")
def test_threads_of_torch_count_and_give_the_same_bits():
    code = """
counts, products = [], []
for count in (1, 3, 2, 4):
    torch.set_num_threads(count)
    (torch.ones(400, 400) @ torch.ones(400, 400)).sum()
    counts.append(fo.get_num_threads())
    products.append(fo.linear(x, w))
fo.set_num_threads(5)
counts.append(fo.get_num_threads())
products.append(fo.linear(x, w))
_core.use_openmp(0, 0, 0)
products.append(fo.linear(x, w))
print(counts, all((p == products[0]).all() for p in products))
"""
    assert last_line(code) == "[1, 3, 2, 4, 5] True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own():
    """The threads of OpenMP are gone in the child, which would wait for them."""
    code = """
torch.set_num_threads(2)
want = fo.linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if fo.get_num_threads() == alone and (fo.linear(x, w) == want).all() else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), (fo.linear(x, w) == want).all())
"""
    assert last_line(code) == "0 True"
