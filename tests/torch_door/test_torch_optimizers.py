"""Optimizers of fastopt.torch: the bits of fastopt, and the manners of torch.optim."""

import copy
import inspect
import io
import itertools
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from reference import narrow_u8, widen_u8

import fastopt as fo
import fastopt.torch as ft
from fastopt import _core
from fastopt.torch.states import POSITIVE, decode, encode
from fastopt.train.param_tree import as_array

CASES = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"maximize": True}),
    ("AdamW", {"weight_decay": 0.3}),
    ("Lion", {"weight_decay": 0.1}),
]
OWN = [
    {},
    {"max_norm": 0.1},
    {"l1": 0.01, "keep_zeros": True},
    {"state_dtype": "bfloat16"},
    {"state_dtype": torch.uint8, "seed": 3},
    {"master_weights": True},
    {"stochastic_rounding": True, "seed": 5},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def fits(name, options, own, dtype):
    narrow = dtype in (torch.bfloat16, torch.float16)
    no_uint8 = name == "Adagrad" or options.get("amsgrad") or options.get("centered")
    return (
        (narrow or not {"master_weights", "stochastic_rounding"} & own.keys())
        and (dtype != torch.float64 or "state_dtype" not in own)
        and not (no_uint8 and own.get("state_dtype") == torch.uint8)
        and not (options.get("centered") and "state_dtype" in own)
    )


def params_of(dtype=torch.float32, shapes=((3, 500), (17,), (), (0, 4))):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params):
    for p in params:
        p.grad = torch.randn_like(p)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits_of(a), bits_of(b))


def bits_of(x):
    x = as_array(x)
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def same_state(a, b):
    """Return whether two state dicts hold the same bits."""
    if isinstance(a, torch.Tensor):
        return same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(own) or "plain")
def test_steps_have_the_bits_of_fastopt(name, options, own):
    for dtype in DTYPES:
        if not fits(name, options, own, dtype):
            continue
        params = params_of(dtype)
        arrays = [as_array(p).copy() for p in params]
        opt = getattr(ft, name)(params, **options, **own)
        theirs = {k: str(v).removeprefix("torch.") if k == "state_dtype" else v for k, v in own.items()}
        want = getattr(fo, name)(arrays, **options, **theirs)
        for _ in range(3):
            give_gradients(params)
            opt.step()
            norm = want.step([as_array(p.grad) for p in params])
            assert opt.grad_norm == norm
        for p, w in zip(params, arrays, strict=True):
            assert np.array_equal(bits_of(p), np.ascontiguousarray(w).reshape(-1).view(np.uint8)), dtype


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "Lion"])
def test_state_of_torch_continues_here_and_back(name, options):
    """States are the same tensors; steps differ from torch's in the last bits alone."""
    params, others = params_of(), None
    others = copy.deepcopy(params)
    ours, torchs = getattr(ft, name)(params, **options), getattr(torch.optim, name)(others, **options)
    for turn in range(4):
        for _ in range(3):
            give_gradients(params)
            for p, q in zip(params, others, strict=True):
                q.grad = p.grad.clone()
            ours.step()
            torchs.step()
        for p, q in zip(params, others, strict=True):
            assert ours.state[p].keys() == torchs.state[q].keys()
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        a, b = ours.state_dict(), torchs.state_dict()
        assert a["param_groups"] == b["param_groups"]
        if turn == 1:  # exchange them: the tensors arrive as they were
            a, b = copy.deepcopy(a), copy.deepcopy(b)
            ours.load_state_dict(b)
            torchs.load_state_dict(a)
            assert same_state(ours.state_dict()["state"], b["state"])
            assert same_state(torchs.state_dict()["state"], a["state"])


RESUMED = [
    (*case, own, dtype) for case, own, dtype in itertools.product(CASES, OWN, DTYPES[::2]) if fits(*case, own, dtype)
]


