"""Parameters in any tree, groups with options of their own, and the gradients that go with them."""

import copy
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import dtype_of, same_bits

import fastopt as fo

pytestmark = pytest.mark.kernel


# ---- trees -------------------------------------------------------------------------------------------------


def network():
    return {
        "fc1": {"w": np.zeros((2, 3), "f4"), "b": np.zeros(2, "f4")},
        "layers": [{"w": np.zeros(2, "f4")}, (np.zeros(1, "f4"),)],
    }


def ones_like(tree):
    if isinstance(tree, dict):
        return {key: ones_like(node) for key, node in tree.items()}
    return [ones_like(node) for node in tree] if isinstance(tree, list | tuple) else np.ones_like(tree)


def test_nested_dicts_and_lists():
    params = network()
    opt = fo.SGD(params, lr=1.0)
    opt.step(ones_like(params))
    assert list(opt.state_dict()["state"]) == ["fc1.w", "fc1.b", "layers.0.w", "layers.1.0"]
    assert (params["fc1"]["w"] == -1).all()
    assert (params["layers"][1][0] == -1).all()
    opt.step({"fc1": None, "layers": [{"w": np.ones(2, "f4")}, [None]]})
    assert (params["fc1"]["w"] == -1).all()
    assert (params["layers"][0]["w"] == -2).all()
    v, twin = pickle.loads(pickle.dumps((params, opt)))
    twin.step(ones_like(v))
    assert (v["layers"][0]["w"] == -3).all()
    assert (params["layers"][0]["w"] == -2).all()


def test_a_list_of_layers_is_not_a_list_of_groups():
    layers = [{"w": np.zeros(2), "b": np.zeros(1)}, {"w": np.zeros(1), "b": np.zeros(1)}]
    opt = fo.SGD(layers, lr=1.0)
    assert len(opt.param_groups) == 1
    opt.step(ones_like(layers))
    assert layers[1]["b"] == -1
    one = [{"w": np.zeros(2)}]
    fo.SGD(one, lr=1.0).step(ones_like(one))
    assert (one[0]["w"] == -1).all()


def test_named_pairs_are_a_dict():
    a, b = np.zeros(2), np.zeros(1)
    opt = fo.SGD(iter([("a", a), ("b", b)]), lr=1.0)
    opt.step({"a": np.ones(2), "b": None})
    assert a.tolist() == [-1, -1]
    groups = fo.SGD([{"params": [("a", a)]}, {"params": [("b", b)], "lr": 2.0}], lr=1.0)
    groups.step([{"a": np.ones(2)}, {"b": np.ones(1)}])
    assert b.tolist() == [-2]


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"fc1": {"w": 0}, "layers": None}, ValueError, r"names of params at 'fc1'; missing \['b'\]"),
        ({"fc1": [0, 0], "layers": None}, TypeError, "expected a dict like params at 'fc1', got list"),
        ({"fc1": None, "layers": [None]}, ValueError, "expected 2 gradients at 'layers', got 1"),
        ({"fc1": None, "layers": {"w": None}}, TypeError, "expected a list like params at 'layers', got dict"),
        (None, TypeError, "expected a tree like params, got NoneType"),
        (
            {"fc1": None, "layers": [{"w": np.ones(3, "f4")}, None]},
            ValueError,
            r"of 'layers.0.w': expected shape \(2,\)",
        ),
    ],
)
def test_gradients_of_another_tree_change_nothing(grads, error, message):
    params = network()
    opt = fo.Adam(params)
    with pytest.raises(error, match=message):
        opt.step(grads)
    assert opt.steps == 0


def test_an_array_replaced_inside_a_tree_is_refused():
    params = network()
    opt = fo.SGD(params)
    params["new"] = np.zeros(1)  # the tree may grow
    grads = ones_like({key: params[key] for key in ("fc1", "layers")})
    opt.step(grads)
    old, params["fc1"]["b"] = params["fc1"]["b"], np.zeros(2, "f4")
    with pytest.raises(ValueError, match="params: expected the arrays that the optimizer was made for"):
        opt.step(grads)
    params["fc1"]["b"] = old
    params["layers"].pop()
    with pytest.raises(ValueError, match="params: expected the arrays that the optimizer was made for"):
        opt.step(grads)


