"""`fastopt pack --eval`: bits by a score of the whole model."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import fastopt as fo
from fastopt.cli.show_commands import app

SCORE = """
import sys
import numpy as np
import fastopt as fo

def loss(model):
    original = fo.load("model.safetensors")
    return sum(float(np.square(np.asarray(model[name]) - original[name]).mean()) * k
               for name, k in {"first": 1, "second": 30}.items())

def score(model):
    return 10 - loss(model)

if __name__ == "__main__":
    print("scoring", sys.argv[1])
    print(score(fo.load(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal((48, 128)).astype("f4") for name in ("first", "second", "third")}
    return {**made, "bias": np.zeros(48, "f4")}


def run(*args, code=0):
    result = CliRunner().invoke(app, ["pack", "model.safetensors", "-o", "small.safetensors", *args])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.filterwarnings("always:overrides")
def test_eval_on_the_command_line(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fo.PackedModel(weights).save("model.safetensors")
    (tmp_path / "few_score.py").write_text(SCORE)
    common = ("--fit", "lsq", "--budget", "0.1")
    result = run("--eval", "few_score:score", *common, "--state", "state.json", "--json")
    assert "chosen" in result.stderr
    assert "second" in result.stderr
    told = json.loads(result.stdout)
    names = {}
    exec(SCORE, names)
    expected = fo.search(weights, names["score"], fit="lsq", budget=0.1)
    assert {t["name"]: t["bits"] for t in told["tensors"] if t["bits"]} == expected.bits
    first = (tmp_path / "small.safetensors").read_bytes()
    # A command scores files, and is not asked for what the state has.
    run("--eval", "false {}", *common, "--state", "state.json")
    assert (tmp_path / "small.safetensors").read_bytes() == first
    alone = ("--include", "second", "--evaluations", "1")
    run("--eval", f"{sys.executable} few_score.py {{}}", *common, *alone)
    assert fo.load("small.safetensors")["second"].bits > 4
    # All candidates are packed with the pattern that matches nothing.
    result = run("--eval", "few_score:score", *common, "--override", "nothing:bits=8")
    assert result.stderr.count("no tensor matches 'nothing'") == 1


ONNX_SCORE = """
import numpy as np
import onnxruntime

def score(path):
    x = np.random.default_rng(1).standard_normal((50, 128), dtype=np.float32)
    ours, theirs = (onnxruntime.InferenceSession(str(p)).run(None, {"x": x})[0] for p in (path, "model.onnx"))
    return -float(np.abs(ours - theirs).mean() / np.abs(theirs).mean())
"""


@pytest.mark.parametrize("options", [(), ("--fast",)])
def test_eval_of_an_onnx_model(options, tmp_path, monkeypatch, rng):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    weights = {name: rng.standard_normal((128, 128)).astype("f4") for name in ("a.weight", "b.weight")}
    fo.export(weights, "model.onnx", to="onnx", graph=[fo.Layer("a", activation="relu"), fo.Layer("b")])
    (tmp_path / "onnx_score.py").write_text(ONNX_SCORE)
    args = ["pack", "model.onnx", "-o", "small.onnx", "--eval", "onnx_score:score", "--budget", ".03", "--json"]
    result = CliRunner().invoke(app, [*args, *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {t["bits"] for t in told["tensors"]} <= {8, 4, 2}  # others take no fewer bytes in ONNX
    names = {}
    exec(ONNX_SCORE, names)
    assert names["score"]("small.onnx") >= -0.03
    if not options:
        (tmp_path / "recipe.toml").write_text('preset = "balanced"')
        result = CliRunner().invoke(
            app, ["pack", "model.onnx", "-o", "small.onnx", "--recipe", "recipe.toml", "--json"]
        )
        assert {t["bits"] for t in json.loads(result.stdout)["tensors"]} == {4}
        return
    # The scores in a state depend on the options of ONNX too.
    state = [*args, *options, "--state", "state.json", "--evaluations", "1"]
    for more, code in (((), 0), ((), 0), (("--accuracy-level", "4"), 1)):
        result = CliRunner().invoke(app, [*state, *more])
        assert result.exit_code == code, result.output
    assert "belongs to a search with other weights or options" in result.output


def test_bad_eval_on_the_command_line(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fo.PackedModel(weights).save("model.safetensors")
    for args, text in (
        (["--eval", "x {}"], "expected --budget"),
        (["--budget", "1"], "together with --eval"),
        (["--state", "x"], "together with --eval"),
        (["--eval", "nothing_here:f", "--budget", "1"], "nothing_here"),
        (["--eval", "math:pi", "--budget", "1"], "not a function"),
        (["--eval", "python score.py", "--budget", "1"], "or a command with {}"),
        (["--eval", "x {}", "--budget", "1", "--bits", "4"], "--bits"),
    ):
        assert text in " ".join(run(*args, code=2).output.replace("│", "").split())
    for args, text in (
        (["--eval", "false {}", "--budget", "1"], "exit code 1"),
        (["--eval", "echo {}", "--budget", "1"], "expected a number in the last line"),
        (["--eval", "math:isnan", "--budget", "x"], "--budget: expected a number"),
    ):
        assert text in run(*args, code=1).stderr
    assert not (tmp_path / "small.safetensors").exists()
