"""Files that lie: each is refused by a ValueError that says where, before memory is taken for what it claims."""

import importlib.util
import json
import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from fuzz.targets import load_and_use, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import fastopt as fo

# ---- the container -----------------------------------------------------------------------------------------------

F32 = '"dtype":"F32"'


def raw(header, data=b"", length=None):
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x00" * 8, "not a safetensors file"),
        (b"\x02\x00\x00", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"PK\x03\x04 a zip, really" * 10, "not a safetensors file"),
        (raw("{}", length=1 << 40), "not a safetensors file"),
        (raw("{}", length=3), "not a safetensors file"),
        (raw("[]"), "not a safetensors file"),
        (raw("{"), "not a safetensors file"),
        (raw(b"\xff{}"), "not a safetensors file"),
        (raw("[" * 1_000_000), "not a safetensors file"),
        (raw('{"a":' * 100_000), "not a safetensors file"),
        (raw("{}", b"rest"), "not a safetensors file"),
        (raw(f'{{"a":{{{F32},"shape":[2],"data_offsets":[0,8]}}}}', b"1234"), "not a safetensors file"),
        (
            raw(f'{{"a":{{{F32},"shape":[1],"data_offsets":[4,8]}}}}', b"12345678"),
            "'a' starts at byte 4 of the data",
        ),  # a hole
        (
            raw(f'{{"a":{{{F32},"shape":[2],"data_offsets":[0,4]}}}}', b"1234"),
            r"'a': F32 of shape \(2,\) has 8 bytes, got 4",
        ),  # short
        (raw(f'{{"a":{{{F32},"shape":[1],"data_offsets":[4,0]}}}}', b"1234"), "'a': F32 of shape"),  # backwards
        (raw(f'{{"a":{{{F32},"shape":[-1],"data_offsets":[0,4]}}}}', b"1234"), "not a safetensors file"),
        (raw(f'{{"a":{{{F32},"shape":[1.0],"data_offsets":[0,4]}}}}', b"1234"), "not a safetensors file"),
        (raw(f'{{"a":{{{F32},"shape":[1e99],"data_offsets":[0,4]}}}}', b"1234"), "not a safetensors file"),
        (raw(f'{{"a":{{{F32},"shape":[{"9" * 5000}],"data_offsets":[0,4]}}}}', b"1234"), "not a safetensors file"),
        (
            raw(f'{{"a":{{{F32},"shape":[{1 << 62},{1 << 62}],"data_offsets":[0,4]}}}}', b"1234"),
            "not a safetensors file",
        ),
        (raw(f'{{"a":{{{F32},"shape":[0,{1 << 62}],"data_offsets":[0,0]}}}}'), "'a': shape: expected the sizes of"),
        (raw(f'{{"a":{{{F32},"shape":[0{",1" * 40}],"data_offsets":[0,0]}}}}'), "'a': shape: expected the sizes of"),
        (raw('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"), "not a safetensors file"),
        (
            raw('{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', b"1234"),
            "'a' has dtype F4, which NumPy",
        ),
        (
            raw(
                f'{{"a":{{{F32},"shape":[1],"data_offsets":[0,4]}},"b":{{{F32},"shape":[1],"data_offsets":[0,4]}}}}',
                b"1234",
            ),
            "'b' starts at byte 0 of the data, expected 4",  # an overlap
        ),
        (
            raw(
                f'{{"a":{{{F32},"shape":[1],"data_offsets":[0,4]}},"a":{{{F32},"shape":[1],"data_offsets":[0,4]}}}}',
                b"1234",
            ),
            "'a' is there twice",
        ),
        (raw('{"__metadata__":{"fastopt":"{}","fastopt":"{}"}}'), "'fastopt' is there twice"),
        (raw('{"a":{"dtype":"F4","shape":[7],"data_offsets":[0,4]}}', b"1234"), "F4 of shape .* has 3.5 bytes, got 4"),
        (
            raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}', b"1234"),
            "data_offsets: expected two numbers",
        ),
        (raw('{"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}}', b"1234"), "dtype: expected a dtype of the format"),
        (raw('{"a":1}'), "'a': expected a JSON object, got int"),
        (raw('{"__metadata__":[]}'), "__metadata__: expected a map of texts"),
        (raw('{"__metadata__":{"fastopt":1}}'), "not a safetensors file"),
        (raw('{"__metadata__":{"fastopt":"' + "[" * 100_000 + '"}}'), "metadata: nested too deeply|metadata"),
    ],
)
def test_containers_that_lie(content, message, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    for read in (fo.load, fo.open_weights, fo.load_checkpoint):
        with pytest.raises(
            ValueError, match=message if read is not fo.load_checkpoint else f"{message}|not a checkpoint"
        ):
            read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(content) + (1 << 23)


def test_nothing_is_a_model_too(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(raw("{}"))
    assert len(fo.load(tmp_path / "m.safetensors")) == 0


# ---- bounds of memory and time -----------------------------------------------------------------------------------


def bounded(read, size, seconds=2.0):
    """Call what must raise ValueError, in at most 64 bytes of memory for each byte of the file, and in little time."""
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"m\.\w+"):
        read()
    took = time.process_time() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * size + (1 << 23)
    assert took < seconds


N = 40_000


@pytest.mark.parametrize(
    "header",
    [
        "{" + ",".join(f'"{i:05}":1' for i in [*range(N), N - 1]) + "}",
        "{" + ",".join(['"a":1'] * N) + "}",
        "{" + ",".join(['"":{}'] * N) + "}",
        '{"a":[' + "[]," * N + "[]]}",
        '{"a":[' + "{}," * N + "{}]}",
        '{"a":[' + '{"":1},' * N + "{}]}",
        '{"a":[' + "1," * N + "1]}",
        '{"a":{"dtype":"F32","shape":[' + "1," * N + '1],"data_offsets":[0,4]}}',
        '{"a":"' + "\\ud83d\\ude00" * N + '"}',
        '{"a":"\U0001f600' + "x" * 10 * N + '"}',
        '{"a":' + "9" * 4000 + "}",
        '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(N)) + ',"0":""}}',
        '{"__metadata__":{"fastopt":"[' + "[]," * N + '[]]"}}',
        '{"__metadata__":{"fastopt.checkpoint":"' + "[1," * N + '"}}',
    ],
    ids=range(14),
)
def test_headers_take_little_memory_and_time(header, tmp_path):
    path = tmp_path / "m.safetensors"
    content = raw(header)
    path.write_bytes(content)
    for read in (fo.load, fo.load_checkpoint):
        bounded(lambda read=read: read(path), len(content))


