import contextlib
import errno
import json
import os
import stat
import sys
import textwrap
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import PEAK_MB, run_python, same_bits
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastopt as fo
from fastopt.files.safetensors_file import ALIGNMENT, PAD, MappedFile, part_of, write

RECIPE = fo.Recipe(
    bits=4,
    exclude=["*norm*"],
    overrides={
        "a.*": {"bits": 8},
        "b.*": {"fit": "lsq", "outliers": 0.01},
        "c.*": {"sparsity": 0.8},
        "d.*": {"bits": None, "pattern": "2:4"},
    },
    min_size=64,
)


@pytest.fixture
def weights(rng):
    return {
        "a.weight": rng.standard_normal((40, 33)).astype("f4"),
        "b.weight": rng.standard_normal((7, 5, 3, 3)).astype("f2"),
        "c.weight": rng.standard_normal((64, 64)).astype(ml_dtypes.bfloat16),
        "d.weight": rng.standard_normal((30, 70)).astype("f4"),
        "d.norm": rng.standard_normal(100),
        "ids": np.arange(5),
        "flag": np.array(True),
        "empty": np.zeros((0, 3), "f4"),
        "e.weight": rng.standard_normal((33, 65)).astype("f4"),
    }


# ---- the layout --------------------------------------------------------------------------------------------------


