"""The command line: the commands on models, and how every command ends."""

import json
import os
import pty
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import run_python, start
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import fastopt as fo
from fastopt import _core
from fastopt.cli import timing
from fastopt.cli.show_commands import app
from fastopt.models import stream

ENTRY = [sys.executable, "-c", "from fastopt.cli.__main__ import main; main()"]


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def answer(*args):
    result = run(*args, "--json")
    assert result.stderr == ""  # no progress where there is no terminal
    return json.loads(result.stdout, parse_constant=pytest.fail)


def weights():
    rng = np.random.default_rng(0)
    made = {
        "embed.weight": rng.standard_normal((100, 64)),
        "layers.0.weight": rng.standard_normal((64, 128)),
        "layers.0.bias": rng.standard_normal(64),
        "layers.1.weight": rng.standard_normal((128, 64)),
        "norm.weight": rng.standard_normal(5000),
    }
    made["layers.0.weight"][3, 5] = 40
    made["layers.1.weight"][:64] = 0
    return {**{name: w.astype(np.float32) for name, w in made.items()}, "ids": np.arange(5000)}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    return path


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.safetensors"
    fo.pack(weights(), bits=4, exclude=["norm*"], overrides={"embed*": {"sparsity": 0.5}}).save(path)
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- inspect -----------------------------------------------------------------------------------------------------


def test_inspect(model):
    told = answer("inspect", model)
    assert set(told) == {"file", "recipe", "tensors"}
    assert (told["file"], told["recipe"]) == (str(model), None)
    facts = {t["name"]: t for t in told["tensors"]}
    assert facts.keys() == weights().keys()
    assert facts["layers.0.weight"] == {
        "name": "layers.0.weight",
        "kind": "dense",
        "bits": None,
        "group_size": None,
        "param_bits": None,
        "shape": [64, 128],
        "dtype": "float32",
        "size": 8192,
        "nbytes": 32768,
        "bits_per_weight": 32.0,
        "minimum": float(weights()["layers.0.weight"].min()),
        "maximum": 40.0,
        "mean": pytest.approx(weights()["layers.0.weight"].mean(dtype=np.float64), rel=1e-12),
        "std": pytest.approx(weights()["layers.0.weight"].std(dtype=np.float64), rel=1e-12),
        "zeros": 0,
        "outliers": 1,
        "non_finite": 0,
        "suggested_bits": 4,
    }
    assert facts["layers.1.weight"]["zeros"] == 64 * 64
    assert [facts[name]["suggested_bits"] for name in ("norm.weight", "layers.0.bias", "ids")] == [4, None, None]
    assert facts["ids"]["maximum"] == 4999


def test_inspect_of_a_packed_file(small):
    told = answer("inspect", small)
    facts = {t["name"]: t for t in told["tensors"]}
    packed = fo.load(small)
    assert told["recipe"] == json.loads(json.dumps(packed.recipe.to_dict()))
    line = 'recipe: {"bits": 4, "exclude": ["norm*"], "overrides": {"embed*": {"sparsity": 0.5}}}'
    assert line in run("inspect", small).stdout
    for name, kind, bits, group_size in (
        ("embed.weight", "sparse+quantized", 4, 32),
        ("layers.0.weight", "quantized", 4, 32),
        ("norm.weight", "dense", None, None),
    ):
        t = facts[name]
        assert (t["kind"], t["bits"], t["group_size"], t["nbytes"]) == (kind, bits, group_size, packed[name].nbytes)
    assert facts["layers.0.weight"]["bits_per_weight"] == packed["layers.0.weight"].bits_per_weight
    assert facts["layers.0.weight"]["suggested_bits"] is None


def test_inspect_prints_a_table_and_a_command_that_works(model, tmp_path, monkeypatch):
    text = run("inspect", model).stdout
    for name in weights():
        assert name.rpartition("layers.0.")[2].rpartition("layers.1.")[2] in text
    command = re.search(r"suggested: fastopt (.*)", text)[1].split()
    monkeypatch.chdir(tmp_path)
    run(*command)
    assert (tmp_path / "model-packed.safetensors").exists()


def test_inspect_tells_of_nan(tmp_path):
    w = np.ones((64, 64), np.float32)
    w[0, :2] = np.nan, np.inf
    save_file({"w": w}, tmp_path / "m.safetensors")
    assert "w: 2 values are NaN or infinite" in run("inspect", tmp_path / "m.safetensors").stdout
    [facts] = answer("inspect", tmp_path / "m.safetensors")["tensors"]
    assert (facts["non_finite"], facts["minimum"], facts["suggested_bits"]) == (2, 1.0, None)


# ---- pack and unpack ---------------------------------------------------------------------------------------------

