import numpy as np
import pytest

import fastopt as fo
from fastopt.models.shrinking import ACTIVATIONS


def conv(x, w, depthwise=False):
    """Convolve x [samples, channels, h, w], without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,cij->nchw" if depthwise else "nchwij,ocij->nohw", windows, w[:, 0] if depthwise else w)


def forward(weights, graph, x):
    """Return the output of each node of the graph."""
    out, before = {}, None
    for node in graph:
        if isinstance(node, fo.Layer):
            h = out[node.input or before] if node.input or before else x
            w = weights[f"{node.name}.weight"].astype("f8")
            h = h.reshape(len(h), -1) @ w.T if node.kind == "dense" else conv(h, w, node.kind == "depthwise")
            column = (slice(None), *[None] * (h.ndim - 2))
            if f"{node.name}.bias" in weights:
                h = h + weights[f"{node.name}.bias"][column]
            if node.norm:
                mean, var, gain, shift = (
                    weights[f"{node.norm}.{part}"][column] for part in ("running_mean", "running_var", "weight", "bias")
                )
                h = (h - mean) / np.sqrt(var + node.eps) * gain + shift
        else:
            parts = [out[name] for name in node.inputs]
            h = sum(parts) if isinstance(node, fo.Add) else np.concatenate(parts, axis=1)
        activation = getattr(node, "activation", None)
        out[node.name] = ACTIVATIONS[activation](h) if activation else h
        before = node.name
    return out


def make(rng, graph, shapes):
    weights = {}
    for node in graph:
        if not isinstance(node, fo.Layer):
            continue
        shape = shapes[node.name]
        weights[f"{node.name}.weight"] = rng.standard_normal(shape).astype("f4")
        if node.norm:
            for part in ("weight", "bias", "running_mean", "running_var"):
                weights[f"{node.norm}.{part}"] = rng.random(shape[0]).astype("f4") + 0.5
        else:
            weights[f"{node.name}.bias"] = rng.standard_normal(shape[0]).astype("f4")
    return weights


CHAIN = [fo.Layer("a", activation="tanh"), fo.Layer("b", activation="sigmoid"), fo.Layer("c")]
NET = [
    fo.Layer("stem", "conv", norm="bn", activation="relu"),
    fo.Layer("deep", "depthwise", activation="silu"),
    fo.Layer("in", "conv", activation="gelu"),
    fo.Layer("out", "conv", norm="bn2"),
    fo.Layer("side", "conv", input="deep", activation="leaky_relu"),
    fo.Add("sum", ["out", "side"], activation="relu6"),
    fo.Layer("other", "conv", input="sum"),
    fo.Layer("twin", "conv", input="sum"),
    fo.Concat("both", ["other", "twin"]),
    fo.Layer("head", flatten=True),
]
SHAPES = {
    "stem": (10, 3, 3, 3),
    "deep": (10, 1, 2, 2),
    "in": (12, 10, 1, 1),
    "out": (9, 12, 3, 3),
    "side": (9, 10, 3, 3),
    "other": (5, 9, 2, 2),
    "twin": (6, 9, 2, 2),
    "head": (4, 11 * 16),
}
SIDE = 10  # 10 -> 8 -> 7 -> 7 -> 5 -> 4


def test_dead_units_change_nothing(rng):
    shapes = {"a": (20, 6), "b": (30, 20), "c": (5, 30)}
    weights = make(rng, CHAIN, shapes)
    weights["a.weight"][::4] = 0
    weights["b.weight"][1::3] = 0
    x = rng.standard_normal((7, 6))
    small = fo.shrink(weights, CHAIN, threshold=0)
    assert {n: w.shape for n, w in small.weights.items() if "weight" in n} == {
        "a.weight": (15, 6),
        "b.weight": (20, 15),
        "c.weight": (5, 20),
    }
    assert small.kept["a"].tolist() == [i for i in range(20) if i % 4]
    want = forward(weights, CHAIN, x)["c"]
    assert np.abs(forward(small.weights, CHAIN, x)["c"] - want).max() <= 1e-6 * np.abs(want).max()
    lost = fo.shrink(weights, CHAIN, threshold=0, fold=False).weights
    assert np.abs(forward(lost, CHAIN, x)["c"] - want).max() > 1e-2


def test_dead_channels_of_a_net_change_nothing(rng):
    weights = make(rng, NET, SHAPES)
    dead = {"stem": [1, 5], "deep": [1, 5], "in": [0, 11], "out": [2, 3], "side": [2, 3], "other": [4], "twin": [0, 1]}
    for name, channels in dead.items():
        weights[f"{name}.weight"][channels] = 0
    x = rng.standard_normal((3, 3, SIDE, SIDE))
    small = fo.shrink(weights, NET, threshold=0)
    for name, channels in dead.items():
        assert small.kept[name].tolist() == [i for i in range(SHAPES[name][0]) if i not in channels]
    assert small.weights["head.weight"].shape == (4, 8 * 16)
    assert small.weights["side.weight"].shape == (7, 8, 3, 3)
    assert small.weights["bn.running_var"].shape == (8,)
    want = forward(weights, NET, x)["head"]
    assert np.abs(forward(small.weights, NET, x)["head"] - want).max() <= 1e-6 * np.abs(want).max()


def test_what_is_kept_is_what_the_wide_net_computes_without_the_rest(rng):
    weights = make(rng, NET, SHAPES)
    small = fo.shrink(weights, NET, share=0.4, fold=False)
    x = rng.standard_normal((2, 3, SIDE, SIDE))
    ours, before = forward(small.weights, NET, x), forward(weights, NET, x)
    assert np.allclose(ours["stem"], before["stem"][:, small.kept["stem"]])
    assert np.allclose(ours["deep"], before["deep"][:, small.kept["deep"]])
    assert len(small.kept["head"]) == 4


def test_criteria_scopes_and_rounding(rng):
    weights = make(rng, CHAIN, {"a": (20, 6), "b": (30, 20), "c": (5, 30)})
    w = weights["a.weight"].astype("f8")
    gradients = {name: rng.standard_normal(x.shape) for name, x in weights.items()}
    activations = {name: rng.standard_normal((9, n, 2)) for name, n in (("a", 20), ("b", 30), ("c", 5))}
    for criterion, scores in {
        "l1": np.abs(w).sum(axis=1),
        "l2": np.square(w).sum(axis=1),
        "taylor": np.abs(w * gradients["a.weight"]).sum(axis=1),
        "activity": np.abs(activations["a"]).mean(axis=(0, 2)),
    }.items():
        options = {"criterion": criterion, "gradients": gradients, "activations": activations}
        small = fo.shrink(weights, CHAIN, share=0.5, **options)
        assert small.kept["a"].tolist() == sorted(np.argsort(scores)[10:].tolist())
        assert len(small.kept["b"]) == 15
    weights["b.weight"] *= 100
    small = fo.shrink(weights, CHAIN, share=0.3, scope="global")
    assert (len(small.kept["a"]), len(small.kept["b"])) == (5, 30)
    small = fo.shrink(weights, CHAIN, share=0.3, scope="global", round_to=8)
    assert (len(small.kept["a"]), len(small.kept["b"])) == (8, 30)
    small = fo.shrink(weights, CHAIN, share=1.0, round_to=8)
    assert (len(small.kept["a"]), len(small.kept["b"])) == (8, 8)
    assert len(fo.shrink(weights, CHAIN, share=1.0).kept["a"]) == 1  # never all
    small = fo.shrink(weights, CHAIN, share=0.5, layers=["b"])
    assert (len(small.kept["a"]), len(small.kept["b"])) == (20, 15)


def test_states_are_cut_alike(rng):
    weights = make(rng, NET, SHAPES)
    numbered = {name: np.arange(w.size).reshape(w.shape) for name, w in weights.items()}
    del numbered["in.bias"]
    small = fo.shrink(weights, NET, share=0.5, states=[numbered, {}], fold=False)
    first, second = small.states
    assert second == {}
    assert "in.bias" not in first
    for name, indices in first.items():
        assert np.array_equal(small.weights[name], weights[name].reshape(-1)[indices])


def test_no_bias_to_fold_into(rng):
    weights = make(rng, CHAIN, {"a": (20, 6), "b": (30, 20), "c": (5, 30)})
    del weights["c.bias"]
    with pytest.raises(ValueError, match="weights: 'c' has no bias for what removed units add; fold=False leaves it"):
        fo.shrink(weights, CHAIN, share=0.5)
    assert fo.shrink(weights, CHAIN, share=0.5, fold=False).weights["c.weight"].shape == (5, 15)


def test_what_does_not_fit_is_refused_by_name(rng):
    weights = make(rng, CHAIN, {"a": (20, 6), "b": (30, 20), "c": (5, 30)})
    before = {name: w.copy() for name, w in weights.items()}
    extra = {**weights, "steps": np.zeros(1)}
    assert "steps" in fo.shrink(extra, CHAIN, share=0.5, keep=["st*"]).weights
    for weights_, graph, options, message in [
        (extra, CHAIN, {}, "weights: the graph does not cover 'steps'"),
        (weights, [*CHAIN, fo.Layer("d")], {}, "weights: the graph needs 'd.weight', which is missing"),
        (weights, CHAIN[::-1], {}, r"weights: 'b.weight' of shape \(30, 20\) does not fit the 5 channels of 'c'"),
        ({**weights, "a.bias": np.zeros(3)}, CHAIN, {}, r"weights: expected 'a.bias' of shape \(20,\), got \(3,\)"),
        (weights, [*CHAIN, CHAIN[0]], {}, "graph: two nodes are named 'a'"),
        (weights, [fo.Layer("a", input="z")], {}, "graph: 'a' reads 'z', which does not come before it"),
        (weights, [*CHAIN, fo.Add("s", ["a", "b"])], {}, "graph: 's' adds 20 channels of 'a' and 30 of 'b'"),
        (weights, [*CHAIN, fo.Add("s", [])], {}, "graph: 's' reads nothing"),
        (weights, [fo.Layer("a", "lstm"), *CHAIN[1:]], {}, "graph: 'a' is 'lstm'"),
        (weights, [fo.Layer("a", activation="mish"), *CHAIN[1:]], {}, "activation: expected one of"),
        (weights, [fo.Layer("a", norm="bn"), *CHAIN[1:]], {}, "weights: the graph needs 'bn.weight'"),
        (weights, [fo.Layer("a", "depthwise")], {}, "graph: 'a' is depthwise and has no node before it"),
        (weights, CHAIN, {"share": None}, "share, threshold: expected exactly one of them"),
        (weights, CHAIN, {"share": 1.5}, "share: expected a number from 0 to 1, got 1.5"),
        (weights, CHAIN, {"scope": "all"}, "scope: expected 'local' or 'global'"),
        (weights, CHAIN, {"criterion": "l0"}, "criterion: expected 'l1', 'l2', 'activity' or 'taylor'"),
        (weights, CHAIN, {"round_to": 0}, "round_to: expected at least 1"),
        (weights, CHAIN, {"criterion": "taylor"}, "gradients: nothing for 'a.weight'"),
        (
            weights,
            CHAIN,
            {"criterion": "activity", "activations": {"a": np.ones((2, 3))}},
            "activations: expected shape",
        ),
        (weights, CHAIN, {"states": [{"a.weight": np.ones(3)}]}, r"states: expected shape \(20, 6\) for 'a.weight'"),
    ]:
        with pytest.raises(ValueError, match=message):
            fo.shrink(weights_, graph, **{"share": 0.5, **options})
    assert all(np.array_equal(weights[name], before[name]) for name in weights)


def test_layers_of_a_stack(rng):
    weights = {f"net.{i}.{part}": rng.standard_normal((3, 3)) for i in range(12) for part in ("q.weight", "v.weight")}
    weights["head.weight"] = np.ones(2)
    weights["net.3.q.weight"] *= 0.1
    weights["net.10.v.weight"] *= 0.1
    small = fo.drop_layers(weights, "net.{}.", count=2, states=[weights])
    order = [i for i in range(12) if i not in small.weights and i in small.kept["net.{}."]]
    assert len(order) == 10
    assert len(small.weights) == 21
    for new, old in enumerate(order):
        assert small.weights[f"net.{new}.q.weight"] is weights[f"net.{old}.q.weight"]
        assert small.states[0][f"net.{new}.v.weight"] is weights[f"net.{old}.v.weight"]
    small = fo.drop_layers(weights, "net.{}.", count=3, importance=[1, 0, 0, *[1] * 9])
    assert small.kept["net.{}."].tolist() == [0, *range(3, 11)]
    for options, message in [
        ({"prefix": "net."}, "prefix: expected one '{}' for the number"),
        ({"prefix": "block.{}."}, "prefix: expected layers 0, 1"),
        ({"count": 12}, "count: expected 0 to 11, got 12"),
        ({"importance": [1]}, "importance: expected 12 numbers, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            fo.drop_layers(weights, **{"prefix": "net.{}.", "count": 1, **options})


@pytest.mark.parametrize("criterion", ["activity", "taylor"])
def test_only_layers_that_may_lose_units_are_scored(criterion, rng):
    weights = {f"{name}.weight": rng.standard_normal((6, 6)).astype("f4") for name in "abcd"}
    graph = [fo.Layer(name) for name in "abcd"]
    given = {
        "activity": {"activations": {"b": rng.standard_normal((9, 6))}},
        "taylor": {"gradients": {"b.weight": rng.standard_normal((6, 6))}},
    }[criterion]
    small = fo.shrink(weights, graph, share=0.5, criterion=criterion, layers=["b"], fold=False, **given)
    assert [len(small.kept[name]) for name in "abcd"] == [6, 3, 6, 6]
    assert fo.shrink(weights, graph, share=0.5, criterion=criterion, layers=["none"]).weights["b.weight"].shape == (
        6,
        6,
    )
    missing = {"activity": "activations: nothing for 'a'", "taylor": "gradients: nothing for 'a.weight'"}[criterion]
    with pytest.raises(ValueError, match=missing):
        fo.shrink(weights, graph, share=0.5, criterion=criterion, layers=["a", "b"], fold=False, **given)
    next(iter(given.values())).update(dict.fromkeys(("b", "b.weight"), np.full((6, 6), np.nan)))
    with pytest.raises(ValueError, match="of 'b' is not finite"):
        fo.shrink(weights, graph, share=0.5, criterion=criterion, layers=["b"], fold=False, **given)
