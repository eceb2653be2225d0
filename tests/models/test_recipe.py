import dataclasses
import itertools
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from helpers import BITS
from safetensors.numpy import save_file

import fastopt as fo
from fastopt.models.choose import Sizes, make_to_fit, parse_size
from fastopt.models.recipe import PRESETS, RecipeOptions
from fastopt.models.stream import plan
from fastopt.tensors.quantization import quantized_nbytes


def test_the_first_match_wins_and_the_reason_is_told():
    recipe = fo.Recipe(
        bits=4,
        exclude=["*norm*", "head.*"],
        include=["*.weight"],
        overrides={"embed.*": {"bits": 8}, "*.weight": {"group_size": -1}, "embed.weight": {"bits": 2}},
        min_size=100,
    )
    for name, shape, dtype, bits, group_size, reason in [
        ("embed.weight", (10, 10), "float32", 8, "auto", "override 'embed.*'"),
        ("fc.weight", (10, 10), "float16", 4, -1, "override '*.weight'"),
        ("fc.weight", (10, 10), ml_dtypes.bfloat16, 4, -1, "override '*.weight'"),
        ("fc.weight", (9, 11), "float32", None, None, "99 weights, fewer than min_size 100"),
        ("fc.weight", (1 << 40, 1 << 40), "float32", 4, -1, "override '*.weight'"),
        ("norm.weight", (10, 10), "float32", None, None, "excluded by '*norm*'"),
        ("head.weight", (10, 10), "float32", None, None, "excluded by 'head.*'"),
        ("fc.bias", (100,), "float32", None, None, "not included"),
        ("ids.weight", (100,), "int64", None, None, "int64 is not quantized or pruned"),
    ]:
        options, why = recipe.of(name, shape, dtype)
        assert why == reason
        assert (options and (options.bits, options.group_size)) == (bits and (bits, group_size))
    assert fo.Recipe().of("w", (100, 100), "float32") == (None, "nothing is asked for")
    assert fo.Recipe(bits=4, exclude="*norm*").of("w", (100, 100), "float32")[0].bits == 4  # a text is one pattern


def test_an_override_of_how_to_prune_replaces_all_of_it():
    recipe = fo.Recipe(
        bits=4, sparsity=0.5, overrides={"a": {"pattern": "2:4"}, "b": {"sparsity": None}, "c": {"bits": 8}}
    )
    options = {name: recipe.of(name, (100, 100), "float32")[0] for name in "abcd"}
    assert [(o.bits, o.sparsity, o.pattern) for o in options.values()] == [
        (4, None, "2:4"),
        (4, None, None),
        (8, 0.5, None),
        (4, 0.5, None),
    ]
    keep = fo.Recipe(bits=4, overrides={"head*": {"bits": None}})
    assert keep.of("head", (100, 100), "float32") == (None, "override 'head*'")


def test_every_option_reaches_its_function(rng):
    w = rng.standard_normal((64, 96)).astype("f4")
    w[rng.random(w.shape) < 0.1] = 0
    for options, expected in [
        ({"bits": 8}, fo.quantize(w, 8)),
        ({"bits": 4, "group_size": 24}, fo.quantize(w, 4, group_size=24)),
        ({"bits": 4, "group_size": None}, fo.quantize(w, 4, group_size=None)),
        ({"bits": 2, "param_dtype": "float32"}, fo.quantize(w, 2, param_dtype="float32")),
        ({"bits": 2, "fit": "lsq", "outliers": 0.01}, fo.quantize(w, 2, fit="lsq", outliers=0.01)),
        ({"bits": 2, "importance": "magnitude"}, fo.quantize(w, 2, importance="magnitude")),
        (
            {"bits": 2, "importance": "magnitude", "outliers": 0.01},
            fo.quantize(w, 2, importance="magnitude", outliers=0.01),
        ),
        ({"sparsity": 0.7}, fo.prune(w, sparsity=0.7)),
        (
            {"sparsity": 0.9, "bits": 2, "importance": "magnitude"},
            fo.prune(w, sparsity=0.9, layout="index8").quantize(2, importance="magnitude"),
        ),
        ({"threshold": 0.3}, fo.prune(w, threshold=0.3)),
        ({"pattern": "2:4"}, fo.prune(w, pattern="2:4")),
        ({"pattern": "1x16", "sparsity": 0.5}, fo.prune(w, pattern="1x16", sparsity=0.5)),
        ({"pattern": "2:4", "bits": 4}, fo.prune(w, pattern="2:4").quantize(4)),
        (
            {"sparsity": 0.9, "bits": 2, "fit": "lsq", "group_size": 8, "param_dtype": "float32"},
            fo.prune(w, sparsity=0.9, layout="index8").quantize(2, group_size=8, fit="lsq", param_dtype="float32"),
        ),
    ]:
        packed = fo.pack({"w": w}, **options)["w"]
        by_override = fo.pack({"w": w, "x": w}, overrides={"w": options})
        assert packed == expected
        assert by_override["w"] == expected
        assert by_override["x"] is w
        assert getattr(packed, "layout", None) == getattr(expected, "layout", None)


