"""Whether Adam with narrow states learns as well: four trainings, the last loss and accuracy by kind of state.

Images: the digits and Fashion-MNIST networks of `fastopt demo`. Text: the next character from the eight before it,
through an embedding, in the descriptions of scikit-learn's data sets. Regression: diabetes, in full batches.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn import datasets

import fastopt as fo
from fastopt.demo import run as demo

STATES = ("float32", "bfloat16", "uint8")
CONTEXT, EMBEDDING = 8, 24


def mean_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(axis=1))
    loss = float((log_sum - logits[np.arange(len(labels)), labels]).mean())
    return loss, float((logits.argmax(axis=1) == labels).mean())


def logits_of(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    layers = demo.layers_of(params)
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def train_images(data: demo.Dataset, epochs: int, state_dtype: str) -> tuple[float, float, fo.Optimizer]:
    sizes = (data.train_images.shape[1], *data.hidden, len(data.classes))
    network, rng = demo.Network(sizes, data.batch), np.random.default_rng(0)
    opt = fo.Adam(network.params, lr=1e-3, state_dtype=state_dtype)
    for _ in range(epochs):
        order = rng.permutation(len(data.train_labels))
        for at in range(0, len(order) - data.batch + 1, data.batch):
            chosen = order[at : at + data.batch]
            network.backpropagate(data.train_images[chosen], data.train_labels[chosen])
            opt.step(network.grads)
    loss, _ = mean_cross_entropy(logits_of(network.params, data.train_images), data.train_labels)
    _, accuracy = mean_cross_entropy(logits_of(network.params, data.test_images), data.test_labels)
    return loss, accuracy, opt


def text() -> tuple[np.ndarray, int]:
    """Characters as numbers, and how many there are."""
    loaders: Any = (datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer, datasets.load_digits)
    characters = "".join(load().DESCR for load in (*loaders, datasets.load_diabetes))
    alphabet = sorted(set(characters))
    return np.array([alphabet.index(c) for c in characters]), len(alphabet)


def train_text(epochs: int, state_dtype: str) -> tuple[float, float, fo.Optimizer]:
    ids, count = text()
    rng = np.random.default_rng(0)
    windows = np.lib.stride_tricks.sliding_window_view(ids, CONTEXT + 1)
    windows = windows[rng.permutation(len(windows))]
    split, batch = len(windows) * 9 // 10, 64
    network = demo.Network((CONTEXT * EMBEDDING, 128, count), batch)
    embedding = (0.1 * rng.standard_normal((count, EMBEDDING))).astype("f4")
    first = network.params["fc1.weight"]
    opt = fo.Adam({**network.params, "embedding": embedding}, lr=2e-3, state_dtype=state_dtype)
    gradient = np.zeros_like(embedding)

    def inputs(chosen: np.ndarray) -> np.ndarray:
        return embedding[chosen[:, :-1]].reshape(len(chosen), -1)

    for _ in range(epochs):
        for at in range(0, split - batch + 1, batch):
            chosen = windows[at : at + batch]
            x = inputs(chosen)
            network.backpropagate(x, chosen[:, -1])
            # Through the first layer once more, to what it reads.
            hidden = network._deltas[0] @ first
            gradient[...] = 0
            np.add.at(gradient, chosen[:, :-1], hidden.reshape(batch, CONTEXT, EMBEDDING))
            opt.step({**network.grads, "embedding": gradient})
    loss, _ = mean_cross_entropy(logits_of(network.params, inputs(windows[:split])), windows[:split, -1])
    _, accuracy = mean_cross_entropy(logits_of(network.params, inputs(windows[split:])), windows[split:, -1])
    return loss, accuracy, opt


def train_regression(steps: int, state_dtype: str) -> tuple[float, float, fo.Optimizer]:
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = (x / x.std(axis=0)).astype("f4"), ((y - y.mean()) / y.std()).astype("f4")
    w = np.zeros(x.shape[1], "f4")
    opt = fo.Adam(w, lr=fo.schedules.cosine(0.02, steps=steps), state_dtype=state_dtype)
    for _ in range(steps):
        opt.step(x.T @ (x @ w - y) / len(y))
    mean_square = float(((x @ w - y) ** 2).mean())
    return mean_square, 1 - mean_square, opt


def trainings(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[str], tuple[float, float, Any]]]]:
    digits = demo.load_digits()
    yield "digits", lambda dtype: train_images(digits, 4 if options.quick else 30, dtype)
    if options.data:
        fashion = demo.load_idx_folder(options.data)
        yield fashion.name, lambda dtype: train_images(fashion, 1 if options.quick else 5, dtype)
    yield "characters", lambda dtype: train_text(1 if options.quick else 12, dtype)
    yield "diabetes", lambda dtype: train_regression(2000, dtype)


def state_bytes(opt: fo.Optimizer) -> float:
    """Bytes of state for each parameter of the largest tensor."""
    states = [[v for v in s.values() if isinstance(v, np.ndarray)] for s in opt.state_dict()["state"].values()]
    largest = max(states, key=lambda arrays: arrays[0].size)
    return sum(a.nbytes for a in largest) / largest[0].size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with MNIST-style idx files, for one training more")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    table = Table(title="Adam by kind of state", title_justify="left")
    for column in ("training", "states"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes/parameter", "training loss", "of float32", "test score"):
        table.add_column(column, justify="right", no_wrap=True)
    results: list[dict[str, Any]] = []
    for name, train in trainings(options):
        for dtype in STATES:
            loss, score, opt = train(dtype)
            results.append({"training": name, "states": dtype, "bytes": state_bytes(opt), "loss": loss, "score": score})
            first = results[-1 - STATES.index(dtype)]["loss"]
            table.add_row(
                name if dtype == STATES[0] else "",
                dtype,
                f"{results[-1]['bytes']:.3f}",
                f"{loss:.5f}",
                f"{loss / first:.3f}",
                f"{score:.4f}",
            )
    Console().print(table)
    ratios = [r["loss"] / results[i - i % 3]["loss"] for i, r in enumerate(results) if i % 3]
    print(f"loss over that of float32 states, median of all: {statistics.median(ratios):.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
