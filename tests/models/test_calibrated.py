"""Models that are packed with what is known of their inputs."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastopt as fo


@pytest.fixture
def layers(rng):
    """Weights, and inputs of the first two: correlated, and of very different sizes."""
    weights = {
        "a.weight": rng.standard_normal((64, 128)).astype("f4"),
        "a.bias": rng.standard_normal(64).astype("f4"),
        "conv.weight": rng.standard_normal((32, 16, 3, 3)).astype("f4"),
        "head.weight": rng.standard_normal((48, 96)).astype("f4"),
    }
    mix = rng.standard_normal((144, 144)) * np.exp(rng.standard_normal(144))
    x = (rng.standard_normal((2000, 144)) @ mix + 1).astype("f4")
    return weights, {"a.weight": x[:, :128], "conv.weight": x}


def calibrated(inputs, **options):
    calib = fo.Calibration(**options)
    for name, x in inputs.items():
        calib.update(name, x)
    return calib


def output_error(w, q, x):
    w, q = (t.reshape(len(t), -1).astype("f8") for t in (w, q))
    return np.sqrt(np.square(x @ (w - q).T).sum() / np.square(x @ w.T).sum())


@pytest.mark.parametrize("products", [False, True])
def test_the_error_of_outputs_is_less(layers, products):
    weights, inputs = layers
    calib = calibrated(inputs, products=products)
    plain, model = fo.pack(weights, bits=2, fit="lsq"), fo.pack(weights, bits=2, calibration=calib)
    for t in model.report(weights).tensors:
        if t.name in inputs:
            errors = [output_error(weights[t.name], m[t.name].to_dense(), inputs[t.name]) for m in (plain, model)]
            assert errors[1] < 0.95 * errors[0]
            if products:
                assert t.output_error == pytest.approx(errors[1], rel=1e-6)
            else:
                assert t.output_error > 0
        else:
            assert t.output_error is None
    reasons = {t.name: t.reason for t in model.report().tensors}
    assert reasons["a.weight"] == "for all"
    assert reasons["head.weight"] == "for all; no calibration"
    assert model["head.weight"] == fo.quantize(weights["head.weight"], 2, fit="lsq")
    assert "output error" in str(model.report(weights))
    assert "output error" not in str(plain.report(weights))


def test_every_door_makes_the_same(layers, tmp_path):
    weights, inputs = layers
    calib = calibrated(inputs)
    recipe = fo.Recipe(bits=4, calibration=calib)
    model = fo.pack(weights, bits=4, calibration=calib)
    np.savez(tmp_path / "m.npz", **weights)
    report = fo.pack_file(tmp_path / "m.npz", tmp_path / "m.safetensors", bits=4, calibration=calib)
    with ThreadPoolExecutor(2) as executor:
        again = fo.pack_file(
            tmp_path / "m.npz", tmp_path / "n.safetensors", bits=4, calibration=calib, executor=executor
        )
    assert again.tensors == report.tensors
    assert [t.output_error for t in report.tensors] == [t.output_error for t in model.report(weights).tensors]
    for other in (
        fo.load(tmp_path / "m.safetensors"),
        fo.load(tmp_path / "n.safetensors"),
        fo.pack(weights, recipe),
        fo.pack(weights, fo.Recipe(bits=4), calibration=calib),
        fo.pack(weights, pickle.loads(pickle.dumps(recipe))),
    ):
        assert all(np.array_equal(other[name], tensor) for name, tensor in model.items())
    assert model["a.weight"] == fo.quantize(weights["a.weight"], 4, calibration=calib["a.weight"])
    assert "calibration" not in recipe.to_dict()
    assert fo.Recipe.from_dict(recipe.to_dict()) == recipe


def test_gptq(layers, tmp_path):
    weights, inputs = layers
    calib = calibrated({**inputs, "head.weight": inputs["conv.weight"][:50, :96]}, products=True)
    diagonal = fo.pack(weights, bits=2, calibration=calib)
    model = fo.pack(weights, bits=2, calibration=calib, fit="gptq")
    before, after = ({t.name: t.output_error for t in m.report(weights).tensors} for m in (diagonal, model))
    assert all(after[name] < 0.8 * before[name] for name in calib)
    reasons = {t.name: t.reason for t in model.report().tensors}
    assert reasons["a.weight"] == "for all"
    assert reasons["head.weight"] == "for all; calibrated by 50 rows for 96 inputs"
    some = fo.pack(weights, bits=2, calibration=calibrated({"a.weight": inputs["a.weight"]}, products=True), fit="gptq")
    assert some["a.weight"] == model["a.weight"]
    assert some["head.weight"] == fo.quantize(weights["head.weight"], 2, fit="lsq")
    small = fo.pack(weights, preset="small", calibration=calib, fit="gptq")
    assert small["a.weight"] == fo.quantize(
        weights["a.weight"], 4, group_size=32, param_bits=4, fit="gptq", calibration=calib["a.weight"]
    )
    assert fo.pack(weights, target_bits=3, calibration=calib, fit="gptq").report(weights).bits_per_weight <= 3
    with pytest.raises(ValueError, match=r"'a.weight': fit: 'gptq' needs the products of inputs"):
        fo.pack(weights, bits=2, calibration=calibrated(inputs), fit="gptq")


def test_bias_correction(layers, tmp_path):
    """The mean of the outputs stays, whatever the codes are; a layer without a bias gets one."""
    weights, inputs = layers
    inputs = {name: np.abs(x) for name, x in inputs.items()}
    calib = calibrated(inputs)
    model = fo.pack(weights, bits=2, calibration=calib, bias_correction=True)
    assert [*model] == [*weights, "conv.bias"]
    for name, bias in (("a.weight", weights["a.bias"]), ("conv.weight", np.zeros(32, "f4"))):
        x, w, q = inputs[name].astype("f8"), weights[name].astype("f8"), model[name].to_dense().astype("f8")
        expected = (x @ w.reshape(len(w), -1).T + bias).mean(axis=0)
        outputs = x @ q.reshape(len(q), -1).T
        found = (outputs + model[name.replace("weight", "bias")]).mean(axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        assert np.abs((outputs + bias).mean(axis=0) - expected).max() > 0.1
    plain = fo.pack(weights, bits=2, calibration=calib)
    assert all(np.array_equal(model[name], plain[name]) for name in ("a.weight", "conv.weight", "head.weight"))
    first = {name: weights[name] for name in ("a.bias", "a.weight", "conv.weight", "head.weight")}
    np.savez(tmp_path / "m.npz", **first)
    report = fo.pack_file(
        tmp_path / "m.npz", tmp_path / "m.safetensors", bits=2, calibration=calib, bias_correction=True
    )
    again = fo.load(tmp_path / "m.safetensors")
    assert [*again] == [*first, "conv.bias"]
    assert all(np.array_equal(again[name], tensor) for name, tensor in model.items())
    reasons = {t.name: t.reason for t in report.tensors}
    assert (reasons["a.bias"], reasons["conv.bias"]) == ("corrected bias", "bias correction of 'conv.weight'")
    with ThreadPoolExecutor(2) as executor:
        by_tasks = fo.pack_file(
            tmp_path / "m.npz",
            tmp_path / "n.safetensors",
            bits=2,
            calibration=calib,
            bias_correction=True,
            executor=executor,
        )
    assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert by_tasks.tensors == report.tensors
    with pytest.raises(TypeError, match="bias_correction: expected a bool"):
        fo.pack(weights, bits=2, bias_correction=1)
    with pytest.raises(ValueError, match=r"bias_correction: 'a.bias' has shape \(3,\), expected \(64,\)"):
        fo.pack({**weights, "a.bias": np.zeros(3, "f4")}, bits=2, calibration=calib, bias_correction=True)


def test_pruned_weights(layers):
    weights, inputs = layers
    calib = calibrated(inputs, products=True)
    plain = fo.pack(weights, bits=2, sparsity=0.5, fit="lsq").report(weights)
    model = fo.pack(weights, bits=2, sparsity=0.5, calibration=calib)
    dense = {name: tensor.to_dense() if name == "a.weight" else tensor for name, tensor in model.items()}
    assert output_error(weights["a.weight"], dense["a.weight"], inputs["a.weight"]) > 0
    ours = {t.name: t.error.relative for t in model.report(weights).tensors}
    assert ours["a.weight"] > {t.name: t.error.relative for t in plain.tensors}["a.weight"]


def test_bits_are_chosen_by_the_error_of_outputs(rng):
    """The inputs of "quiet" are so small that its errors hardly count; but relative errors are what is compared."""
    weights = {name: rng.standard_normal((64, 256)).astype("f4") for name in ("even", "uneven")}
    scale = np.where(np.arange(256) % 16 == 0, 30, 0.01)
    calib = calibrated({"even": rng.standard_normal((500, 256)), "uneven": rng.standard_normal((500, 256)) * scale})
    assert fo.pack(weights, target_bits=4, fit="lsq").report().bits_per_weight <= 4
    recipe = fo.choose_bits(weights, fo.Recipe(calibration=calib), target_bits=5)
    assert recipe.calibration is calib
    report = fo.pack(weights, recipe).report(weights)
    assert report.bits_per_weight <= 5
    bits = {t.name: t.bits_per_weight for t in report.tensors}
    assert bits["uneven"] < bits["even"]


def test_refused(layers):
    weights, inputs = layers
    calib = calibrated(inputs)
    for pack in (fo.pack, lambda w, **options: fo.choose_bits(w, fo.Recipe(**options), target_bits=4)):
        others = {name: w for name, w in weights.items() if name != "conv.weight"}
        options = {"bits": 4} if pack is fo.pack else {}
        with pytest.raises(ValueError, match=r"has inputs of 'conv.weight', which the model does not have"):
            pack(others, calibration=calib, **options)
        others = {**weights, "a.weight": weights["a.weight"].T.copy()}
        with pytest.raises(ValueError, match=r"calibration: has 128 inputs of 'a.weight', which takes 64"):
            pack(others, calibration=calib, **options)
    with pytest.raises(TypeError, match="calibration: expected a Calibration, got dict"):
        fo.pack(weights, bits=4, calibration={})
    with pytest.raises(ValueError, match=r"unknown options \['inputs'\]"):
        fo.Recipe(overrides={"*": {"inputs": None}})