OPTIONS = {
    "--bits 4": {"bits": 4},
    "--bits 4 --exclude *norm* --override embed*:bits=8": {
        "bits": 4,
        "exclude": ["*norm*"],
        "overrides": {"embed*": {"bits": 8}},
    },
    "--bits 4 --group-size row --fit lsq --outliers 1e-3 --param-dtype float32": {
        "bits": 4,
        "group_size": -1,
        "fit": "lsq",
        "outliers": 1e-3,
        "param_dtype": "float32",
    },
    "--bits 2 --group-size 64 --include layers.* --include embed* --min-size 10": {
        "bits": 2,
        "group_size": 64,
        "include": ["layers.*", "embed*"],
        "min_size": 10,
    },
    "--bits 4 --group-size 32 --param-bits 6 --param-group 256": {
        "bits": 4,
        "group_size": 32,
        "param_bits": 6,
        "param_group": 256,
    },
    "--bits 8 --group-size tensor --sparsity 0.5": {"bits": 8, "group_size": None, "sparsity": 0.5},
    "--pattern 2:4 --override embed*:pattern=none,bits=2,group_size=row,outliers=0.01": {
        "pattern": "2:4",
        "overrides": {"embed*": {"pattern": None, "bits": 2, "group_size": -1, "outliers": 0.01}},
    },
    "--threshold 0.5 --override *1.weight:threshold=1.5,bits=4": {
        "threshold": 0.5,
        "overrides": {"*1.weight": {"threshold": 1.5, "bits": 4}},
    },
}


@pytest.mark.parametrize("line", OPTIONS)
def test_pack_does_what_python_does(model, tmp_path, line):
    told = answer("pack", model, "-o", tmp_path / "a.safetensors", *line.split())
    expected = fo.pack(fo.load(model), **OPTIONS[line])
    expected.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert told["recipe"] == json.loads(json.dumps(expected.recipe.to_dict()))
    assert told["file_bytes"] == (tmp_path / "a.safetensors").stat().st_size
    report = expected.report(fo.load(model)).to_dict()
    assert {key: told[key] for key in report} == json.loads(json.dumps(report))


