"""Training checkpoints: which part is the model, and what else torch stores in them."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from helpers import same_bits
from safetensors.numpy import load_file, save_file

import fastopt as fo
from fastopt.files.sources import model_files
from fastopt.files.torch_files import _chosen

W = np.ones((2, 3), "f4")
STEP = np.array(7)
MODEL = {"fc.weight": W, "fc.bias": W[0]}
ADAM = {"state": {0: {"exp_avg": W, "step": STEP}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def chosen(state, key=None):
    return list(_chosen(state, key, lambda value: isinstance(value, np.ndarray)))


@pytest.mark.parametrize(
    "state",
    [
        MODEL,
        {**MODEL, "version": 3, "note": None},
        {**MODEL, "optimizer": ADAM},
        {"state_dict": MODEL, "epoch": 3, "optimizer_states": [ADAM], "callbacks": {"best": {"score": 0.5}}},
        {"model_state_dict": MODEL, "optimizer_state_dict": ADAM, "loss": 0.5},
        {"model": MODEL, "optimizer": ADAM, "lr_scheduler": {"base": [0.1]}, "rng_state": np.zeros(9, "u1")},
        {"model": MODEL, "ema": MODEL},
        {"step": 7, "model_state": MODEL, "optimizer_state": ADAM},
        {"step": STEP, "net_G": MODEL, "opt": ADAM},
        {"checkpoint": {"model": MODEL, "optimizer": ADAM}, "epoch": 1},
        {"model": {"state_dict": MODEL, "config": {"layers": 3}}},
        {"anything": MODEL, "rng": {"torch": np.zeros(9, "u1")}, "grad_scaler": {"scale": STEP.reshape(1)}},
    ],
    ids=range(12),
)
def test_the_model_of_a_checkpoint_is_found(state):
    assert chosen(state) == list(MODEL)


def test_nested_models_are_flat():
    nested = {"encoder": {"fc": {"weight": W}}, "scaler": {"weight": W}, "depth": 3}
    names = ["encoder.fc.weight", "scaler.weight"]
    assert chosen({"model": nested, "optimizer": ADAM}) == names
    assert chosen({"epoch": 3, "all": {"model": nested}}) == names
    assert chosen(nested, "") == names
    assert chosen(nested, "encoder") == ["fc.weight"]
    assert chosen(nested, "encoder/fc") == ["weight"]
    assert chosen({"a/b": MODEL}, "a/b") == list(MODEL)


@pytest.mark.parametrize(
    ("state", "key", "message"),
    [
        ({"net_G": MODEL, "net_D": MODEL}, None, "several parts could be the model: 'net_G', 'net_D'; choose one by"),
        ({"model": MODEL, "state_dict": MODEL}, None, "several parts could be the model: 'model', 'state_dict'"),
        ({"w": W, "head": MODEL}, None, r"several parts could be the model: the tensors beside them \(''\), 'head'"),
        ({"model": MODEL}, "network", "has no key 'network'; there are 'model'"),
        ({"model": MODEL}, "model/fc", "has no key 'model/fc'; there are 'fc.weight', 'fc.bias'"),
        ({"model": MODEL, "epoch": 3}, "epoch", "key 'epoch' has no tensors"),
        ({"epoch": 3}, None, "'epoch' is a int, expected a tensor"),
        ([MODEL], None, "expected a state dict, got a list"),
        ({"a": {"b": W}, "a.b": W}, "", "two tensors would have the name 'a.b'"),
        ({0: W, "0": W}, None, "two tensors would have the name '0'"),
    ],
)
def test_a_choice_that_is_not_clear_is_refused(state, key, message):
    with pytest.raises(ValueError, match=message):
        chosen(state, key)


def test_a_dict_that_holds_itself():
    state = {"w": W}
    state["again"] = state
    for key in (None, "", "again"):
        with pytest.raises(ValueError, match="more than 100 levels"):
            chosen(state, key)
    wide = {"w": W}
    for _ in range(60):
        wide = {"a": wide, "b": wide}
    with pytest.raises(ValueError, match="or 1,000,000 entries"):
        chosen(wide)


# ---- files -------------------------------------------------------------------------------------------------------


def test_masks_of_pruning_are_joined(rng, tmp_path):
    w = rng.standard_normal((64, 80)).astype("f4")
    w[0, 0] = -1
    mask = (rng.random(w.shape) < 0.5).astype("f4")
    mask[0, 0] = 0
    expected = np.where(mask == 1, w, np.float32(0))
    arrays = {
        "a.bias": w[0],
        "a.weight_orig": w,
        "a.weight_mask": mask,
        "b_orig": w,
        "c_mask": mask,
        "d_mask_orig": w,  # the parameter d_mask
        "d_mask_mask": mask,
    }
    np.savez(tmp_path / "m.npz", **arrays)
    save_file(arrays, tmp_path / "m.safetensors")
    shards = {"a.weight_orig": "1.safetensors", "a.weight_mask": "2.safetensors", "a.bias": "2.safetensors"}
    save_file({"a.weight_orig": w}, tmp_path / "1.safetensors")
    save_file({"a.weight_mask": mask, "a.bias": w[0]}, tmp_path / "2.safetensors")
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": shards}))
    for name, others in [
        ("m.npz", {"b_orig", "c_mask", "d_mask"}),
        ("m.safetensors", {"b_orig", "c_mask", "d_mask"}),
        ("m.index.json", set()),
    ]:
        opened = fo.open_weights(tmp_path / name)
        assert set(opened) == {"a.bias", "a.weight"} | others
        assert same_bits(opened["a.weight"], expected)
        assert opened.spec("a.weight") == ((64, 80), np.dtype("f4"))
        opened.release("a.weight")
        assert set(fo.open_weights(tmp_path / name, skip="a.weight")) == {"a.bias"} | others
    assert opened.shards == {"1.safetensors": ["a.weight"], "2.safetensors": ["a.bias"]}
    fo.pack_file(tmp_path / "m.index.json", tmp_path / "p.index.json", sparsity=0.1)
    assert (fo.load(tmp_path / "p.index.json").unpack()["a.weight"][mask == 0] == 0).all()


def test_one_rule_for_folders(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).write_bytes(b"")

    def refused(found):
        with pytest.raises(ValueError, match=f"found {found}.*; name the file"):
            model_files(tmp_path)

    refused("0, 0 and 0, and 0 files of torch")
    touch("a.npy", "b.npy")
    assert model_files(tmp_path) == [tmp_path / "a.npy", tmp_path / "b.npy"]
    touch("model.safetensors")
    refused("0, 1 and 2")
    for read in (fo.open_weights, fo.inspect):
        with pytest.raises(ValueError, match="name the file"):
            read(tmp_path)
    (tmp_path / "a.npy").unlink()
    (tmp_path / "b.npy").unlink()
    touch("optimizer.pt", "training_args.bin")
    assert model_files(tmp_path) == tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    refused("0, 0 and 0, and 2 files of torch")
    touch("pytorch_model.bin")
    assert model_files(tmp_path) == tmp_path / "pytorch_model.bin"
    touch("pytorch_model.bin.index.json", "1.safetensors", "2.safetensors")
    assert model_files(tmp_path) == tmp_path / "pytorch_model.bin.index.json"
    touch("model.safetensors.index.json")
    assert model_files(tmp_path) == tmp_path / "model.safetensors.index.json"
    touch("other.safetensors.index.json")
    refused("2, 2 and 0, and 3 files of torch")
    assert model_files(tmp_path / "1.safetensors") == tmp_path / "1.safetensors"


def test_what_cannot_be_read_can_be_left_out(tmp_path):
    header = {
        "odd": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    np.savez(tmp_path / "m.npz", w=np.ones(3), odd=np.array([None]), other=np.array(["text"]))
    with pytest.raises(ValueError, match="'odd' has dtype F4, which NumPy does not have; skip leaves it out"):
        fo.open_weights(tmp_path / "m.safetensors")
    assert list(fo.open_weights(tmp_path / "m.safetensors", skip="o*")) == ["w"]
    assert list(fo.open_weights(tmp_path / "m.npz", skip=["odd", "*r"])) == ["w"]
    fo.pack({"w": W, "v": W}, bits=4, min_size=1).save(tmp_path / "p.safetensors")
    assert list(fo.open_weights(tmp_path / "p.safetensors", skip="v")) == ["w"]
    with pytest.raises(ValueError, match="key: expected a checkpoint of torch"):
        fo.open_weights(tmp_path / "m.npz", key="model")


def test_small_floats_and_complex_numbers_are_carried_through(tmp_path, rng):
    w = rng.standard_normal((64, 80)).astype("f4")
    arrays = {
        "w": w,
        "c": (w + 1j * w[::-1]).astype("c8"),
        **{name: w.astype(getattr(ml_dtypes, name)) for name in dir(ml_dtypes) if name in FLOAT8},
    }
    assert len(arrays) == 7
    fo.PackedModel(arrays).save(tmp_path / "m.safetensors")
    fo.pack_file(tmp_path / "m.safetensors", tmp_path / "p.safetensors", bits=8)
    fo.unpack_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    for name in "mpu":
        opened = fo.open_weights(tmp_path / f"{name}.safetensors")
        for key, array in arrays.items():
            if key != "w":
                assert opened[key].dtype == array.dtype
                assert opened[key].tobytes() == array.tobytes()
    assert "w" in {facts["name"] for facts in map(vars_of, fo.inspect(tmp_path / "m.safetensors"))}
    assert fo.diff(tmp_path / "m.safetensors", tmp_path / "u.safetensors").total.relative < 0.01


FLOAT8 = {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"}


def vars_of(facts):
    return facts._asdict() if hasattr(facts, "_asdict") else vars(facts)


def test_checkpoints_of_torch(tmp_path, rng):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.Linear(64, 64))
    adam = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(64, 80)}}
    optimizer = {"state": adam, "param_groups": [{"lr": 0.1, "params": [0]}]}
    weight = model[0].weight.detach()
    mask = (torch.rand(64, 80) < 0.5).float()
    weights = {  # as torch.nn.utils.prune leaves them
        "0.bias": model[0].bias,
        "0.weight_orig": weight,
        "0.weight_mask": mask,
        "1.weight": model[1].weight,
        "1.bias": model[1].bias,
    }
    state = {"model": weights, "optimizer": optimizer, "epoch": 3, "rng": torch.get_rng_state()}
    names = ["0.bias", "0.weight", "1.weight", "1.bias"]
    for name in ("c.pt", "c.ckpt", "c.pth.tar", "plain"):
        torch.save(state, tmp_path / name)
        opened = fo.open_weights(tmp_path / name)
        assert list(opened) == names
        assert np.array_equal(opened["0.weight"], (weight * mask).numpy())
        assert fo.pack_file(tmp_path / name, tmp_path / "m.safetensors", bits=8).nbytes > 0
    exp_avg = fo.open_weights(tmp_path / "c.pt", key="optimizer/state", skip="*.step")
    assert "0.exp_avg" in exp_avg
    assert not any(name.endswith("step") for name in exp_avg)
    # Shards.
    index = {}
    for i, part in enumerate((names[:2], names[2:])):
        some = {n: t for n, t in weights.items() if n.replace("_orig", "").replace("_mask", "") in part}
        torch.save(some, tmp_path / f"pytorch_model-{i}.bin")
        index |= dict.fromkeys(some, f"pytorch_model-{i}.bin")
    folder = tmp_path / "pytorch_model.bin.index.json"
    folder.write_text(json.dumps({"weight_map": index}))
    opened = fo.open_weights(folder)
    assert list(opened) == names
    assert opened.shards == {"pytorch_model-0.bin": names[:2], "pytorch_model-1.bin": names[2:]}
    assert len(fo.inspect(folder)) == 4
    fo.pack_file(folder, tmp_path / "s.index.json", bits=8)
    assert list(fo.load(tmp_path / "s.index.json")) == names


def test_tensors_of_torch_of_any_kind(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(6.0).reshape(2, 3) * (1 + 2j)
    state = {
        "fp8": torch.arange(4.0).to(torch.float8_e4m3fn),
        "conj": x.conj(),
        "imag": (2 * x).conj().imag,
        "tied": torch.ones(3),
        "bool": torch.tensor([True]),
    }
    torch.save(state, tmp_path / "m.pt")
    opened = fo.open_weights(tmp_path / "m.pt")
    assert opened["fp8"].dtype == ml_dtypes.float8_e4m3fn
    assert opened["fp8"].astype("f4").tolist() == [0, 1, 2, 3]
    assert np.array_equal(opened["conj"], np.conj(x.numpy()))
    torch.save({"a": state["tied"], "b": state["tied"], "c": state["tied"][:2]}, tmp_path / "tied.pt")
    fo.unpack_file(tmp_path / "tied.pt", tmp_path / "m.safetensors")
    assert sorted(load_file(tmp_path / "m.safetensors")) == ["a", "c"]
    assert fo.load(tmp_path / "m.safetensors")["b"].tolist() == [1, 1, 1]
    assert np.array_equal(opened["imag"], -2 * x.imag.numpy())


def test_other_files_of_torch_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 3)
    torch.save(module, tmp_path / "module.pt")
    torch.save({"w": torch.ones(3), "best": np.float64(0.5)}, tmp_path / "scalar.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "lfs.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "zip.pt").write_bytes(b"PK\x03\x04" + bytes(99))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(tmp_path / "script.pt")
    for name, message in [
        (
            "module",
            r"it holds objects of Python \(torch\.nn\.modules\.linear\.Linear\) that are not read, .* state_dict$",
        ),
        ("scalar", r"it holds objects of Python \(numpy\..*scalar\) that are not read"),
        ("empty", "the file is empty"),
        ("lfs", "is a pointer of git-lfs"),
        ("zip", "not a state dict of torch: "),
        ("script", "is a TorchScript archive, expected a state dict: save model"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            fo.open_weights(tmp_path / f"{name}.pt")
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)