def npy(header, data=b"", version=(1, 0), length=None):
    header = header.encode("latin-1") if isinstance(header, str) else header
    width = 2 if version == (1, 0) else 4
    length = len(header) if length is None else length
    return b"\x93NUMPY" + bytes(version) + length.to_bytes(width, "little") + header + data


def about_npy(descr="'<f4'", shape="(2,)", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    "content",
    [
        npy(about_npy("'|V0'", "(-1,)")),
        npy(about_npy("'|V0'", "(4,)")),
        npy(about_npy("'|S0'", "(4,)")),
        npy(about_npy("'<U0'", "(0,)")),
        npy(about_npy("'<U1'"), b"\xff" * 8),
        npy(about_npy("'|V4'"), bytes(8)),
        npy(about_npy("'<M8[s]'"), bytes(16)),
        npy(about_npy("'|O'"), bytes(16)),
        npy(about_npy("[('a', '<f4')]"), bytes(8)),
        npy(about_npy("('<f4', (1000000000,))"), bytes(8)),
        npy(about_npy("'<f4,<f4'"), bytes(16)),
        npy(about_npy("None"), bytes(16)),
        npy(about_npy("float"), bytes(16)),
        npy(about_npy(shape="(-2, -1)"), bytes(8)),
        npy(about_npy(shape=f"({10**21},)"), bytes(8)),
        npy(about_npy(shape=f"({1 << 62}, {1 << 62})"), bytes(8)),
        npy(about_npy(shape=f"(0, {1 << 62})")),
        npy(about_npy(shape="(" + "1," * 64 + ")"), bytes(4)),
        npy(about_npy(shape="(True, 2)"), bytes(8)),
        npy(about_npy(shape="(2.0,)"), bytes(8)),
        npy(about_npy(shape="[2]"), bytes(8)),
        npy(about_npy(order="1"), bytes(8)),
        npy("[" * 9000),
        npy("(" * 150 + ")" * 150),
        npy("-" * 9000 + "1"),
        npy("{" + "'a':{" * 1500),
        npy("{'descr': '<f4', 'shape': (2,)}", bytes(8)),
        npy("print(1)"),
        npy(b"\x00" * 20),
        npy(about_npy() + " " * 20_000, bytes(8)),
        npy(about_npy(), bytes(8), version=(2, 0), length=1 << 31),
        npy(about_npy(), bytes(8), version=(9, 9)),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff",
    ],
    ids=range(34),
)
def test_arrays_that_lie(content, tmp_path):
    path, archive = tmp_path / "m.npy", tmp_path / "m.npz"
    path.write_bytes(content)
    bounded(lambda: fo.open_weights(path), len(content))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(archive, "w", method) as opened:
            opened.writestr("w.npy", content)
        bounded(lambda: fo.open_weights(archive), archive.stat().st_size)
        assert list(fo.open_weights(archive, skip="w")) == []
    (tmp_path / "m").mkdir()
    path.rename(tmp_path / "m" / "m.npy")
    bounded(lambda: fo.open_weights(tmp_path / "m"), len(content))


