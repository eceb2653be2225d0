"""Files of Keras, without Keras: written by h5py in both layouts."""

import io
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from helpers import same_bits
from test_cli import run

import fastopt as fo
from fastopt.formats.keras_weights import turned_axes

h5py = pytest.importorskip("h5py", reason="the extra `keras` is not installed")

# Path, name of the layer, variables, and the axes in which they come in.
LAYERS = [
    ("layers/dense", "dense_7", [((5, 4), (1, 0)), ((4,), None)]),
    ("layers/dense_1", "head", [((4, 4), (1, 0))]),
    ("layers/conv2d", "conv2d", [((3, 2, 6, 8), (3, 2, 0, 1)), ((8,), None)]),
    ("layers/conv1d", "conv1d", [((3, 6, 8), (2, 1, 0)), ((8,), None)]),
    ("layers/conv2d_transpose", "up", [((3, 2, 7, 8), (2, 3, 0, 1)), ((7,), None)]),
    ("layers/depthwise_conv2d", "depth", [((3, 3, 6, 2), (2, 3, 0, 1)), ((12,), None)]),
    ("layers/separable_conv2d", "s", [((3, 3, 6, 2), (2, 3, 0, 1)), ((1, 1, 12, 9), (3, 2, 0, 1)), ((9,), None)]),
    ("layers/embedding", "embedding", [((20, 6), None)]),
    ("layers/lstm/cell", "lstm_cell", [((6, 16), (1, 0)), ((4, 16), (1, 0)), ((16,), None)]),
    ("layers/gru/cell", "gru_cell", [((6, 12), (1, 0)), ((4, 12), (1, 0)), ((2, 12), None)]),
    ("layers/multi_head_attention/query_dense", "query", [((6, 3, 4), (1, 2, 0)), ((3, 4), None)]),
    ("layers/multi_head_attention/output_dense", "attention_output", [((3, 4, 6), (2, 0, 1)), ((6,), None)]),
    ("layers/batch_normalization", "norm", [((6,), None)] * 4),
    ("fc1", "first", [((5, 4), (1, 0)), ((4,), None)]),
    ("mystery", "mystery", [((5, 4), None)]),
]


def numbered(path, rng, layers=LAYERS):
    """A file in the layout of Keras 3; returns what is in it, as it should come in."""
    want = {}
    with h5py.File(path, "w") as file:
        for place, name, variables in layers:
            group = file.create_group(f"{place}/vars")
            group.attrs["name"] = name
            for number, (shape, axes) in enumerate(variables):
                array = rng.standard_normal(shape).astype("f4")
                group[str(number)] = array
                want[f"{place}/vars/{number}"] = array if axes is None else array.transpose(axes)
        file["optimizer/vars/0"] = np.ones(9, "f4")
        file["layers/dropout/seed_generator/vars/0"] = np.arange(2, dtype="u4")
        want["layers/dropout/seed_generator/vars/0"] = np.arange(2, dtype="u4")
    return want


def named(path, rng, *, config=True):
    """A model in the layout of Keras 2."""
    want = {}
    layers = {
        "dense_1": ("Dense", {"dense_1/kernel:0": ((5, 4), (1, 0)), "dense_1/bias:0": ((4,), None)}),
        "c": ("Conv2D", {"c/kernel:0": ((3, 2, 6, 8), (3, 2, 0, 1))}),
        "up": ("Conv2DTranspose", {"up/kernel:0": ((3, 2, 7, 8), (2, 3, 0, 1)), "up/bias:0": ((7,), None)}),
        "depth": ("DepthwiseConv2D", {"depth/depthwise_kernel:0": ((3, 3, 6, 2), (2, 3, 0, 1))}),
        "lstm": ("LSTM", {"lstm/lstm_cell/recurrent_kernel:0": ((4, 16), (1, 0))}),
        "einsum_dense": ("EinsumDense", {"einsum_dense/kernel:0": ((6, 3, 4), (1, 2, 0) if config else None)}),
        "drop": ("Dropout", {}),
    }
    with h5py.File(path, "w") as file:
        about = [
            {"class_name": kind, "config": {"name": name, "equation": "abc,cde->abde"}}
            for name, (kind, _) in layers.items()
        ]
        root = file.create_group("model_weights") if config else file
        if config:
            file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {"layers": about}})
            file["optimizer_weights/Adam/w:0"] = np.ones(3, "f4")
        root.attrs["layer_names"] = np.array([name.encode() for name in layers])
        for name, (_, variables) in layers.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = np.array([v.encode() for v in variables])
            for variable, (shape, axes) in variables.items():
                array = group[variable] = rng.standard_normal(shape).astype("f4")
                want[f"{name}/{variable}"] = array if axes is None else array.transpose(axes)
    return want


