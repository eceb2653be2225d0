"""Two processes on gloo: DDP, ZeRO, FSDP2 with parameters on the CPU, and distributed checkpoints."""

import os
import socket

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastopt.torch as ft

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
WORLD = 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 5))


def train(model, opt, share=slice(None), steps=3):
    for k in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(k))[share]
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


def check_same(model, want):
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor() if hasattr(p, "full_tensor") else p, q, rtol=1e-4, atol=1e-6)


def sharded():
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    model, policy = net(), CPUOffloadPolicy(pin_memory=False)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    return model


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        check(slice(rank, None, WORLD), folder)
    finally:
        dist.destroy_process_group()


def check(share, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"lr": 1e-2, "max_norm": 0.05}  # the norm is that of all shards
    want = net()
    train(want, ft.AdamW(want.parameters(), **options))

    model = nn.parallel.DistributedDataParallel(net())
    train(model, ft.AdamW(model.parameters(), **options), share)
    check_same(model, want)

    plain = net()
    train(plain, ft.AdamW(plain.parameters(), lr=1e-2))
    model = nn.parallel.DistributedDataParallel(net())
    zero = ZeroRedundancyOptimizer(model.parameters(), ft.AdamW, lr=1e-2)
    train(model, zero, share)
    check_same(model, plain)

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        return  # which has no FSDP2 for the CPU
    model = sharded()
    opt = ft.AdamW(model.parameters(), **options)
    train(model, opt, share)
    check_same(model, want)
    state = opt.state[next(model.parameters())]
    assert type(state["exp_avg"]).__name__ == "DTensor"

    saved = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.save(saved, checkpoint_id=folder)
    other = sharded()
    with torch.no_grad():
        for p in other.parameters():
            p.to_local().zero_()
    resumed = ft.AdamW(other.parameters(), **options)
    loaded = dict(zip(("model", "opt"), get_state_dict(other, resumed), strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    for m, o in ((model, opt), (other, resumed)):
        train(m, o, share)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())

    model = sharded()
    with pytest.raises(ValueError, match="DTensor"):
        train(model, ft.AdamW(model.parameters(), state_dtype="uint8"), share)


def test_two_processes(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="torch has no FSDP")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path / "checkpoint")), nprocs=WORLD)