# ---- one shape of gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda a, b, c: fo.SGD([a, b, c], lr=1.0),
    lambda a, b, c: fo.SGD([{"params": [a, b, c]}], lr=1.0),
    lambda a, b, c: fo.SGD([{"params": [a, b]}, {"params": [c]}], lr=1.0),
    lambda a, b, c: fo.SGD([{"params": a}, {"params": [b, c]}], lr=1.0),
    lambda a, b, c: fo.SGD([{"params": a}, {"params": b}, {"params": c}], lr=1.0),
    lambda a, b, c: fo.SGD({"a": a, "x": {"b": b, "c": c}}, lr=1.0),
    lambda a, b, c: late(fo.SGD([a, b], lr=1.0), [c]),
])  # fmt: skip
def test_a_flat_list_of_gradients_fits_any_number_of_groups(wrap):
    params = np.zeros(2, "f4"), np.zeros(3, "f4"), np.zeros(1, "f4")
    opt = wrap(*params)
    flat = [np.ones(2, "f4"), None, np.ones(1, "f4")]
    if "x.b" in opt.state_dict()["state"]:
        flat = {"a": flat[0], "x": {"b": None, "c": flat[2]}}
    opt.step(flat)
    assert [p.max() for p in params] == [-1, 0, -1]


def late(opt, params):
    opt.add_param_group({"params": params})
    return opt


def test_a_list_of_groups_fits_one_group_too():
    a, b = np.zeros(2), np.zeros(1)
    g, h = np.ones(2), np.ones(1)
    for opt, shapes in [
        (fo.SGD([a, b], lr=1.0), ([g, h], [[g, h]])),
        (fo.SGD([{"params": [a, b]}], lr=1.0), ([g, h], [[g, h]])),
        (fo.SGD({"a": a, "b": b}, lr=1.0), ({"a": g, "b": h}, [{"a": g, "b": h}])),
        (fo.SGD([{"params": {"a": a, "b": b}}], lr=1.0), ({"a": g, "b": h}, [{"a": g, "b": h}], {"0.a": g, "0.b": h})),
        (
            fo.SGD([{"params": {"a": a}}, {"params": {"b": b}}], lr=1.0),
            ({"a": g, "b": h}, [g, h], [{"a": g}, {"b": h}]),
        ),
        (fo.SGD(a, lr=1.0), (g, [g])),
    ]:
        for grads in shapes:
            before = a.copy()
            opt.step(grads)
            assert same_bits(a, before - 1)
    with pytest.raises(ValueError, match="list of 2 entries, one a group, or of all 3 gradients, got 4"):
        fo.SGD([{"params": [a]}, {"params": [b, np.zeros(1)]}]).step([g, h, h, h])
    with pytest.raises(ValueError, match=r"grads: expected the names of params; missing \['1.b'\], unexpected \['c'\]"):
        fo.SGD([{"params": {"a": a}}, {"params": {"b": b}}]).step({"0.a": g, "c": h})
    with pytest.raises(TypeError, match="grads: expected a list of 2 entries, one a group, got NoneType"):
        fo.SGD([{"params": {"a": a}}, {"params": {"b": b}}]).step(None)


# ---- dtypes and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
def test_gradients_may_be_of_any_narrower_dtype(dtype, g_dtype, state_dtype, rng):
    grads = [rng.standard_normal(1000).astype(dtype_of(g_dtype)) for _ in range(3)]
    w, v = (np.ones(1000, dtype_of(dtype)) for _ in range(2))
    opts = [fo.Adam(x, state_dtype=state_dtype, max_norm=1.0) for x in (w, v)]
    for g in grads:
        opts[0].step(g)
        opts[1].step(g.astype("f4"))
    np.testing.assert_allclose(w.astype("f4"), v.astype("f4"), rtol=1e-6)  # the norms are summed in another order


def layouts(x):
    """The same numbers in other layouts of memory."""
    big = np.zeros((*x.shape, 2), x.dtype)
    big[..., 0] = x
    shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return [
        np.asfortranarray(x),
        big[..., 0],
        x[::-1].copy()[::-1],
        shifted,
        np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_gradients_may_have_any_layout(dtype, rng):
    g = rng.standard_normal((3, 4, 5)).astype(dtype_of(dtype))
    want = np.zeros_like(g)
    norm = fo.SGD(want, lr=1.0, max_norm=1.0).step(g)
    for other in layouts(g):
        w = np.zeros_like(want)
        opt = fo.SGD(w, lr=1.0, max_norm=1.0)
        assert opt.step(other) == norm
        assert same_bits(w, want)
        plain = np.zeros_like(want)
        fo.SGD(plain, lr=1.0).step(other)
        assert same_bits(plain, -g)
    w = np.zeros_like(g)
    fo.SGD(w, lr=1.0).step(np.broadcast_to(np.ones(5, g.dtype), g.shape))
    assert (w == -1).all()


@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_may_be_dense_in_any_order(dtype, state_dtype, rng):
    """Columns first, or channels last."""
    options = {"state_dtype": state_dtype, "master_weights": dtype == "bfloat16"}
    start = rng.standard_normal((8, 3, 4, 5)).astype(dtype_of(dtype))
    for put in (np.asfortranarray, lambda x: np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)):
        w, v = put(start), start.copy()
        assert not w.flags.c_contiguous
        opt, twin = (fo.Adam([x], lr=0.01, **options) for x in (w, v))
        grads = [rng.standard_normal(w.shape).astype(w.dtype) for _ in range(6)]
        for g in grads[:3]:
            opt.step([g])
            twin.step([g])
        if state_dtype == "float32":
            assert same_bits(w, v)
        saved = copy.deepcopy(opt.state_dict())
        about = saved["state"]["0"]
        assert about["exp_avg"].shape == about["shape"] == w.shape
        again = put(w.copy())
        resumed = fo.Adam([again], lr=0.01, **options)
        resumed.load_state_dict(saved)
        for g in grads[3:]:
            opt.step([g])
            resumed.step([np.asfortranarray(g)])
        assert same_bits(w, again)
        if state_dtype == "uint8":
            with pytest.raises(ValueError, match="order of '0': expected None, as blocks are in memory"):
                twin.load_state_dict(saved)
        else:
            twin.load_state_dict(saved)
        with pytest.raises(ValueError, match=r"gradient of '0': expected shape \(8, 3, 4, 5\), got \(8, 4, 5, 3\)"):
            opt.step([np.ones((8, 4, 5, 3), w.dtype)])
    with pytest.raises(ValueError, match="must be C-contiguous"):
        fo.SGD(np.zeros((4, 4))[:, ::2])


