"""Keras itself: its layers, files and models, if it is installed with PyTorch as its backend."""

import json
import os
import warnings

import numpy as np
import pytest

import fastopt as fo

pytest.importorskip("h5py", reason="the extra `keras` is not installed")
pytest.importorskip("torch", reason="torch, the backend, is not installed")
os.environ.setdefault("KERAS_BACKEND", "torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    L = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore")


def make():
    image, words = L.Input((12, 12, 6)), L.Input((5,), dtype="int32")
    x = L.Conv2D(8, 3)(image)
    x = L.DepthwiseConv2D(3, depth_multiplier=2)(x)
    x = L.SeparableConv2D(10, 3)(x)
    x = L.BatchNormalization(name="norm")(x)
    x = L.Conv2DTranspose(7, 3)(x)
    x = L.Reshape((-1, 7))(x)
    x = L.Conv1D(9, 3)(x)
    x = L.LSTM(11, return_sequences=True)(x)
    x = L.Bidirectional(L.GRU(6, return_sequences=True))(x)
    x = L.MultiHeadAttention(3, 4)(x, x)
    x = L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 5), bias_axes="de")(x)
    x = L.Reshape((-1, 10))(x)
    x = L.TimeDistributed(L.Dense(10))(x)
    x = L.Dense(10, use_bias=False, name="head")(L.GlobalAveragePooling1D()(x))
    e = L.SimpleRNN(10)(L.Embedding(20, 10)(words))
    return keras.Model([image, words], L.Dense(3, activation="softmax")(L.Add()([x, e])))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return make()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3, 12, 12, 6)).astype("f4"), rng.integers(0, 20, (3, 5)).astype("i4")]


def predicted(model, inputs):
    return model.predict(inputs, verbose=0)


@pytest.mark.parametrize(
    ("source", "target"), [("m.keras", "o.weights.h5"), ("m.weights.h5", "o.weights.h5"), ("m.h5", "o.h5")]
)
def test_there_and_back(source, target, model, inputs, tmp_path):
    (model.save_weights if "weights" in source else model.save)(tmp_path / source)
    want = predicted(model, inputs)
    other = make()
    fo.export(tmp_path / source, tmp_path / target, to="keras")
    other.load_weights(tmp_path / target)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(model.weights, other.weights, strict=True))
    fo.pack_file(tmp_path / source, tmp_path / "p.safetensors", bits=8, min_size=1, exclude=["*norm*"])
    assert not hasattr(fo.load(tmp_path / "p.safetensors"), "assign")  # it has the names of the file
    fo.export(tmp_path / "p.safetensors", tmp_path / target, to="keras")
    other.load_weights(tmp_path / target)
    assert np.abs(predicted(other, inputs) - want).max() < 0.02


def test_files_and_model_turn_the_same(model, tmp_path):
    """Every kernel of every kind of layer comes in as [out, in, ...], whatever the file."""
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    turned = {}
    for source in (tmp_path / "m.keras", tmp_path / "m.h5", model):
        packed = fo.pack(source, include=())
        axes = json.loads(packed.metadata["keras"])["turned"]
        turned[str(source)[-5:]] = sorted((tuple(packed[name].shape), tuple(axes.get(name, ()))) for name in packed)
    first, *others = turned.values()
    assert others == [first, first]
    assert sum(bool(axes) for _, axes in first) == 22


def test_a_model_in_memory(model, inputs, tmp_path):
    want = predicted(model, inputs)
    packed = fo.pack(model, bits=8, min_size=1, exclude=["*norm*"])
    assert packed["head/kernel"].shape == (10, 10)
    (kernel,) = (v.numpy() for v in model.weights if v.path == "head/kernel")
    assert np.array_equal(fo.pack(model, include=())["head/kernel"], kernel.T)
    keras.utils.set_random_seed(1)
    other = make()
    names = {ours.path: theirs.path for ours, theirs in zip(model.weights, other.weights, strict=True)}
    renamed = {names[name]: tensor for name, tensor in packed.items()}
    with pytest.raises(ValueError, match="expected the variables of the model"):
        packed.assign(keras.Sequential([L.Input((3,)), L.Dense(2)]))
    from fastopt.formats.keras_weights import assign

    assign(other, renamed)
    assert np.abs(predicted(other, inputs) - want).max() < 0.02
    before = [v.numpy() for v in model.weights]
    packed.save(tmp_path / "m.safetensors")
    packed.assign(model)
    after = [v.numpy() for v in model.weights]
    fo.load(tmp_path / "m.safetensors").assign(model)
    again = fo.pack(packed, bits=4)
    again.assign(model)
    packed.assign(model)
    assert packed.report(model).error.relative < 0.01  # the decoded weights, but for the order of additions
    assert all(np.array_equal(v.numpy(), w) for v, w in zip(model.weights, after, strict=True))
    for variable, value in zip(model.weights, before, strict=True):
        variable.assign(value)
    with pytest.raises(ValueError, match="put the weights back by its method assign"):
        fo.export(packed, tmp_path / "m.weights.h5", to="keras")


def test_variables_of_one_path():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = L.Dense(4, name="same"), L.Dense(3, name="same")

        def call(self, x):
            return self.second(self.first(x))

    model = Twice()
    want = model(np.ones((1, 5), "f4")).detach().numpy()
    packed = fo.pack(model, include=())
    assert [packed[name].shape for name in packed] == [(4, 5), (4,), (3, 4), (3,)]
    packed.assign(model)
    assert np.array_equal(model(np.ones((1, 5), "f4")).detach().numpy(), want)


def test_optimizers_are_left_out(tmp_path):
    small = keras.Sequential([L.Input((3,)), L.Dense(4), L.Dropout(0.5), L.Dense(1)])
    small.compile("adam", "mse")
    small.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    for name in ("s.keras", "s.weights.h5", "s.h5"):
        (small.save_weights if "weights" in name else small.save)(tmp_path / name)
        opened = fo.open_weights(tmp_path / name)
        assert not any("optimizer" in tensor for tensor in opened)
        target = tmp_path / ("o.h5" if name == "s.h5" else "o.weights.h5")
        fo.export(opened, target, to="keras")
        small.load_weights(target)
