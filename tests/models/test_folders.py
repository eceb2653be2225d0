"""Folders of models go in and out with the files beside the weights."""

import json

import numpy as np
import pytest

import fastopt as fo

CONFIG = {"architectures": ["Toy"], "model_type": "toy", "title": "Modèle"}


@pytest.fixture
def weights(rng):
    return {f"{i}.weight": rng.standard_normal((64, 96)).astype("float32") for i in range(4)}


@pytest.fixture
def folder(tmp_path, weights):
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    fo.PackedModel(weights).save(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "1_Pooling" / "config.json").write_text("[]")
    (folder / "flax_model.msgpack").write_bytes(b"weights")
    (folder / ".cache").mkdir()
    return folder


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


COPIED = ["1_Pooling/config.json", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_goes_in_and_out(folder, weights, tmp_path, exists):
    small, back = tmp_path / "toy-3.2", tmp_path / "back"
    if exists:
        small.mkdir()
    report = fo.pack_file(folder, small, bits=8)
    assert report.nbytes < report.nbytes_before / 3
    assert names_in(small) == sorted([*COPIED, "model.safetensors"])
    assert json.loads((small / "config.json").read_bytes()) == {
        **CONFIG,
        "quantization_config": {"quant_method": "fastopt"},
    }
    assert (small / "1_Pooling" / "config.json").read_text() == "[]"
    packed = fo.load(small)
    assert packed["0.weight"] == fo.quantize(weights["0.weight"], bits=8)
    fo.unpack_file(small, back)
    assert names_in(back) == names_in(small)
    assert json.loads((back / "config.json").read_bytes()) == CONFIG
    assert np.array_equal(fo.load(back)["3.weight"], packed["3.weight"].dequantize())


def test_in_place(folder):
    before = names_in(folder)
    fo.pack_file(folder, folder, bits=8)
    assert names_in(folder) == before
    assert fo.load(folder)["0.weight"].bits == 8
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    fo.pack_file(folder, folder, bits=8)
    fo.unpack_file(folder, folder)
    assert json.loads((folder / "config.json").read_bytes()) == CONFIG


def test_shards(folder, weights, tmp_path):
    (folder / "model.safetensors").unlink()
    placed = {}
    for i, name in enumerate(weights):
        file = f"model-{i % 2 + 1:05}-of-00002.safetensors"
        placed[name] = file
    for file in set(placed.values()):
        fo.PackedModel({name: w for name, w in weights.items() if placed[name] == file}).save(folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    small = tmp_path / "small"
    fo.pack_file(folder, small, bits=4)
    assert [name for name in names_in(small) if "safetensors" not in name] == COPIED
    assert len(list(small.glob("model-*.safetensors"))) == 2
    assert dict(fo.load(small)) == dict(fo.pack(weights, bits=4))
    fo.pack_file(folder, small, bits=8)  # again: the old shards go
    assert len(list(small.glob("model-*.safetensors"))) == 2
    assert fo.load(small)["1.weight"].bits == 8
    one = tmp_path / "one"
    one.mkdir()
    fo.PackedModel(weights).save(one / "model.safetensors")
    with pytest.raises(ValueError, match=r"small: holds other weights, model\.safetensors\.index\.json"):
        fo.pack_file(one, small, bits=8)


def test_names_of_files_and_of_folders(folder, tmp_path):
    fo.pack_file(folder, tmp_path / "file.safetensors", bits=8)
    assert not (tmp_path / "config.json").exists()
    assert fo.pack_file(folder, tmp_path / "dry", bits=8, dry_run=True).nbytes
    assert not (tmp_path / "dry").exists()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    fo.pack_file(folder, tmp_path / "adapter", bits=8)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    (folder / "config.json").write_text("{ no JSON")
    fo.pack_file(folder, tmp_path / "odd", bits=8)
    assert (tmp_path / "odd" / "config.json").read_text() == "{ no JSON"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fo.pack_file(folder, tmp_path / "nowhere" / "out", bits=8)
    file = folder / "adapter_model.safetensors"  # from a file to a folder
    with pytest.raises(IsADirectoryError):
        fo.pack_file(file, tmp_path / "adapter", bits=8)