# ---- options of a group ---------------------------------------------------------------------------------------------


def test_options_of_states_and_rounding_are_those_of_a_group(rng):
    """Matrices of bfloat16 with norms of float32, under one norm of gradients."""
    w = rng.standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    norm, bias, big = np.ones(64, "f4"), np.zeros(64), np.ones((32, 32), "f2")
    opt = fo.AdamW(
        [
            {"params": {"w": w, "norm": norm}, "master_weights": True, "state_dtype": "uint8"},
            {"params": {"bias": bias}},
            {"params": {"big": big}, "stochastic_rounding": True},
        ],
        lr=1e-4,
        max_norm=1.0,
    )
    saved = opt.state_dict()["state"]
    assert "master" in saved["0.w"]
    assert "master" not in saved["0.norm"]  # needs none
    assert saved["0.norm"]["exp_avg"].dtype == np.uint8
    assert saved["1.bias"]["exp_avg"].dtype == np.float64
    assert saved["2.big"]["exp_avg"].dtype == np.float32
    grads = {
        "w": np.full_like(w, 3),
        "norm": np.zeros_like(norm),
        "bias": np.zeros_like(bias),
        "big": np.full_like(big, 4),
    }
    total = math.sqrt(9 * 64 * 64 + 16 * 32 * 32)
    before = [x.copy() for x in (w, norm, bias, big)]
    for _ in range(30):
        assert opt.step(grads) == pytest.approx(total)
    assert len(np.unique(big)) > 1  # rounded stochastically
    resumed_params = [x.copy() for x in (w, norm, bias, big)]
    resumed = fo.AdamW(
        [
            {
                "params": {"w": resumed_params[0], "norm": resumed_params[1]},
                "master_weights": True,
                "state_dtype": "uint8",
            },
            {"params": {"bias": resumed_params[2]}},
            {"params": {"big": resumed_params[3]}, "stochastic_rounding": True},
        ]
    )
    resumed.load_state_dict(opt.state_dict())
    assert resumed.max_norm == 1.0
    for _ in range(3):
        opt.step(grads)
        resumed.step(grads)
    assert all(same_bits(a, b) for a, b in zip((w, norm, bias, big), resumed_params, strict=True))
    assert not same_bits(before[0], w)


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}])
def test_one_group_of_mixed_dtypes(options):
    model = {
        "w": np.ones(8, ml_dtypes.bfloat16),
        "norm": np.ones(8, "f4"),
        "half": np.ones(8, "f2"),
        "wide": np.ones(8),
    }
    plain = copy.deepcopy(model)
    opt, twin = fo.SGD(model, lr=0.5, **options), fo.SGD(plain, lr=0.5)
    for _ in range(3):
        opt.step({name: np.full_like(x, 2**-4) for name, x in model.items()})
        twin.step({name: np.full_like(x, 2**-4) for name, x in model.items()})
    assert all(same_bits(model[name], plain[name]) for name in ("norm", "wide"))
    again = fo.SGD(copy.deepcopy(model), **options)
    again.load_state_dict(opt.state_dict())


def test_other_keys_of_groups_are_kept():
    w = np.zeros(2)
    opt = fo.SGD([{"params": w, "name": "head", "lr_scale": 0.1, "initial_lr": 1e-3}], lr=1.0)
    opt.step([np.ones(2)])
    assert opt.param_groups[0]["name"] == "head"
    other = fo.SGD([{"params": np.zeros(2)}])
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr_scale"] == 0.1
    opt.param_groups[0]["note"] = [1, 2]
    opt.step([np.ones(2)])


