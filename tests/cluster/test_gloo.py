"""Steps over two ranks of torch's gloo."""

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from engines import run_program

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
