"""Against torch.optim, where torch is installed."""

import copy

import ml_dtypes
import numpy as np
import pytest

import fastopt as fo

torch = pytest.importorskip("torch", reason="torch is not installed")

# Every option that torch.optim has, alone or with others.
CASES = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adagrad", {"lr": 0.05}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adagrad", {"lr": 0.05, "eps": 0.1, "maximize": True}),
    ("RMSprop", {"lr": 0.01, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    ("RMSprop", {"lr": 0.01, "centered": True, "alpha": 0.9}),
    ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-3}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "eps": 1e-3}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "maximize": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trajectories_agree(name, options, dtype, rng):
    """200 steps; within 4 ULP a step of the largest weight, of which steps add up."""
    w = rng.standard_normal(500).astype(dtype)
    theirs = torch.tensor(w.copy(), requires_grad=True)
    opt, torch_opt = getattr(fo, name)(w, **options), getattr(torch.optim, name)([theirs], **options)
    target = rng.standard_normal(500).astype(dtype)
    for _ in range(200):
        noise = rng.standard_normal(500).astype(dtype)
        opt.step((w - target) * 0.1 + noise)
        theirs.grad = torch.tensor((theirs.detach().numpy() - target) * 0.1 + noise)
        torch_opt.step()
    ulp = np.spacing(np.abs(w).max())
    assert np.abs(w - theirs.detach().numpy()).max() <= 200 * 4 * ulp


def test_lion_is_the_papers(rng):
    """torch has no Lion: against its formula in double."""
    w = rng.standard_normal(500)
    want, m = w.copy(), np.zeros(500)
    opt = fo.Lion(w, lr=0.01, weight_decay=0.1)
    for _ in range(200):
        g = rng.standard_normal(500)
        opt.step(g)
        want = want * (1 - 0.01 * 0.1) - 0.01 * np.sign(0.9 * m + (1 - 0.9) * g)
        m = 0.99 * m + (1 - 0.99) * g
    np.testing.assert_allclose(w, want, rtol=1e-12, atol=1e-13)


def test_clipping_is_torchs(rng):
    w = [rng.standard_normal((20, 30)).astype("f4"), rng.standard_normal(40).astype("f4")]
    theirs = [torch.tensor(a.copy(), requires_grad=True) for a in w]
    opt, torch_opt = fo.SGD(w, lr=0.1, max_norm=1.0), torch.optim.SGD(theirs, lr=0.1)
    for scale in (1e-4, 1.0, 100.0):
        grads = [(scale * rng.standard_normal(a.shape)).astype("f4") for a in w]
        before = [g.copy() for g in grads]
        norm = opt.step(grads)
        assert all((a == b).all() for a, b in zip(grads, before, strict=True))
        for t, g in zip(theirs, grads, strict=True):
            t.grad = torch.tensor(g)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)), rel=1e-5)
        torch_opt.step()
        for a, t in zip(w, theirs, strict=True):
            np.testing.assert_allclose(a, t.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_are_stepped_in_place(dtype):
    w = torch.ones(10, dtype=getattr(torch, dtype), requires_grad=True)
    (w.float().sum() * 2).backward()
    opt = fo.SGD([w], lr=0.25)
    opt.step([w.grad])
    assert w.detach().float().tolist() == [0.5] * 10
    with pytest.raises(ValueError, match="array '0': must be C-contiguous"):
        fo.SGD([torch.ones(4, 4)[:, ::2]])


def test_gradients_of_bfloat16(rng):
    w = np.ones(8, ml_dtypes.bfloat16)
    fo.SGD(w, lr=0.5).step(torch.ones(8, dtype=torch.bfloat16))
    assert w.astype("f4").tolist() == [0.5] * 8


def test_a_copy_steps_its_own_tensors():
    params = [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]
    opt = fo.SGD(params, lr=1.0)
    copied, twin = copy.deepcopy((params, opt))
    twin.step([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
    assert [p.tolist() for p in copied] == [[-1.0] * 3, [-1.0] * 2]
    assert [p.tolist() for p in params] == [[0.0] * 3, [0.0] * 2]


def test_autograd_knows_what_was_changed():
    """Going back through a graph that has the weights of before would give wrong gradients in silence."""
    w, v = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    of_w, of_v = (w * w).sum(), (v * v).sum()
    fo.SGD([w, v]).step([torch.ones(3), None])
    of_v.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_w.backward()
    with torch.inference_mode():
        fo.SGD(torch.ones(3), lr=1.0).step(torch.ones(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_that_were_given_other_memory_are_refused(dtype):
    """Otherwise the memory of before would be stepped, which may be nobody's any more."""
    for put in (lambda w: w, lambda w: [w], lambda w: {"w": w}):
        w = torch.ones(3, dtype=getattr(torch, dtype))
        params = put(w)
        opt = fo.SGD(params)
        grads = copy.deepcopy(params)
        opt.step(grads)
        w.data = w * 0
        with pytest.raises(ValueError, match="params: expected the arrays that the optimizer was made for"):
            opt.step(grads)
        assert not w.any()


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0.3), (5, 0.4), (10, 0.3), (100, 0.05), (7, 0.9)])
def test_one_cycle_is_that_of_torch(steps, warmup):
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.1, total_steps=steps, pct_start=warmup)
    ours = fo.schedules.one_cycle(0.1, steps=steps, warmup=warmup)
    for s in range(steps):
        assert ours(s) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-12)
        theirs.step()
        if s + 1 < steps:
            schedule.step()