class Scalar:
    """A number in a tensor without axes, as jax and torch have them."""

    shape, dtype = (), "torch.float32"

    def __float__(self):
        return 0.5


@pytest.mark.parametrize(
    "number", [np.array(0.5), np.array(0.5, "f4"), Scalar(), ml_dtypes.bfloat16(0.5), np.float64(0.5)]
)
def test_numbers_of_arrays_are_numbers(number):
    w = np.zeros(1)
    opt = fo.Adam(w, lr=number, betas=(number, 0.9), eps=number, max_norm=number)
    assert opt.param_groups[0]["lr"] == 0.5
    assert type(opt.param_groups[0]["lr"]) is float
    opt.step(np.ones(1), grad_scale=number)
    scheduled = fo.SGD(w, lr=lambda step: number)
    scheduled.step(np.ones(1))
    assert scheduled.learning_rates == [0.5]
    assert fo.schedules.cosine(number, steps=10)(0) == 0.5
    for wrong in (np.array([0.5]), np.array(True), np.array("0.5"), np.array(0.5j)):
        with pytest.raises(TypeError, match="lr: expected a number, got ndarray"):
            fo.SGD(w, lr=wrong)


# ---- loading ------------------------------------------------------------------------------------------------------


def test_a_schedule_and_clipping_of_the_new_run_stay():
    old = fo.Adam(np.zeros(2, "f4"), lr=1e-3, max_norm=5.0, seed=7)
    new = fo.Adam(np.zeros(2, "f4"), lr=fo.schedules.cosine(1e-5, steps=9), max_norm=1.0)
    new.load_state_dict(old.state_dict())
    assert new.learning_rates == [1e-5]
    assert new.max_norm == 1.0
    assert new.step(np.full(2, 100, "f4")) == pytest.approx(math.sqrt(2) * 100)
    plain = fo.Adam(np.zeros(2, "f4"))
    plain.load_state_dict(old.state_dict())  # nothing of its own: as the old run
    assert plain.max_norm == 5.0
    assert plain.state_dict()["seed"] == 7


def test_names_in_another_order_and_groups_that_came_late(rng):
    sizes = {"a": 3, "b": 2, "c": 1}
    grads = {name: rng.standard_normal(n) for name, n in sizes.items()}
    old = fo.Adam({name: np.zeros(n) for name, n in sizes.items()})
    old.step(grads)
    reordered = fo.Adam({name: np.zeros(sizes[name]) for name in ("c", "a", "b")})
    reordered.load_state_dict(old.state_dict())
    for name in sizes:
        assert same_bits(reordered.state_dict()["state"][name]["exp_avg"], old.state_dict()["state"][name]["exp_avg"])

    added = late(fo.Adam({"a": np.zeros(3)}), {"b": np.zeros(2)})
    added.step([{"a": grads["a"]}, {"b": grads["b"]}])
    whole = fo.Adam([{"params": {"a": np.zeros(3)}}, {"params": {"b": np.zeros(2)}}])
    for one, other in ((added, whole), (whole, added)):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        assert other.steps == 1
        assert [s["step"] for s in other.state_dict()["state"].values()] == [1, 1]


def test_groups_that_were_added_or_removed_by_hand_are_refused():
    a, b = np.zeros(1), np.zeros(1)
    opt = fo.SGD([{"params": [a]}])
    opt.param_groups.append({**opt.param_groups[0], "params": [b]})
    for act in (
        lambda: opt.step([np.ones(1)]),
        opt.state_dict,
        lambda: opt.learning_rates,
        lambda: opt.load_state_dict({}),
    ):
        with pytest.raises(ValueError, match="param_groups: expected 1 groups, got 2; use add_param_group"):
            act()
    opt.param_groups.clear()
    with pytest.raises(ValueError, match="param_groups: expected 1 groups, got 0"):
        opt.step([np.ones(1)])


def test_repr_shows_what_the_next_step_takes():
    opt = fo.SGD([{"params": np.zeros(2)}, {"params": np.zeros(3), "lr": 0.25}], lr=0.5, max_norm=2.0)
    text = repr(opt)
    assert "lr=[0.5, 0.25]" in text
    assert "max_norm=2.0" in text
    assert "over 5 parameters in 2 arrays" in text
    opt.param_groups[1]["lr"] = opt.param_groups[0]["lr"] = 5.0
    assert "lr=5.0," in repr(opt)
    scheduled = fo.SGD(np.zeros(1), lr=fo.schedules.linear(1.0, steps=4))
    scheduled.step(np.ones(1))
    assert "lr=0.25 at step 1," in repr(scheduled)
    assert scheduled.learning_rates == [0.25]
    assert scheduled.steps == 1