def test_sound_arrays_of_every_kind_are_read(tmp_path):
    arrays = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">i4"),
        "none": np.zeros((0, 3), "f2"),
        "scalar": np.array(1j),
        "flag": np.array([True, False]),
    }
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    opened = fo.open_weights(tmp_path / "m.npz")
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        for found in (opened[name], fo.open_weights(tmp_path / f"{name}.npy")[name]):
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)
    (tmp_path / "old.npy").write_bytes(npy(about_npy(shape="(2L,)"), np.ones(2, "<f4").tobytes()))
    assert fo.open_weights(tmp_path / "old.npy")["old"].tolist() == [1, 1]


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return bytearray(path.read_bytes())


def test_archives_that_lie(tmp_path):
    path = tmp_path / "m.npz"
    whole = npy(about_npy(shape="(1000,)"), bytes(4000))
    header = npy(about_npy(), version=(2, 0), length=(1 << 32) - 1)
    zipped(path, {"w.npy": header + bytes(1 << 24)})  # 16 MB of header in 16 kB
    bounded(lambda: fo.open_weights(path), path.stat().st_size)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # which make thousands of bytes of one
        zipped(path, {"w.npy": whole}, method)
        with pytest.raises(ValueError, match=r"'w' is compressed by method 1\d, expected deflate or none"):
            fo.open_weights(path)
    zipped(path, {"w.npy": whole, "w": whole})
    with pytest.raises(ValueError, match=r"has two arrays of one name, 'w'"):
        fo.open_weights(path)
    # Two entries of the directory over one content.
    content = zipped(path, {"a.npy": whole, "b.npy": whole}, zipfile.ZIP_STORED)
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = bytes(4)
    del content[content.index(b"PK\x03\x04", 4) : content.index(b"PK\x01\x02")]
    end = content.rindex(b"PK\x05\x06")
    content[end + 16 : end + 20] = content.index(b"PK\x01\x02").to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.npz"):
        fo.open_weights(path)
    # Fields of the directory: version needed, method, sizes, offset, flags.
    for offset, width in [(4, 2), (6, 2), (8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)]:
        for value in (0, 1, 65, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF):
            content = zipped(path, {"w.npy": whole})
            entry = content.rindex(b"PK\x01\x02") + offset
            content[entry : entry + width] = (value & (256**width - 1)).to_bytes(width, "little")
            path.write_bytes(content)
            try:
                opened = fo.open_weights(path)
                assert all(array.nbytes == 4000 for array in opened.values())
            except ValueError as error:
                assert "m.npz" in str(error)  # noqa: PT017


