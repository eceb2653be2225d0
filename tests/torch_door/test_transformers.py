"""Models of transformers: packed folders, `from_pretrained`, and layers that other libraries look at."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import fastopt as fo
import fastopt.torch as ft
from fastopt.torch import transformers as door

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_quiet")]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(**SIZES, vocab_size=300, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SIZES, vocab_size=300)),
    "llama": (transformers.LlamaForCausalLM, LLAMA),
    "gpt2": (  # with Conv1D
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=300, bos_token_id=1, eos_token_id=2),
    ),
    "vit": (  # with other names in its files
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**SIZES, image_size=32, patch_size=8),
    ),
}


@pytest.fixture
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)


def made(name):
    cls, config = MODELS[name]
    return cls(config).eval()


def output(model):
    with torch.inference_mode():
        x = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        return model(x)[0] if "ViT" in type(model).__name__ else model(torch.arange(9)[None])[0]


def packed_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, ft.PackedModule)}


@pytest.fixture(
    params=[pytest.param((name, size), id=f"{name}-{size}") for name in MODELS for size in ("1GB", "150KB")]
)
def folder(request, tmp_path):
    """A model, its folder, and one that `fastopt pack` makes of it."""
    name, size = request.param
    model = made(name)
    model.save_pretrained(tmp_path / "model", max_shard_size=size)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (size != "1GB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    fo.pack_file(tmp_path / "model", tmp_path / "packed", bits=8)
    return model, tmp_path


def test_a_packed_folder(folder):
    model, path = folder
    door.install()
    door.install()
    packed = type(model)(model.config).eval()
    ft.load_(packed, path / "packed")
    assert len(packed_layers(packed)) >= 3
    assert torch.nn.functional.cosine_similarity(output(model), output(packed), dim=-1).min() > 0.999
    loaded, info = type(model).from_pretrained(path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert packed_layers(loaded) == packed_layers(packed)
    assert torch.equal(output(loaded), output(packed))
    if type(model) is transformers.ViTForImageClassification:
        with pytest.raises(ValueError, match="not serializable"):
            loaded.save_pretrained(path / "again")
    else:
        loaded.save_pretrained(path / "again")
        again, info = type(model).from_pretrained(path / "again", output_loading_info=True)
        assert not any(info.values())
        assert packed_layers(again) == packed_layers(packed)
        assert torch.equal(output(again), output(packed))
    ft.save(loaded, path / "again.safetensors")
    loaded.dequantize()
    assert not packed_layers(loaded)
    torch.testing.assert_close(output(loaded), output(packed), rtol=1e-3, atol=1e-4)

    fo.unpack_file(path / "packed", path / "back")
    back, info = type(model).from_pretrained(path / "back", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(output(back), output(packed), rtol=1e-3, atol=1e-4)
    assert "tokenizer.json" in {file.name for file in (path / "back").iterdir()}


def test_from_pretrained_packs(tmp_path):
    door.install()
    model = made("gpt2")
    model.save_pretrained(tmp_path)
    config = door.FastoptConfig(bits=8, precision="int8", exclude=["*wpe*"])
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    ft.pack_(model, bits=8, precision="int8", exclude=["*wpe*"])
    assert packed_layers(packed) == packed_layers(model)
    assert torch.equal(output(packed), output(model))
    assert packed.lm_head.codes is packed.transformer.wte.codes
    assert json.loads(packed.config.to_json_string())["quantization_config"]["quant_method"] == "fastopt"
    packed.save_pretrained(tmp_path / "saved")
    assert (
        fo.load(tmp_path / "saved")["transformer.h.0.attn.c_attn.weight.T"]
        == packed.transformer.h[0].attn.c_attn.packed
    )
    again, info = type(packed).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert packed_layers(again) == packed_layers(packed)
    assert again.lm_head.codes is again.transformer.wte.codes
    assert torch.equal(output(again), output(packed))  # by int8, as the config says
    tokens = packed.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 8)
    half = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    assert output(half).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device_map: expected the CPU"):
        transformers.AutoModel.from_pretrained(tmp_path, device_map="meta", quantization_config=config)
    with pytest.raises(TypeError, match="bit"):
        door.FastoptConfig(bit=4)


def test_another_head(tmp_path):
    """A packed base model serves a model with a head, and the other way round."""
    door.install()
    made("bert").save_pretrained(tmp_path / "base")
    fo.pack_file(tmp_path / "base", tmp_path / "packed", bits=8)
    tagger = transformers.BertForTokenClassification.from_pretrained(tmp_path / "packed")
    base = transformers.BertModel.from_pretrained(tmp_path / "packed")
    assert packed_layers(tagger) == {f"bert.{name}" for name in packed_layers(base) if "pooler" not in name}
    assert torch.isfinite(output(tagger)).all()
    config = transformers.LlamaConfig(**SIZES, vocab_size=300)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    fo.pack_file(tmp_path / "lm", tmp_path / "lm-packed", bits=8)
    base = transformers.LlamaModel.from_pretrained(tmp_path / "lm-packed")
    assert len(packed_layers(base)) == 15
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['lm_head\.weight'\]"):
        ft.load_(base, tmp_path / "lm-packed")


def test_a_module_without_memory(tmp_path):
    model = made("bert")
    ft.pack_(model)
    ft.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = transformers.BertModel(model.config)
    with pytest.raises(ValueError, match="position_ids' is on the device 'meta', and no file holds it"):
        ft.load_(empty, tmp_path / "m.safetensors")
