"""Sums over the inputs of the layers of a model."""

import json
import operator
import pickle
from functools import reduce

import numpy as np
import pytest

import fastopt as fo
from fastopt.files.safetensors_file import part_of, write


def batches(rng, count=4, columns=48):
    return [rng.standard_normal((5, 3, columns)).astype("f4") for _ in range(count)]


def calibrated(parts, products=False, name="fc.weight"):
    calib = fo.Calibration(products=products)
    for x in parts:
        calib.update(name, x)
    return calib


@pytest.mark.parametrize("products", [False, True])
def test_sums(products, rng):
    parts = batches(rng)
    sums = calibrated(parts, products)["fc.weight"]
    x = np.concatenate(parts).reshape(-1, 48).astype("f8")
    assert (sums.rows, sums.columns) == (60, 48)
    np.testing.assert_allclose(sums.sum, x.sum(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sums.sum_squares, np.square(x).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sums.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)
    if products:
        np.testing.assert_allclose(sums.products, x.T @ x, rtol=1e-12, atol=1e-12)
    else:
        assert sums.products is None


def test_the_split_into_updates_changes_no_bit(rng):
    x = (rng.standard_normal((1000, 48)) * 1e3).astype("f4")
    once = calibrated([x])
    assert once == calibrated(np.array_split(x, 7)) == calibrated(x) == calibrated([x.reshape(10, 100, 48)])
    assert once != calibrated([x[:-1]])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes(dtype, rng):
    x = rng.integers(-9, 9, (20, 48)).astype(dtype)
    assert calibrated([x]) == calibrated([x.astype("f4")])


@pytest.mark.parametrize("products", [False, True])
def test_addition(products, rng):
    parts = [calibrated([x.round()], products) for x in batches(rng)]  # integers: no sum is rounded
    whole = reduce(operator.add, parts)
    assert whole == reduce(operator.add, parts[::-1])
    assert whole["fc.weight"].rows == 60
    assert parts[0]["fc.weight"].rows == 15
    both = parts[0] + calibrated(batches(rng, 1), products, "other.weight")
    assert list(both) == ["fc.weight", "other.weight"]
    assert both["fc.weight"] == parts[0]["fc.weight"]
    both.update("fc.weight", np.ones((1, 48), "f4"))
    assert parts[0]["fc.weight"].rows == 15  # a sum shares nothing


def test_products_are_kept_where_both_have_them(rng):
    parts = batches(rng)
    mixed = calibrated(parts, True) + calibrated(parts)
    assert not mixed.products
    assert mixed["fc.weight"].products is None
    assert mixed == calibrated(parts) + calibrated(parts)


@pytest.mark.parametrize("products", [False, True])
def test_files_and_pickle(products, rng, tmp_path):
    calib = calibrated(batches(rng), products)
    calib.update("é/0", np.ones((2, 3), "f4"))
    calib.save(tmp_path / "c.safetensors")
    for other in (fo.Calibration.load(tmp_path / "c.safetensors"), pickle.loads(pickle.dumps(calib))):
        assert other == calib
        assert list(other) == list(calib)
        assert other.products == products
        other.update("fc.weight", np.ones((1, 48), "f4"))
        assert other["fc.weight"].rows == 61
    fo.Calibration().save(tmp_path / "c.safetensors")
    assert fo.Calibration.load(tmp_path / "c.safetensors") == fo.Calibration()


def test_it_tells_how_many_rows_it_saw(rng):
    calib = calibrated(batches(rng))
    assert repr(calib) == "Calibration(1 weights, 60 rows)"
    calib.update("other", np.ones((2000, 3), "f4"))
    assert repr(calib) == "Calibration(2 weights, 60 to 2,000 rows)"
    assert calib.rows == {"fc.weight": 60, "other": 2000}
    assert repr(fo.Calibration(products=True)) == "Calibration(0 weights, 0 rows, products)"


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad, products, rng):
    calib = calibrated(batches(rng), products)
    before = pickle.loads(pickle.dumps(calib))
    x = np.ones((400, 48), "f4")
    x[300, 7] = bad
    with pytest.raises(ValueError, match=rf"'fc.weight': x: expected finite values, got {bad} in column 7"):
        calib.update("fc.weight", x)
    with pytest.raises(ValueError, match=r"'new.weight': x: expected finite"):
        calib.update("new.weight", x)
    assert calib == before


def test_refused(rng, tmp_path):
    calib = calibrated(batches(rng))
    with pytest.raises(ValueError, match=r"'fc.weight': x: expected 48 columns, got shape \(2, 47\)"):
        calib.update("fc.weight", np.ones((2, 47), "f4"))
    with pytest.raises(TypeError, match=r"'fc.weight': x: expected float32"):
        calib.update("fc.weight", np.ones((2, 48), "i4"))
    with pytest.raises(ValueError, match=r"'a': x: expected shape \(..., columns\), got a single number"):
        calib.update("a", np.float32(1))
    with pytest.raises(TypeError, match="name: expected a text, got int"):
        calib.update(1, np.ones((2, 48), "f4"))
    with pytest.raises(ValueError, match=r"'fc.weight': expected sums of 48 columns, got 3"):
        calib + calibrated([np.ones((2, 3), "f4")])
    with pytest.raises(TypeError, match="unsupported operand"):
        calib + {}
    with pytest.raises(TypeError, match="products: expected a bool, got int"):
        fo.Calibration(products=1)
    fo.pack({"w": np.zeros((64, 128), np.float32)}, bits=8).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m.safetensors: is not a calibration"):
        fo.Calibration.load(tmp_path / "m.safetensors")
    calib.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c.safetensors: is a calibration, not a model"):
        fo.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected version 1, got "),
        ({"rows": {"fc.weight": -1}}, "-1 rows"),
        ({"rows": {"fc.weight": 1.5}}, "1.5 rows"),
        ({"rows": {"other": 1}}, "other.sum"),
        ({"rows": []}, "rows: expected a mapping"),
        ({"products": True}, "fc.weight.products"),
        ({"products": 1}, "products: expected a bool"),
    ],
)
def test_damaged_files(change, message, rng, tmp_path):
    sums = calibrated(batches(rng))["fc.weight"]
    parts = [part_of("fc.weight.sum", sums.sum), part_of("fc.weight.sum_squares", sums.sum_squares)]
    about = {"version": 1, "products": False, "rows": {"fc.weight": 60}, **change}
    write(tmp_path / "c.safetensors", parts, {"fastopt.calibration": json.dumps(about)})
    with pytest.raises(ValueError, match=rf"c.safetensors: is a damaged calibration: .*{message}"):
        fo.Calibration.load(tmp_path / "c.safetensors")
