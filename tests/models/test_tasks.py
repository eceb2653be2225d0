"""Packing, unpacking, inspecting and comparing by the tasks of an executor: the results are those of one process."""

import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import fastopt as fo
from fastopt.files.weights import Weights
from fastopt.models import parallel, tasks


@pytest.fixture
def small_runs(monkeypatch):
    """Runs of few bytes, so that small models make many, and tensors are cut by rows."""
    monkeypatch.setattr(tasks, "_LEAST", 20_000)
    monkeypatch.setattr(tasks, "_MOST", 20_000)


@pytest.fixture
def source(tmp_path, rng):
    folder = tmp_path / "source"
    folder.mkdir()
    placed = {}
    for shard in range(3):
        tensors = {f"{shard}.{i}.w": rng.standard_normal((257, 64)).astype("f4") for i in range(2)}
        tensors |= {
            f"{shard}.bias": np.ones(7, "f4"),
            f"{shard}.half": rng.standard_normal((300, 48)).astype(ml_dtypes.bfloat16),
            f"{shard}.ids": np.arange(6000),
        }
        if shard == 1:
            wide = rng.standard_normal((300, 48)).astype("f4")
            wide[250] *= 1e6  # float16 cannot hold the parameters of the last runs of rows alone
            tensors["wide"] = wide
        save_file(tensors, folder / f"m-{shard}.safetensors")
        placed |= dict.fromkeys(tensors, f"m-{shard}.safetensors")
    index = folder / "m.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    return index


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(3) as pool:
        yield pool


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def same_report(one, other):
    """All but the errors are equal; those of a tensor in runs of rows are sums in another order."""
    assert [dataclasses.replace(t, error=None) for t in one.tensors] == [
        dataclasses.replace(t, error=None) for t in other.tensors
    ]
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert (a.error is None) == (b.error is None)
        assert a.error is None or all(map(lambda x, y: math.isclose(x, y, rel_tol=1e-12), a.error, b.error))
    assert one.recipe == other.recipe


OPTIONS = [
    {"bits": 4},
    {"bits": 4, "param_dtype": "float32", "fit": "lsq"},
    {"bits": 8, "group_size": None},
    {"bits": 2, "outliers": 1e-3},
    {"bits": 4, "sparsity": 0.5, "exclude": ["*half"]},
    {"pattern": "2:4"},
    {"target_bits": 11},
    {"target_size": "270kB"},
    {"target_size": "270kB", "overrides": {"0.*": {"bits": 8}}},
]


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["out.index.json", "out.safetensors"])
def test_files_are_those_of_one_process(source, tmp_path, threads, name, options):
    alone, together, plain, plain2 = folders(tmp_path, "alone", "together", "plain", "plain2")
    calls = []
    expected = fo.pack_file(source, alone / name, **options)
    got = fo.pack_file(source, together / name, executor=threads, notify=lambda *call: calls.append(call), **options)
    assert contents(alone) == contents(together)
    same_report(expected, got)
    done = [call[0] for call in calls]
    assert calls[-1] == (calls[0][1], calls[0][1], "")
    assert len(calls) > 20
    assert "target_size" in options or done == sorted(done)

    fo.unpack_file(alone / name, plain / name)
    fo.unpack_file(alone / name, plain2 / name, executor=threads)
    assert contents(plain) == contents(plain2)
    assert fo.inspect(alone / name) == fo.inspect(alone / name, executor=threads)
    assert fo.diff(source, alone / name) == fo.diff(source, alone / name, executor=threads)


@pytest.mark.usefixtures("small_runs")
def test_rows_that_are_stored_in_other_ways(source, tmp_path, threads, monkeypatch):
    """If rows are described in another way than others of their tensor, it is packed as a whole."""
    alone, together = folders(tmp_path, "alone", "together")
    fo.pack_file(source, alone / "o.index.json", bits=4)
    describe, odd = parallel.disassemble, []

    def disassemble(name, tensor):
        arrays, entry = describe(name, tensor)
        if name == "1.1.w" and tensor.shape[0] < 60:
            odd.append(name)
            entry = {**entry, "fit": len(odd)}
        return arrays, entry

    monkeypatch.setattr(parallel, "disassemble", disassemble)
    fo.pack_file(source, together / "o.index.json", bits=4, executor=threads)
    assert odd
    assert contents(alone) == contents(together)