def test_pointers_and_other_formats_are_named(tmp_path):
    for name, content, message in [
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        ("m.index.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "not a safetensors file but an HDF5 file"),
        ("m.gguf", b"GGUF\x03\x00\x00\x00" + bytes(99), "not a safetensors file but a GGUF file"),
        ("m.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(99), "not a safetensors file but a TFLite file"),
        ("m.pkl", pickle.dumps([1] * 999), "a pickle, which is not read"),
        ("m.keras", b"PK\x03\x04" + bytes(99), "not a safetensors file but a zip archive"),
        ("m.safetensors", b"<!DOCTYPE html><html>Not found", "not a safetensors file but a text"),
        ("m.safetensors", b"", "not a safetensors file: it has 0 bytes"),
    ]:
        (tmp_path / name).write_bytes(content)
        readers = (fo.load, fo.open_weights) if "index" in name else (fo.load, fo.open_weights, fo.load_checkpoint)
        # open_weights knows these formats.
        for read in readers if not name.endswith((".h5", ".gguf", ".keras")) else (fo.load, fo.load_checkpoint):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / name)
    for name in ("m.npz", "m.npy", "m.onnx.data", "model", *(["m.onnx"] if importlib.util.find_spec("onnx") else [])):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match="a pointer of git-lfs"):
            fo.open_weights(tmp_path / name)
    (tmp_path / "m.joblib").write_bytes(b"x\x9c" + bytes(99))
    for read in (fo.open_weights, fo.inspect):
        with pytest.raises(ValueError, match=r"TFLite file; expected \.safetensors, \.index\.json, \.npz.*\.gguf"):
            read(tmp_path / "m.tflite")
        with pytest.raises(ValueError, match="is a pickle, which is not read, as it could run code; load it"):
            read(tmp_path / "m.joblib")


# ---- the description ---------------------------------------------------------------------------------------------