@pytest.mark.parametrize(("name", "options", "own", "dtype"), RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(name, options, own, dtype):
    params = params_of(dtype)
    opt = getattr(ft, name)(params, **options, **own)
    for _ in range(2):
        give_gradients(params)
        opt.step()
    file = io.BytesIO()
    torch.save({"model": params, "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(p.detach()) for p in saved["model"]]
    again = getattr(ft, name)(resumed, lr=123.0)
    again.load_state_dict(saved["opt"])
    assert same_state(again.state_dict(), opt.state_dict())
    copied = copy.deepcopy(opt)
    pickled = pickle.loads(pickle.dumps(opt))
    for _ in range(2):
        give_gradients(params)
        runs = [resumed, copied.param_groups[0]["params"], pickled.param_groups[0]["params"]]
        for others in runs:
            for p, q in zip(params, others, strict=True):
                q.grad = p.grad.clone()
        for o in (opt, again, copied, pickled):
            o.step()
        for others in runs:
            assert all(map(same_bits, params, others))
    assert same_state(again.state_dict(), opt.state_dict())


def test_a_loaded_state_is_a_copy():
    params = params_of()
    opt, other = ft.AdamW(params), ft.AdamW(copy.deepcopy(params))
    give_gradients(params)
    opt.step()
    state = opt.state_dict()
    other.load_state_dict(state)
    before = copy.deepcopy(state)
    give_gradients(other.param_groups[0]["params"])
    other.step()
    assert same_state(state, before)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_a_state_of_torch_is_converted(state_dtype):
    params = params_of(shapes=((40, 50),))
    torchs = torch.optim.AdamW(params)
    for _ in range(3):
        give_gradients(params)
        torchs.step()
    opt = ft.AdamW(copy.deepcopy(params), state_dtype=state_dtype)
    opt.load_state_dict(torchs.state_dict())
    (p,) = opt.param_groups[0]["params"]
    assert opt.param_groups[0]["state_dtype"] == state_dtype  # torch's state does not say
    p.grad = torch.zeros_like(p)
    opt.step()
    state, before = opt.state[p], torchs.state[params[0]]
    assert state["step"] == 4
    if state_dtype == "uint8":
        values = decode(state["exp_avg_codes"].numpy().ravel(), state["exponents"]["exp_avg"].numpy(), False)
        got = torch.from_numpy(values).reshape(p.shape)
    else:
        got = state["exp_avg"].float()
    torch.testing.assert_close(got, 0.9 * before["exp_avg"], rtol=0.2, atol=1e-3)
    with pytest.raises((KeyError, RuntimeError)) if state_dtype == "uint8" else pytest.MonkeyPatch.context():
        torchs.load_state_dict(opt.state_dict())  # codes are no numbers: torch does not find any
        torchs.step()
    opt.param_groups[0]["state_dtype"] = "float32"
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    assert "exponents" not in opt.state[p]


def test_the_positive_states_are_those_of_the_kernels():
    for name, options in CASES:
        (group,) = getattr(ft, name)(params_of(), **options).param_groups
        formula = getattr(fo, name)
        bits = _core.positive_states(_core.rule(formula._rule(group)))
        keys = formula._states(group)
        assert [key in POSITIVE for key in keys] == [bool(bits >> i & 1) for i in range(len(keys))]


@pytest.mark.parametrize("positive", [False, True])
def test_codes_of_states(positive, rng):
    x = (rng.standard_normal(1000) * np.exp2(rng.integers(-40, 40, 1000))).astype(np.float32)
    x = abs(x) if positive else x
    codes, exponents = encode(x, positive)
    want = narrow_u8(x, positive, np.full(x.size, 1 << 19, np.uint32))
    assert np.array_equal(codes, want[0])
    assert np.array_equal(exponents, want[1])
    assert np.array_equal(decode(codes, exponents, positive), widen_u8(codes, exponents, positive))
    assert encode(x[:0], positive)[0].size == 0


SCHEDULES = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 6},
    "ReduceLROnPlateau": {"patience": 0},
    "ChainedScheduler": None,
    "SequentialLR": None,
}


def test_every_schedule_of_torch_is_tried():
    schedules = {
        name
        for name, cls in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and name not in ("LRScheduler", "SWALR")
    }
    assert schedules == SCHEDULES.keys()


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own, before torch 2.5
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_schedules(schedule, name):
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    lr = torch.optim.lr_scheduler

    def run(module):
        torch.manual_seed(1)
        params = params_of()
        opt = getattr(module, name)(params, lr=0.1, **options)
        if SCHEDULES[schedule] is not None:
            plan = getattr(lr, schedule)(opt, **SCHEDULES[schedule])
        else:
            parts = [lr.ConstantLR(opt), lr.ExponentialLR(opt, 0.9)]
            plan = lr.ChainedScheduler(parts) if schedule == "ChainedScheduler" else lr.SequentialLR(opt, parts, [2])
        for _ in range(5):
            give_gradients(params)
            opt.step()
            plan.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
        return params, opt.param_groups[0]["lr"]

    (ours, our_lr), (theirs, their_lr) = run(ft), run(torch.optim)
    assert our_lr == their_lr
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_grad_scaler():
    """The step unscales by itself, and skips gradients that are not finite, step count included."""
    params, others = params_of(), None
    others = copy.deepcopy(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt, plain = ft.AdamW(params, max_norm=1.0), ft.AdamW(others, max_norm=1.0)
    give_gradients(params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad / 1024
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    scaler.update()
    plain.step()
    assert all(map(same_bits, params, others))
    assert opt.grad_norm == plain.grad_norm

    before = copy.deepcopy((params, opt.state_dict()))
    params[0].grad[0, 0] = torch.inf
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512
    assert opt.skipped == 1
    assert all(map(same_bits, params, before[0]))
    assert same_state(opt.state_dict(), before[1])

    give_gradients(params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad / 512
    scaler.unscale_(opt)  # then the step must not do it again
    scaler.step(opt)
    plain.step()
    assert all(map(same_bits, params, others))
    assert not {"found_inf", "grad_scale"} & vars(opt).keys()


def test_clipping_is_that_of_torch():
    params, others = params_of(), None
    others = copy.deepcopy(params)
    opt, plain = ft.SGD(params, lr=0.1, max_norm=0.5), torch.optim.SGD(others, lr=0.1)
    give_gradients(params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    kept = [p.grad.clone() for p in params]
    norm = torch.nn.utils.clip_grad_norm_(others, 0.5)
    opt.step()
    plain.step()
    assert all(same_bits(p.grad, k) for p, k in zip(params, kept, strict=True))
    assert opt.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
    before = copy.deepcopy(params)
    late = ft.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, max_norm=0.5)
    params[1].grad[0] = torch.nan
    late.step()
    assert not any(late.state.values())  # its first step is still to come
    opt.step()
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))


def test_groups_have_options_of_their_own():
    a, b, c = params_of(shapes=((5, 5), (4,), (3,)))
    opt = ft.AdamW([{"params": [a], "l1": 0.1}, {"params": b, "lr": 0.5, "max_norm": 1.0}], lr=0.1)
    opt.add_param_group({"params": [c], "state_dtype": "bfloat16"})
    arrays = [as_array(p).copy() for p in (a, b, c)]
    wants = [
        fo.AdamW(arrays[0], lr=0.1, l1=0.1),
        fo.AdamW(arrays[1], lr=0.5, max_norm=1.0),
        fo.AdamW(arrays[2], lr=0.1, state_dtype="bfloat16"),
    ]
    give_gradients([a, b, c])
    b.grad *= 1e-6  # so that what is clipped shows whose norm it is
    a.grad *= 1e3
    opt.step()
    wants[0].step(as_array(a.grad))
    assert np.array_equal(as_array(a), arrays[0])
    assert opt.grad_norm == pytest.approx(float(torch.cat([p.grad.ravel() for p in (a, b, c)]).norm()), rel=1e-5)
    assert opt.state[c]["exp_avg"].dtype == torch.bfloat16
    factor = np.float32(1 / (opt.grad_norm + 1e-6))
    torch.testing.assert_close(opt.state[b]["exp_avg"], 0.1 * b.grad * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [
    {"max_norm": 0.0}, {"max_norm": "x"}, {"l1": -1}, {"keep_zeros": 1}, {"state_dtype": "int8"}, {"seed": 0.5},
    {"master_weights": None}, {"momentun": 0.9}, {"state_dtype": "uint8", "amsgrad": True}, {"betas": (1.0, 0.9)},
    {"lr": -1.0},
])  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=rf"(?i){next(iter(wrong))}|learning rate|beta"):
        ft.Adam(params_of(), **wrong)


def test_wrong_options_of_a_group_are_refused():
    opt = ft.AdamW(params_of())
    with pytest.raises(ValueError, match="l1"):
        opt.add_param_group({"params": params_of(), "l1": -1.0})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["max_norm"] = -1.0
    give_gradients(opt.param_groups[0]["params"])
    with pytest.raises(ValueError, match="max_norm"):
        opt.step()
    with pytest.raises(ValueError, match="state_dtype: expected 'float32' or 'bfloat16' for Adagrad, got 'uint8'"):
        ft.Adagrad(params_of(), state_dtype=torch.uint8)
    with pytest.raises(ValueError, match="state_dtype: expected 'float32' or 'bfloat16' with amsgrad, got 'uint8'"):
        ft.AdamW(params_of(), state_dtype="uint8", amsgrad=True)
    late = ft.Adam(params_of(), state_dtype="uint8")
    late.param_groups[0]["amsgrad"] = True
    give_gradients(late.param_groups[0]["params"])
    with pytest.raises(ValueError, match="with amsgrad"):
        late.step()
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ft.Lion(params_of(), **wrong)
    with pytest.raises(ValueError, match="centered"):
        ft.RMSprop(params_of(), state_dtype="uint8", centered=True)
    with pytest.raises(ValueError, match="state_dtype: expected 'float32' if centered, got 'bfloat16'"):
        ft.RMSprop(params_of(), state_dtype="bfloat16", centered=True)


def test_constructors_take_what_those_of_torch_take():
    for name in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW"):
        ours, theirs = getattr(ft, name), getattr(torch.optim, name)
        assert issubclass(ours, theirs)
        positions = [p for p in inspect.signature(theirs).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        mine = list(inspect.signature(ours).parameters.values())
        assert [(p.name, p.default) for p in mine[:-1]] == [(p.name, p.default) for p in positions]
        assert ours(params_of()).defaults == theirs(params_of()).defaults
        for flag in inspect.signature(theirs).parameters.keys() & {"foreach", "fused", "capturable", "maximize"}:
            params = params_of()
            opt = ours(params, **{flag: True})
            give_gradients(params)
            opt.step()
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
            continue  # which takes no names
        model = torch.nn.Linear(2, 2)
        assert ours(model.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]
    with pytest.raises(RuntimeError, match="foreach"):
        ft.Adam(params_of(), fused=True, foreach=True)
    with pytest.raises(ValueError, match="empty"):
        ft.Lion([])


def test_layouts():
    """channels_last parameters, and gradients in another layout, have the bits of plain ones."""
    conv = torch.nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
    assert not conv.weight.is_contiguous()
    opts = [ft.AdamW(m.parameters(), max_norm=1.0, lr=0.1) for m in (conv, plain)]
    for k in range(3):
        conv.weight.grad = torch.randn(6, 8, 3, 3).to(
            memory_format=(torch.channels_last, torch.contiguous_format)[k % 2]
        )
        conv.bias.grad = torch.randn(()).expand(6)
        plain.weight.grad, plain.bias.grad = conv.weight.grad.contiguous(), conv.bias.grad.contiguous()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(conv.weight, plain.weight)  # the norm adds in another order
    assert opts[0].state[conv.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)

    w = torch.nn.Parameter(torch.randn(5, 5))
    q = torch.nn.Parameter(w.detach().clone().t().contiguous().t())  # transposed: dense, not C order
    w.grad = torch.randn(5, 5).t()
    q.grad = w.grad.clone()
    for p in (w, q):
        ft.RMSprop([p], momentum=0.9).step()
    assert torch.equal(w, q)
    half = torch.nn.Parameter(torch.zeros(4, 6)[:, :3])  # with gaps: torch steps it
    half.grad = torch.ones(4, 3)
    ft.SGD([half], lr=1.0).step()
    assert torch.equal(half, -torch.ones(4, 3))


def test_everything_is_read_anew():
    """Others exchange memory, gradients, groups and states between steps."""
    p = torch.nn.Parameter(torch.zeros(4))
    opt = ft.SGD([p], lr=1.0)
    p.grad = torch.ones(4)
    opt.step()
    old, p.data = p.data, torch.zeros(4)
    opt.step()
    assert torch.equal(p, -torch.ones(4))
    assert torch.equal(old, -torch.ones(4))
    q = torch.nn.Parameter(torch.zeros(2))
    q.grad = torch.ones(2)
    opt.param_groups[0]["params"] = [q]
    opt.step()
    assert torch.equal(q, -torch.ones(2))
    opt.param_groups[0]["params"] = []
    opt.step()
    assert torch.equal(q, -torch.ones(2))


@pytest.mark.parametrize("change", ["tensor", "memory", "entry", "count", "dtype", "shape", "nothing"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_states_that_others_change_are_found_anew(name, change):
    """What a step remembers of the last one never replaces what is there now."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    params = [torch.nn.Parameter(torch.linspace(1, 2, 12).reshape(4, 3)) for _ in range(2)]
    ours, theirs = getattr(ft, name)(params[:1], **options), getattr(torch.optim, name)(params[1:], **options)
    for _ in range(3):
        for p, opt in zip(params, (ours, theirs), strict=True):
            p.grad = torch.linspace(-1, 3, p.numel()).reshape(p.shape)
            opt.step()
            state = opt.state[p]
            if change == "tensor":
                state[key] = state[key] * 0.5
            elif change == "memory":
                state[key].data = state[key].data * 0.5
            elif change == "entry":
                opt.state[p] = {k: v.clone() for k, v in state.items()}
            elif change == "count" and "step" in state:
                state["step"] = torch.tensor(40.0)
            elif change == "dtype":
                state[key] = state[key].double().to(torch.float32)
            elif change == "shape":
                p.data = p.data[:2].clone()
                for k, v in state.items():
                    state[k] = v if k == "step" else v[:2].clone()
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(before)
    params[0].grad = torch.ones_like(params[0])
    ours.step()
    assert not torch.equal(ours.state[params[0]][key], before["state"][0][key])


def test_twice_the_same_memory():
    p = torch.nn.Parameter(torch.zeros(3))
    q = torch.nn.Parameter(torch.zeros(3))
    q.data = p.data
    opt = ft.SGD([p, q], lr=1.0)
    p.grad, q.grad = torch.ones(3), 2 * torch.ones(3)
    opt.step()
    assert torch.equal(p, torch.full((3,), -3.0))


def test_closure_hooks_and_profiler():
    p = torch.nn.Parameter(torch.ones(3))
    opt = ft.Adam([p], lr=torch.tensor(0.1))
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        seen.append("closure")
        return loss

    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # patches its own step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = opt.step(closure)
    assert loss == 3
    assert seen == ["before", "closure", "after"]
    assert "Optimizer.step#Adam.step" in {event.key for event in profile.key_averages()}
    assert torch.allclose(p, torch.full((3,), 0.9))


def test_autograd_knows_of_the_step():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    ft.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lazy_and_frozen_parameters():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 1))
    model[1].weight.requires_grad_(False)
    opt = ft.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert len(opt.state) == 3
    opt.zero_grad()
    assert model[0].weight.grad is None


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, in Adagrad
def test_what_torch_steps():
    """Sparse gradients, complex parameters, differentiable steps, other classes of tensors."""

    def run(module, make, name="SGD", **options):
        torch.manual_seed(2)
        params = make()
        opt = getattr(module, name)(params, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
                if p.ndim == 2:
                    index, values = torch.tensor([[0, 2]]), torch.randn(2, 3)
                    p.grad = torch.sparse_coo_tensor(index, values, p.shape, check_invariants=True)
            opt.step()
        return [p.detach() for p in params]

    def sparse():
        return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]

    def complex_():
        return [torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))]

    for make, name, options in (
        (sparse, "SGD", {"momentum": 0.9}),
        (sparse, "Adagrad", {}),
        (complex_, "Adam", {}),
    ):
        for p, q in zip(run(ft, make, name, **options), run(torch.optim, make, name, **options), strict=True):
            torch.testing.assert_close(p, q)
    with pytest.raises(RuntimeError, match="sparse"):
        run(ft, sparse, "Adam")
    with pytest.raises(RuntimeError, match="sparse"):
        run(ft, sparse, "Lion")
    with pytest.raises(ValueError, match="state_dtype: expected 'float32' for a parameter that torch steps"):
        run(ft, complex_, state_dtype="bfloat16", momentum=0.9)

    p = torch.ones(3, requires_grad=True).clone()
    p.retain_grad()
    opt = ft.SGD([p], lr=0.1, differentiable=True, l1=0.1, max_norm=1.0)
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    opt.step()
    assert p.requires_grad
    torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.06 - 0.01, 0.99, 1 - 0.08 - 0.01]))


class Tagged(torch.Tensor):
    """A tensor with a class of its own, whose operations torch must see."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_go_to_torch():
    p = torch.zeros(3).as_subclass(Tagged).requires_grad_()
    p.grad = torch.ones(3).as_subclass(Tagged)
    ft.Lion([p], lr=0.5).step()
    assert torch.equal(p.as_subclass(torch.Tensor), torch.full((3,), -0.5))


def test_lion_in_torch_is_ours():
    p = torch.nn.Parameter(torch.randn(100))
    q = p.clone()
    q.retain_grad()
    a, b = ft.Lion([p], lr=0.01, weight_decay=0.1), ft.Lion([q], lr=0.01, weight_decay=0.1, differentiable=True)
    for _ in range(3):
        p.grad = torch.randn(100)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(a.state[p]["exp_avg"], b.state[q]["exp_avg"])


@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(own) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_lr_of_zero_changes_no_parameter(dtype, own):
    tiny = torch.finfo(dtype).tiny
    for name, options in CASES:
        if not fits(name, options, own, dtype):
            continue
        params = params_of(dtype)
        # The kernels flush subnormal numbers; a negative zero could lose its sign.
        params.append(torch.nn.Parameter(torch.tensor([tiny / 4, -tiny / 4, 0.0, -0.0, 1.0], dtype=dtype)))
        opt = getattr(ft, name)(params, **{**options, "lr": 0.0}, **own)
        before = copy.deepcopy(params)
        for _ in range(2):
            give_gradients(params)
            opt.step()
        assert all(map(same_bits, params, before))


def test_a_step_that_raises_takes_back_new_states():
    a, b = params_of(shapes=((4,), (3,)))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    opt = ft.SGD([a, b], **options)
    before = copy.deepcopy(a)
    give_gradients([a, b])
    opt.state[b]["momentum_buffer"] = torch.zeros(4)
    with pytest.raises(ValueError, match="momentum_buffer"):
        opt.step()
    assert not opt.state[a]
    opt.state.clear()
    c = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))  # torch steps it
    opt.add_param_group({"params": [c], "state_dtype": "bfloat16"})
    c.grad = torch.ones_like(c)
    with pytest.raises(ValueError, match="a parameter that torch steps"):
        opt.step()
    assert not any(opt.state.values())
    assert same_bits(a, before)
    late = ft.AdamW([a], max_norm=1.0)
    a.grad[0] = torch.nan
    late.step()
    assert not any(late.state.values())  # "step" alone would make torch's AdamW believe that there are states


def test_optimizers_in_backward():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    want = copy.deepcopy(model)
    opts = {p: ft.AdamW([p], lr=0.1) for p in model.parameters()}

    def hook(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    whole = ft.AdamW(want.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        want(torch.ones(2, 3)).sum().backward()
        whole.step()
        whole.zero_grad()
    assert all(map(torch.equal, model.parameters(), want.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_loop_steps_by_the_kernels():
    p = torch.nn.Parameter(torch.ones(3))
    opt = ft.SGD([p], lr=0.5)
    p.grad = torch.ones(3)
    torch.compile(lambda: opt.step(), backend="eager")()
    assert torch.equal(p, torch.full((3,), 0.5))


def test_states_keep_the_default_float64_count():
    for dtype, steps in itertools.product((torch.float32, torch.float64), (1, 3)):
        p = torch.nn.Parameter(torch.ones(3))
        opt = ft.Adam([p])
        opt.state[p]["step"] = torch.tensor(5.0, dtype=dtype)
        opt.state[p]["exp_avg"] = torch.zeros(3)
        opt.state[p]["exp_avg_sq"] = torch.zeros(3)
        p.grad = torch.ones(3)
        for _ in range(steps):
            opt.step()
        assert opt.state[p]["step"] == 5 + steps
    opt.state[p]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
