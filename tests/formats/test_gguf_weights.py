"""GGUF files come in with their codes unchanged, and go out with their metadata."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from helpers import same_bits
from test_cli import run

import fastopt as fo
from fastopt._types import BITS

gguf = pytest.importorskip("gguf", reason="the extra `export` is not installed")

AFFINE = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
VALUES = {
    "general.architecture": ("llama", "STRING"),
    "general.name": ("n\u00e4me", "STRING"),
    "llama.block_count": (30, "UINT32"),
    "llama.rope.freq_base": (1e5, "FLOAT32"),
    "llama.big": (1 << 60, "UINT64"),
    "llama.negative": (-5, "INT8"),
    "llama.double": (0.1, "FLOAT64"),
    "llama.yes": (True, "BOOL"),
    "tokenizer.ggml.tokens": (["a", "", "\u0120b", b"\xff\xfe"], "ARRAY", "STRING"),
    "tokenizer.ggml.scores": ([0.5, -1.0, float("inf")], "ARRAY", "FLOAT32"),
    "tokenizer.ggml.types": ([1, 2, 3], "ARRAY", "INT32"),
}


def blocks(rng, kind, *shape):
    """Bytes of random blocks whose numbers are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    if kind.name in AFFINE:  # these begin with one or two numbers of 16 bits
        params = 2 if kind.name.endswith("_1") else 1
        raw[..., : 2 * params] = rng.standard_normal((*raw.shape[:-1], params)).astype("f2").view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(path, tensors, values=VALUES, alignment=None):
    """Write a file by the gguf package; a tensor is an array, or a type and its bytes."""
    writer = gguf.GGUFWriter(path, values.get("general.architecture", ("none",))[0])
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (value, kind, *of) in values.items():
        types = [gguf.GGUFValueType[k] for k in (kind, *of)]
        if key != "general.architecture":
            writer.add_key_value(key, value, *types)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=tensor[0])
        elif tensor.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(name, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors(rng):
    kinds = {name: gguf.GGMLQuantizationType[name] for name in AFFINE}
    return {
        **{name: (kind, blocks(rng, kind, 6, 96)) for name, kind in kinds.items()},
        "cube": (kinds["Q4_0"], blocks(rng, kinds["Q4_0"], 2, 3, 64)),
        "row": (kinds["Q8_0"], blocks(rng, kinds["Q8_0"], 160)),
        "f4": rng.standard_normal((3, 5)).astype("f4"),
        "f2": rng.standard_normal((3, 5)).astype("f2"),
        "f8": rng.standard_normal(7),
        "bf16": rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
        "i4": np.arange(5, dtype="i4"),
    }


@pytest.mark.filterwarnings("ignore:.*tensors are decoded")
def test_codes_come_in_as_they_are(tensors, tmp_path):
    path = write(tmp_path / "m.gguf", tensors, alignment=64)
    opened = fo.open_weights(path)
    assert list(opened) == list(tensors)
    model = fo.pack(path, include=())
    for name, tensor in tensors.items():
        if not isinstance(tensor, tuple):
            assert same_bits(opened[name], tensor), name
            continue
        kind, raw = tensor
        want = gguf.dequantize(raw, kind)
        assert opened[name].dtype == np.float32
        assert np.array_equal(opened[name], want), name  # 0 times a negative scale is -0 there
        if AFFINE[kind.name] in BITS:
            q = model[name]
            assert (q.bits, q.group_size, q.scale.dtype, q.shape) == (AFFINE[kind.name], 32, np.float16, want.shape)
            x = np.random.default_rng(1).standard_normal((3, want[0].size)).astype("f4")
            if want.ndim == 2:
                for precision, close in (("exact", 1e-6), ("int8", 2e-2)):
                    got, expected = fo.linear(x, q, precision=precision), x @ want.T
                    assert np.linalg.norm(got - expected) < close * np.linalg.norm(expected), (name, precision)


@pytest.mark.filterwarnings("ignore:.*tensors are decoded")
def test_a_large_scale_has_a_minimum_in_float32(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = np.zeros((2, 34), np.uint8)
    raw[:, :2] = np.array([[60000], [1e-7]], "f2").view(np.uint8)
    raw[:, 2:] = np.arange(64).reshape(2, 32) * 4
    path = write(tmp_path / "m.gguf", {"w": (kind, raw)})
    assert fo.pack(path, include=())["w"].scale.dtype == np.float32
    assert np.array_equal(fo.open_weights(path)["w"], gguf.dequantize(raw, kind))


def test_other_types_are_decoded_and_named(rng, tmp_path):
    kind = gguf.GGMLQuantizationType.TQ2_0
    raw = blocks(rng, kind, 4, 256)
    raw[:, -2:] = np.ones((4, 1), "f2").view(np.uint8)
    path = write(tmp_path / "m.gguf", {"w": (kind, raw), "b": np.ones(3, "f4")})
    with pytest.warns(UserWarning, match=r"tensors are decoded.*1 of type TQ2_0"):
        opened = fo.open_weights(path)
    assert same_bits(opened["w"], gguf.dequantize(raw, kind))
    assert fo.open_weights(path, skip="w").spec("b") == ((3,), np.dtype("f4"))


@pytest.mark.filterwarnings("ignore:.*tensors are decoded")
def test_back_to_gguf(tensors, tmp_path):
    """Through a file of fastopt, everything is as it was, metadata included."""
    source = write(tmp_path / "m.gguf", tensors)
    run("pack", source, "-o", tmp_path / "m.safetensors", "--include", "*", "--min-size", 10**9)
    run("export", tmp_path / "m.safetensors", "--to", "gguf", "-o", tmp_path / "back.gguf")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "back.gguf")
    types = [{t.name: t.tensor_type for t in reader.tensors if len(t.shape) > 1} for reader in (before, after)]
    assert types[0] == types[1]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        if len(one.shape) > 1:
            assert same_bits(np.asarray(one.data), np.asarray(other.data)), one.name
        assert one.shape.tolist() == other.shape.tolist()
    for key, (value, *_) in VALUES.items():
        if key != "tokenizer.ggml.tokens":
            assert after.fields[key].contents() == before.fields[key].contents(), key
        field = after.fields[key]
        assert [bytes(part) for part in field.parts] == [bytes(part) for part in before.fields[key].parts], (key, value)
    assert after.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    fo.export(source, tmp_path / "back.gguf", to="gguf", architecture="other")
    assert gguf.GGUFReader(tmp_path / "back.gguf").fields["general.architecture"].contents() == "other"


def test_packed_again(rng, tmp_path):
    """Fewer bits keep the metadata; weights of one axis become numbers, as llama.cpp wants them."""
    weights = {"blk.0.w": rng.standard_normal((64, 128)).astype("f4"), "norm": np.ones(8192, "f4")}
    source = write(tmp_path / "m.gguf", weights)
    fo.pack_file(source, tmp_path / "m.safetensors", bits=4)
    fo.export(tmp_path / "m.safetensors", tmp_path / "small.gguf", to="gguf")
    after = gguf.GGUFReader(tmp_path / "small.gguf")
    assert {t.name: t.tensor_type.name for t in after.tensors} == {"blk.0.w": "Q4_1", "norm": "F32"}
    assert after.fields["llama.block_count"].contents() == 30
    bad = fo.PackedModel(weights, metadata={"gguf": '{"a": 3}'})
    with pytest.raises(ValueError, match="is not what a GGUF file left"):
        fo.export(bad, tmp_path / "bad.gguf", to="gguf")
    assert not (tmp_path / "bad.gguf").exists()


def test_commands(tensors, tmp_path):
    source = write(tmp_path / "model.bin2", tensors)  # by its first bytes
    told = {t["name"]: t for t in json.loads(run("inspect", source, "--json").stdout)["tensors"]}
    assert (told["Q4_0"]["kind"], told["Q4_0"]["bits"]) == ("quantized", 4)
    run("unpack", source, "-o", tmp_path / "u.safetensors")
    found = json.loads(run("diff", tmp_path / "u.safetensors", source, "--json").stdout)
    assert found["total"]["rmse"] == 0
    assert [t["different"] for t in found["tensors"]] == [0] * len(tensors)
    run("pack", source, "-o", tmp_path / "p.safetensors")  # as it is
    assert fo.load(tmp_path / "p.safetensors")["Q8_0"].bits == 8
    for file in (source, tmp_path / "p.safetensors"):
        run("export", file, "--to", "gguf", "-o", tmp_path / "out.gguf", "--rename", "Q4=four", "--exclude", "f8")
        names = [t.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors]
        assert names == [name.replace("Q4", "four") for name in tensors if name != "f8"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(source.read_bytes())
    assert list(fo.open_weights(folder)) == list(tensors)


def header(*parts):
    return b"GGUF" + b"".join(struct.pack("<" + code, value) if code else value for code, value in parts)


def text(content):
    return struct.pack("<Q", len(content)) + content


HOSTILE = {
    "version": (header(("I", 1), ("Q", 0), ("Q", 0)), "expected version 2 or 3, got 1"),
    "big-endian": (header(("I", 3 << 24), ("Q", 0), ("Q", 0)), "big-endian"),
    "counts": (header(("I", 3), ("Q", 1 << 63), ("Q", 0)), "is there twice"),
    "values": (header(("I", 3), ("Q", 0), ("Q", (1 << 64) - 1)), "is there twice"),
    "key": (header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 1 << 62)), "ends early"),
    "array": (header(("I", 3), ("Q", 0), ("Q", 1), ("", text(b"k")), ("I", 9), ("I", 4), ("Q", 1 << 61)), "ends early"),
    "texts": (header(("I", 3), ("Q", 0), ("Q", 1), ("", text(b"k")), ("I", 9), ("I", 8), ("Q", 1 << 61)), "ends early"),
    "deep": (header(("I", 3), ("Q", 0), ("Q", 1), ("", text(b"k")), ("I", 9), ("I", 9), ("Q", 1)), "arrays of arrays"),
    "kind": (header(("I", 3), ("Q", 0), ("Q", 1), ("", text(b"k")), ("I", 99)), "a value of type 99"),
    "axes": (header(("I", 3), ("Q", 1), ("Q", 0), ("", text(b"w")), ("I", 1 << 31)), "expected up to 4 axes"),
    "sizes": (
        header(("I", 3), ("Q", 1), ("Q", 0), ("", text(b"w")), ("I", 2), ("Q", 1 << 40), ("Q", 1 << 40), ("Q", 0)),
        "sizes that memory could hold",
    ),
    "outside": (
        header(("I", 3), ("Q", 1), ("Q", 0), ("", text(b"w")), ("I", 1), ("Q", 99), ("I", 0), ("Q", 1 << 40)),
        "the file has",
    ),
    "place": (
        header(("I", 3), ("Q", 1), ("Q", 0), ("", text(b"w")), ("I", 1), ("Q", 1), ("I", 0), ("Q", 7)),
        "a multiple of 32",
    ),
    "type": (
        header(("I", 3), ("Q", 1), ("Q", 0), ("", text(b"w")), ("I", 1), ("Q", 1), ("I", 77), ("Q", 0)),
        "has type 77",
    ),
    "blocks": (
        header(("I", 3), ("Q", 1), ("Q", 0), ("", text(b"w")), ("I", 1), ("Q", 33), ("I", 2), ("Q", 0)),
        "has blocks of 32",
    ),
    "alignment": (
        header(("I", 3), ("Q", 0), ("Q", 1), ("", text(b"general.alignment")), ("I", 4), ("I", 3)),
        "expected a power of 2",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(content, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content + bytes(64))
    with pytest.raises(ValueError, match=message):
        fo.open_weights(tmp_path / "m.gguf")


def test_truncated_and_overlapping(tensors, tmp_path):
    content = write(tmp_path / "m.gguf", tensors).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(content) - 4000, 41):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            fo.open_weights(path)
    twice = header(("I", 3), ("Q", 2), ("Q", 0))
    for name in (b"a", b"b"):
        twice += text(name) + struct.pack("<IQIQ", 1, 8, 0, 0)
    path.write_bytes(twice + bytes(256))
    with pytest.raises(ValueError, match="'a' and 'b' overlap"):
        fo.open_weights(path)


# ---- models in several files ----------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path, rng):
    """A model in three files, as llama.cpp splits it: the metadata is in the first."""
    tensors = {f"blk.{i}.weight": rng.standard_normal((4, 32)).astype("f4") for i in range(5)}
    folder = tmp_path / "split"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    writer.add_string("general.name", "whole")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, tensors


@pytest.mark.parametrize("which", ["folder", 1, 3])
def test_any_part_of_a_split_model_opens_all_of_it(split, which):
    folder, tensors = split
    path = folder if which == "folder" else folder / f"m-{which:05}-of-00003.gguf"
    weights = fo.open_weights(path)
    assert list(weights) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(weights[name], tensor)
    assert json.loads(weights.metadata["gguf"])["general.name"] == ["STRING", "whole"]


def test_a_split_model_goes_out_as_one_file(split, tmp_path):
    folder, tensors = split
    fo.export(fo.pack(folder, bits=4, min_size=0), tmp_path / "one.gguf", to="gguf")
    weights = fo.open_weights(tmp_path / "one.gguf")
    assert set(weights) == set(tensors)
    metadata = json.loads(weights.metadata["gguf"])
    assert metadata["general.architecture"] == ["STRING", "llama"]
    assert not any(key.startswith("split.") for key in metadata)


def test_a_missing_part_is_named(split):
    folder, _ = split
    (folder / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf: not found; .* is one of 3 parts"):
        fo.open_weights(folder / "m-00001-of-00003.gguf")


@pytest.mark.parametrize("name", ["m-00002-of-00003.gguf", "renamed.gguf"])
def test_a_part_that_is_not_what_its_name_says_is_refused(split, name):
    folder, _ = split
    (folder / name).write_bytes((folder / "m-00001-of-00003.gguf").read_bytes())
    with pytest.raises(
        ValueError, match=r"expected part \d of \d, as its name says, got split\.no 0 and split\.count 3"
    ):
        fo.open_weights(folder / name)