def test_pack_json_is_stable(model, tmp_path):
    told = answer("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4)
    assert set(told) == {
        *("source", "target", "dry_run", "file_bytes", "recipe"),
        *("nbytes_before", "nbytes", "bits_per_weight", "error", "tensors"),
    }
    error = {"rmse", "relative", "max", "snr", "cosine"}
    assert set(told["error"]) == error
    for t in told["tensors"]:
        assert set(t) == {
            *("name", "shape", "dtype", "kind", "bits", "group_size", "density", "bits_per_weight"),
            *("nbytes_before", "nbytes", "error", "reason", "output_error", "param_bits"),
        }
        assert t["error"] is None or set(t["error"]) == error


def test_pack_prints_what_was_kept_and_why(model, tmp_path):
    text = run("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4, "--exclude", "*norm*").stdout
    assert "kept as they are: 1 tensor, 256 B (fewer than min_size 4096)" in text
    assert "kept as they are: 1 tensor, 20.00 kB (excluded by '*norm*')" in text
    assert re.search(r"embed\.weight .*4 bits, g32 .*5\.00", text)


def test_recipe_file(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\nexclude = ["*norm*"]\n[overrides]\n"embed*" = {bits = 2}\n"layers.0*" = {bits = 8}\n')
    told = answer("pack", model, "-o", tmp_path / "a.safetensors", "--recipe", recipe)
    bits = {t["name"]: t["bits"] for t in told["tensors"]}
    assert (bits["embed.weight"], bits["layers.0.weight"], bits["layers.1.weight"]) == (2, 8, 4)
    # What the command line says goes first.
    told = answer(
        *("pack", model, "-o", tmp_path / "a.safetensors", "--recipe", recipe),
        *("--bits", 8, "--override", "*.0.*:bits=2", "--exclude", "embed*"),
    )
    bits = {t["name"]: t["bits"] for t in told["tensors"]}
    assert bits == {**dict.fromkeys(weights()), "layers.0.weight": 2, "layers.1.weight": 8, "norm.weight": 8}


def test_targets(model, tmp_path):
    path = tmp_path / "a.safetensors"
    told = answer("pack", model, "-o", path, "--target-size", "62kB")
    assert told["file_bytes"] == path.stat().st_size <= 62_000
    assert {t["bits"] for t in told["tensors"]} & {2, 4}
    told = answer("pack", model, "-o", path, "--target-bits", 16, "--fit", "lsq")
    assert told["bits_per_weight"] <= 16
    assert fo.load(path).recipe.fit == "lsq"


def test_dry_run_writes_nothing(model, tmp_path):
    before = content(tmp_path)
    for args in (("pack", "--bits", 4, "--sparsity", 0.5), ("pack", "--bits", 2), ("prune", "--sparsity", 0.5)):
        told = answer(args[0], model, "-o", tmp_path / "small.safetensors", "--dry-run", *args[1:])
        assert content(tmp_path) == before
        assert told["dry_run"]
        assert told["file_bytes"] is None
        real = answer(args[0], model, "-o", tmp_path / "small.safetensors", *args[1:])
        for planned, made in zip(told["tensors"], real["tensors"], strict=True):
            assert planned == {**made, "error": None}
        assert told["nbytes"] == real["nbytes"]
        (tmp_path / "small.safetensors").unlink()
    assert "not written" in run("pack", model, "-o", tmp_path / "x.safetensors", "--dry-run", "--bits", 4).stdout
    assert content(tmp_path) == before


def test_the_input_may_be_the_output(model):
    run("pack", model, "-o", model, "--bits", 8, "--html", model.with_suffix(".html"))
    assert fo.load(model)["embed.weight"] == fo.pack(weights(), bits=8)["embed.weight"]
    assert model.with_suffix(".html").exists()
    run("unpack", model, "-o", model)
    assert load_file(model).keys() == weights().keys()


def test_unpack(small, tmp_path):
    told = answer("unpack", small, "-o", tmp_path / "back.safetensors")
    assert told == {
        "source": str(small),
        "target": str(tmp_path / "back.safetensors"),
        "file_bytes": (tmp_path / "back.safetensors").stat().st_size,
    }
    back = load_file(tmp_path / "back.safetensors")
    for name, w in fo.load(small).unpack().items():
        np.testing.assert_array_equal(back[name], w)
        assert back[name].dtype == w.dtype


def test_other_formats(model, tmp_path):
    np.savez(tmp_path / "model.npz", **weights())
    (tmp_path / "arrays").mkdir()
    for name, w in weights().items():
        np.save(tmp_path / "arrays" / f"{name}.npy", w)
    packed = fo.pack(weights(), bits=4)
    for source in (tmp_path / "model.npz", tmp_path / "arrays"):
        run("pack", source, "-o", tmp_path / "a.safetensors", "--bits", 4)
        made = fo.load(tmp_path / "a.safetensors")
        assert {name: made[name] for name in packed if name.startswith("layers")}.keys() < set(made)
        assert made["embed.weight"] == packed["embed.weight"]
        assert answer("diff", model, source)["total"]["rmse"] == 0


def test_what_cannot_be_read_is_left_out(tmp_path):
    path, out = tmp_path / "m.npz", tmp_path / "m.safetensors"
    np.savez(path, w=np.ones((64, 80), "f4"), labels=np.array(["a", "b"]), odd=np.array([None]))
    assert "'labels': has dtype <U1, expected numbers; skip leaves it out" in run("inspect", path, code=1).stderr
    skip = ("--skip", "labels", "--skip", "od*")
    assert [t["name"] for t in answer("inspect", path, *skip)["tensors"]] == ["w"]
    for line in (["pack", "--bits", "4"], ["prune", "--sparsity", "0.5", "--html", tmp_path / "m.html"], ["unpack"]):
        run(*line, path, "-o", out, *skip)
        assert list(fo.load(out)) == ["w"]
        assert answer("diff", path, out, *skip)["missing"] == []
    run("export", path, "--to", "npz", "-o", tmp_path / "e.npz", *skip)
    assert (
        "key: expected a checkpoint of torch"
        in run("pack", path, "-o", out, "--bits", "4", "--key", "a", code=1).stderr
    )


def test_a_folder_with_a_config(model, tmp_path):
    folder, small, back = tmp_path / "hf", tmp_path / "small", tmp_path / "back"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "vocab.txt").write_text("a")
    told = answer("pack", folder, "-o", small, "--bits", 4)
    assert told["target"] == str(small / "model.safetensors")
    assert told["file_bytes"] == (small / "model.safetensors").stat().st_size
    assert '"quant_method": "fastopt"' in (small / "config.json").read_text()
    told = answer("unpack", small, "-o", back)
    assert told["target"] == str(back / "model.safetensors")
    assert json.loads((back / "config.json").read_text()) == {"model_type": "toy"}
    assert content(back).keys() == content(folder).keys()
    run("pack", folder, "-o", small, "--bits", 8, "--html", tmp_path / "r.html", "--target-size", "1MB", code=2)
    run("pack", folder, "-o", small, "--html", tmp_path / "r.html", "--target-size", "1MB")


def test_shards(tmp_path):
    parts = {"a.safetensors": ["embed.weight", "ids"], "b.safetensors": ["layers.0.weight", "layers.0.bias"]}
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for file, names in parts.items():
        save_file({name: weights()[name] for name in names}, tmp_path / "in" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    target = tmp_path / "out" / "model.safetensors.index.json"
    told = answer("pack", tmp_path / "in", "-o", target, "--bits", 4)
    made = fo.load(target)
    assert made["layers.0.weight"] == fo.quantize(weights()["layers.0.weight"], 4)
    assert len(list(target.parent.glob("*.safetensors"))) == 2
    assert told["file_bytes"] == sum(path.stat().st_size for path in target.parent.iterdir())
    facts = answer("inspect", tmp_path / "out")["tensors"]
    assert {t["name"] for t in facts if t["kind"] == "quantized"} == {"embed.weight", "layers.0.weight"}
    assert answer("diff", tmp_path / "in", target)["total"]["relative"] > 0


def test_prune(model, tmp_path):
    path = tmp_path / "pruned.safetensors"
    told = answer("prune", model, "-o", path, "--sparsity", 0.75, "--exclude", "*norm*")
    assert {t["name"]: t["kind"] for t in told["tensors"]} == {
        **dict.fromkeys(weights(), "dense"),
        **dict.fromkeys(("embed.weight", "layers.0.weight", "layers.1.weight"), "sparse"),
    }
    assert fo.load(path)["layers.0.weight"].nnz == 64 * 128 // 4
    run("prune", model, "-o", path, "--pattern", "2:4")
    assert fo.load(path)["layers.0.weight"].layout == "2:4"
    run("prune", model, "-o", path, "--threshold", 1)
    assert np.abs(fo.load(path)["embed.weight"].values).min() > 1


@pytest.mark.filterwarnings("default:overrides")
def test_patterns_that_match_nothing_are_told(model, tmp_path):
    result = run(
        "pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4, "--exclude", "nrm*", "--override", "x:bits=2"
    )
    assert result.stderr == (
        "fastopt: warning: --override: no tensor matches 'x'; there are 'ids', 'embed.weight', 'layers.0.bias' ...\n"
        "fastopt: warning: no tensor matches 'nrm*', did you mean '*norm*'?\n"
    )


@pytest.mark.parametrize(
    ("given", "got", "proposed"),
    [("--fit", "minmaxx", "minmax"), ("--fit", "least-squares", "lsq"), ("--include", "embad*", "*embed*")],
)
def test_the_closest_choice_is_proposed(model, tmp_path, given, got, proposed):
    code = 1 if given == "--include" else 2
    result = run("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4, given, got, code=code)
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert f"{got!r}, did you mean {proposed!r}?" in text
    assert "Value error" not in text


@pytest.mark.filterwarnings("default:overrides")
def test_an_override_comes_before_the_recipes_even_with_its_pattern(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\n[overrides]\n"*.weight" = {bits = 2}\n"embed*" = {bits = 4}\n')
    given = ["pack", model, "-o", tmp_path / "a.safetensors", "--recipe", recipe]
    for override, bits in (("*.weight:bits=8", 8), ("embed*:bits=8", 8), ("none*:bits=8", 2)):
        told = json.loads(run(*given, "--override", override, "--json").stdout)
        assert {t["name"]: t["bits"] for t in told["tensors"]}["embed.weight"] == bits
        assert next(iter(told["recipe"]["overrides"])) == override.partition(":")[0]


def test_the_first_override_of_a_pattern_counts(model, tmp_path):
    result = run(
        *("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4, "--json"),
        *("--override", "embed*:bits=8", "--override", "embed*:group_size=64"),
    )
    told = {t["name"]: t for t in json.loads(result.stdout)["tensors"]}["embed.weight"]
    assert (told["bits"], told["group_size"]) == (8, -1)
    assert result.stderr == "fastopt: --override 'embed*' is given twice; the first one counts\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed*:bit=8", "unknown option 'bit', did you mean 'bits'? (options: bits, group_size"),
        ("embed*:bits=8,group=3", "unknown option 'group'"),
        ("embed*:bits", "expected GLOB:OPTION=VALUE"),
        ("embed*:bits=8,fit", "expected fit=VALUE"),
        ("embed*:bits=8,bits=4", "bits is given twice"),
        ("embed*:bits=7", "expected 8, 6, 5, 4, 3 or 2, got 7"),
    ],
)
def test_wrong_overrides(override, message, model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    result = run("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4, "--override", override, code=2)
    assert message in result.stderr
    assert not (tmp_path / "a.safetensors").exists()


def test_patterns_of_overrides_may_have_colons(tmp_path):
    np.savez(tmp_path / "m.npz", **{"a:bits=3": weights()["embed.weight"], "b": weights()["embed.weight"]})
    told = answer(
        *("pack", tmp_path / "m.npz", "-o", tmp_path / "a.safetensors", "--pattern", "2:4"),
        *("--override", "a:bits=3:bits=8,pattern=1:4"),
    )
    assert [t["bits"] for t in told["tensors"]] == [8, None]


# ---- packing a packed model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [False, True])
def test_packed_tensors_stay_packed_unless_asked(small, tmp_path, dry_run):
    before, target = fo.load(small), tmp_path / "b.safetensors"
    options = ["--dry-run"] if dry_run else []
    told = answer("pack", small, "-o", target, "--bits", 8, "--include", "layers.0*", *options)
    assert told["nbytes_before"] == before.nbytes
    assert told["nbytes"] > told["nbytes_before"]  # more bits make it larger, and the report says so
    tensors = {t["name"]: t for t in told["tensors"]}
    for name, tensor in before.items():
        assert tensors[name]["nbytes_before"] == tensor.nbytes
        assert tensors[name]["reason"].endswith("was packed before") == (not isinstance(tensor, np.ndarray))
    if not dry_run:
        after = fo.load(target)
        assert after["layers.0.weight"] == fo.quantize(before["layers.0.weight"].to_dense(), 8)
        for name in before.keys() - {"layers.0.weight"}:
            assert np.all(after[name] == before[name])
        assert tensors["embed.weight"]["error"]["rmse"] == 0
    text = run("pack", small, "-o", target, "--bits", 8, "--include", "layers.0*", *options).stdout
    assert "times larger" in text
    assert "packed before: 3 tensors" in text
    assert "smaller" not in text


def test_nothing_is_unpacked_that_is_excluded(small, tmp_path):
    run("pack", small, "-o", tmp_path / "b.safetensors", "--bits", 8, "--exclude", "*")
    before, after = fo.load(small), fo.load(tmp_path / "b.safetensors")
    assert all(np.all(after[name] == before[name]) for name in before)


@pytest.mark.parametrize(
    "options", [["--sparsity", 0.9], ["--pattern", "2:4"], ["--pattern", "1x16", "--sparsity", 0.5]]
)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zeros_of_a_pruned_model_stay_zero(options, bits, model, tmp_path):
    pruned, packed = tmp_path / "p.safetensors", tmp_path / "q.safetensors"
    run("prune", model, "-o", pruned, *options)
    run("pack", pruned, "-o", packed, "--bits", bits)
    for name, w in fo.load(pruned).unpack().items():
        back = fo.load(packed)[name]
        assert (np.asarray(back)[w == 0] == 0).all()
        assert isinstance(back, fo.SparseTensor) == isinstance(fo.load(pruned)[name], fo.SparseTensor)
    size = answer("pack", pruned, "-o", packed, "--target-bits", 20)["nbytes"]
    assert size == fo.load(packed).nbytes
    assert isinstance(fo.load(packed)["embed.weight"], fo.SparseTensor)


def test_the_same_bits_again_change_nothing(small, tmp_path):
    run("pack", small, "-o", tmp_path / "b.safetensors", "--bits", 4, "--fit", "lsq", "--exclude", "norm*")
    before, after = fo.load(small), fo.load(tmp_path / "b.safetensors")
    assert all(np.all(after[name] == before[name]) for name in before)


# ---- diff --------------------------------------------------------------------------------------------------------


def test_diff(model, small, tmp_path):
    assert "6 of 6 tensors that both have are equal" in run("diff", model, model).stdout
    told = answer("diff", model, small)
    assert set(told) == {"first", "second", "tensors", "missing", "extra", "reshaped", "total"}
    found = {t["name"]: t for t in told["tensors"]}
    packed = fo.load(small)["layers.0.weight"]
    error = packed.error(weights()["layers.0.weight"])._asdict()
    assert found["layers.0.weight"] == {
        "name": "layers.0.weight",
        "shape": [64, 128],
        "dtypes": ["float32", "float32"],
        "size": 8192,
        "different": int((packed.dequantize() != weights()["layers.0.weight"]).sum()),
        "nbytes": [32768, packed.nbytes],
        **{key: pytest.approx(value, rel=1e-12) for key, value in error.items()},
    }
    assert (found["norm.weight"]["rmse"], found["norm.weight"]["snr"]) == (0, None)
    assert "layers.0" in run("diff", model, small).stdout


def test_diff_of_names_and_shapes(model, tmp_path):
    other = weights()
    other["new"] = other.pop("ids")
    other["norm.weight"] = other["norm.weight"].reshape(50, 100)
    other["layers.0.bias"] = other["layers.0.bias"] + np.float32(1)
    save_file(other, tmp_path / "other.safetensors")
    told = answer("diff", model, tmp_path / "other.safetensors")
    assert (told["missing"], told["extra"]) == (["ids"], ["new"])
    assert told["reshaped"] == [["norm.weight", [5000], [50, 100]]]
    assert {t["name"] for t in told["tensors"] if t["rmse"]} == {"layers.0.bias"}
    text = run("diff", model, tmp_path / "other.safetensors").stdout
    for line in ("only in the first: ids", "only in the second: new", "other shape: norm.weight, 5000 and 50x100"):
        assert line in text


def test_diff_with_a_limit(model, small, tmp_path):
    run("diff", model, small, "--max-error", 1.5)
    result = run("diff", model, small, "--max-error", 0.01, code=1)
    assert result.stderr.startswith("fastopt: 3 tensors, as 'embed.weight', differ by more than 0.01")
    assert result.stderr.count("\n") == 1
    save_file({"ids": weights()["ids"]}, tmp_path / "few.safetensors")
    run("diff", model, tmp_path / "few.safetensors", "--max-error", 1, code=1)


# ---- the page ----------------------------------------------------------------------------------------------------


def page_data(path):
    text = path.read_text()
    assert not re.search(r"(src|href|url|import|fetch)\W*['\"(]?https?:", text)  # it needs no network
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_page_of_packing(model, tmp_path):
    path = tmp_path / "report.html"
    args = ("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4, "--override", "embed*:sparsity=0.5,bits=2")
    told = answer(*args, "--html", path)
    data = page_data(path)
    assert [t["name"] for t in data["tensors"]] == list(fo.load(model))
    for shown, t in zip(data["tensors"], told["tensors"], strict=True):
        assert (shown["bytes_before"], shown["bytes_after"], shown["why"]) == (
            t["nbytes_before"],
            t["nbytes"],
            t["reason"],
        )
        assert shown["relative"] == (t["error"] and t["error"]["relative"])
    assert json.loads(data["recipe"]) == told["recipe"]
    answer(*args, "--html", path, "--dry-run")
    assert all(t["histogram"]["after"] is None for t in page_data(path)["tensors"])


def test_page_of_a_difference(model, small, tmp_path):
    told = answer("diff", model, small, "--html", tmp_path / "report.html")
    data = page_data(tmp_path / "report.html")
    assert [t["relative"] for t in data["tensors"]] == [t["relative"] for t in told["tensors"]]


def test_names_from_files_stay_texts(tmp_path):
    name = "</script><img src=x onerror=alert(1)> [bold]x[/bold] & 'é"
    save_file({name: np.eye(64, dtype=np.float32)}, tmp_path / "m.safetensors")
    args = ("pack", tmp_path / "m.safetensors", "-o", tmp_path / "a.safetensors", "--bits", 4)
    assert "[bold]x[/bold] & 'é" in run(*args, "--html", tmp_path / "report.html").stdout
    assert page_data(tmp_path / "report.html")["tensors"][0]["name"] == name
    assert "onerror" not in re.sub(r"<script.*?</script>", "", (tmp_path / "report.html").read_text(), flags=re.S)
    assert "[bold]x[/bold] & 'é" in run("inspect", tmp_path / "m.safetensors").stdout


# ---- how commands end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "7"], "bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        (["--bits", "four"], "--bits"),
        (["--bits", "4", "--group-size", "many"], "expected a number, row or tensor"),
        (["--bits", "4", "--group-size", "0"], "--group-size: expected a positive number"),
        (["--bits", "4", "--fit", "best"], "--fit"),
        (["--bits", "4", "--outliers", "2"], "outliers: expected a share between 0 and 1, got 2"),
        (["--bits", "4", "--override", "*embed*"], "GLOB:OPTION=VALUE"),
        (["--bits", "4", "--override", "*embed*:colour=8"], "GLOB:OPTION=VALUE"),
        (["--bits", "4", "--override", "*embed*:bits=8,colour=8"], "colour"),
        (["--bits", "4", "--override", "*embed*:bits=7"], "bits"),
        (["--sparsity", "1.5"], "sparsity"),
        (["--pattern", "4:2"], "pattern"),
        (["--target-size", "12MB", "--target-bits", "4"], "one of them"),
        (["--target-bits", "4", "--bits", "4"], "--bits"),
        (["--bits", "4", "-o", "small.npz"], "see also fastopt export"),
        ([], "nothing to do"),
        (["--exclude", "*"], "nothing to do"),
        (["--bits", "4", "extra"], "extra"),
    ],
)
def test_usage(model, tmp_path, args, message):
    before = content(tmp_path)
    result = run("pack", model, "-o", tmp_path / "a.safetensors", *args, code=2)
    assert result.stdout == ""
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "args",
    [["nonsense"], ["pack"], ["pack", "x"], ["unpack", "x"], ["diff", "x"], ["inspect"], ["prune", "x", "-o", "y"]],
)
def test_usage_of_others(args):
    assert run(*args, code=2).stdout == ""


def test_failures(model, tmp_path):
    nan = tmp_path / "nan.safetensors"
    save_file({"layers.0.weight": np.full((64, 64), np.nan, np.float32)}, nan)
    text = tmp_path / "text.safetensors"
    text.write_text("no model")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("bits = 7")
    out = tmp_path / "out.safetensors"
    for args, message in (
        (("inspect", tmp_path / "none.safetensors"), f"{tmp_path / 'none.safetensors'}: No such file or directory"),
        (("inspect", text), f"{text}: not a safetensors file"),
        (("diff", model, text), f"{text}: not a safetensors file"),
        (("pack", nan, "-o", out, "--bits", 4), "'layers.0.weight': w: expected finite float32 values, got nan"),
        (("pack", model, "-o", out, "--recipe", recipe), f"{recipe}: bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        (("pack", model, "-o", out, "--recipe", tmp_path / "no.toml"), f"{tmp_path / 'no.toml'}: No such file"),
        (("pack", model, "-o", out, "--target-size", "1kB"), "--target-size: expected at least"),
        (("pack", model, "-o", out, "--target-size", "big"), "--target-size: expected bytes"),
        (("pack", model, "-o", out, "--bits", 4, "--include", "x*"), "--include: no tensor matches 'x*'; there are"),
        (("pack", model, "-o", tmp_path / "no" / "out.safetensors", "--bits", 4), "No such file or directory"),
        (("pack", model, "-o", out, "--bits", 4, "--html", tmp_path / "no" / "r.html"), "No such file or directory"),
        (("pack", model, "-o", tmp_path, "--bits", 4), f"{tmp_path}: Is a directory"),
        (("unpack", model, "-o", tmp_path), f"{tmp_path}: Is a directory"),
    ):
        result = run(*args, code=1)
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"fastopt: {message}" if message[0] in "/'t" else "fastopt: "), result.stderr
        assert message in result.stderr
        assert not out.exists()
    assert not list(tmp_path.glob(".*"))  # nothing half written is left
    result = CliRunner().invoke(app, ["--debug", "inspect", str(text)])
    assert isinstance(result.exception, ValueError)


def test_an_interruption_leaves_the_old_file(model, tmp_path, monkeypatch):
    target = tmp_path / "small.safetensors"
    target.write_bytes(b"old")
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack_tensor(*args, **kwargs)

    pack_tensor = stream.pack_tensor
    monkeypatch.setattr(stream, "pack_tensor", interrupted)
    result = run("pack", model, "-o", target, "--bits", 4, "--html", tmp_path / "r.html", code=130)
    assert result.stderr == "fastopt: interrupted\n"
    assert content(tmp_path).keys() == {"model.safetensors", "small.safetensors"}
    assert target.read_bytes() == b"old"


def test_real_entry_point(model, tmp_path):
    def entry(*args):
        return start(*ENTRY, *args, timeout=60)

    assert entry("pack", model, "-o", tmp_path / "a.safetensors", "--bits", 4).returncode == 0
    done = entry("inspect", tmp_path / "none.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"fastopt: {tmp_path / 'none.safetensors'}: No such file or directory"
    assert entry("pack", model).returncode == 2


def test_progress_on_a_terminal(model, tmp_path):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    args = ["pack", str(model), "-o", str(tmp_path / "a.safetensors"), "--bits", "4"]
    done = subprocess.run([*ENTRY, *args], stdout=subprocess.PIPE, stderr=theirs, env=env, check=False, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "pack" in shown
    assert "100%" in shown
    assert b"\x1b" not in done.stdout


def test_completion():
    env = {**os.environ, "_FASTOPT_COMPLETE": "complete_bash", "COMP_WORDS": "fastopt pa", "COMP_CWORD": "1"}
    done = start(*ENTRY, env=env, timeout=60)
    assert done.stdout.split() == ["pack"]


@pytest.mark.parametrize("command", ["inspect", "pack", "unpack", "diff", "prune", "bench", "demo"])
def test_help(command):
    assert command in run("--help").stdout
    text = run(command, "--help").stdout
    assert "<bool>" not in text
    assert "--json" in text
    assert command == "bench" or f"fastopt {command} " in text.partition("Examples")[2]


def test_short_help():
    assert run("-h").stdout == run("--help").stdout
    assert run("pack", "-h").stdout == run("pack", "--help").stdout


def test_bench_fits_the_terminal(monkeypatch):
    for columns, heads in ((60, ["fastopt", "NumPy", "faster"]), (80, ["fastopt", "NumPy", "faster", "of limit", "±"])):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = run("bench", "--only", "Adam, 10", "--only", "dequantize", "--seconds", 0.01).stdout.splitlines()
        assert max(map(len, lines[2:])) <= columns
        assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
        assert re.split(r"  +", lines[3].strip()) == heads
        assert [line.split()[0] for line in lines[4:6]] == ["Adam,", "dequantize"]
        assert all(len(re.findall(r"[\d.]+ [um]s", line)) == 2 for line in lines[4:6])
        assert any(line.startswith("of limit: ") for line in lines)


def test_bench_answers(tmp_path):
    told = answer("bench", "--only", "Adam, 10,000", "--seconds", 0.01, "--svg", tmp_path / "b.svg")
    assert {result["case"] for result in told["results"]} == {"Adam, 10,000"}
    assert [result["contender"] for result in told["results"]] == ["memory limit", "fastopt", "numpy"]
    root = ElementTree.parse(tmp_path / "b.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(texts[1:4]) == ["Adam, 10,000", "NumPy", "fastopt"]

    told = answer("bench", "--threads", 1, "--only", "Adam, 10,000", "--seconds", 0.01)
    assert told["machine"]["threads"] == 1
    assert "no case has 'none'" in run("bench", "--threads", 1, "--only", "none", code=1).stderr


def test_bench_doubts_a_busy_machine():
    def result(spread):
        return timing.Result("case", "fastopt", 1.0, spread, 1.0, 1.0, 1.0, 1.0, None)

    cores = os.cpu_count()
    assert timing.doubts([result(0.02)] * 3, 0.1, cores) is None
    assert timing.doubts([result(0.02)] * 3, None, cores) is None
    assert "other programs kept 0.6" in timing.doubts([result(0.02)], 0.6, cores)
    assert "equal calls differ by ±25 %" in timing.doubts([result(0.5)] * 2 + [result(0.0)], 0.0, cores)


def test_a_model_without_tensors(tmp_path):
    np.savez(tmp_path / "e.npz")
    assert run("inspect", tmp_path / "e.npz").stdout == "0 tensors, 0 values, 0 B, 0.00 bits each\n"
    for args in (
        ["pack", tmp_path / "e.npz", "-o", tmp_path / "e.safetensors", "--bits", 4],
        [
            "prune",
            tmp_path / "e.npz",
            "-o",
            tmp_path / "e.safetensors",
            "--sparsity",
            0.5,
            "--html",
            tmp_path / "e.html",
        ],
        ["diff", tmp_path / "e.npz", tmp_path / "e.safetensors", "--max-error", 0],
        ["unpack", tmp_path / "e.safetensors", "-o", tmp_path / "u.safetensors"],
    ):
        assert run(*args).stderr == ""


def test_what_packs_nothing_is_told(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones((8, 8), "f4"))
    result = start(*ENTRY, "pack", "m.npz", "-o", "m.safetensors", "--bits", "4", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == "fastopt: warning: no tensor is packed: 1 x fewer than min_size 4096\n"


def test_recipes_of_any_content_are_one_line(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    for text in (
        b"a = " + b"[" * 5000,
        b"a." * 5000 + b"a = 1",
        b"overrides = " + b"{a = " * 3000,
        b"bits = 99999999999999999999999999",
        b"bits = nan",
        b"min_size = 1e999",
        b"sparsity = inf",
        b"bits = 1979-05-27",
        b"include = 3",
        b"overrides = [1]",
        b'"\x1b[2J" = 1',
        b"\xff\xfe",
        b"bits = 4\nbits = 8",
        b"[overrides]\n'*' = 3",
    ):
        recipe.write_bytes(text)
        result = run("pack", model, "-o", tmp_path / "a.safetensors", "--recipe", recipe, code=1)
        assert result.stderr.startswith(f"fastopt: {recipe}: "), (text[:20], result.stderr[:200])
        assert result.stderr.count("\n") == 1
        assert "\x1b" not in result.stderr
        assert len(result.stderr) < 1000
        with pytest.raises((TypeError, ValueError), match=r"recipe\.toml: "):
            fo.Recipe.from_toml(recipe)


def test_version():
    assert run("--version").stdout == f"fastopt {fo.__version__} ({_core.isa()})\n"


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra(module):
    code = f"import sys; sys.modules[{module!r}] = None; from fastopt.cli.__main__ import main; main()"
    done = run_python(code)
    assert done.returncode == 1
    # An editable install may report its build before.
    assert done.stderr.splitlines()[-1] == "fastopt: the command line needs typer and rich: pip install typer rich"


# ---- names that a terminal would act on --------------------------------------------------------------------------

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp\u2066\u200b\u2028\x7f\x85\nforged 1x1 row\r\t\ud800"


def is_safe(text):
    return all(line.isprintable() for line in text.replace("\u2502", "").split("\n"))


@pytest.fixture
def evil(tmp_path):
    name = EVIL.replace("\ud800", "")
    path = tmp_path / "evil\x1b[2J\n\u202e.npz"
    rng = np.random.default_rng(0)
    np.savez(path, **{name: rng.standard_normal((64, 64)), "layers.0." + name: rng.standard_normal(3), "w": np.ones(9)})
    return path


@pytest.mark.parametrize("columns", [None, "80"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_names_do_nothing_to_the_terminal(evil, columns, as_json, tmp_path, monkeypatch):
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    out, html = tmp_path / "a\x9b.safetensors", tmp_path / "r.html"
    np.savez(tmp_path / "b.npz", other=np.ones(3))
    for args in (
        ["inspect", evil],
        ["pack", evil, "-o", out, "--bits", 4, "--exclude", EVIL.replace("\ud800", ""), "--html", html],
        ["pack", evil, "-o", out, "--bits", 4, "--target-size", 1, "--override", f"{EVIL[:40]}:bits=8"],
        ["prune", evil, "-o", out, "--sparsity", 0.5],
        ["diff", evil, out, "--max-error", 0, "--html", html],
        ["diff", evil, tmp_path / "b.npz"],
        ["export", evil, "--to", "npz", "-o", tmp_path / "x\x1b.npz"],
        ["unpack", evil, "-o", out],
        ["inspect", tmp_path / "none\x1b[1m\x85.npz"],
        ["pack", evil, "-o", tmp_path / "\x1bno" / "x", "--bits", 4],
        ["pack", evil, "-o", out, "--bits", 4, "--recipe", tmp_path / "\x1b.toml"],
        ["pack", evil, "-o", out, "--bits", 4, f"extra{EVIL}"],
        ["pack", evil, "-o", out, "--bits", EVIL],
        ["pack", evil, "-o", out, f"--{EVIL}"],
        [EVIL],
    ):
        result = CliRunner().invoke(app, [*map(str, args), *(as_json if args[0] != EVIL else [])])
        assert isinstance(result.exception, SystemExit | None), args
        assert is_safe(result.stdout), args
        assert is_safe(result.stderr), args
        assert "forged" not in [line.split()[0] for line in result.stdout.splitlines() if line.split()]
        if as_json and result.exit_code == 0:
            told = json.loads(result.stdout)
            if args[0] == "inspect":
                assert told["tensors"][0]["name"] == EVIL.replace("\ud800", "")  # JSON escapes, and loses nothing
        if html.exists():
            assert is_safe(html.read_text())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_no_failure(encoding, tmp_path):
    name = "\N{CYRILLIC SMALL LETTER ZHE}\N{GRINNING FACE}.weight"
    np.savez(tmp_path / "m.npz", **{name: np.random.default_rng(0).standard_normal((64, 64))})
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    for args in (
        ["pack", "m.npz", "-o", "a.safetensors", "--bits", "4"],
        ["inspect", "m.npz", "--json"],
        ["inspect", "m.npz"],
    ):
        done = start(*ENTRY, *args, cwd=tmp_path, env=env, encoding=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        if "--json" in args:
            assert json.loads(done.stdout)["tensors"][0]["name"] == name
        else:
            assert ".weight" in done.stdout


def test_an_error_of_any_kind_is_one_line(model, monkeypatch):
    for error in (
        RecursionError("deep"),
        KeyError("k"),
        AttributeError("no\nattribute"),
        AssertionError(),
        SystemError("x"),
    ):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr("fastopt.cli.model_commands.open_model", fail)
        result = run("inspect", model, code=1)
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"fastopt: {type(error).__name__}")
        result = CliRunner().invoke(app, ["--debug", "inspect", str(model)])
        assert result.exception is error


def test_workers(model, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    pool = ("--workers", 2)
    alone = answer("pack", model, "-o", one, "--target-bits", 14)
    together = answer("pack", model, "-o", two, "--target-bits", 14, *pool)
    assert {**alone, "target": None} == {**together, "target": None}
    assert one.read_bytes() == two.read_bytes()
    assert answer("inspect", one) == answer("inspect", one, *pool)
    assert answer("diff", model, one) == answer("diff", model, one, *pool)
    run("unpack", one, "-o", tmp_path / "three.safetensors")
    run("unpack", one, "-o", tmp_path / "four.safetensors", *pool)
    assert (tmp_path / "three.safetensors").read_bytes() == (tmp_path / "four.safetensors").read_bytes()
    assert "expected one of them" in run("inspect", model, *pool, "--dask", "tcp://nowhere:1", code=2).output
    onnx = tmp_path / "m.onnx"
    onnx.touch()
    assert "not for an ONNX model" in run("pack", onnx, "-o", onnx, "--bits", 4, *pool, code=2).output
