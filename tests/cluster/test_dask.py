"""A scheduler and workers of Dask, as processes and as hosts of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

distributed = pytest.importorskip("distributed", reason="distributed is not installed")

from engines import contents, make_model, on_host, process, program, run_program, wait_for

import fastopt as fo
from fastopt.models import tasks

# Workers that think they have another version, and that die of every task.
OLD = "import fastopt.models.tasks as t; t.__version__ = '0.0.9'; from dask.__main__ import main; main()"
DYING = "import os, fastopt.models.tasks as t; t._run = lambda *_: os._exit(1); from dask.__main__ import main; main()"


def dask(*words):
    return [sys.executable, "-m", "dask", *words]


def worker(address, code=None):
    words = ["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
    return dask(*words) if code is None else [sys.executable, "-c", code, *words]


@contextlib.contextmanager
def scheduler(folder, host="127.0.0.1", allowed_failures=1):
    file = folder / "scheduler.json"
    words = ["--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    with process(*dask("scheduler", *words), DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=str(allowed_failures)):

        def address():
            with contextlib.suppress(OSError, ValueError):
                return json.loads(file.read_text())["address"]

        yield wait_for(address)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A scheduler with two workers."""
    with (
        scheduler(tmp_path_factory.mktemp("dask")) as address,
        process(*worker(address)),
        process(*worker(address)),
    ):
        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield address


def test_programs_of_the_page(address, model, alone, tmp_path):
    def on_page(title):
        return (
            program(title)
            .replace("tcp://10.0.0.1:8786", address)
            .replace('target_size="4GB"', "bits=4")
            .replace('f"inputs', f'f"{tmp_path}/inputs')
        )

    printed = run_program(on_page("Pack with Dask"), tmp_path)
    assert "12 packed" in printed
    assert contents(tmp_path / "packed") == alone

    rng, whole = np.random.default_rng(0), fo.Calibration()
    for part in range(4):
        x = rng.integers(-9, 9, (3, 20, 64)).astype("f4")  # whose sums are exact in any order
        np.save(tmp_path / f"inputs-{part}.npy", x)
        whole.update("fc.weight", x)
    run_program(on_page("Calibrate on parts of the data"), tmp_path)
    assert fo.Calibration.load(tmp_path / "calibration.safetensors") == whole


def test_command_line(address, model, alone, tmp_path):
    fastopt = [sys.executable, "-m", "fastopt"]
    for words in (
        ["pack", model, "-o", tmp_path / "packed", "--bits", "4"],
        ["unpack", tmp_path / "packed", "-o", tmp_path / "plain"],
    ):
        subprocess.run([*fastopt, *map(str, words), "--dask", address], check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "packed") == alone
    fo.unpack_file(tmp_path / "packed", tmp_path / "plain2")
    assert contents(tmp_path / "plain") == contents(tmp_path / "plain2")


def test_a_killed_worker_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_LEAST", 1 << 20)
    model = make_model(tmp_path / "model", tensors=12, rows=1024)
    fo.pack_file(model, tmp_path / "alone", bits=4, fit="lsq")
    killed = []
    with scheduler(tmp_path) as address, process(*worker(address)) as one, process(*worker(address)):

        def kill(done, total, name):
            if done > total / 4 and not killed:
                os.kill(one.pid, signal.SIGKILL)
                killed.append(done / total)

        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=60)
            executor = client.get_executor()
            fo.pack_file(model, tmp_path / "packed", bits=4, fit="lsq", executor=executor, notify=kill)
        assert one.wait(10) == -signal.SIGKILL
    assert killed[0] < 0.5
    assert contents(tmp_path / "packed") == contents(tmp_path / "alone")


def test_workers_of_another_version(model, tmp_path):
    with (
        scheduler(tmp_path) as address,
        process(*worker(address, OLD)),
        distributed.Client(address) as client,
        pytest.raises(ValueError, match=r"worker .* has fastopt 0\.0\.9, expected"),
    ):
        fo.pack_file(model, tmp_path / "packed", bits=4, executor=client.get_executor())
    assert not list((tmp_path / "packed").iterdir())


def test_a_task_that_kills_its_workers(model, tmp_path):
    with (
        scheduler(tmp_path, allowed_failures=0) as address,
        process(*worker(address, DYING)),
        process(*worker(address, DYING)),
        distributed.Client(address) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        with pytest.raises(RuntimeError, match=r"^'\d\.0\.weight' to '\d\.bias': the task failed, .* KilledWorker"):
            fo.pack_file(model, tmp_path / "packed", bits=4, executor=client.get_executor())
    assert not list((tmp_path / "packed").iterdir())


def test_interrupt(address, model, tmp_path):
    fo.pack_file(model, tmp_path / "packed", bits=8)
    before = contents(tmp_path / "packed")

    def interrupt(done, total, name):
        raise KeyboardInterrupt

    with distributed.Client(address) as client:
        with pytest.raises(KeyboardInterrupt):
            fo.pack_file(model, tmp_path / "packed", bits=4, executor=client.get_executor(), notify=interrupt)
        wait_for(lambda: not any(client.processing().values()))
    assert contents(tmp_path / "packed") == before


# ---- hosts -------------------------------------------------------------------------------------------------------


def test_two_hosts(hosts, model, alone, tmp_path):
    (a, b), net = hosts
    with (
        scheduler(tmp_path, "0.0.0.0") as address,
        process(*on_host(a, "alpha", worker(address.replace("0.0.0.0", f"{net}.0.1")))),
        process(*on_host(b, "beta", worker(address.replace("0.0.0.0", f"{net}.1.1")))),
        distributed.Client(address) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        assert {info["host"] for info in client.scheduler_info()["workers"].values()} == {f"{net}.0.2", f"{net}.1.2"}
        fo.pack_file(model, tmp_path / "packed", bits=4, executor=client.get_executor())
        assert contents(tmp_path / "packed") == alone


def test_hosts_with_other_files(hosts, model, tmp_path):
    (a, _), net = hosts
    (tmp_path / "packed").mkdir()
    hidden = ["sh", "-c", f'mount -t tmpfs none {tmp_path / "packed"}; exec "$@"', "sh"]
    with (
        scheduler(tmp_path, "0.0.0.0") as address,
        process(*on_host(a, "alpha", [*hidden, *worker(address.replace("0.0.0.0", f"{net}.0.1"))])),
        distributed.Client(address) as client,
    ):
        client.wait_for_workers(1, timeout=60)
        with pytest.raises(OSError, match=r"worker alpha:\d+ does not see this folder; all workers need"):
            fo.pack_file(model, tmp_path / "packed", bits=4, executor=client.get_executor())
    assert not list((tmp_path / "packed").iterdir())
