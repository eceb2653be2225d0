"""Train an MLP and a CNN on Fashion-MNIST until a test accuracy is reached: time, and where it goes.

The networks are plain NumPy, forward and backward, and are stepped by fastopt or by Adam in NumPy without temporaries.
torch trains the same networks by its own operations, with its fused Adam or with that of `fastopt.torch`. All start
from the same weights and see the same batches. Testing does not count. Times of one thread are those of its CPU, which
other programs hardly disturb; times of several threads are those of the clock. Without the data set (Debian's package
dataset-fashion-mnist, or any folder of idx files) the digits of scikit-learn stand in for it.

``--json bench/training.json`` writes what ``bench/charts.py`` shows in docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import numpy as np

import fastopt as fo
from fastopt._types import Array
from fastopt.cli.timing import machine
from fastopt.demo.run import Dataset, load_digits, load_idx_folder

DATA = Path("/usr/share/datasets/fashion-mnist")
BATCH, LR = 128, 1e-3
GOALS = {("MLP", True): 0.87, ("CNN", True): 0.87, ("MLP", False): 0.95, ("CNN", False): 0.95}  # True: Fashion-MNIST
CHANNELS = 16, 32
Weights = dict[str, Array]


def load(folder: Path) -> tuple[Dataset, bool]:
    return (load_idx_folder(folder), True) if folder.is_dir() else (load_digits(), False)


# ---- the networks in NumPy -----------------------------------------------------------------------------------------


def cross_entropy(scores: Array, labels: Array) -> Array:
    """Return the gradient of the mean cross entropy of softmax."""
    grad = np.exp(scores - scores.max(axis=1, keepdims=True))
    grad /= grad.sum(axis=1, keepdims=True)
    grad[np.arange(len(labels)), labels] -= 1
    grad /= len(labels)
    return grad


def dense(rng: np.random.Generator, out: int, inputs: int) -> Array:
    return (rng.standard_normal((out, inputs)) * np.sqrt(2 / inputs)).astype(np.float32)


class Mlp:
    """Two hidden layers of 512 and 256."""

    def __init__(self, data: Dataset) -> None:
        rng = np.random.default_rng(0)
        sizes = [data.train_images.shape[1], 512, 256, len(data.classes)]
        self.weights: Weights = {}
        for i, (inputs, out) in enumerate(pairwise(sizes)):
            self.weights[f"{i}.weight"], self.weights[f"{i}.bias"] = dense(rng, out, inputs), np.zeros(out, np.float32)

    def forward(self, x: Array) -> list[Array]:
        w, found = self.weights, [x]
        for i in range(3):
            x = x @ w[f"{i}.weight"].T
            x += w[f"{i}.bias"]
            if i < 2:
                np.maximum(x, 0, out=x)
            found.append(x)
        return found

    def gradients(self, x: Array, labels: Array) -> Weights:
        found, grads = self.forward(x), {}
        grad = cross_entropy(found[-1], labels)
        for i in (2, 1, 0):
            grads[f"{i}.weight"], grads[f"{i}.bias"] = grad.T @ found[i], grad.sum(axis=0)
            if i > 0:
                grad = grad @ self.weights[f"{i}.weight"]
                grad *= found[i] > 0
        return {name: grads[name] for name in self.weights}


def patches(x: Array) -> Array:
    """Return the 3 x 3 patches of images [batch, channels, rows, cols] at every second pixel, as rows."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    windows = windows[:, :, ::2, ::2].transpose(0, 2, 3, 1, 4, 5)
    return windows.reshape(-1, 9 * x.shape[1])