def test_every_tensor_is_aligned_and_the_library_agrees(weights, tmp_path):
    path = tmp_path / "m.safetensors"
    model = fo.pack(weights, recipe=RECIPE)
    model.save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    offsets = sorted(e["data_offsets"] for name, e in header.items() if name != "__metadata__")
    assert (8 + length) % ALIGNMENT == 0
    assert [begin for begin, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    assert 8 + length + offsets[-1][1] == len(content)
    for name, entry in header.items():
        if name != "__metadata__" and not name.startswith(PAD):
            assert entry["data_offsets"][0] % ALIGNMENT == 0
    arrays = load_file(path)
    for name, array in arrays.items():
        if name.startswith(PAD):
            assert array.dtype == np.uint8
            assert array.size < ALIGNMENT
            assert not array.any()
    assert np.array_equal(arrays["a.weight.codes"], model["a.weight"].codes)
    loaded = fo.load(path)
    assert list(loaded) == list(weights)
    assert loaded.recipe == RECIPE
    for part in (loaded["a.weight"].codes, loaded["c.weight"].values.codes, loaded["d.weight"].positions):
        assert part.ctypes.data % ALIGNMENT == 0
        assert not part.flags.writeable


def test_any_array_is_written(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    arrays = {
        "swapped": np.arange(5, dtype=">f4"),
        "strided": np.arange(20, dtype="i2").reshape(4, 5)[:, ::2],
        "fortran": np.asfortranarray(np.arange(6, dtype="u8").reshape(2, 3)),
        "scalar": np.array(3, "i8"),
        "none": np.zeros((3, 0), "f2"),
        "bf": np.arange(3).astype(ml_dtypes.bfloat16),
        "ünï": np.array([True, False]),
    }
    write(path, [part_of(name, array) for name, array in arrays.items()], {"a": "ä"})
    back = load_file(path)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(back[name], array)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"a": "ä"}
    monkeypatch.setattr("fastopt.files.safetensors_file._LONGEST_HEADER", 1000)
    with pytest.raises(ValueError, match=r"tensors: names make a header of 1\d\d\d bytes, expected at most 1000"):
        write(path, [part_of("x" * 1000, np.zeros(3))], {})
    with pytest.raises(ValueError, match=r"tensors: 'fastopt\.pad\.0' is a name that the format reserves"):
        write(path, [part_of(f"{PAD}0", np.zeros(3))], {})
    with pytest.raises(ValueError, match="tensors: two would be stored as 'w'"):
        write(path, [part_of("w", np.zeros(3)), part_of("w", np.zeros(3))], {})


@pytest.mark.parametrize("order", ["<", ">", "="])
@pytest.mark.parametrize(
    "dtype", ["f8", "f4", "f2", "bfloat16", "i8", "i4", "i2", "u8", "u4", "u2", "i1", "u1", "?", "c8"]
)
def test_any_byte_order_is_read_again(dtype, order, tmp_path, rng):
    path = tmp_path / "m.safetensors"
    w = rng.standard_normal((64, 80)) * 50
    w = (abs(w) if dtype[0] == "u" else w).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    w = w.astype(w.dtype.newbyteorder(order))
    for recipe in ({"bits": 8}, {"sparsity": 0.9}, {"bits": 4, "sparsity": 0.5}, {"bits": 4, "outliers": 0.01}):
        model = fo.pack({"w": w}, **recipe)
        model.save(path)
        assert same_bits(fo.load(path).unpack()["w"], model.unpack()["w"].astype(w.dtype.newbyteorder("=")))
    fo.save_checkpoint([w], path)
    assert same_bits(fo.load_checkpoint(path)[0], w.astype(w.dtype.newbyteorder("=")))
    if dtype != "bfloat16":
        np.savez(tmp_path / "m.npz", w=w)
        fo.pack_file(tmp_path / "m.npz", path, bits=8)
        assert same_bits(
            fo.load(path).unpack()["w"], fo.pack({"w": w}, bits=8).unpack()["w"].astype(w.dtype.newbyteorder("="))
        )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"\ud800": np.zeros(3)}, r"'\\ud800' is not valid Unicode"),
        ({"w": np.zeros((0, 1 << 59))}, "'w': shape: expected the sizes of up to 32 axes"),
        ({"__metadata__": np.zeros(3)}, "'__metadata__' is a name that the format reserves"),
        ({"w": fo.quantize(np.ones((8, 8), "f4")), "w.codes": np.zeros(3)}, "two would be stored as 'w.codes'"),
        ({0: np.zeros(3)}, "expected texts as names, got 0"),
        ({"l": [1, 2]}, "'l' is a list, expected a NumPy array"),
        ({"n": None}, "'n' is a NoneType, expected a NumPy array"),
        ({"o": np.array([None])}, "'o' has dtype object, which the file cannot hold"),
        ({"m": np.ma.masked_array([1.0], [True])}, "'m' is a masked array"),
    ],
)
def test_what_could_not_be_read_again_replaces_nothing(tensors, message, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises((TypeError, ValueError), match=message):
        fo.PackedModel(tensors).save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_checks_of_the_reader_come_before_the_replacement(weights, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    model = fo.pack(weights, recipe=RECIPE)
    model.save(path)
    whole = path.read_bytes()
    real = json.dumps

    def wrong(value, **options):
        return real(value, **options).replace("float32", "complex")

    monkeypatch.setattr("fastopt.files.container.json.dumps", wrong)
    with pytest.raises(ValueError, match=r"no reader would accept them: 'a\.weight': dtype: expected one of"):
        model.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == whole


def test_version_1_still_loads(rng, tmp_path):
    """Files as they were before padding, alignment and recipes."""
    w = rng.standard_normal((6, 40)).astype("f4")
    q, s = fo.quantize(w, outliers=0.05), fo.prune(w, sparsity=0.5).quantize(4)
    arrays = {
        "q.codes": q.codes,
        "q.scale": q.scale,
        "q.minimum": q.minimum,
        "q.outlier_index": q.outliers.indices,
        "q.outlier_value": q.outliers.values,
        "s.positions": s.positions,
        "s.row_offsets": s.row_offsets,
        "s.values.codes": s.values.codes,
        "s.values.scale": s.values.scale,
        "s.values.minimum": s.values.minimum,
        "fastopt.pad.7": w,  # a name like any other, then
    }
    quantized = {"kind": "quantized", "bits": 4, "group_size": 32, "dtype": "float32"}
    described = {
        "version": 1,
        "order": ["s", "fastopt.pad.7", "q"],
        "tensors": {
            "q": {**quantized, "shape": [6, 40], "outliers": 12},
            "s": {"kind": "sparse", "layout": "mask", "shape": [6, 40], "values": quantized},
        },
    }
    save_file(arrays, tmp_path / "m.safetensors", metadata={"fastopt": json.dumps(described)})
    loaded = fo.load(tmp_path / "m.safetensors")
    assert list(loaded) == ["s", "fastopt.pad.7", "q"]
    assert loaded["q"] == q
    assert loaded["s"] == s
    assert loaded.recipe is None


def test_loading_a_large_file_takes_no_memory(tmp_path):
    """One GB of codes, of which the disk holds nothing: their pages are never touched."""
    path = tmp_path / "m.safetensors"
    rows, cols = 1 << 15, 1 << 16
    scale = np.ones((rows, 1), "f2")
    about = {"kind": "quantized", "bits": 4, "group_size": -1, "dtype": "float32", "shape": [rows, cols]}
    described = {"version": 2, "order": ["w"], "tensors": {"w": about}}
    sizes = {"w.scale": scale.nbytes, "w.minimum": scale.nbytes, "w.codes": rows * cols // 2}
    header, at = {"__metadata__": {"fastopt": json.dumps(described)}}, 0
    for name, size in sizes.items():
        kind, shape = ("U8", [rows, cols // 2]) if name == "w.codes" else ("F16", [rows, 1])
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + scale.tobytes())
        file.truncate(8 + len(text) + at)
    assert path.stat().st_size > 1 << 30
    code = """
        import sys
        import numpy as np
        import fastopt as fo
        fo.linear(np.ones(64, "f4"), fo.quantize(np.ones((64, 64), "f4")))  # all that is made at first use
        before = peak_mb()
        w = fo.load(sys.argv[1])["w"]
        row = w[100:101].dequantize()
        print(peak_mb() - before)
        assert w.codes.nbytes == 1 << 30 and row.shape == (1, 1 << 16) and not row.any()
        """
    done = run_python(PEAK_MB + textwrap.dedent(code), path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


# ---- one tensor with several names, texts of other programs --------------------------------------------------------


def test_tied_tensors_are_stored_once(tmp_path, rng):
    embed, other = rng.standard_normal((128, 64)).astype("f4"), rng.standard_normal((128, 64)).astype("f4")
    weights = {"embed": embed, "fc": other, "head": embed, "bias": other[0], "bias2": other[0]}
    once = {"embed": embed, "fc": other, "bias": other[0]}
    model = fo.pack(weights, bits=4)
    assert model["head"] is model["embed"]
    assert model.nbytes == fo.pack(once, bits=4).nbytes == model.report(weights).nbytes
    model.save(tmp_path / "p.safetensors")
    loaded = fo.load(tmp_path / "p.safetensors")
    assert list(loaded) == list(weights)
    assert loaded["head"] is loaded["embed"]
    assert loaded["bias2"] is loaded["bias"]
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()

    # As safetensors.torch.save_model writes them, and back.
    save_file(once, tmp_path / "plain.safetensors", metadata={"head": "embed", "bias2": "bias", "format": "pt"})
    report = fo.pack_file(tmp_path / "plain.safetensors", tmp_path / "f.safetensors", bits=4)
    found = fo.load(tmp_path / "f.safetensors")
    assert set(found) == set(model)
    assert all(same_bits(found.unpack()[name], array) for name, array in model.unpack().items())
    assert report.nbytes == model.nbytes == found.nbytes
    assert report.nbytes_before == sum(w.nbytes for w in once.values())
    assert [(t.reason, t.nbytes) for t in report.tensors if t.name == "head"] == [("tied to embed", 0)]
    assert fo.pack_file(tmp_path / "plain.safetensors", bits=4, dry_run=True).nbytes == report.nbytes
    fo.unpack_file(tmp_path / "f.safetensors", tmp_path / "u.safetensors")
    assert sorted(load_file(tmp_path / "u.safetensors")) == sorted(once)
    with safe_open(tmp_path / "u.safetensors", "numpy") as file:
        assert file.metadata() == {"head": "embed", "bias2": "bias", "format": "pt"}
    for read in (fo.open_weights, lambda path: fo.load(path).unpack()):
        unpacked = read(tmp_path / "u.safetensors")
        assert all(same_bits(unpacked[name], array) for name, array in found.unpack().items())
    # Other options for one of the names.
    apart = fo.pack_file(
        tmp_path / "plain.safetensors", tmp_path / "f.safetensors", bits=4, overrides={"head": {"bits": 8}}
    )
    assert [t.bits for t in apart.tensors if t.name in ("head", "embed")] in ([4, 8], [8, 4])
    assert fo.load(tmp_path / "f.safetensors")["head"].bits == 8


def test_equal_arrays_are_not_tied(tmp_path):
    weights = {"a": np.ones((64, 64), "f4"), "b": np.ones((64, 64), "f4"), "e": np.zeros(0), "f": np.zeros(0)}
    model = fo.pack(weights, bits=4)
    assert model["a"] is not model["b"]
    model.save(tmp_path / "m.safetensors")
    assert "tied" not in json.loads(MappedFile(tmp_path / "m.safetensors").metadata["fastopt"])
    view = weights["a"]
    assert fo.pack({"a": view, "t": view.T, "half": view[:32]}, bits=4)["t"] is not model["a"]


def test_texts_of_other_programs_are_kept(weights, tmp_path):
    texts = {"format": "pt", "licence": "MIT", "ss_tag": '{"a": 1}'}
    save_file(weights, tmp_path / "m.safetensors", metadata=texts)
    fo.pack_file(tmp_path / "m.safetensors", tmp_path / "p.safetensors", RECIPE)
    fo.pack(tmp_path / "m.safetensors", RECIPE).save(tmp_path / "q.safetensors")
    fo.unpack_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    fo.pack_file(tmp_path / "p.safetensors", tmp_path / "s.index.json", bits=2)
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
    assert MappedFile(tmp_path / "u.safetensors").metadata == texts
    for path in ("m.safetensors", "p.safetensors", "u.safetensors", "s.index.json"):
        assert fo.load(tmp_path / path).metadata == texts
        assert fo.open_weights(tmp_path / path).metadata == texts
    assert not [name for name in load_file(tmp_path / "u.safetensors") if name.startswith(PAD)]


# ---- from file to file -------------------------------------------------------------------------------------------


def test_from_file_to_file_is_the_same_as_in_memory(weights, tmp_path, threads):
    save_file(weights, tmp_path / "m.safetensors")
    source = fo.open_weights(tmp_path / "m.safetensors")
    ordered = {name: weights[name] for name in source}
    model = fo.pack(ordered, recipe=RECIPE)
    model.save(tmp_path / "a.safetensors")
    seen = []
    report = fo.pack_file(
        tmp_path / "m.safetensors", tmp_path / "b.safetensors", RECIPE, notify=lambda *args: seen.append(args)
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert report == model.report(ordered)
    total = sum(w.nbytes for w in weights.values())
    assert [name for _, _, name in seen] == [*ordered, ""]
    assert [done for done, _, _ in seen] == list(np.cumsum([0, *(w.nbytes for w in ordered.values())]))
    assert {t for _, t, _ in seen} == {total}

    fo.unpack_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", notify=lambda *args: seen.append(args))
    back = load_file(tmp_path / "c.safetensors")
    for name, array in model.unpack().items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"{name}.safetensors" for name in "abcm"]


def test_dry_run_writes_nothing(weights, tmp_path):
    fo.PackedModel(weights).save(tmp_path / "m.safetensors")
    for target in ({}, {"target_bits": 12}):
        recipe = RECIPE if not target else fo.Recipe(min_size=64)
        planned = fo.pack_file(tmp_path / "m.safetensors", tmp_path / "x.safetensors", recipe, dry_run=True, **target)
        made = fo.pack_file(tmp_path / "m.safetensors", tmp_path / "y.safetensors", recipe, **target)
        assert [(t.name, t.kind, t.nbytes) for t in planned.tensors] == [
            (t.name, t.kind, t.nbytes) for t in made.tensors
        ]
        assert planned.error is None
        assert not (tmp_path / "x.safetensors").exists()


def test_pruning_a_file(weights, tmp_path):
    fo.PackedModel(weights).save(tmp_path / "m.safetensors")
    report = fo.pack_file(tmp_path / "m.safetensors", tmp_path / "p.safetensors", sparsity=0.75, exclude=["*norm*"])
    pruned = fo.load(tmp_path / "p.safetensors")
    assert pruned["c.weight"] == fo.prune(weights["c.weight"], sparsity=0.75)
    assert pruned["d.norm"].shape == (100,)
    assert {t.name: t.reason for t in report.tensors}["a.weight"] == "1320 weights, fewer than min_size 4096"
    with pytest.raises(TypeError, match="target: expected a path"):
        fo.pack_file(tmp_path / "m.safetensors", sparsity=0.75)
    assert fo.pack_file(tmp_path / "m.safetensors", bits=4, dry_run=True).nbytes > 0


def test_paths_and_checkpoints(weights, tmp_path):
    path = tmp_path / "m.safetensors"
    fo.pack(weights, bits=4).save(path)
    assert fo.inspect(path) == fo.inspect(fo.load(path))
    assert fo.diff(path, str(path)).total.max == 0
    assert fo.diff(fo.pack(path, bits=4), fo.pack(fo.open_weights(path), bits=4)).total.max == 0
    fo.export(path, tmp_path / "m.npz", to="npz")
    assert set(np.load(tmp_path / "m.npz")) >= {"c.weight"}
    fo.save_checkpoint({"w": weights["c.weight"]}, path)
    with pytest.raises(ValueError, match=r"is a checkpoint, not a model; read it with fastopt\.load_checkpoint"):
        fo.load(path)
    assert [*fo.open_weights(path)] == ["/w"]


def test_onto_itself(weights, tmp_path):
    path, other = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    fo.PackedModel(weights).save(path)
    fo.pack_file(path, other, RECIPE)
    plain = fo.load(other).unpack()
    fo.pack_file(path, path, RECIPE)
    assert path.read_bytes() == other.read_bytes()
    fo.unpack_file(path, path)
    assert all(np.array_equal(w, plain[name]) for name, w in fo.load(path).items())
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    fo.pack_file(path, link, RECIPE)
    assert link.is_symlink()
    assert "fastopt" in MappedFile(path).metadata


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are enforced on Linux alone")
def test_a_model_larger_than_its_memory(tmp_path):
    """Half a GB of float32 in 32 tensors goes through a process that may allocate a third of it, and back."""
    tensors, rows, cols = 32, 1 << 10, 1 << 12
    size = rows * cols * 4
    header = {
        f"{i:02}": {"dtype": "F32", "shape": [rows, cols], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    source, packed, back = (tmp_path / f"{name}.safetensors" for name in ("large", "packed", "back"))
    some = np.random.default_rng(0).standard_normal((16, cols)).astype("f4")
    with source.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(tensors):  # the rest is a hole: the disk holds nothing of it
            file.seek(8 + len(text) + i * size)
            file.write(some.tobytes())
        file.truncate(8 + len(text) + tensors * size)
    code = """
        import resource, sys
        import numpy as np
        import fastopt as fo
        fo.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_DATA, (SIZE << 20, SIZE << 20))
        try:
            np.ones(SIZE << 20, "u1")
        except MemoryError:
            pass  # the limit holds
        else:
            raise SystemExit("no limit")
        fo.pack_file(sys.argv[1], sys.argv[2], fo.Recipe(bits=2, group_size=-1, overrides={"0*": {"sparsity": 0.99}}))
        fo.unpack_file(sys.argv[2], sys.argv[3])
        print(peak_mb())
        """
    code = PEAK_MB + textwrap.dedent(code).replace("SIZE", "170")
    done = run_python(code, source, packed, back, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400  # MB, pages of mapped files included: fewer than the model has
    model = fo.load(packed)
    for name in ("00", "31"):
        w = MappedFile(source).array(name)
        expected = (
            fo.prune(w, sparsity=0.99, layout="index8").quantize(2, group_size=-1)
            if name == "00"
            else fo.quantize(w, 2, group_size=-1)
        )
        assert model[name] == expected
        assert np.array_equal(
            MappedFile(back).array(name), expected.to_dense() if name == "00" else expected.dequantize()
        )


# ---- shards ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(weights, tmp_path):
    """A model in two shards, as other libraries write them; return its index."""
    folder = tmp_path / "source"
    folder.mkdir()
    names = list(weights)
    placed = {}
    for i, some in enumerate((names[:4], names[4:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / file)
        placed |= dict.fromkeys(some, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index


def test_shards_in_shards_out(weights, sharded, tmp_path):
    source = fo.open_weights(sharded)
    assert {name: list(names) for name, names in source.shards.items()} == {
        "model-00001-of-00002.safetensors": [n for n in source if n in list(weights)[:4]],
        "model-00002-of-00002.safetensors": [n for n in source if n in list(weights)[4:]],
    }
    assert all(np.array_equal(source[name], w) for name, w in weights.items())
    assert list(fo.open_weights(sharded.parent)) == list(source)
    model = fo.pack(source, recipe=RECIPE)
    index = tmp_path / "small.safetensors.index.json"
    report = fo.pack_file(sharded, index, RECIPE)
    assert report == model.report(source)
    loaded = fo.load(index)
    assert list(loaded) == list(model)
    assert loaded.recipe == RECIPE
    assert all(same_bits(a, b) for a, b in zip(loaded.unpack().values(), model.unpack().values(), strict=True))
    described = json.loads(index.read_text())
    assert described["metadata"]["total_size"] == model.nbytes
    files = sorted(set(described["weight_map"].values()))
    assert [file[:21] for file in files] == ["small-00001-of-00002-", "small-00002-of-00002-"]
    for file in files:  # any reader opens them, and the index tells what is where
        stored = [name for name in load_file(tmp_path / file) if not name.startswith(PAD)]
        assert sorted(stored) == sorted(n for n, f in described["weight_map"].items() if f == file)

    again = tmp_path / "again" / "small.safetensors.index.json"
    again.parent.mkdir()
    fo.pack_file(sharded, again, RECIPE)
    assert again.read_bytes() == index.read_bytes()
    fo.pack_file(sharded, tmp_path / "one.safetensors", RECIPE)  # shards in, one file out
    assert list(fo.load(tmp_path / "one.safetensors")) == list(model)
    fo.unpack_file(index, index)  # what was packed gives way to what it is unpacked to
    assert all(np.array_equal(w, model.unpack()[name]) for name, w in fo.load(index).items())
    kept = set(json.loads(index.read_text())["weight_map"].values())
    assert kept == {file.name for file in tmp_path.glob("small-*")}
    assert not kept & set(files)
    fo.pack_file(sharded, sharded, RECIPE)  # onto itself: the original shards stay, as another wrote them
    assert "fastopt" in MappedFile(sharded.parent / next(iter(fo.open_weights(sharded).shards))).metadata
    assert (sharded.parent / "model-00001-of-00002.safetensors").exists()


def test_an_index_appears_when_all_shards_are_there(weights, sharded, tmp_path, monkeypatch):
    index = tmp_path / "small.index.json"
    fo.pack_file(sharded, index, RECIPE)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("small*")}
    real, left = os.fsync, []

    def fail(handle):
        if not left:
            raise OSError(errno.EIO, "Input/output error")
        left.pop()
        real(handle)

    for good in range(4):
        left[:] = [None] * good
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            fo.pack_file(sharded, index, fo.Recipe(bits=8, min_size=64))
        monkeypatch.undo()
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert fo.load(index).recipe == RECIPE
    left[:] = [None] * 4  # the index has been replaced, but whether that is on the disk is not known
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fo.pack_file(sharded, index, fo.Recipe(bits=8, min_size=64))
    monkeypatch.undo()
    assert fo.load(index).recipe == fo.Recipe(bits=8, min_size=64)
    assert len(fo.load(index)) == len(weights)


def test_bad_indices(sharded, weights, tmp_path):
    good = json.loads(sharded.read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a.weight": -weights["a.weight"]}, sharded.parent / "double.safetensors")
    for described, message in [
        ("{", "not an index of shards"),
        ("[" * 100_000, "not an index of shards"),
        ([], "expected a 'weight_map'"),
        ({"weight_map": ["a"]}, "expected a 'weight_map'"),
        ({"weight_map": {"a": 1}}, "expected a 'weight_map'"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"),
        (
            {"weight_map": {"a": "../secret.safetensors"}},
            "'a' is in '../secret.safetensors', expected the name of a file",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected the name of a file beside"),
        ({"weight_map": {"a": ".."}}, "expected the name of a file beside"),
        ({"weight_map": {"a": ""}}, "expected the name of a file beside"),
        ({"weight_map": {**good["weight_map"], "missing": first}}, f"'missing' is not in {first}"),
        ({"weight_map": {**good["weight_map"], "a.weight": second}}, f"'a.weight' is not in {second}"),
    ]:
        sharded.write_text(described if isinstance(described, str) else json.dumps(described))
        for read in (fo.load, fo.open_weights):
            with pytest.raises(ValueError, match=message):
                read(sharded)
    # An array that is missing is an error also if others are left out; the parts of those are not missed.
    save_file({"a.weight": weights["a.weight"]}, sharded.parent / "double.safetensors")
    placed = {"a.weight": "double.safetensors", "b.codes": "double.safetensors", "b.x.y": "double.safetensors"}
    sharded.write_text(json.dumps({"weight_map": placed}))
    assert list(fo.open_weights(sharded, skip="b")) == ["a.weight"]
    with pytest.raises(ValueError, match=r"'b\.x\.y' is not in double"):
        fo.open_weights(sharded, skip="b.codes")
    save_file({"a.weight": -weights["a.weight"]}, sharded.parent / "double.safetensors")
    # If a tensor is in two files, the one that the index names counts.
    doubled = {**good["weight_map"], "a.weight": "double.safetensors"}
    sharded.write_text(json.dumps({"weight_map": doubled}))
    for read in (fo.load, fo.open_weights):
        assert np.array_equal(read(sharded)["a.weight"], -weights["a.weight"])
    assert fo.open_weights(sharded).shards["double.safetensors"] == ["a.weight"]
    del doubled["a.weight"]
    sharded.write_text(json.dumps({"weight_map": {**doubled, "other": "double.safetensors"}}))
    save_file({"a.weight": weights["a.weight"], "other": np.ones(3)}, sharded.parent / "double.safetensors")
    for read in (fo.load, fo.open_weights):
        with pytest.raises(ValueError, match=r"'a\.weight' is in two shards"):
            read(sharded)
    sharded.write_text(json.dumps({"weight_map": {"a": "nowhere.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fo.load(sharded)


# ---- other formats -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overrides")  # that array is left out
def test_numpy_files(weights, tmp_path):
    plain = {name: w for name, w in weights.items() if w.dtype != ml_dtypes.bfloat16}
    plain["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "m.npz", **plain)
        opened = fo.open_weights(tmp_path / "m.npz")
        assert sorted(opened) == sorted(plain)
        for name, w in plain.items():
            assert opened.spec(name) == (w.shape, w.dtype)
            assert np.array_equal(opened[name], w)
        assert opened.nbytes == sum(w.nbytes for w in plain.values())
        assert opened.shards is None
    (tmp_path / "folder").mkdir()
    for name, w in plain.items():
        np.save(tmp_path / "folder" / f"{name}.npy", w)
    opened = fo.open_weights(tmp_path / "folder")
    assert all(np.array_equal(opened[name], w) for name, w in plain.items())
    assert list(opened) == sorted(plain)
    assert repr(opened) == f"Weights({len(plain)} arrays, {opened.nbytes:,} bytes)"
    one = fo.open_weights(tmp_path / "folder" / "a.weight.npy")
    assert np.array_equal(one["a.weight"], plain["a.weight"])
    report = fo.pack_file(tmp_path / "folder", tmp_path / "m.safetensors", RECIPE)
    others = fo.pack_file(tmp_path / "m.npz", tmp_path / "n.safetensors", RECIPE)
    assert sorted(report.tensors, key=lambda t: t.name) == sorted(others.tensors, key=lambda t: t.name)


def test_torch_files(weights, tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        "a.weight": torch.from_numpy(weights["a.weight"]),
        "view": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
        "bf": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "bf.T": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "grad": torch.nn.Parameter(torch.ones(3)),
        "ids": torch.arange(5),
        "none": torch.zeros(0, 4),
    }
    for name, content, options in [
        ("new.pt", state, {}),
        ("old.pth", state, {"_use_new_zipfile_serialization": False}),
        ("lightning.bin", {"state_dict": state, "epoch": 3}, {}),
    ]:
        torch.save(content, tmp_path / name, **options)
        opened = fo.open_weights(tmp_path / name)
        assert list(opened) == list(state)
        for key, tensor in state.items():
            assert opened.spec(key)[0] == tuple(tensor.shape)
            assert np.array_equal(opened[key].astype("f4"), tensor.detach().float().numpy())
        assert opened["bf"].dtype == opened["bf.T"].dtype == ml_dtypes.bfloat16
    for content, message in [
        ([1], "expected a state dict, got a list"),
        ({"a": 1}, "'a' is a int, expected a tensor"),
        ({"s": torch.eye(3).to_sparse()}, "'s' is stored as torch.sparse_coo, expected a dense tensor"),
        ({"m": torch.zeros(3, device="meta")}, "'m' has no content"),
        ({"e": torch.zeros(1).expand(10**9)}, "'e' takes 4000000000 bytes, the file has"),
    ]:
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            fo.open_weights(tmp_path / "bad.pt")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", w=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match=r"evil\.pt: not a state dict of torch"):
        fo.open_weights(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.npz: 'w': holds Python objects, expected numbers"):
        fo.open_weights(tmp_path / "evil.npz")
    assert not (tmp_path / "pwned").exists()


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pt").write_bytes(b"")
    with pytest.raises(ImportError, match=r"m\.pt: a file of torch needs torch: pip install torch"):
        fo.open_weights(tmp_path / "m.pt")


def test_bad_files_of_other_formats(tmp_path):
    np.save(tmp_path / "w.npy", np.zeros((100, 100)))
    whole = (tmp_path / "w.npy").read_bytes()
    for content, message in [
        (whole[:-1], r"w\.npy: expected 80128 bytes, got 80127"),
        (whole + b"x", "expected 80128 bytes, got 80129"),
        (b"", "not an array of NumPy"),
        (b"\x93NUMPY\x03\x00" + whole[8:], "not an array of NumPy: version"),
        (whole.replace(b"<f8", b"|O8"), "holds Python objects"),
        (whole.replace(b"(100, 100), ", b"(9999999999,)"[:12]), "not an array|expected"),
        (whole.replace(b"(100, 100)", b"(-10, -10)"), "not an array|expected"),
        (whole.replace(b"(100, 100)", b"(99999999,)"[:10]), "not an array|expected"),
    ]:
        (tmp_path / "w.npy").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            fo.open_weights(tmp_path / "w.npy")
    for name, content, message in [
        ("m.npz", b"PK\x03\x04 no", "m.npz"),
        ("m.npz", b"", "m.npz"),
        ("m.npz", whole, "m.npz: not a .npz file"),
        ("m.safetensors", b"nonsense", "not a safetensors file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            fo.open_weights(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("w.npy", whole[:-1])
    with pytest.raises(ValueError, match=r"m\.npz: 'w' has 80127 bytes, expected 80128"):
        fo.open_weights(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", w=np.arange(1000))
    content = bytearray((tmp_path / "m.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "m.npz").write_bytes(content)
    opened = fo.open_weights(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"m\.npz: 'w\.npy' cannot be read: Bad CRC-32"):
        opened["w"]
    with pytest.raises(
        ValueError, match=r"expected one \.index\.json, one \.safetensors file or \.npy files, found 0, 1 and 1"
    ):
        fo.open_weights(tmp_path)
    with pytest.raises(FileNotFoundError):
        fo.open_weights(tmp_path / "nothing.npz")


# ---- whole or not at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["m.safetensors", "m.index.json"])
def test_killed_while_it_writes(target, weights, tmp_path):
    """Whenever the process is killed, there is the old model, or the new one."""
    fo.PackedModel(weights).save(tmp_path / "source.safetensors")
    done = run_python(
        """
        import itertools, os, signal, sys
        from pathlib import Path
        import fastopt as fo
        from fastopt.files import safetensors_file as files

        source, target = "source.safetensors", sys.argv[1]
        recipes = [fo.Recipe(bits=bits, min_size=1) for bits in (4, 8)]
        whole = [fo.pack(fo.open_weights(source), recipe=recipe) for recipe in recipes]

        def killed_at(step):
            left = [step]

            def counted(function):
                def call(*args, **kwargs):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return function(*args, **kwargs)
                return call

            os.fsync, files.write_array = map(counted, (os.fsync, files.write_array))
            Path.replace, Path.unlink = map(counted, (Path.replace, Path.unlink))
            fo.pack_file(source, target, recipes[1])
            os._exit(0)

        fo.pack_file(source, target, recipes[0])
        for step in itertools.count():
            child = os.fork()
            if child == 0:
                killed_at(step)
            status = os.waitpid(child, 0)[1]
            model = fo.load(target)
            same = [m.recipe == model.recipe and all(t.tobytes() == m.unpack()[n].tobytes()
                    for n, t in model.unpack().items()) for m in whole]
            print("old" if same[0] else "new" if same[1] else "neither")
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
        """,
        target,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found == sorted(found, reverse=True)  # old until it is replaced, then new
    assert found.count("old") > 10
    assert found[-2:] == ["new", "new"]  # killed once between the replacement and the end


def test_a_full_disk_is_one_clear_error(weights, tmp_path):
    fo.PackedModel({**weights, "large": np.zeros((300, 1000), "f4")}).save(tmp_path / "source.safetensors")
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    code = """
        import resource, sys
        import fastopt as fo
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        weights = fo.open_weights(sys.argv[1])
        for write in (
            lambda: fo.PackedModel(weights).save(sys.argv[2]),
            lambda: fo.pack_file(sys.argv[1], sys.argv[2], fo.Recipe(bits=8)),
            lambda: fo.unpack_file(sys.argv[1], sys.argv[2]),
            lambda: fo.unpack_file(sys.argv[1], sys.argv[2] + ".index.json"),
            lambda: fo.save_checkpoint({"w": weights["large"]}, sys.argv[2]),
        ):
            try:
                write()
            except OSError as error:
                print(f"{error.strerror}: {error.filename}")
        """
    done = run_python(code, tmp_path / "source.safetensors", path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith(f"{os.strerror(errno.EFBIG)}: {tmp_path}/")
        assert ".part" not in line
    assert path.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.safetensors", "source.safetensors"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.zeros((64, 64), "f4"))
    folder = tmp_path / "locked"
    folder.mkdir()
    tmp_path.chmod(0o755)
    (folder / "m.safetensors").write_bytes(b"old")
    folder.chmod(0o555)
    code = """
        import os, sys
        import numpy as np
        import fastopt as fo
        source, target = sys.argv[1:]
        opened = fo.open_weights(source)
        w = opened["w"]
        if os.getuid() == 0:
            os.setuid(65534)
        for write in (
            lambda: fo.pack({"w": w}, bits=8).save(target),
            lambda: fo.save_checkpoint({"w": w}, target),
        ):
            try:
                write()
            except PermissionError as error:
                print(f"{error.strerror}: {error.filename}")
        """
    parents = [p for p in tmp_path.parents if p.stat().st_uid == os.getuid() and p != Path("/")]
    with contextlib.ExitStack() as stack:
        for parent in parents:  # pytest locks its folders for others
            mode = stat.S_IMODE(parent.stat().st_mode)
            parent.chmod(mode | 0o555)
            stack.callback(parent.chmod, mode)
        done = run_python(code, tmp_path / "m.npz", folder / "m.safetensors")
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"Permission denied: {folder / 'm.safetensors'}"] * 2
    assert (folder / "m.safetensors").read_bytes() == b"old"


def test_what_cannot_be_stored_is_named(tmp_path):
    np.savez(tmp_path / "m.npz", good=np.zeros(3), bad=np.zeros(3, complex))
    for convert in (
        lambda: fo.pack_file(tmp_path / "m.npz", tmp_path / "x.safetensors", fo.Recipe(bits=8)),
        lambda: fo.unpack_file(tmp_path / "m.npz", tmp_path / "x.safetensors"),
    ):
        with pytest.raises(TypeError, match="tensors: 'bad' has dtype complex128, which the file cannot hold"):
            convert()
    np.savez(tmp_path / "m.npz", good=np.zeros(3, "f4"), bad=np.full(5000, np.nan))
    with pytest.raises(ValueError, match="'bad': w: expected finite float32 values, got nan"):
        fo.pack_file(tmp_path / "m.npz", tmp_path / "x.safetensors", fo.Recipe(bits=8))
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{tmp_path}'"):
        fo.pack_file(tmp_path / "m.npz", tmp_path, fo.Recipe())
    with pytest.raises(FileNotFoundError, match="nowhere/x"):
        fo.unpack_file(tmp_path / "m.npz", tmp_path / "nowhere" / "x.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["m.npz"]