@pytest.mark.usefixtures("small_runs")
def test_processes(source, tmp_path):
    alone, together = folders(tmp_path, "alone", "together")
    fo.pack_file(source, alone / "m.index.json", bits=4)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        fo.pack_file(source, together / "m.index.json", bits=4, executor=pool)
        assert contents(alone) == contents(together)
        # The source itself may be the target; what it was packed with before is packed again.
        before = contents(together)
        fo.pack_file(together / "m.index.json", together / "m.index.json", bits=4, executor=pool)
        assert contents(together) == before
        fo.pack_file(alone / "m.index.json", alone / "m.index.json", bits=2)
        fo.pack_file(together / "m.index.json", together / "m.index.json", bits=2, executor=pool)
        assert contents(alone) == contents(together)
        assert fo.inspect(alone, executor=pool) == fo.inspect(alone)


@pytest.mark.usefixtures("small_runs")
def test_sources(tmp_path, rng, threads):
    w = rng.standard_normal((300, 40)).astype("f4")
    np.savez(tmp_path / "m.npz", w=w, v=w[:100])
    np.save(tmp_path / "m.npy", w)
    fo.PackedModel({"w": w, "tied": w, "other": w[::2].copy()}).save(tmp_path / "m.safetensors")
    orig = {"a.weight_orig": w, "b": w[::-1].copy()}
    mask = {"a.weight_mask": (w > 0).astype("f4")}
    for name, tensors in {"one": orig, "two": mask}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    placed = dict.fromkeys(orig, "one.safetensors") | dict.fromkeys(mask, "two.safetensors")
    (tmp_path / "masked.index.json").write_text(json.dumps({"weight_map": placed}))
    for name in ("m.npz", "m.npy", "m.safetensors", "masked.index.json"):
        alone, together = folders(tmp_path, f"{name}.alone", f"{name}.together")
        weights = fo.open_weights(tmp_path / name, skip="v")
        expected = fo.pack_file(weights, alone / "o.index.json", bits=4)
        got = fo.pack_file(weights, together / "o.index.json", bits=4, executor=threads)
        assert contents(alone) == contents(together)
        same_report(expected, got)


@pytest.mark.parametrize("options", [{"bits": 4, "fit": "gptq"}, {"target_bits": 11}])
def test_large_sums_of_a_calibration_wait_in_files(source, tmp_path, rng, threads, monkeypatch, options):
    monkeypatch.setattr(tasks, "_LARGE", 10_000)
    calib = fo.Calibration(products=True)
    calib.update("0.0.w", rng.standard_normal((200, 64)).astype("f4"))
    calib.update("1.half", rng.standard_normal((200, 48)).astype(ml_dtypes.bfloat16))
    sent = []

    class Watched:
        def submit(self, function, version, pickled):
            sent.append(len(pickled))
            return threads.submit(function, version, pickled)

    alone, together = folders(tmp_path, "alone", "together")
    fo.pack_file(source, alone / "o.index.json", calibration=calib, **options)
    fo.pack_file(source, together / "o.index.json", calibration=calib, executor=Watched(), **options)
    assert contents(alone) == contents(together)
    assert max(sent) < 48 * 48 * 8
    fo.pack_file(source, calibration=calib, executor=threads, dry_run=True, **options)


def test_empty_model(tmp_path, threads):
    fo.PackedModel({}).save(tmp_path / "m.safetensors")
    fo.pack_file(tmp_path / "m.safetensors", tmp_path / "a.safetensors", bits=4)
    fo.pack_file(tmp_path / "m.safetensors", tmp_path / "b.safetensors", bits=4, executor=threads)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# ---- failures ----------------------------------------------------------------------------------------------------


class Changed:
    """An executor that changes the arguments of every task: of the worker's function, or fields of the task."""

    def __init__(self, pool, version=None, **fields):
        self.pool, self.version, self.fields = pool, version, fields

    def submit(self, function, version, pickled):
        task = pickle.loads(pickled)
        known = [field.name for field in dataclasses.fields(task)]
        task = dataclasses.replace(task, **{key: value for key, value in self.fields.items() if key in known})
        return self.pool.submit(function, self.version or version, pickle.dumps(task))


@pytest.fixture
def old(source, tmp_path):
    """A target that exists already, and must stay."""
    (folder,) = folders(tmp_path, "target")
    fo.pack_file(source, folder / "out.index.json", bits=8)
    return folder


def test_worker_with_another_version(source, old, threads):
    before = contents(old)
    with pytest.raises(ValueError, match=rf"worker .*:{os.getpid()} has fastopt .*, expected 9\.9"):
        fo.pack_file(source, old / "out.index.json", bits=4, executor=Changed(threads, version="9.9"))
    assert contents(old) == before


