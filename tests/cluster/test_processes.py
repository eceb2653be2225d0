"""The command line with processes of this machine, which is interrupted and killed, and the program of the page."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the extra cli is not installed")

from engines import contents, make_model, process, program, run_program, wait_for

import fastopt as fo


@pytest.fixture
def large(tmp_path):
    """A model that takes a second or two, and a target that exists."""
    make_model(tmp_path / "model", shards=2, tensors=8, rows=2048, cols=2048)
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


def test_import_needs_no_engine():
    code = (
        "import fastopt, sys; assert not {'dask', 'distributed', 'mpi4py', 'multiprocessing', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
