"""Run the cases of a script: options, threads, pinning, a JSON file, a picture.

A script yields cases, and `main` measures them in one child process for each number of threads. OpenMP and BLAS read
their environment when they are loaded, so it must be set before, and idle threads of one run must not disturb the next.
The child may use as many cores as it has threads. OpenMP's own binding (`OMP_PROC_BIND`) is left off: it binds the main
thread too, and with it all threads that start later, those of fastopt among them.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from fastopt.cli.timing import (
    FASTOPT,
    LIMIT,
    NUMPY,
    Case,
    Disturbance,
    Result,
    doubts,
    header,
    machine,
    measure_all,
    show,
)

COLORS = {FASTOPT: "#c2410c", NUMPY: "#4d77cf", "numpy blocked": "#94b5ee"}
OTHER_COLORS = ["#6b7280", "#a16207", "#0f766e", "#7c3aed", "#be185d", "#4d7c0f"]


@functools.cache
def peer(name: str) -> ModuleType | None:
    """Import a module to compare with, or print that it is missing and return None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out", file=sys.stderr)
        return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers of threads, e.g. 1,2")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, a few seconds in all")
    parser.add_argument("--full", action="store_true", help="also cases that need gigabytes")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, help="to measure each case (default 2; quick: 0.3)")
    parser.add_argument("--json", type=Path, help="write machine and results to this file")
    parser.add_argument("--png", type=Path, help="draw results into this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # measure here, write results to this file
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 0.3 if options.quick else 2.0
    return options


def main(cases: Callable[[argparse.Namespace], Iterable[Case]]) -> None:
    """Measure the cases that `cases` yields for the options of the command line, and print the results."""
    options = parse()
    if options.child:
        chosen = (case for case in cases(options) if options.only in case.name)
        options.child.write_text(json.dumps(measured(chosen, options.seconds)))
        return
    runs = []
    for threads in dict.fromkeys(int(n) for n in options.threads.split(",")):
        run = measure_in_child(threads)
        runs.append(run)
        if run["results"]:
            show([Result(**result) for result in run["results"]], header(run["machine"]))
        if run["warning"]:
            print(f"\nwarning: {run['warning']}")
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1))
    if options.png:
        draw(runs, options.png)


def measured(cases: Iterable[Case], seconds: float) -> dict[str, Any]:
    """Return the facts of the machine, the results, and a warning if they cannot be believed, as JSON holds them."""
    disturbance, facts = Disturbance(), machine()
    results = measure_all(cases, seconds)
    warning = doubts(results, disturbance.cores(), facts["threads"]) if results else None
    return {"machine": facts, "results": [asdict(result) for result in results], "warning": warning}


def measure_in_child(threads: int) -> dict[str, Any]:
    """Run this script again with so many threads, on as many cores."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    env["MKL_NUM_THREADS"] = env["NUMBA_NUM_THREADS"] = str(threads)
    cores: list[int] = []
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))[-threads:]

    def pin() -> None:
        if cores:
            os.sched_setaffinity(0, cores)

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, *sys.argv, "--child", str(result)]
        subprocess.run(command, env=env, preexec_fn=pin, check=True)
        return json.loads(result.read_text())


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw each contender's share of the memory limit, a panel for each number of threads."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(result["case"] for result in runs[0]["results"]))
    who = list(dict.fromkeys(r["contender"] for r in runs[0]["results"] if r["contender"] != LIMIT))
    others = iter(OTHER_COLORS)
    colors = {name: COLORS.get(name) or next(others) for name in who}
    shares = [{(r["case"], r["contender"]): r["of_limit"] for r in run["results"]} for run in runs]
    rows = [(case, name) for case in names for name in who if (case, name) in shares[0]]
    y, at = {}, 0.0
    for i, (case, name) in enumerate(rows):
        at += 1.6 if i and rows[i - 1][0] != case else 1.0
        y[case, name] = at

    label: dict[str, Any] = {"va": "center", "fontsize": 7, "color": "#374151"}
    label["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    height = 1.6 + 0.19 * at
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.4 + 4.2 * len(runs), height), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, run, of_limit in zip(axes[0], runs, shares, strict=True):
        for case, name in rows:
            share = of_limit[case, name]
            axis.barh(y[case, name], min(share, 1.3), height=0.9, color=colors[name])
            axis.text(min(share, 1.3) + 0.015, y[case, name], f"{share:.2f}", **label)
        axis.axvline(1, color="#111827", linewidth=1, zorder=0)
        axis.set_xlim(0, 1.45)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "half", "", "memory limit"], fontsize=8)
        axis.set_title(f"{run['machine']['threads']} thread(s)", fontsize=10)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    middle = [sum(y[c, n] for c, n in rows if c == case) / sum(c == case for c, _ in rows) for case in names]
    axes[0][0].set_yticks(middle, names, fontsize=8)
    axes[0][0].set_ylim(at + 1, -1)
    handles = [Patch(color=colors[name]) for name in who]
    figure.legend(handles, who, loc="outside lower center", ncols=len(who), frameon=False, fontsize=8)
    facts = runs[0]["machine"]
    caption = f"{facts['cpu']} ({facts['isa']}), fastopt {facts['fastopt']}, numpy {facts['numpy']}"
    figure.suptitle(f"Share of the memory limit, longer is faster\n{caption}", fontsize=10)
    figure.savefig(path, dpi=150)


def rounded(value: Any) -> Any:
    """Return what JSON holds with four digits a number, which is more than a measurement has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
