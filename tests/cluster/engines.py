"""Models in shards, engines as processes of their own, and the programs of docs/how-to/several-machines.md."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PAGE = Path(__file__).parents[2] / "docs/how-to/several-machines.md"
# As if each worker were a machine of one core.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def program(title):
    """Return the program in the section of the page with this title."""
    section = PAGE.read_text("utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_model(folder, shards=3, tensors=4, rows=512, cols=512):
    folder.mkdir()
    rng, placed = np.random.default_rng(0), {}
    for shard in range(shards):
        made = {f"{shard}.{i}.weight": rng.standard_normal((rows, cols)).astype("f4") for i in range(tensors)}
        made[f"{shard}.bias"] = np.ones(cols, "f4")
        save_file(made, folder / f"model-{shard}.safetensors")
        placed |= dict.fromkeys(made, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@contextlib.contextmanager
def process(*command, **environment):
    """Run a command in a session of its own, and end that session."""
    running = subprocess.Popen(
        [str(part) for part in command],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def run_program(text, folder, *command):
    """Run a Python program in a folder, which must succeed, and return what it prints."""
    path = folder / "program.py"
    path.write_text(text)
    done = subprocess.run(
        [*map(str, command or (sys.executable,)), str(path)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return found


# ---- hosts ------------------------------------------------------------------------------------------------------


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


def on_host(name, hostname, command):
    """Return a command that runs another one in a namespace, with a name for the host."""
    return [
        "ip",
        "netns",
        "exec",
        name,
        "unshare",
        "--uts",
        "sh",
        "-c",
        f'hostname {hostname}; exec "$@"',
        "sh",
        *command,
    ]