def test_worker_with_other_files(source, old, threads, tmp_path):
    before = contents(old)
    with pytest.raises(OSError, match="does not see this folder; all workers need the file system of the target"):
        fo.pack_file(source, old / "out.index.json", bits=4, executor=Changed(threads, folder=str(tmp_path)))
    origin = fo.open_weights(source).origin
    away = dataclasses.replace(origin, path=str(tmp_path / "away.index.json"))
    with pytest.raises(FileNotFoundError, match=r"on worker .*away\.index\.json"):
        fo.pack_file(source, old / "out.index.json", bits=4, executor=Changed(threads, origin=away))
    assert contents(old) == before


def test_source_that_changes(source, old, threads):
    before = contents(old)
    weights = fo.open_weights(source)
    shard = source.with_name("m-1.safetensors")
    content = shard.read_bytes()
    shard.with_suffix(".new").write_bytes(content[:-1] + b"\0")
    shard.with_suffix(".new").replace(shard)
    with pytest.raises(ValueError, match=r"m-1\.safetensors: has changed since it was opened \(on worker"):
        fo.pack_file(weights, old / "out.index.json", bits=4, executor=threads)
    assert contents(old) == before

    class Late:
        """Changes the source when the last task is submitted."""

        def submit(self, function, version, pickled):
            future = threads.submit(function, version, pickled)
            if type(pickle.loads(pickled)).__name__ == "_Join":
                future.result()
                os.utime(shard, ns=(1, 1))
            return future

    with pytest.raises(ValueError, match=r"m-1\.safetensors: has changed since it was opened"):
        fo.pack_file(source, old / "out.index.json", bits=4, executor=Late())
    assert contents(old) == before


@pytest.mark.usefixtures("small_runs")
def test_failure_names_the_tensor(tmp_path, rng, threads):
    w = rng.standard_normal((300, 48)).astype("f4")
    w[250, 7] = np.nan
    save_file({"a": np.ones_like(w), "bad": w}, tmp_path / "m.safetensors")
    for executor in (None, threads):
        with pytest.raises(ValueError, match=r"^'bad': w: expected finite float32 values, got nan at \(250, 7\)$"):
            fo.pack_file(tmp_path / "m.safetensors", tmp_path / "o.index.json", bits=4, executor=executor)
        assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_lost_workers(source, old):
    before = contents(old)
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os._exit, (3,)) as pool,
        pytest.raises(RuntimeError, match=r"'0\..*' to '.*': the task failed, and nothing was replaced: BrokenProcess"),
    ):
        fo.pack_file(source, old / "out.index.json", bits=4, executor=pool)
    assert contents(old) == before


def test_tasks_that_run_twice(source, tmp_path, threads):
    class Twice:
        def submit(self, function, *args):
            first = threads.submit(function, *args)
            threads.submit(first.result)
            return threads.submit(function, *args)

    alone, together = folders(tmp_path, "alone", "together")
    fo.pack_file(source, alone / "m.index.json", bits=4)
    fo.pack_file(source, together / "m.index.json", bits=4, executor=Twice())
    assert contents(alone) == contents(together)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_cancels_the_tasks(source, old):
    class Never:
        def __init__(self):
            self.futures = []

        def submit(self, *_):
            self.futures.append(Future())
            return self.futures[-1]

    def interrupt():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    executor, before = Never(), contents(old)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        fo.pack_file(source, old / "out.index.json", bits=4, executor=executor)
    assert executor.futures
    assert all(future.cancelled() for future in executor.futures)
    assert contents(old) == before


def test_abandoned_folders_are_removed(source, old, threads):
    before = contents(old)
    for letter, files in (("a", ["lock", "piece"]), ("b", [])):
        left = old / f".out.index.json.{letter * 16}.parts"
        left.mkdir()
        for name in files:
            (left / name).touch()
    other = old / ".another.index.json.aaaaaaaaaaaaaaaa.parts"
    other.mkdir()
    elsewhere = source.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    link = old / f".out.index.json.{'c' * 16}.parts"
    link.symlink_to(elsewhere)
    fo.pack_file(source, old / "out.index.json", bits=8, executor=threads)
    other.rmdir()
    link.unlink()
    assert (elsewhere / "lock").exists()
    assert contents(old) == before


def test_bad_arguments(source, tmp_path, threads):
    target = tmp_path / "o.index.json"
    with pytest.raises(TypeError, match=r"executor: expected a concurrent\.futures\.Executor, got int"):
        fo.pack_file(source, target, bits=4, executor=3)
    with pytest.raises(TypeError, match="source: expected a path, or what open_weights returned"):
        fo.pack_file(Weights({}), target, bits=4, executor=threads)
    with pytest.raises(TypeError, match="weights: expected a path together with an executor, got dict"):
        fo.inspect({}, executor=threads)
    with pytest.raises(ValueError, match="target_bits: expected at least"):
        fo.pack_file(source, target, target_bits=0.5, executor=threads)
    assert not target.exists()
