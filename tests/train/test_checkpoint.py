import json

import ml_dtypes
import numpy as np
import pytest
from helpers import same_bits
from safetensors.numpy import save_file

import fastopt as fo

pytestmark = pytest.mark.kernel


def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path, rng):
    for options in (
        {},
        {"state_dtype": "bfloat16"},
        {"state_dtype": "uint8", "max_norm": 1.0},
        {"amsgrad": True, "lr": lambda step: 0.01 / (step + 1)},
    ):
        grads = [[rng.standard_normal((30, 20)).astype("f4"), rng.standard_normal(7).astype("f4")] for _ in range(10)]
        params = [rng.standard_normal((30, 20)).astype("f4"), rng.standard_normal(7).astype("f4")]
        opt = fo.Adam(params, **options)
        for g in grads[:5]:
            opt.step([g[0], None] if g is grads[2] else g)
        fo.save_checkpoint(
            {"params": params, "optimizer": opt.state_dict(), "note": "half-way"}, tmp_path / "c.safetensors"
        )
        for g in grads[5:]:
            opt.step(g)

        saved = fo.load_checkpoint(tmp_path / "c.safetensors")
        assert saved["note"] == "half-way"
        resumed = fo.Adam(saved["params"], **options)
        resumed.load_state_dict(saved["optimizer"])
        for g in grads[5:]:
            resumed.step(g)
        assert all(same_bits(a, b) for a, b in zip(params, saved["params"], strict=True))


def test_what_a_file_holds(tmp_path):
    tree = {
        "a": [1, 2.5, "text", None, True, {"b": np.arange(3), "c": []}],
        "bf16": np.ones(2, ml_dtypes.bfloat16),
        "scalar": np.float32(1.5),
        "empty": np.zeros((0, 3)),
        "strided": np.arange(10)[::2],
        "array": {"array": 3},
    }
    fo.save_checkpoint(tree, tmp_path / "c.safetensors")
    back = fo.load_checkpoint(tmp_path / "c.safetensors")
    assert back["a"][:5] == [1, 2.5, "text", None, True]
    assert back["a"][5]["b"].tolist() == [0, 1, 2]
    assert back["a"][5]["c"] == []
    assert back["bf16"].dtype == ml_dtypes.bfloat16
    assert back["scalar"] == 1.5
    assert back["empty"].shape == (0, 3)
    assert back["strided"].tolist() == [0, 2, 4, 6, 8]
    assert back["array"] == {"array": 3}
    back["strided"][0] = 7  # a copy, which may be changed


def test_keys_that_look_like_paths_keep_their_own_arrays(tmp_path):
    tree = {
        "a": {"b": np.zeros(2)},
        "a/b": np.ones(3),
        "a/b#2": np.full(1, 2),
        "": {"": np.full(1, 3)},
        "/": np.full(1, 4),
    }
    fo.save_checkpoint(tree, tmp_path / "c.safetensors")
    back = fo.load_checkpoint(tmp_path / "c.safetensors")
    for ours, theirs in zip(
        [back["a"]["b"], *(back[k] for k in ("a/b", "a/b#2", "/")), back[""][""]],
        [tree["a"]["b"], *(tree[k] for k in ("a/b", "a/b#2", "/")), tree[""][""]],
        strict=True,
    ):
        assert same_bits(ours, theirs)


def test_a_tree_that_could_not_be_read_again_replaces_nothing(tmp_path):
    path = tmp_path / "c.safetensors"

    def nested(levels):
        tree = {"w": np.arange(3)}
        for i in range(levels):
            tree = [tree] if i % 2 else {"a": tree}
        return tree

    fo.save_checkpoint(nested(99), path)
    whole = path.read_bytes()
    tree = fo.load_checkpoint(path)
    for i in reversed(range(99)):
        tree = tree[0] if i % 2 else tree["a"]
    assert tree["w"].tolist() == [0, 1, 2]
    for bad, error, message in [
        (nested(3000), ValueError, r"tree: /.*is nested more than 100 levels deep"),
        (nested(100), ValueError, "more than 100 levels"),
        ({"n": 10**5000}, ValueError, "tree: /n is an integer of more than 4000 digits"),
        ({"\ud800": np.zeros(3)}, ValueError, r"tensors: '/\\ud800' is not valid Unicode"),
        ({"m": np.ma.masked_array([1, 2], [True, False])}, TypeError, "tensors: '/m' is a masked array"),
        ({"e": np.zeros((0, 1 << 59))}, ValueError, "'/e': shape: expected the sizes of up to 32 axes"),
    ]:
        with pytest.raises(error, match=message):
            fo.save_checkpoint(bad, path)
        assert path.read_bytes() == whole
    fo.save_checkpoint({"n": -(10**4000), "\ud800": "\udfff", "x": float("inf")}, path)
    assert fo.load_checkpoint(path) == {"n": -(10**4000), "\ud800": "\udfff", "x": float("inf")}


def test_an_array_is_read_once(tmp_path):
    """A name takes fewer bytes than an array: two hundred thousand names of one array are no tree of ours."""
    path = tmp_path / "c.safetensors"
    tree = [{"array": "/0"}] * 200_000
    text = json.dumps({"version": 1, "tree": tree})
    save_file({"/0": np.zeros(1 << 20, "u1")}, path, metadata={"fastopt.checkpoint": text})
    with pytest.raises(ValueError, match="not a checkpoint of fastopt: KeyError"):
        fo.load_checkpoint(path)


def test_bad_trees_and_files(tmp_path):
    path = tmp_path / "c.safetensors"
    for scalar in (np.complex64(1), np.datetime64("2020-01-01"), np.longdouble(1)):
        with pytest.raises(TypeError, match=r"tree: /a/0 is a .*, which a file cannot hold"):
            fo.save_checkpoint({"a": [scalar]}, path)
    with pytest.raises(TypeError, match="tree: /a/0 is a set, which a file cannot hold"):
        fo.save_checkpoint({"a": [{1}]}, path)
    with pytest.raises(TypeError, match="tree: /a has the key 1, expected a string"):
        fo.save_checkpoint({"a": {1: 2}}, path)
    assert not path.exists()
    for metadata in (
        {},
        {"fastopt.checkpoint": "{"},
        {"fastopt.checkpoint": json.dumps({"version": 2, "tree": 1})},
        {"fastopt.checkpoint": json.dumps({"version": 1, "tree": {"array": "missing"}})},
        {"fastopt.checkpoint": json.dumps({"version": 1, "tree": {"array": []}})},
        {"fastopt.checkpoint": json.dumps({"version": 1, "tree": {"dict": 3}})},
        {"fastopt.checkpoint": '{"version": 1, "tree": ' + "[" * 100000},
    ):
        save_file({"a": np.zeros(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match="not a checkpoint of fastopt"):
            fo.load_checkpoint(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        fo.load_checkpoint(path)