def add_patches(grad: Array, shape: tuple[int, ...]) -> Array:
    """Return the gradient of the images from that of their patches."""
    batch, channels, rows, cols = shape
    out = np.zeros((batch, channels, rows + 2, cols + 2), np.float32)
    parts = grad.reshape(batch, (rows + 1) // 2, (cols + 1) // 2, channels, 3, 3).transpose(0, 3, 1, 2, 4, 5)
    for i in range(3):
        for j in range(3):
            target = out[:, :, i : i + rows : 2, j : j + cols : 2]
            target += parts[..., i, j]
    return out[:, :, 1:-1, 1:-1]


class Cnn:
    """Two convolutions of 3 x 3 with stride 2, and a dense layer."""

    def __init__(self, data: Dataset) -> None:
        rng = np.random.default_rng(0)
        self.shape = (1, *data.image_shape)
        first, second = CHANNELS
        rows, cols = (((size + 1) // 2 + 1) // 2 for size in data.image_shape)
        self.weights: Weights = {}
        for name, out, inputs in (
            ("0", first, 9),
            ("1", second, 9 * first),
            ("2", len(data.classes), second * rows * cols),
        ):
            self.weights[f"{name}.weight"] = dense(rng, out, inputs)
            self.weights[f"{name}.bias"] = np.zeros(out, np.float32)

    def convolve(self, i: int, x: Array) -> tuple[Array, Array]:
        columns = patches(x)
        y = columns @ self.weights[f"{i}.weight"].T
        y += self.weights[f"{i}.bias"]
        np.maximum(y, 0, out=y)
        rows, cols = ((size + 1) // 2 for size in x.shape[2:])
        return columns, np.ascontiguousarray(y.reshape(len(x), rows, cols, -1).transpose(0, 3, 1, 2))

    def forward(self, x: Array) -> list[Array]:
        x = x.reshape(-1, *self.shape)
        columns0, x1 = self.convolve(0, x)
        columns1, x2 = self.convolve(1, x1)
        flat = x2.reshape(len(x2), -1)
        return [columns0, x1, columns1, x2, flat @ self.weights["2.weight"].T + self.weights["2.bias"]]

    def gradients(self, x: Array, labels: Array) -> Weights:
        columns0, x1, columns1, x2, scores = self.forward(x)
        grad, grads = cross_entropy(scores, labels), {}
        grads["2.weight"], grads["2.bias"] = grad.T @ x2.reshape(len(x2), -1), grad.sum(axis=0)
        back = (grad @ self.weights["2.weight"]).reshape(x2.shape)
        for i, columns, outputs in ((1, columns1, x2), (0, columns0, x1)):
            back *= outputs > 0
            rows = back.transpose(0, 2, 3, 1).reshape(-1, outputs.shape[1])
            grads[f"{i}.weight"], grads[f"{i}.bias"] = rows.T @ columns, rows.sum(axis=0)
            if i > 0:
                back = add_patches(rows @ self.weights[f"{i}.weight"], x1.shape)
        return {name: grads[name] for name in self.weights}


class NumpyAdam:
    """Adam in place, without temporaries."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.t = weights, 0
        self.state = {name: [np.zeros_like(w) for _ in range(4)] for name, w in weights.items()}

    def step(self, grads: Weights) -> None:
        self.t += 1
        unbias = np.sqrt(1 - 0.999**self.t)
        size, eps = LR * unbias / (1 - 0.9**self.t), 1e-8 * unbias
        for name, w in self.weights.items():
            (m, v, a, b), g = self.state[name], grads[name]
            np.subtract(g, m, out=a)
            np.multiply(a, 0.1, out=a)
            np.add(m, a, out=m)
            np.multiply(g, g, out=a)
            np.multiply(a, 0.001, out=a)
            np.multiply(v, 0.999, out=v)
            np.add(v, a, out=v)
            np.sqrt(v, out=a)
            np.add(a, eps, out=a)
            np.multiply(m, size, out=b)
            np.divide(b, a, out=b)
            np.subtract(w, b, out=w)


clock = time.perf_counter  # that of the process, where it has one thread


# ---- trainers: a function that trains on a batch and returns the time of its step, and one that predicts -----------

Train = Callable[[Array, Array], float]
Predict = Callable[[Array], Array]


def with_numpy(network: Any, optimizer: Any) -> tuple[Train, Predict]:
    def train(x: Array, labels: Array) -> float:
        grads = network.gradients(x, labels)
        start = clock()
        optimizer.step(grads)
        return clock() - start

    return train, lambda x: network.forward(x)[-1].argmax(axis=1)


def with_torch(network: Any, own: bool) -> tuple[Train, Predict]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    weights = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in network.weights.items()}
    if own:
        import fastopt.torch as ft

        optimizer: Any = ft.Adam(weights.values(), lr=LR)
    else:
        optimizer = torch.optim.Adam(weights.values(), lr=LR, fused=True)
    functions = torch.nn.functional

    def scores(x: Any) -> Any:
        for i in range(3):
            w, bias = weights[f"{i}.weight"], weights[f"{i}.bias"]
            if i < 2 and isinstance(network, Cnn):
                images = x.reshape(-1, *network.shape) if i == 0 else x
                x = functions.conv2d(images, w.reshape(len(w), -1, 3, 3), bias, stride=2, padding=1)
            else:
                x = functions.linear(x.flatten(1), w, bias)
            x = x.relu() if i < 2 else x
        return x

    def train(x: Array, labels: Array) -> float:
        functions.cross_entropy(scores(torch.from_numpy(x)), torch.from_numpy(labels)).backward()
        start = clock()
        optimizer.step()
        used = clock() - start
        optimizer.zero_grad(set_to_none=True)
        return used

    def predict(x: Array) -> Array:
        with torch.no_grad():
            return np.asarray(scores(torch.from_numpy(x)).argmax(dim=1).numpy())

    return train, predict


TRAINERS: dict[str, Callable[[Any], tuple[Train, Predict]]] = {
    "numpy + fastopt": lambda network: with_numpy(network, fo.Adam(network.weights, lr=LR)),
    "numpy": lambda network: with_numpy(network, NumpyAdam(network.weights)),
    "torch + fastopt": lambda network: with_torch(network, own=True),
    "torch fused": lambda network: with_torch(network, own=False),
}


def measure(network: Any, trainer: str, data: Dataset, goal: float, most: int) -> dict[str, Any]:
    """Train until the accuracy is `goal`, tested every 50 batches, or for `most` batches."""
    train, predict = TRAINERS[trainer](network)
    rng = np.random.default_rng(1)
    batches = 0
    total = accuracy = in_steps = 0.0
    while batches < most and accuracy < goal:
        order = rng.permutation(len(data.train_images))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            x, labels = data.train_images[chosen], data.train_labels[chosen]
            start = clock()
            in_steps += train(x, labels)
            total += clock() - start
            batches += 1
            if batches % 50 == 0 or batches == most:
                accuracy = float((predict(data.test_images) == data.test_labels).mean())
            if accuracy >= goal or batches == most:
                break
    return {"seconds": total, "step_seconds": in_steps, "batches": batches, "accuracy": accuracy, "goal": goal}


def child(options: argparse.Namespace) -> None:
    global clock
    if os.environ["OMP_NUM_THREADS"] == "1":
        clock = time.process_time
    data, fashion = load(options.data)
    print(f"{data.name}, threads: {os.environ['OMP_NUM_THREADS']}")
    print(f"{'':5} {'':16} {'seconds':>8} {'in steps':>9} {'batches':>8} {'accuracy':>9}  ms a batch, a step")
    most = 100 if options.quick else 5000
    results = []
    for name, make in (("MLP", Mlp), ("CNN", Cnn)):
        for trainer in TRAINERS:
            try:
                r = measure(make(data), trainer, data, GOALS[name, fashion], most)
            except ImportError as error:
                print(f"{trainer}: left out ({error})", file=sys.stderr)
                continue
            each = [1e3 * r[key] / r["batches"] for key in ("seconds", "step_seconds")]
            print(
                f"{name:5} {trainer:16} {r['seconds']:8.2f} {r['step_seconds']:9.2f} {r['batches']:8} "
                f"{r['accuracy']:9.4f}  {each[0]:.2f}, {each[1]:.3f}",
                flush=True,
            )
            results.append({"data": data.name, "network": name, "trainer": trainer, **r})
    options.child.write_text(json.dumps({"machine": machine(), "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="a folder of idx files")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers of threads, e.g. 1,2")
    parser.add_argument("--quick", action="store_true", help="100 batches, whatever the accuracy")
    parser.add_argument("--json", type=Path, help="write machine and results to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # measure here, write results to this file
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    runs = []
    for threads in dict.fromkeys(options.threads.split(",")):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            subprocess.run([sys.executable, *sys.argv, "--child", str(result)], env=env, check=True)
            runs.append(json.loads(result.read_text()))
        if options.json:  # what is measured is kept, though the rest be interrupted
            options.json.write_text(json.dumps(harness.rounded(runs), indent=0) + "\n")


if __name__ == "__main__":
    main()