def test_what_is_wrong_is_named():
    for options, error, message in [
        ({"bits": 7}, ValueError, "bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        ({"bits": 4.0}, TypeError, r"bits: expected 8, 6, 5, 4, 3 or 2, got 4\.0"),
        ({"group_size": 0}, ValueError, "group_size: expected a positive number"),
        ({"param_dtype": "int8"}, ValueError, "param_dtype: expected float16 or float32, got 'int8'"),
        ({"fit": "least-squares"}, ValueError, "got 'least-squares', did you mean 'lsq'?"),
        ({"fit": "best"}, ValueError, "fit: expected 'auto', 'minmax', 'lsq' or 'gptq', got 'best'"),
        ({"outliers": 2}, ValueError, "outliers: expected a share between 0 and 1, got 2"),
        ({"importance": "size"}, ValueError, "importance: expected 'magnitude' or None, got 'size'"),
        ({"importance": "magnitude", "fit": "minmax"}, ValueError, "importance: expected None with fit='minmax'"),
        ({"sparsity": 1.5}, ValueError, "sparsity: expected a fraction from 0 to 1"),
        ({"pattern": "4:2"}, ValueError, "pattern: expected 'N:M'"),
        ({"pattern": "1x16"}, ValueError, "threshold, sparsity: expected exactly one"),
        ({"pattern": "2:4", "sparsity": 0.5}, ValueError, "expected neither"),
        ({"bits": 4, "sparsity": 0.5, "outliers": 0.1}, ValueError, "outliers: expected None"),
        ({"include": [1]}, TypeError, "include: expected glob patterns"),
        ({"exclude": {"*"}}, TypeError, "exclude: expected glob patterns"),
        ({"overrides": ["*"]}, TypeError, "overrides: expected a mapping, got list"),
        ({"overrides": {"*": 8}}, TypeError, r"overrides: expected options for a pattern, got 8 for '\*'"),
        (
            {"overrides": {"*": {"bit": 8}}},
            ValueError,
            r"overrides: '\*' has unknown options \['bit'\], did you mean 'bits'\?",
        ),
        ({"overrides": {"*": {"min_size": 8}}}, ValueError, r"overrides: '\*' has unknown options \['min_size'\]"),
        ({"overrides": {"*": {"bits": 7}}}, ValueError, r"overrides: '\*': bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        ({"min_size": -1}, ValueError, "min_size: expected a number, 0 or more, got -1"),
        ({"min_size": 1.5}, ValueError, "min_size: expected a number"),
    ]:
        with pytest.raises(error, match=message):
            fo.Recipe(**options)
    with pytest.raises(ValueError, match=r"recipe: unknown options \['bit'\], did you mean 'bits'\? \(options: bits, "):
        fo.Recipe.from_dict({"bit": 4})
    with pytest.raises(TypeError, match="recipe: expected a mapping, got list"):
        fo.Recipe.from_dict([])
    with pytest.raises(ValueError, match="recipe: cannot be given together with other options"):
        fo.pack({}, bits=4, recipe=fo.Recipe())
    with pytest.raises(TypeError, match=r"unknown option 'bit', did you mean 'bits'.*options: bits, group_size"):
        fo.pack({}, bit=4)
    options = [f.name for f in dataclasses.fields(fo.Recipe) if f.name != "inputs"]
    assert sorted(RecipeOptions.__annotations__) == sorted(["preset", *options])
    with pytest.raises(TypeError, match="recipe: expected a Recipe, got dict"):
        fo.pack({}, recipe={})


def test_toml_and_dict(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("""
bits = 4
fit = "lsq"
exclude = ["*norm*", "*bias"]
min_size = 100
[overrides]
"*embed*" = {bits = 8, group_size = "none"}
"*head*" = {bits = "none"}
"*fc*" = {pattern = "2:4", param_dtype = "float32"}
""")
    recipe = fo.Recipe.from_toml(path)
    assert recipe == fo.Recipe(
        bits=4,
        fit="lsq",
        exclude=["*norm*", "*bias"],
        min_size=100,
        overrides={
            "*embed*": {"bits": 8, "group_size": None},
            "*head*": {"bits": None},
            "*fc*": {"pattern": "2:4", "param_dtype": np.float32},
        },
    )
    assert list(recipe.overrides) == ["*embed*", "*head*", "*fc*"]
    assert fo.Recipe.from_dict(recipe.to_dict()) == recipe
    for text, message in [("bits = 7", "bits: expected"), ("bits = [", "recipe.toml"), ("bit = 3", "unknown options")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}.*{message}|{message}.*{path}|{path}"):
            fo.Recipe.from_toml(path)
    with pytest.raises(FileNotFoundError):
        fo.Recipe.from_toml(tmp_path / "none.toml")


@pytest.fixture
def weights(rng):
    """Tensors that are hard to quantize, easy, small, and already sparse."""
    heavy = rng.standard_t(2, (64, 256)).astype("f4")
    easy = rng.uniform(-1, 1, (128, 256)).astype("f4")
    return {
        "heavy": heavy,
        "easy": easy,
        "bias": rng.standard_normal(64).astype("f4"),
        "half": rng.standard_normal((40, 130)).astype("f2"),
        "odd[0]": rng.standard_normal((80, 67)),
        "pruned": np.where(rng.random((64, 128)) < 0.9, 0, rng.standard_normal((64, 128))).astype("f4"),
    }


def test_the_plan_is_what_happens(weights):
    for options in [
        {"bits": 4},
        {"bits": 2, "group_size": None, "param_dtype": "float32", "overrides": {"easy": {"bits": 8}}},
        {"bits": 8, "outliers": 0.01, "overrides": {"pruned": {"outliers": None, "sparsity": 0.9}}},
        {"pattern": "1x16", "sparsity": 0.5, "exclude": ["h*"]},
        {"threshold": 0.5, "bits": 4},
    ]:
        recipe = fo.Recipe(**options)
        planned, made = plan(weights, recipe), fo.pack(weights, recipe=recipe).report()
        assert planned == made
        assert planned.nbytes == sum(t.nbytes for t in planned.tensors)
        assert planned.nbytes_before == sum(w.nbytes for w in weights.values())


def test_bytes_follow_from_the_shape(rng):
    for shape in [(7, 33), (1000,), (3, 4, 5), (0, 4), (4, 0), ()]:
        w = rng.standard_normal(shape).astype("f4")
        for bits in BITS:
            for group_size in ("auto", -1, None, 5):
                for params, share in (("float16", None), ("float32", 0.1)):
                    q = fo.quantize(w, bits, group_size=group_size, param_dtype=params, outliers=share)
                    assert quantized_nbytes(shape, bits, group_size, params, share) == q.nbytes


def test_bits_are_chosen_within_the_target(weights, tmp_path):
    total = sum(w.size for w in weights.values())
    fixed = fo.Recipe(fit="lsq", overrides={"half": {"bits": 8, "group_size": -1}, "pruned": {"sparsity": 0.9}})
    errors = []
    for target in (3.25, 4, 5, 8):
        recipe = fo.choose_bits(weights, fixed, target_bits=target)
        model = fo.pack(weights, recipe=recipe)
        report = model.report(weights)
        assert report.nbytes * 8 <= target * total
        assert fo.pack(weights, recipe=fixed, target_bits=target).recipe == recipe
        assert model["half"] == fo.quantize(weights["half"], 8, fit="lsq")
        assert model["bias"] is weights["bias"]
        assert recipe.overrides["odd[[]0]"]["bits"] == model["odd[0]"].bits
        assert model["pruned"].nnz <= round(0.1 * weights["pruned"].size) + 1
        errors.append(sum(t.error.relative**2 * math.prod(t.shape) ** 0.5 for t in report.tensors))
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4
    assert fo.choose_bits(weights, fixed) is fixed

    for target in (60_000, "70kB", "0.08 MiB"):
        model = fo.pack(weights, recipe=fixed, target_size=target)
        model.save(tmp_path / "m.safetensors")
        size = (tmp_path / "m.safetensors").stat().st_size
        assert size <= parse_size(target)
        assert size > parse_size(target) * 0.7


def size_of(target):
    return (
        sum(path.stat().st_size for path in target.parent.iterdir())
        if "index" in target.name
        else target.stat().st_size
    )


@pytest.mark.parametrize(
    "names", ["fc{}.weight", '"' * 90 + "\\{}", "\N{SNOWMAN}" * 50 + "{}", "[[*?]" * 9 + "{}", "\x01" * 40 + "{}"]
)
@pytest.mark.parametrize("target", ["m.safetensors", "m.safetensors.index.json"])
def test_the_target_size_counts_the_whole_file(names, target, rng, tmp_path):
    """From the smallest size that is accepted on, the file is never larger."""
    arrays = {names.format(i): rng.standard_normal((32, 160)).astype("f4") for i in range(3)} | {"ids": np.arange(99)}
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    index = {"weight_map": {}}
    for i, (name, array) in enumerate(arrays.items()):
        save_file({name: array}, tmp_path / "in" / f"{i}.safetensors")
        index["weight_map"][name] = f"{i}.safetensors"
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    target = tmp_path / "out" / target
    with pytest.raises(ValueError, match="target_size: expected at least") as refused:
        fo.pack_file(tmp_path / "in", target, target_size=5000)
    assert not target.exists()
    least = int(re.search(r"at least (\d+) bytes", str(refused.value))[1])
    for size in (least, least + 100, least + 1500, 30_000):
        report = fo.pack_file(tmp_path / "in", target, target_size=size)
        assert size_of(target) <= size
        assert fo.load(target).recipe == report.recipe
    model = fo.pack(arrays, target_size=least)
    model.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size <= least


def test_a_target_holds_where_the_sample_misses_large_weights(rng, tmp_path):
    """Group parameters that float16 cannot hold take twice the bytes; they may be in rows that are not measured."""
    w = rng.standard_normal((2049, 1024)).astype("f4")
    w[1] *= 1e30
    model = fo.pack({"w": w}, target_bits=4.5)
    assert model.nbytes * 8 <= 4.5 * w.size
    assert model["w"].scale.dtype == np.float32
    np.savez(tmp_path / "m.npz", w=w)
    report = fo.pack_file(tmp_path / "m.npz", tmp_path / "m.safetensors", target_size="1.2MB")
    assert (tmp_path / "m.safetensors").stat().st_size <= 1_200_000
    assert report.nbytes < 1_200_000


def test_the_writer_of_another_format_tells_its_bytes(rng):
    arrays = {name: rng.standard_normal((64, 64)).astype("f4") for name in "ab"}
    tried = []

    class Triple(Sizes):
        def quantized(self, *args):
            return 3 * super().quantized(*args)

        def header(self, name, options):
            return 0

        def rest(self, recipe):
            return 1000

    def make(recipe, check):
        model = fo.pack(arrays, recipe)
        tried.append(3 * model.nbytes + 5000)
        check(tried[-1] - 5000, tried[-1])
        return model

    model = make_to_fit(arrays, fo.Recipe(), make, target_size=20_000, sizes=Triple())
    assert len(tried) > 1  # the rest was 5000
    assert 3 * model.nbytes + 5000 <= 20_000
    with pytest.raises(ValueError, match=r"expected at least 1\d{4} bytes"):
        make_to_fit(arrays, fo.Recipe(), make, target_size=10_000, sizes=Triple())


def test_no_other_choice_is_better(rng):
    """With few tensors, all choices can be tried: none that fits has less error."""
    groups = {2: (16, 32, 64, 128, -1), 4: (16, 32, 64, 128, -1), 8: (128, -1)}
    weights = {f"{i}": (rng.standard_t(3, (64 << i, 64)) * 10.0**i).astype("f4") for i in range(3)}
    tried = [
        [
            (q.nbytes, q.error(w).relative ** 2 * w.size**0.5)
            for q in (fo.quantize(w, bits, group_size=size) for bits, sizes in groups.items() for size in sizes)
        ]
        for w in weights.values()
    ]
    total = sum(w.size for w in weights.values())
    for target in (2.6, 3.1, 3.5, 4.25, 4.6, 6):
        report = fo.pack(weights, target_bits=target, min_size=0).report(weights)
        mine = sum(t.error.relative**2 * math.prod(t.shape) ** 0.5 for t in report.tensors)
        every = [(sum(n for n, _ in c), sum(e for _, e in c)) for c in itertools.product(*tried)]
        assert report.nbytes * 8 <= target * total
        # Bytes are counted in 16384ths of the budget: what fits by less than that may be missed.
        assert mine <= min(e for n, e in every if n * 8 * (1 + 1e-3) <= target * total) * (1 + 1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_options_in_one_word(preset, rng):
    """Options beside a preset count, wherever it is named."""
    weights = {name: rng.standard_normal((64, 96)).astype("f4") for name in ("a", "norm")}
    recipe = fo.Recipe(**PRESETS[preset], exclude=["norm"])
    packed = fo.pack(weights, preset=preset, exclude=["norm"])
    assert packed.recipe == recipe
    assert packed["norm"] is weights["norm"]
    assert packed["a"] == fo.quantize(weights["a"], **PRESETS[preset])
    assert fo.Recipe.from_dict({"preset": preset, "exclude": ["norm"]}) == recipe
    assert fo.Recipe.from_dict(recipe.to_dict()) == recipe
    assert fo.pack(weights, preset=preset, bits=6)["a"].bits == 6
    with pytest.raises(ValueError, match="bits: expected None together with a target"):
        fo.pack(weights, preset=preset, target_bits=4)


def test_larger_presets_are_more_exact(rng):
    w = {"w": rng.standard_normal((64, 384)).astype("f4")}
    models = [fo.pack(w, preset=preset) for preset in ("small", "balanced", "safe")]
    sizes, errors = [m.nbytes for m in models], [m["w"].error(w["w"]).relative for m in models]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.08
    for bad in ("tiny", 4, ["small"]):
        with pytest.raises(ValueError, match=r"^preset: expected one of 'safe', 'balanced', 'small', got "):
            fo.pack(w, preset=bad)


def test_few_bits_are_fitted_by_least_squares(rng):
    w = rng.standard_normal((8, 256)).astype("f4")
    for bits, group_size in ((2, 64), (3, 32)):
        assert fo.quantize(w, bits) == fo.quantize(w, bits, fit="lsq", group_size=group_size)
    assert fo.quantize(w, 4) == fo.quantize(w, 4, fit="minmax", group_size=32)
    old = fo.quantize(w, 2, fit="minmax", group_size=16)  # the default until there were 3 bits
    assert fo.quantize(w, 2).nbytes < 0.65 * old.nbytes
    assert fo.quantize(w, 2).error(w).rmse < 1.05 * old.error(w).rmse


def test_a_choice_weighs_errors_by_importance(rng):
    """Large weights, that count more, get more bits than where all errors count alike."""
    w = rng.standard_normal((64, 256)).astype("f4")
    weights = {"even": w, "peaked": np.where(rng.random(w.shape) < 0.02, 10 * w, w).astype("f4")}

    def error(model):
        weight = {
            name: np.abs(x.astype("f8")) + np.sqrt(np.square(x, dtype="f8").mean()) for name, x in weights.items()
        }
        parts = (
            np.square(model[name].to_dense() - x) * weight[name] / (weight[name] * x**2).sum()
            for name, x in weights.items()
        )
        return sum(part.sum() for part in parts)

    alike, weighed = (fo.pack(weights, target_bits=3, fit="lsq", importance=i) for i in (None, "magnitude"))
    assert weighed.nbytes * 8 <= 3 * 2 * w.size
    assert error(weighed) < 0.95 * error(alike)


def test_a_large_tensor_is_measured_on_some_of_its_rows(rng):
    w = rng.standard_normal((2049, 1024)).astype("f4")
    seen = []
    recipe = fo.choose_bits({"w": w}, fo.Recipe(), target_bits=4.5, notify=seen.append)
    assert recipe.overrides == {"w": {"bits": 4, "group_size": 64}}
    assert seen == ["w"]


def test_targets_out_of_reach(weights):
    for options, message in [
        ({"target_bits": 1}, r"target_bits: expected at least \d+\.\d{3}, got 1"),
        ({"target_size": 100}, r"target_size: expected at least \d+ bytes, got 100"),
        ({"target_size": "1 kB"}, r"target_size: expected at least \d+\.\d\d kB, got 1 kB"),
        ({"target_size": "12 parsec"}, "target_size: expected bytes, as 12000000 or '12MB', got '12 parsec'"),
        ({"target_size": True}, "target_size: expected bytes"),
        ({"target_bits": 4, "target_size": 100}, "expected one of them, got both"),
        ({"target_bits": 4, "bits": 4}, "bits: expected None together with a target, got 4"),
        ({"target_bits": math.nan}, "target_bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            fo.pack(weights, **options)
    for override in ({}, {"w": {"bits": 8}}):
        with pytest.raises(ValueError, match="'w': w: expected finite float32 values, got nan"):
            fo.pack({"w": np.full((64, 64), np.nan)}, target_bits=4, overrides=override)
    assert fo.pack({"w": np.zeros((0, 4))}, target_bits=4, min_size=0)["w"].shape == (0, 4)
    least = fo.pack(weights, bits=2, group_size=64, min_size=4096).report()
    fo.pack(weights, target_bits=least.bits_per_weight + 0.001)


def test_sizes_in_words():
    assert [parse_size(s) for s in (12, "12", "12B", "1.5kB", "2 MB", "1GiB", "3k", "1 kib")] == [
        12, 12, 12, 1500, 2_000_000, 1 << 30, 3000, 1024,
    ]  # fmt: skip


def test_reports(weights):
    recipe = fo.Recipe(bits=4, overrides={"easy": {"sparsity": 0.5}, "heavy": {"bits": None, "pattern": "2:4"}})
    model = fo.pack(weights, recipe=recipe)
    report = model.report(weights)
    kinds = {t.name: (t.kind, t.bits, t.group_size) for t in report.tensors}
    assert kinds == {
        "heavy": ("sparse", None, None),
        "easy": ("sparse+quantized", 4, 32),
        "bias": ("dense", None, None),
        "half": ("quantized", 4, 32),
        "odd[0]": ("quantized", 4, 32),
        "pruned": ("quantized", 4, 32),
    }
    for t in report.tensors:
        w, back = weights[t.name].astype("f8"), model.unpack()[t.name].astype("f8")
        assert (t.shape, t.dtype, t.nbytes_before) == (w.shape, weights[t.name].dtype.name, weights[t.name].nbytes)
        assert t.nbytes == model[t.name].nbytes
        assert t.bits_per_weight == 8 * t.nbytes / w.size
        if t.dtype != "float16":  # decoded in float32, which the dtype of the weight may round
            assert t.error.max == np.abs(back - w).max()
        assert math.isclose(t.error.rmse, math.sqrt(np.square(back - w).mean()), rel_tol=1e-3, abs_tol=1e-12)
        cosine = np.vdot(back, w) / np.linalg.norm(back) / np.linalg.norm(w)
        assert math.isclose(t.error.cosine, cosine, rel_tol=1e-6)
    ours, theirs = (np.concatenate([np.ravel(m[n]).astype("f8") for n in weights]) for m in (model.unpack(), weights))
    assert math.isclose(report.error.relative, np.linalg.norm(ours - theirs) / np.linalg.norm(theirs), rel_tol=1e-6)
    assert report.error.max == np.abs(ours - theirs).max()
    plain = report.to_dict()
    assert plain["tensors"][2]["error"] == {"rmse": 0, "relative": 0, "max": 0, "snr": None, "cosine": 1}
    assert plain["tensors"][0]["shape"] == [64, 256]
    assert plain["nbytes"] == report.nbytes
    assert model.report().error is None
    assert model.report().to_dict()["error"] is None
    with pytest.raises(ValueError, match=r"'half': weights: expected shape \(40, 130\), got \(5200,\)"):
        model.report({"half": weights["half"].reshape(-1)})
    with pytest.raises(ValueError, match=r"'bias': weights: expected shape \(64,\), got \(1, 64\)"):
        model.report({"bias": weights["bias"][None]})
    assert fo.PackedModel({"w": weights["easy"]}).report().tensors[0].reason == ""
