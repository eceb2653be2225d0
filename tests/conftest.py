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
    params = {item: getattr(item, "callspec", None) and item.callspec.params for item in items}
    left = [item for item in items if params[item] and params[item].get("bits") in (5, 6)
            and params[item].get("isa", best) != best]  # fmt: skip
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


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


@pytest.fixture
def rng():
    return np.random.default_rng(20261122)
