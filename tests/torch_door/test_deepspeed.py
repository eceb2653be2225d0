"""DeepSpeed's operators by fastopt's kernels, and DeepSpeed's own classes with them where it is installed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastopt as fo
from fastopt.torch import deepspeed


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_operators_have_the_bits_of_fastopt():
    w, m, v = torch.randn(1000), torch.zeros(1000), torch.zeros(1000)
    array = w.numpy().copy()
    for adamw, kind in ((True, fo.AdamW), (False, fo.Adam)):
        deepspeed.Operators.create_adam(7, 0.1, 0.9, 0.999, 1e-8, 0.1, adamw, False)
        m.zero_(), v.zero_()
        opt = kind(array, lr=0.1, weight_decay=0.1)
        for step in (1, 2):
            g = torch.randn(1000)
            deepspeed.Operators.adam_update(7, step, 0.1, 0.9, 0.999, 1e-8, 0.1, True, w, g, m, v)
            opt.step(g.numpy())
            assert np.array_equal(w.numpy(), array)
    g = torch.randn(1000)  # without bias correction: as after steps without number
    deepspeed.Operators.adam_update(7, 3, 0.1, 0.9, 0.999, 1e-8, 0.1, False, w, g, m, v)
    late = opt.state_dict()
    late["state"]["0"]["step"] = 1 << 61
    opt.load_state_dict(late)
    opt.step(g.numpy())
    assert np.array_equal(w.numpy(), array)
    m.zero_(), v.zero_()
    adagrad, lion = fo.Adagrad(array, lr=0.1, eps=1e-10), None
    g = torch.randn(1000)
    deepspeed.Operators.adagrad_update(0, 1, 0.1, 1e-10, 0.0, w, g, v)
    adagrad.step(g.numpy())
    assert np.array_equal(w.numpy(), array)
    lion = fo.Lion(array, lr=0.1, weight_decay=0.1)
    deepspeed.Operators.lion_update(0, 1, 0.1, 0.9, 0.99, 0.1, w, g, m)
    lion.step(g.numpy())
    assert np.array_equal(w.numpy(), array)


def test_wrong_tensors_are_refused():
    w, update = torch.randn(10), deepspeed.Operators.lion_update
    with pytest.raises(ValueError, match="grad"):
        update(0, 1, 0.1, 0.9, 0.99, 0.1, w, w[:5].clone(), w.clone())
    with pytest.raises(TypeError, match="fp32_optimizer_states"):
        update(0, 1, 0.1, 0.9, 0.99, 0.1, w, w.clone(), w.half())
    with pytest.raises(NotImplementedError, match="rollback"):
        deepspeed.Operators.adam_rollback()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adam.DeepSpeedCPUAdam", "adagrad.DeepSpeedCPUAdagrad", "lion.DeepSpeedCPULion"])
def test_classes_of_deepspeed(name, dtype):
    ops = pytest.importorskip("deepspeed.ops", reason="DeepSpeed is not installed")
    deepspeed.install()
    module, cls = name.split(".")
    p = torch.nn.Parameter(torch.ones(100, dtype=dtype))
    opt = getattr(getattr(ops, module), cls)([p], lr=0.1)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    assert (p.float() < 0.9).all()