def archive(path, content, method=zipfile.ZIP_STORED, config=None):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", json.dumps(config or {}))
        file.writestr("model.weights.h5", content)


def same(file, want):
    opened = fo.open_weights(file)
    assert sorted(opened) == sorted(want)
    for name, array in want.items():
        assert opened.spec(name) == (array.shape, array.dtype), name
        assert same_bits(opened[name], array), name


def contents(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.__setitem__(name, item[()] if hasattr(item, "dtype") else None))
        attributes = {name: sorted(file[name].attrs) for name in found}
    return found, attributes


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_keras_3(method, rng, tmp_path):
    weights = tmp_path / "m.weights.h5"
    want = numbered(weights, rng)
    same(weights, want)
    archive(tmp_path / "m.keras", weights.read_bytes(), method)
    same(tmp_path / "m.keras", want)
    for other in ("copy", "x.bin2"):  # by the first bytes, and by what is in the archive
        (tmp_path / other).write_bytes(weights.read_bytes() if other == "copy" else (tmp_path / "m.keras").read_bytes())
        same(tmp_path / other, want)


def test_equations_of_a_config(rng, tmp_path):
    """A config says what a file of weights alone cannot: which axes of a kernel are those of the output."""
    weights = tmp_path / "m.weights.h5"
    layers = [("layers/einsum_dense", "e", [((6, 3, 4), None)]), ("layers/einsum_dense_1", "f", [((4, 6), None)])]
    arrays = numbered(weights, rng, layers)
    same(weights, arrays)
    about = [
        {"class_name": "EinsumDense", "config": {"name": n, "equation": e}}
        for n, e in (("e", "abc,cde->abde"), ("f", "ab,cb->ac"))
    ]
    archive(tmp_path / "m.keras", weights.read_bytes(), config={"config": {"layers": about}})
    opened = fo.open_weights(tmp_path / "m.keras")
    assert same_bits(opened["layers/einsum_dense/vars/0"], arrays["layers/einsum_dense/vars/0"].transpose(1, 2, 0))
    assert same_bits(opened["layers/einsum_dense_1/vars/0"], arrays["layers/einsum_dense_1/vars/0"])


@pytest.mark.parametrize("config", [True, False])
def test_keras_2(config, rng, tmp_path):
    want = named(tmp_path / "m.h5", rng, config=config)
    same(tmp_path / "m.h5", want)


def test_bfloat16(rng, tmp_path):
    array = rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16)
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=array).attrs["dtype"] = "bfloat16"
    opened = fo.open_weights(tmp_path / "m.weights.h5")
    assert same_bits(opened["layers/dense/vars/0"], array.T)
    fo.export(opened, tmp_path / "n.weights.h5", to="keras")
    with h5py.File(tmp_path / "n.weights.h5") as file:
        dataset = file["layers/dense/vars/0"]
        assert dataset.attrs["dtype"] == "bfloat16"
        assert dataset[()].tobytes() == array.tobytes()


def test_back_to_keras(rng, tmp_path):
    """The commands, and back into the same layout: nothing but the optimizer is lost."""
    for name, write in (("m.weights.h5", numbered), ("m.h5", lambda path, rng: named(path, rng, config=False))):
        source, packed, back = tmp_path / name, tmp_path / "p.safetensors", tmp_path / f"back.{name}"
        write(source, rng)
        run("unpack", source, "-o", packed)
        run("export", packed, "--to", "keras", "-o", back)
        (before, attributes), (after, theirs) = contents(source), contents(back)
        before = {name: array for name, array in before.items() if not name.startswith("optimizer")}
        assert before.keys() == after.keys()
        assert {name: attributes[name] for name in before} == theirs
        for path, array in before.items():
            assert (array is None and after[path] is None) or same_bits(np.asarray(array), np.asarray(after[path]))
        found = json.loads(run("diff", source, packed, "--json").stdout)
        assert found["total"]["rmse"] == 0 == len(found["missing"])
        run("unpack", source, "-o", tmp_path / "u.safetensors")
        assert len(json.loads(run("inspect", source, "--json").stdout)["tensors"]) == len(fo.load(packed))
    packed = fo.pack(tmp_path / "m.weights.h5", bits=8, min_size=1)
    fo.export(packed, tmp_path / "q.weights.h5", to="keras")
    with h5py.File(tmp_path / "q.weights.h5") as file:
        kernel = file["layers/conv2d/vars/0"][()]
    assert same_bits(kernel, packed.unpack()["layers/conv2d/vars/0"].transpose(2, 3, 1, 0))


