"""Pack a model over processes, and step over ranks of MPI: time, efficiency, bytes, memory, cost of the sum.

The model is made in a temporary folder. Each worker has one thread, as if it were a machine of one core.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import fastopt as fo

SHARDS, COLS, STEPS = 4, 4096, 20


def make_model(folder: Path, nbytes: int) -> int:
    """Write a model in shards; a quarter is one tensor. Return the bytes of that."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    panel = rng.standard_normal((1024, COLS)).astype(np.float32)
    rows = nbytes // (4 * COLS)
    placed: dict[str, str] = {}
    for shard in range(SHARDS):
        mine = [rows // SHARDS] if shard == 0 else [rows // SHARDS // 8] * 8
        made = {f"{shard}.{i}.weight": np.resize(panel, (count, COLS)) for i, count in enumerate(mine)}
        file = f"model-{shard}.safetensors"
        fo.PackedModel(made).save(folder / file)
        placed |= dict.fromkeys(made, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return rows // SHARDS * COLS * 4


def forget(folder: Path) -> None:
    """Let the system drop the files from its cache, so that reading them counts."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def numbers_of(pid: int | None, file: str) -> dict[str, int]:
    """Return the numbers in a file of /proc about a process."""
    lines = (line.split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pack(source: Path, target: Path, workers: int, **options: Any) -> dict[str, float]:
    """Pack by so many processes; return times, the bytes of all workers, and the most memory of one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, fo.set_num_threads, (1,)) as pool:
        list(pool.map(time.sleep, [0.2] * workers))  # all processes are there
        pids = [process.pid for process in pool._processes.values()]
        before = [(numbers_of(pid, "io"), cpu_seconds(pid)) for pid in pids]
        start, own = time.perf_counter(), time.process_time()
        fo.pack_file(source, target, executor=pool, **options)
        seconds, own = time.perf_counter() - start, time.process_time() - own
        after = [(numbers_of(pid, "io"), cpu_seconds(pid)) for pid in pids]
        memory = [numbers_of(pid, "status")["VmHWM"] for pid in pids]
    pairs = list(zip(before, after, strict=True))
    return {
        "seconds": seconds,
        "cpu_of_workers": sum(b[1] - a[1] for a, b in pairs),
        "cpu_of_caller": own,
        "read": sum(b[0]["read_bytes"] - a[0]["read_bytes"] for a, b in pairs),
        "written": sum(b[0]["wchar"] - a[0]["wchar"] for a, b in pairs),
        "peak": 1024 * max(memory),
    }


def bench_pack(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    nbytes = (64 if options.quick else 2048) << 20
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        largest = make_model(folder / "model", nbytes)
        print(f"model: {nbytes / 1e9:.2f} GB in {SHARDS} files, largest tensor {largest / 1e9:.2f} GB")
        print("workers  seconds  speedup  CPU of workers  CPU of caller  read/source  written/packed  peak/largest")
        first = 0.0
        for workers in map(int, options.workers.split(",")):
            best: dict[str, float] = {}
            for _ in range(options.repeat):
                forget(folder / "model")
                cold = pack(folder / "model", folder / "packed", workers, bits=4)
                warm = pack(folder / "model", folder / "packed", workers, bits=4)
                if not best or warm["seconds"] < best["seconds"]:
                    best = {**warm, "read": cold["read"], "seconds_cold": cold["seconds"]}
            packed = sum(path.stat().st_size for path in (folder / "packed").iterdir())
            first = first or best["seconds"] * workers
            print(
                f"{workers:7}  {best['seconds']:7.2f}  {first / best['seconds']:7.2f}  {best['cpu_of_workers']:14.2f}  "
                f"{best['cpu_of_caller']:13.2f}  {best['read'] / nbytes:11.2f}  {best['written'] / packed:14.2f}  "
                f"{best['peak'] / largest:12.2f}"
            )
            yield {"workers": workers, "nbytes": nbytes, "packed": packed, "largest": largest, **best}


# ---- a reduced step ----------------------------------------------------------------------------------------------


def best_of(run: Callable[[], object], barrier: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(STEPS):
        barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def step_on_rank(size: int) -> None:
    """Time steps on one rank; rank 0 prints them as JSON."""
    comm = import_module("mpi4py.MPI").COMM_WORLD
    in_place = import_module("mpi4py.MPI").IN_PLACE
    fo.set_num_threads(1)
    gradient = np.random.default_rng(comm.rank).standard_normal(size).astype(np.float32)
    times = {}
    for name, reduce in {
        "plain": None,
        "reduce that sums nothing": lambda buffer: None,
        "reduce": lambda buffer: comm.Allreduce(in_place, buffer),
    }.items():
        opt = fo.AdamW(np.zeros(size, np.float32), max_norm=1.0)
        times[name] = best_of(partial(opt.step, gradient, reduce=reduce), comm.Barrier)
    buffer = gradient.copy()
    times["Allreduce alone"] = best_of(lambda: comm.Allreduce(in_place, buffer), comm.Barrier)
    if comm.rank == 0:
        print(json.dumps(times))


def bench_step(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        print("mpiexec is not installed: steps are left out", file=sys.stderr)
        return
    size, ranks = (1 if options.quick else 32) << 20, 2
    command = [mpiexec, "-n", str(ranks), sys.executable, __file__, "--rank", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    travels = 2 * (ranks - 1) / ranks * 4 * size
    print(
        f"\nAdamW with max_norm, {size:,} parameters, {ranks} ranks: {travels / 1e6:.0f} MB leave each rank in a step"
    )
    for name, seconds in json.loads(done.stdout).items():
        print(f"{name:25} {1e3 * seconds:8.2f} ms")
        yield {"name": name, "size": size, "ranks": ranks, "seconds": seconds, "bytes": travels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, a few seconds in all")
    parser.add_argument("--workers", default="1,2", help="numbers of processes, e.g. 1,2,4")
    parser.add_argument("--repeat", type=int, default=3, help="the best time counts")
    parser.add_argument("--folder", type=Path, help="where the model is made")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        step_on_rank(options.rank)
        return
    found = {"pack": list(bench_pack(options)), "step": list(bench_step(options))}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
