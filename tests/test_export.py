"""Exports, read back by the runtimes that they are for."""

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bits

import fastopt as fo


def test_npz(rng, tmp_path):
    weights = {
        "float": rng.standard_normal((3, 5)).astype("f4"),
        "bfloat16": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(6),
        "odd": fo.quantize(rng.standard_normal((3, 7, 3)).astype("f4"), bits=2, outliers=0.1),
        "row": fo.quantize(rng.standard_normal(9).astype("f4"), bits=4),
        "sparse": fo.prune(rng.standard_normal((8, 32)).astype("f4"), sparsity=0.5),
        "small": fo.prune(rng.standard_normal((8, 32)).astype("f4"), sparsity=0.5).quantize(bits=4),
    }
    told = []
    fo.export(weights, tmp_path / "m.npz", to="npz", notify=lambda *now: told.append(now))
    assert [name for *_, name in told] == [*weights, ""]
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == fo.PackedModel(weights).nbytes
    with np.load(tmp_path / "m.npz") as file:
        arrays = dict(file)
    for name, w in fo.PackedModel(weights).unpack().items():
        assert same_bits(arrays[name], w.astype("f4") if name == "bfloat16" else w) or name == "ids"
    scale, minimum = (arrays[f"odd.{part}"].astype("f4").repeat(16, 1)[:, :21] for part in ("scale", "minimum"))
    decoded = minimum + scale * arrays["odd.codes"].reshape(3, 21)
    decoded.flat[arrays["odd.outlier_index"]] += arrays["odd.outlier_value"]
    assert same_bits(decoded.reshape(3, 7, 3), arrays["odd"])
    assert arrays["row.codes"].shape == (9,)
    assert same_bits(arrays["sparse.values"], weights["sparse"].values)
    assert same_bits(arrays["small.values"], weights["small"].values.dequantize())
    assert arrays["small.values.codes"].max() == 15
    assert np.array_equal(arrays["small.row_offsets"], weights["small"].row_offsets)


def test_nothing_is_left_behind(tmp_path):
    model = {"w": fo.quantize(np.eye(8, dtype="f4")), "w.codes": np.zeros(1)}
    with pytest.raises(ValueError, match=r"'w.codes': two arrays"):
        fo.export(model, tmp_path / "m.npz", to="npz")
    with pytest.raises(ValueError, match="to: expected one of"):
        fo.export(model, tmp_path / "m.npz", to="tflite")
    with pytest.raises(TypeError, match="nonsense"):
        fo.export(model, tmp_path / "m.npz", to="npz", nonsense=1)
    assert list(tmp_path.iterdir()) == []