def test_export_refuses(rng, tmp_path):
    with pytest.raises(ValueError, match=r"came from a \.keras or \.h5 file"):
        fo.export({"w": np.ones((2, 2), "f4")}, tmp_path / "m.weights.h5", to="keras")
    numbered(tmp_path / "m.weights.h5", rng)
    named(tmp_path / "old.h5", rng)
    for source, target in (("m.weights.h5", "n.h5"), ("old.h5", "n.weights.h5"), ("old.h5", "n.keras")):
        with pytest.raises(ValueError, match="Keras loads this layout from a file whose name ends in"):
            fo.export(tmp_path / source, tmp_path / target, to="keras")
        assert not (tmp_path / target).exists()
    bad = fo.PackedModel({"w": np.ones(3, "f4")}, metadata={"keras": '{"turned": {"w": [1, 1]}, "groups": {}}'})
    with pytest.raises(ValueError, match="is not what a file of Keras left"):
        fo.export(bad, tmp_path / "n.weights.h5", to="keras")


def test_a_missing_package_is_named_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("fastopt.formats.common.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"m\.keras: this needs h5py: pip install h5py"):
        fo.open_weights(tmp_path / "m.keras")


def link(file):
    file["layers/dense/vars/0"] = h5py.ExternalLink("/etc/passwd", "/x")


def soft(file):
    file["w"] = np.ones(3, "f4")
    file["v"] = h5py.SoftLink("/w")


def circle(file):
    file.create_group("a/b")
    file["a/b/c"] = file["a"]


def deep(file):
    file.create_group("/".join("a" * 90))


def stored_elsewhere(file):
    file.create_dataset("w", (9,), "f4", external=[("/etc/passwd", 0, 36)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(4,))
    file.create_virtual_dataset("w", layout)


def huge(file):
    file.create_dataset("w", (1 << 20, 1 << 20), "f4", chunks=(64, 64), compression="gzip")


def larger(file):
    file.create_dataset("w", (1 << 40, 1 << 40), "f4", chunks=(64, 64))


def texts(file):
    file["w"] = np.array([b"a", b"b"])


def kind(file):
    file["w"] = np.dtype("f4")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link, "is a link, which is not followed"),
        (soft, "is a link, which is not followed"),
        (circle, "nested in itself"),
        (deep, "too deeply"),
        (stored_elsewhere, "stored in another file"),
        (virtual, "stored in another file"),
        (huge, "'w' takes"),
        (larger, "a shape that memory could hold"),
        (texts, "expected numbers"),
        (kind, "neither a group nor a dataset"),
    ],
)
def test_hostile_files(make, message, tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        make(file)
    with pytest.raises(ValueError, match=message):
        fo.open_weights(tmp_path / "m.h5")
    archive(tmp_path / "m.keras", (tmp_path / "m.h5").read_bytes())
    with pytest.raises(ValueError, match=message):
        fo.open_weights(tmp_path / "m.keras")
    if "numbers" in message or "another file" in message or "hold" in message:
        assert len(fo.open_weights(tmp_path / "m.h5", skip="w")) == 0


def test_truncated(rng, tmp_path):
    numbered(tmp_path / "m.weights.h5", rng)
    content = (tmp_path / "m.weights.h5").read_bytes()
    archive(tmp_path / "m.keras", content)
    for whole, cut in ((content, "cut.h5"), ((tmp_path / "m.keras").read_bytes(), "cut.keras")):
        for length in range(0, len(whole), len(whole) // 40):
            (tmp_path / cut).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"cut"):
                fo.open_weights(tmp_path / cut)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.weights.h5", bytes(1 << 24))
    (tmp_path / "bomb.keras").write_bytes(bomb.getvalue())
    with pytest.raises(ValueError, match="not a sound file of Keras"):
        fo.open_weights(tmp_path / "bomb.keras")
    with zipfile.ZipFile(tmp_path / "none.keras", "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"has no model\.weights\.h5"):
        fo.open_weights(tmp_path / "none.keras")


def test_axes():
    assert turned_axes("dense", "bias", (4,), None) is None
    assert turned_axes("conv2d", "kernel", (3, 3, 4, 8), (4,)) == (2, 3, 0, 1)  # a bias of its last axis but one
    assert turned_axes("einsum_dense", "kernel", (3, 3), None) is None
    assert turned_axes("einsum_dense", "kernel", (3, 3), None, "...x,xy->...y") == (1, 0)
    assert turned_axes("einsum_dense", "kernel", (3, 3, 3), None, "...x,xy->...y") is None
