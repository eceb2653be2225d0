import pytest
from engines import contents, make_model

import fastopt as fo


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def alone(model, tmp_path):
    """The files that one process writes."""
    fo.pack_file(model, tmp_path / "alone", bits=4)
    return contents(tmp_path / "alone")
