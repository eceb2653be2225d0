import signal
import threading

import numpy as np
import pytest
from hypothesis import settings

import fastopt as fo
from fastopt import _core

settings.register_profile("default", deadline=None)  # machines are shared: nothing here is timed
settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    """Leave out some tables for codes of 6 and 5 bits: test_isa.py shows that all tables give the same bits."""
    best = _core.available_isas()[-1]

    def is_left_out(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("bits") in (5, 6) and params.get("isa", best) != best

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


@pytest.fixture(params=_core.available_isas())
def isa(request):
    """Each table of kernels that this CPU runs, in one process."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


@pytest.fixture(params=[1, 2, 7])
def threads(request):
    before = fo.get_num_threads()
    fo.set_num_threads(request.param)
    yield request.param
    fo.set_num_threads(before)


class ThreadRng(threading.local):
    """A generator for each thread that runs a test: all draw the same numbers."""

    def __init__(self):
        self.generator = np.random.default_rng(20261122)

    def __getattr__(self, name):
        return getattr(self.generator, name)


@pytest.fixture
def rng():
    return ThreadRng()


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where jobs run in the background
    yield
    signal.signal(signal.SIGINT, before)
