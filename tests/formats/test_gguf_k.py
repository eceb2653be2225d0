"""K-quants of GGUF: blocks of any bytes are decoded as the gguf package decodes them, and go out as they came in."""

import warnings

import numpy as np
import pytest

import fastopt as fo
from fastopt.formats.gguf_k import K_QUANTS, blocks_of, k_quant_of, packed_of

gguf = pytest.importorskip("gguf")


def random_blocks(name, count, rng):
    blocks = np.frombuffer(rng.bytes(count * K_QUANTS[name].dtype.itemsize), K_QUANTS[name].dtype).copy()
    for field in ("d", "dm"):
        if field in blocks.dtype.names:
            blocks[field] = rng.standard_normal(count) / 100
    return blocks


def by_gguf(blocks, name, shape):
    kind = gguf.GGMLQuantizationType[name]
    return gguf.dequantize(blocks.view(np.uint8).reshape(-1, blocks.dtype.itemsize), kind).reshape(shape)


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("shape", [(3, 512), (512,), (2, 3, 256)])
def test_reading(name, shape, rng):
    blocks = random_blocks(name, int(np.prod(shape)) // 256, rng)
    q = packed_of(blocks, name, shape)
    assert q.bits == K_QUANTS[name].bits
    assert np.array_equal(q.dequantize(), by_gguf(blocks, name, shape))
    assert k_quant_of(q) == name
    back = blocks_of(q, name)
    assert np.array_equal(by_gguf(back, name, shape), q.dequantize())
    if K_QUANTS[name].param_bits is not None:
        assert back.tobytes() == blocks.tobytes()


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "param_bits"), [(n, *K_QUANTS[n][1:4]) for n in ("Q4_K", "Q5_K", "Q2_K")]
)
def test_there_and_back(name, bits, group_size, param_bits, rng, tmp_path):
    w = {"a": rng.standard_normal((6, 512)).astype("f4"), "b": rng.standard_normal((2, 3, 768)).astype("f4")}
    model = fo.pack(w, bits=bits, group_size=group_size, param_bits=param_bits, param_group=256, min_size=1)
    assert k_quant_of(model["a"]) == name
    fo.export(model, tmp_path / "m.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == name
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(w[tensor.name].shape)
        assert np.array_equal(decoded, model[tensor.name].dequantize())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fo.pack(tmp_path / "m.gguf", bits=bits, group_size=group_size, param_bits=param_bits, param_group=256)
    assert again["a"] == model["a"]
    assert again["b"] == model["b"]


def test_other_parameters_are_refused(rng, tmp_path):
    w = {"a": rng.standard_normal((16, 512)).astype("f4")}
    for options in ({"param_bits": 4}, {"param_bits": 6, "group_size": 16, "param_group": 256}):
        model = fo.pack(w, bits=4, **options)
        with pytest.raises(ValueError, match="Q4_K and Q5_K"):
            fo.export(model, tmp_path / "m.gguf", to="gguf")
        fo.export(model, tmp_path / "m.gguf", to="gguf", requantize=True)
