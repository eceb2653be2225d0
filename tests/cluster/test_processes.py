"""The command line with processes of this machine, which is interrupted and killed, and the program of the page."""

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer", reason="the extra cli is not installed")

from engines import contents, make_model, process, program, run_program, wait_for

import fastopt as fo
from fastopt.models import tasks


@pytest.fixture
def large(tmp_path):
    """A model that takes a second or two, and a target that exists."""
    make_model(tmp_path / "model", shards=2, tensors=8, rows=4096, cols=2048)
    fo.pack_file(tmp_path / "model", tmp_path / "packed", bits=8)
    return tmp_path


def packing(folder):
    command = ["pack", folder / "model", "-o", folder / "packed", "--bits", "2", "--fit", "lsq", "--workers", "2"]
    return process(sys.executable, "-m", "fastopt", *command)


def workers_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def parts_in(folder):
    return list(folder.glob("packed/.*.parts/*"))


def test_program_of_the_page(model, alone, tmp_path):
    assert "12 packed" in run_program(program("Pack in processes of this machine"), tmp_path)
    assert contents(tmp_path / "packed") == alone


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_interrupt(large):
    before = contents(large / "packed")
    with packing(large) as running:
        wait_for(lambda: len(parts_in(large)) > 1)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        assert running.wait(60) == 130
    assert contents(large / "packed") == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_kill(large):
    before = {path.name for path in (large / "packed").iterdir()}
    with packing(large) as running:
        wait_for(lambda: len(parts_in(large)) > 1)
        workers = workers_of(running.pid)
        os.kill(running.pid, signal.SIGKILL)
        running.wait(60)
        assert len(workers) >= 2
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    left = {path.name for path in (large / "packed").iterdir()} - before
    assert len(left) == 1
    fo.pack_file(large / "model", large / "packed", bits=8)
    assert {path.name for path in (large / "packed").iterdir()} == before


def limit_memory():
    """Let this worker take 24 MB more than it has; what is mapped from files does not count."""
    fo.set_num_threads(1)
    has = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (has + (24 << 20),) * 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_tensor_larger_than_the_memory_of_a_worker(tmp_path, monkeypatch):
    w = np.resize(np.random.default_rng(0).standard_normal((1024, 4096)).astype("f4"), (8192, 4096))
    fo.PackedModel({"large": w}).save(tmp_path / "m.safetensors")
    fo.pack_file(tmp_path / "m.safetensors", tmp_path / "alone.safetensors", bits=8)
    target = tmp_path / "packed.safetensors"
    with ProcessPoolExecutor(1, get_context("spawn"), limit_memory) as pool:
        with monkeypatch.context() as whole:
            whole.setattr(tasks, "_LEAST", 256 << 20)
            with pytest.raises(MemoryError, match=r"^'large': not enough memory on worker"):
                fo.pack_file(tmp_path / "m.safetensors", target, bits=8, executor=pool)
        fo.pack_file(tmp_path / "m.safetensors", target, bits=8, executor=pool)
    assert target.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_import_needs_no_engine():
    code = (
        "import fastopt, sys; assert not {'dask', 'distributed', 'mpi4py', 'multiprocessing', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