W = np.random.default_rng(1).standard_normal((6, 40)).astype("f4")
TENSORS = {
    "q": fo.quantize(W, 4, outliers=0.02),
    "mask": fo.prune(W, sparsity=0.5),
    "index16": fo.prune(W, sparsity=0.8, layout="index16"),
    "index8": fo.prune(W, sparsity=0.8, layout="index8"),
    "1x16": fo.prune(W, sparsity=0.5, pattern="1x16"),
    "2:4": fo.prune(W, pattern="2:4"),
    "sq": fo.prune(W, sparsity=0.5, layout="mask").quantize(4),
    "two": fo.quantize(W, 4, group_size=16, param_bits=6),
    "plain": W,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    fo.PackedModel(TENSORS, fo.Recipe(bits=4)).save(path)
    return path.read_bytes()


def parts_of(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load_file(path), json.loads(header["__metadata__"]["fastopt"])


def refused(tmp_path, whole, change, message):
    """Load what is made of a sound file by changing its arrays or what it says of them."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(whole)
    arrays, about = parts_of(path)
    about = change(arrays, about) or about
    save_file(arrays, path, metadata={"fastopt": about if isinstance(about, str) else json.dumps(about)})
    size = path.stat().st_size
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        fo.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * size + (1 << 23)


def test_the_sound_file_loads(tmp_path, whole):
    path = tmp_path / "m.safetensors"
    path.write_bytes(whole)
    model = fo.load(path)
    assert model["q"] == TENSORS["q"]
    assert all(model[name] == s for name, s in TENSORS.items() if isinstance(s, fo.SparseTensor))
    use(model)


def about(**changes):
    return lambda arrays, about: {**about, **changes}


def entry(name, **changes):
    def change(arrays, about):
        about["tensors"][name].update(changes)

    return change


def values(**changes):
    return lambda arrays, about: about["tensors"]["sq"]["values"].update(changes)


def array(name, make):
    return lambda arrays, about: arrays.update({name: np.ascontiguousarray(make(arrays[name]))})


def element(name, place, value):
    return lambda arrays, about: arrays[name].reshape(-1).__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # the text
        (lambda arrays, about: "[" * 100_000, "metadata: nested too deeply"),
        (lambda arrays, about: '{"version": ' * 100_000, "metadata: nested too deeply"),
        (lambda arrays, about: "{", "Expecting"),
        (lambda arrays, about: '{"version": 2, "version": 2}', "'version' is there twice"),
        (lambda arrays, about: '{"version": 2, "tensors": {"q": {}, "q": {}}}', "'q' is there twice"),
        (lambda arrays, about: "[]", "metadata: expected a JSON object, got list"),
        (lambda arrays, about: "{}", "version: expected int, got None"),
        (about(version=4), "metadata: expected format version 1 to 3, got 4"),
        (about(version=0), "metadata: expected format version 1 to 3, got 0"),
        (about(version=True), "version: expected int"),
        (about(version="2"), "version: expected int"),
        (about(order=None), "order: expected list"),
        (about(order=["q"]), "order does not name the tensors"),
        (about(order=[*TENSORS, "q"]), "order does not name the tensors"),
        (about(order=[[], {}]), "order does not name the tensors"),
        (about(order=list(range(len(TENSORS)))), "order does not name the tensors"),
        (about(tensors=[]), "tensors: expected dict"),
        (about(tensors={}), "order does not name the tensors"),
        (about(tensors={"q": 1}), "'q': entry: expected a JSON object, got int"),
        (about(recipe=1), "recipe: expected dict"),
        (about(recipe={"bits": 7}), "bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        (about(recipe={"bits": [4]}), "bits: expected 8, 6, 5, 4, 3 or 2"),
        (about(recipe={"speed": 3}), "recipe: unknown options"),
        (about(recipe={"overrides": {"*": {"bits": {}}}}), "overrides"),
        (about(recipe={"param_dtype": "nonsense"}), "param_dtype: expected float16 or float32, got 'nonsense'"),
        (about(recipe={"param_dtype": [1]}), r"param_dtype: expected float16 or float32, got \[1\]"),
        (about(recipe={"sparsity": "most"}), "sparsity: expected a number, got 'most'"),
        (about(tied=[]), "tied: expected dict"),
        (about(tied={"new": "nowhere"}), "tied: 'new': expected another name of a stored tensor, got 'nowhere'"),
        (about(tied={"new": ["q"]}), "tied: 'new': expected another name"),
        (about(tied={"q": "plain"}), "tied: 'q': expected another name"),
        (about(tied={"a": "b", "b": "q"}), "tied: 'a': expected another name"),
        (about(tied={"new": "q"}), "order does not name the tensors"),
        (about(tied={str(i): "plain" for i in range(20_000)}), "tied: expected names of at most 1032 times the bytes"),
        # quantized tensors
        (entry("q", kind="zip"), "'q': kind: expected one of"),
        (entry("q", kind=[]), "'q': kind: expected str"),
        (entry("q", kind="sparse"), "'q': layout: expected str"),
        (entry("q", bits=7), "'q': bits: expected 8, 6, 5, 4, 3 or 2"),
        (entry("q", bits=4.0), "'q': bits: expected int"),
        (entry("q", bits=8), r"'q': codes: expected shape \(6, 40\), got \(6, 20\)"),
        (entry("q", group_size=-7), "'q': group_size: expected"),
        (entry("q", group_size=0), "'q': group_size: expected"),
        (entry("q", group_size=1 << 70), "'q': group_size: expected"),
        (entry("q", group_size="auto"), "'q': group_size: expected int or NoneType"),
        (entry("q", group_size=8), r"'q': scale: expected shape \(6, 5\)"),
        (entry("q", group_size=None), r"'q': scale: expected shape \(1, 1\)"),
        # parameters in two levels
        (entry("q", param_bits=4), "'q': 'q.param_floats' is missing"),
        (entry("two", param_bits=5), "'two': param_bits: expected 4, 6, 8 or None"),
        (entry("two", param_bits=None), "'two': param_bits: expected int, got None"),
        (entry("two", param_bits=True), "'two': param_bits: expected int"),
        (entry("two", param_bits=4), r"'two': scale: expected shape \(6, 2\), got \(6, 3\)"),
        (entry("two", param_group=128), "'two': param_group: expected -1, a row, or 256"),
        (entry("two", param_group="row"), "'two': param_group: expected int"),
        (entry("two", group_size=None), "'two': group_size: expected a number of columns"),
        (entry("two", group_size=24, param_group=256), "'two': group_size: expected a divisor of param_group"),
        (lambda arrays, about: about["tensors"]["two"].pop("param_group"), "'two': param_group: expected int"),
        (lambda arrays, about: about["tensors"]["two"].pop("param_bits"), "'two': scale, minimum: expected float16"),
        (array("two.param_floats", lambda a: a[..., :1]), r"'two': param_floats: expected shape \(6, 1, 2\) or 3"),
        (array("two.param_floats", lambda a: a[1:]), "'two': param_floats: expected shape"),
        (array("two.param_floats", lambda a: a.astype("f8")), "'two': param_floats: expected float16 or float32"),
        (array("two.scale", lambda a: a[:, 1:]), "'two': scale: expected shape"),
        (array("two.minimum", lambda a: a.astype("f2")), "'two': scale, minimum: expected uint8"),
        (entry("q", dtype="complex64"), "'q': dtype: expected one of"),
        (entry("q", dtype="int8"), "'q': dtype: expected one of"),
        (entry("q", shape=[6, 42]), r"'q': codes: expected shape \(6, 21\)"),
        (entry("q", shape=[6, -40]), "'q': shape: expected the sizes"),
        (entry("q", shape=[True, 40]), "'q': shape: expected the sizes"),
        (entry("q", shape=[6.0, 40]), "'q': shape: expected the sizes"),
        (entry("q", shape="6"), "'q': shape: expected list"),
        (entry("q", shape=[1 << 40, 1 << 40]), "'q': shape: expected the sizes"),
        (entry("q", shape=[0, 1 << 62]), "'q': shape: expected the sizes"),
        (entry("q", shape=[1] * 1000), "'q': shape: expected the sizes"),
        (entry("q", shape=[1 << 58]), "'q': codes: expected shape"),
        (entry("q", outliers=4), "'q': outliers: expected 4, got shape"),
        (entry("q", outliers="5"), "'q': outliers: expected int"),
        (entry("q", outliers=-1), "'q': outliers: expected -1, got shape"),
        (array("q.codes", lambda a: a[:, :-1]), r"'q': codes: expected shape \(6, 20\), got \(6, 19\)"),
        (array("q.codes", lambda a: a.view("i1")), "'q': codes: expected uint8, got int8"),
        (array("q.codes", lambda a: a.reshape(-1)), "'q': codes: expected shape"),
        (array("q.scale", lambda a: a.astype("f8")), "'q': scale, minimum: expected float16 or float32"),
        (array("q.scale", lambda a: a.astype("f4")), "'q': scale, minimum: expected float16 or float32, the same"),
        (array("q.minimum", lambda a: a[:-1]), "'q': minimum: expected shape"),
        (element("q.outlier_index", -1, 240), "'q': outlier_index: expected rising places below 240"),
        (element("q.outlier_index", 0, (1 << 32) - 1), "'q': outlier_index: expected rising places"),
        (element("q.outlier_index", 1, 0), "'q': outlier_index: expected rising places"),
        (array("q.outlier_index", lambda a: a.astype("i8") - 300), "'q': outlier_index: expected rising places"),
        (array("q.outlier_index", lambda a: a.astype("f4")), "'q': outlier_index: expected uint32 or int64"),
        (array("q.outlier_index", lambda a: a.reshape(1, -1)), "'q': outliers: expected 5, got shape"),
        (
            array("q.outlier_value", lambda a: a[1:]),
            "'q': outlier_index, outlier_value: expected one dimension of equal",
        ),
        (array("q.outlier_value", lambda a: a.astype("f8")), "'q': outlier_value: expected float32"),
        (lambda arrays, about: arrays.pop("q.codes"), r"'q': 'q\.codes' is missing"),
        (lambda arrays, about: arrays.pop("q.outlier_index"), r"'q': 'q\.outlier_index' is missing"),
        (lambda arrays, about: arrays.update(q=W), "'q' is stored both packed and plain"),
        # sparse tensors
        (entry("mask", layout="csr"), "'mask': layout: expected 'mask'"),
        (entry("mask", layout="block"), "'mask': layout: expected 'mask'"),
        (entry("mask", layout="9:8"), "'mask': layout: expected 'mask'"),
        (entry("mask", layout="index16"), "'mask': positions: expected"),
        (entry("mask", layout="1x16"), "'mask': "),
        (entry("mask", layout="2:4"), "'mask': positions: expected 2:4"),
        (entry("mask", shape=[5, 48]), "'mask': row_offsets: expected 6 elements"),
        (entry("mask", shape=[6, 48]), r"'mask': positions: expected shape \(6, 6\)"),
        (entry("mask", shape=[6, 39]), "'mask': positions: row . has bits set behind its last column"),
        (entry("mask", values={}), "'mask': bits: expected int|'mask': .*expected"),
        (
            array("mask.positions", lambda a: a ^ np.eye(1, a.size, 7, dtype="u1").reshape(a.shape)),
            "positions: row 1 has",
        ),
        (array("mask.positions", lambda a: a.astype("u2")), "'mask': positions: expected uint8"),
        (array("mask.values", lambda a: a[1:]), "'mask': row_offsets: must rise from 0 to the number of entries"),
        (array("mask.values", lambda a: a.reshape(2, -1)), "'mask': values: expected one dimension"),
        (array("mask.values", lambda a: a.astype("i4")), "'mask': values: expected float32"),
        (array("mask.row_offsets", lambda a: a.astype("i4")), "'mask': row_offsets: expected int64"),
        (array("mask.row_offsets", lambda a: a[:-1]), "'mask': row_offsets: expected 7 elements"),
        (array("mask.row_offsets", lambda a: a[:0]), "'mask': row_offsets: expected 7 elements"),
        (element("mask.row_offsets", 0, -4), "'mask': row_offsets: must rise"),
        (element("mask.row_offsets", 3, 1 << 60), "'mask': row_offsets: must rise"),
        (element("mask.row_offsets", 3, -(1 << 63)), "'mask': row_offsets: must rise"),
        (element("mask.row_offsets", -1, 1 << 62), "'mask': row_offsets: must rise"),
        (lambda arrays, about: arrays.pop("mask.values"), r"'mask': 'mask\.values' is missing"),
        (element("index16.positions", 0, 41), "'index16': positions: row 0"),
        (element("index16.positions", 1, 0), "'index16': positions: row 0: columns must rise"),
        (entry("index16", shape=[6, 1 << 17]), "'index16': layout: index16 has up to 65536 columns"),
        (array("index16.positions", lambda a: a.reshape(2, -1)), "'index16': positions: expected one dimension"),
        (array("index16.positions", lambda a: a[1:]), "'index16': positions: expected"),
        (element("index8.positions", 0, 255), "'index8': positions: row 0: expected columns below 40"),
        (entry("index8", shape=[6, 20]), "'index8': positions: row .: expected columns below 20"),
        (array("1x16.values", lambda a: a[1:]), "'1x16': values: expected a multiple of 16"),
        (entry("1x16", layout="mask"), "'1x16': "),
        (element("1x16.positions", 0, 0xFF), "'1x16': positions: row 0 has"),
        (element("2:4.positions", 0, 0b01110001), "'2:4': positions: expected 2:4 of each columns"),
        # both
        (values(bits=7), "'sq': bits: expected 8, 6, 5, 4, 3 or 2"),
        (values(group_size=7), "'sq': scale: expected shape"),
        (values(outliers=0), "'sq': 'sq.values.outlier_index' is missing"),
        (array("sq.row_offsets", lambda a: a * 1000), "'sq': codes: expected shape"),
        (array("sq.row_offsets", lambda a: a.astype("f8")), "'sq': row_offsets: expected int64"),
        (element("sq.row_offsets", -1, -5), "'sq': row_offsets: expected to rise"),
        (element("sq.row_offsets", -1, 1 << 62), "'sq': row_offsets: expected to rise"),
        (array("sq.row_offsets", lambda a: a[:0]), "'sq': row_offsets: expected int64, at least one"),
        (
            lambda arrays, about: (
                about["tensors"]["sq"]["values"].update(outliers=1),
                arrays.update(
                    {"sq.values.outlier_index": np.zeros(1, "u4"), "sq.values.outlier_value": np.ones(1, "f4")}
                ),
            )[2:],
            "'sq': values: expected none with outliers",
        ),
    ],
)
def test_descriptions_that_lie(change, message, tmp_path, whole):
    def changed(arrays, about):
        made = change(arrays, about)
        return made if isinstance(made, str) or (isinstance(made, dict) and "version" in made) else None

    refused(tmp_path, whole, changed, message)


def test_truncated_anywhere(tmp_path, whole):
    path = tmp_path / "m.safetensors"
    for end in range(0, len(whole), 61):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="not a safetensors file"):
            fo.load(path)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.sampled_from([0, 0, 0, -1, -20, 1, 100]),
    in_header=st.booleans(),
)
def test_mutated_files_load_or_raise(whole, tmp_path, changes, length, in_header):
    """Whatever the bytes: a ValueError, or a model that can be used without a crash."""
    content = bytearray(whole)
    end = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    for place, byte in changes:
        content[min(int(place * end), end - 1)] = byte
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[:length] if length < 0 else content + bytes(length))
    load_and_use(path)
