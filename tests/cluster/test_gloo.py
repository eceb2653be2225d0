"""Steps over two ranks of torch's gloo, as processes and on two hosts."""

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import sys

from engines import on_host, process, run_program

PROGRAM = """
import socket
import sys
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import fastopt as fo

def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    every = [np.random.default_rng(r).integers(-9, 9, (70, 30)).astype("f4") for r in range(2)]
    w, v = np.ones((70, 30), "f4"), np.ones((70, 30), "f4")
    opt, alone = fo.Adam(w, max_norm=0.5), fo.Adam(v, max_norm=0.5)
    for step in range(3):
        norm = opt.step(every[rank], reduce=lambda buffer: dist.all_reduce(torch.from_numpy(buffer)))
        assert norm == alone.step(every[0] + every[1], grad_scale=0.5)
    assert (w == v).all()
    try:
        opt.step(None if rank else every[0], reduce=lambda buffer: dist.all_reduce(torch.from_numpy(buffer)))
    except ValueError as error:
        assert "only some ranks have one" in str(error)
    else:
        raise AssertionError
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, ("FILE",), nprocs=2)
"""


def test_all_reduce(tmp_path):
    run_program(PROGRAM.replace("FILE", str(tmp_path / "meeting")), tmp_path)


ON_HOSTS = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
import fastopt.torch as ft

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2)

def trained(make, distributed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 5))
    opt = make(model.parameters())
    run = DistributedDataParallel(model) if distributed else model
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        run(x[rank::2] if distributed else x).square().mean().backward()
        opt.step()
    return model

want = trained(lambda params: ft.AdamW(params, lr=0.01), False)
for make in (
    lambda params: ft.AdamW(params, lr=0.01),
    lambda params: ZeroRedundancyOptimizer(params, ft.AdamW, lr=0.01),
):
    for p, q in zip(trained(make, True).parameters(), want.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
dist.destroy_process_group()
"""


def test_two_hosts(hosts, tmp_path):
    """DDP, and ZeRO's optimizer around fastopt's, give what one process gives."""
    names, net = hosts
    path = tmp_path / "program.py"
    path.write_text(ON_HOSTS)
    ranks = [on_host(name, f"host{i}", [sys.executable, str(path), str(i)]) for i, name in enumerate(names)]
    meeting = {"MASTER_ADDR": f"{net}.2.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth1"}
    with process(*ranks[0], **meeting) as one, process(*ranks[1], **meeting) as two:
        assert (one.wait(100), two.wait(100)) == (0, 0)
