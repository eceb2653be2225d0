"""The demo: a classifier of small images from training to a packed file, beside the same in plain NumPy."""

import gzip
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastopt as fo
from fastopt.tensors.packed import unpacked

Floats: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]
Notify: TypeAlias = Callable[[str, int, int, str], None]

BITS = 4
SPARSITY = 0.8
PREDICT_BATCH = 64
SEED = 0


# ---- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Images as rows of floats from 0 to 1, with their labels, and the network that suits them.

    Attributes
    ----------
    name, split : str
        What it is, and how training and test images were told apart.
    image_shape : (int, int)
    classes : tuple of str
    hidden : tuple of int
        Widths of the hidden layers.
    batch, epochs : int
        Images a step; passes over the training images.
    """

    name: str
    split: str
    train_images: Floats
    train_labels: Labels
    test_images: Floats
    test_labels: Labels
    image_shape: tuple[int, int]
    classes: tuple[str, ...]
    hidden: tuple[int, ...]
    batch: int
    epochs: int


def load_digits() -> Dataset:
    """Return scikit-learn's handwritten digits: 1797 images of 8 x 8, one third of each class for the test.

    Returns
    -------
    Dataset

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ImportError("the demo on digits needs scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int64), test_size=1 / 3, random_state=SEED, stratify=labels
    )
    return Dataset(
        name="Handwritten digits (scikit-learn)",
        split="one third of each class, chosen at random with a fixed seed, is for the test",
        train_images=train_x,
        train_labels=train_y,
        test_images=test_x,
        test_labels=test_y,
        image_shape=(8, 8),
        classes=tuple("0123456789"),
        hidden=(1024, 512),
        batch=64,
        epochs=6,
    )


_FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load_idx_folder(folder: Path) -> Dataset:
    """Return a data set of four idx files as MNIST has them: training and test, images and labels.

    Parameters
    ----------
    folder : Path
        Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same with ``t10k`` or ``test``
        for ``train``, each plain or with ``.gz``.

    Returns
    -------
    Dataset

    Raises
    ------
    OSError
        If the folder or a file is missing or cannot be read.
    ValueError
        If a file is not in the idx format, or does not fit the others; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    train_path, train_images, train_labels = _read_part(folder, ("train",))
    test_path, test_images, test_labels = _read_part(folder, ("t10k", "test"))
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = f"{train_images.shape[1:]} in {train_path.name}"
        raise ValueError(f"{test_path}: images of {test_images.shape[1:]}, but {sizes}")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    fashion = classes == 10 and "fashion" in folder.resolve().name.lower()
    return Dataset(
        name="Fashion-MNIST" if fashion else folder.resolve().name,
        split=f"the test images are those of {test_path.name}",
        train_images=_as_rows(train_images),
        train_labels=train_labels.astype(np.int64),
        test_images=_as_rows(test_images),
        test_labels=test_labels.astype(np.int64),
        image_shape=train_images.shape[1:],
        classes=_FASHION if fashion else tuple(str(i) for i in range(classes)),
        hidden=(1024, 512),
        batch=256,
        epochs=3,
    )


def _as_rows(images: NDArray[np.uint8]) -> Floats:
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows /= 255
    return rows


def _read_part(folder: Path, prefixes: Sequence[str]) -> tuple[Path, NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the path of the images, the images and the labels of one part, training or test."""
    images_path = _find(folder, [f"{p}-images{dot}idx3-ubyte" for p in prefixes for dot in "-."])
    labels_path = _find(folder, [f"{p}-labels{dot}idx1-ubyte" for p in prefixes for dot in "-."])
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.size == 0:
        raise ValueError(f"{images_path}: expected images, rows and columns, got shape {images.shape}")
    if labels.shape != (len(images),):
        raise ValueError(f"{labels_path}: expected {len(images)} labels, one an image, got shape {labels.shape}")
    return images_path, images, labels


def _find(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder}: has no {names[0]} or {names[0]}.gz")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of an idx file, plain or gzip, in the shape that its header gives.

    Parameters
    ----------
    path : Path

    Returns
    -------
    uint8 array

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not an idx file of unsigned bytes, or has fewer or more bytes than its header says.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    # Two zero bytes, the type (8: unsigned byte), the number of axes; then a big-endian size for each axis.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an idx file of unsigned bytes: it starts with {content[:4].hex(' ')!r}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path}: ends inside its header")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if math.prod(shape) != len(content) - start:
        raise ValueError(f"{path}: shape {shape} needs {math.prod(shape)} bytes, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# ---- the network and its rival, in plain NumPy -------------------------------------------------------------------


class Network:
    """Layers with ReLU between them and softmax at the end; gradients are written in place.

    Parameters
    ----------
    sizes : sequence of int
        Pixels, widths of the hidden layers, classes.
    batch : int
        Images a step.
    """

    def __init__(self, sizes: Sequence[int], batch: int) -> None:
        rng = np.random.default_rng(SEED)
        self.params: dict[str, Floats] = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
            weight = rng.standard_normal((fan_out, fan_in), np.float32)
            weight *= math.sqrt(2 / fan_in)  # He et al., 2015
            self.params[f"fc{i}.weight"] = weight
            self.params[f"fc{i}.bias"] = np.zeros(fan_out, np.float32)
        self.grads = {name: np.empty_like(param) for name, param in self.params.items()}
        self._outputs = [np.empty((batch, size), np.float32) for size in sizes[1:]]
        self._deltas = [np.empty_like(output) for output in self._outputs]
        self._rows = np.arange(batch)

    def backpropagate(self, images: Floats, labels: Labels) -> float:
        """Fill `grads` with the gradients of the mean cross-entropy of a batch, and return that loss."""
        layers, last = layers_of(self.params), len(self._outputs) - 1
        inputs = [images, *self._outputs]
        for i, (weight, bias) in enumerate(layers):
            output = np.matmul(inputs[i], weight.T, out=self._outputs[i])
            output += bias
            if i < last:
                np.maximum(output, 0, out=output)

        logits, delta = self._outputs[last], self._deltas[last]
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=delta)
        delta /= delta.sum(axis=1, keepdims=True)
        loss = -float(np.log(delta[self._rows, labels]).mean())
        delta[self._rows, labels] -= 1
        delta /= len(images)

        for i in range(last, -1, -1):
            np.matmul(self._deltas[i].T, inputs[i], out=self.grads[f"fc{i + 1}.weight"])
            self._deltas[i].sum(axis=0, out=self.grads[f"fc{i + 1}.bias"])
            if i > 0:
                np.matmul(self._deltas[i], layers[i][0], out=self._deltas[i - 1])
                self._deltas[i - 1] *= inputs[i] > 0
        return loss


class Optimizer(Protocol):
    """The interface of an optimizer that `train` uses."""

    def step(self, grads: Mapping[str, Floats], /) -> object:
        """Update the parameters in place."""


class NumpyAdam:
    """Adam as a good NumPy user writes it: in place, without temporaries, operation for operation as fastopt's."""

    def __init__(self, params: Mapping[str, Floats], lr: float = 1e-3) -> None:
        self.params, self.lr, self.steps = params, lr, 0
        self._states = {
            name: (np.zeros_like(p), np.zeros_like(p), np.empty_like(p), np.empty_like(p)) for name, p in params.items()
        }

    def step(self, grads: Mapping[str, Floats], /) -> None:
        """Update the parameters in place."""
        self.steps += 1
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        unbias = math.sqrt(1 - beta2**self.steps)
        step_size, eps = self.lr * unbias / (1 - beta1**self.steps), eps * unbias
        for name, w in self.params.items():
            g, (m, v, a, b) = grads[name], self._states[name]
            np.subtract(g, m, out=a)
            a *= 1 - beta1
            m += a
            np.multiply(g, 1 - beta2, out=a)
            a *= g
            v *= beta2
            v += a
            np.sqrt(v, out=a)
            a += eps
            np.multiply(m, step_size, out=b)
            b /= a
            w -= b


class Predictor:
    """The network forward, for weights of any kind that `linear` takes.

    Parameters
    ----------
    weights : mapping
        ``fc1.weight``, ``fc1.bias``, ``fc2.weight`` ...
    linear : callable
        Maps x, weight and bias to ``x @ weight.T + bias``.
    """

    def __init__(self, weights: Mapping[str, Any], linear: Callable[[Floats, Any, Any], Floats]) -> None:
        self._layers, self._linear = layers_of(weights), linear

    def __call__(self, images: Floats) -> Any:
        """Return the class of an image, or of each row of a batch."""
        x = images
        for weight, bias in self._layers[:-1]:
            x = self._linear(x, weight, bias)
            np.maximum(x, 0, out=x)
        weight, bias = self._layers[-1]
        return self._linear(x, weight, bias).argmax(axis=-1)


def numpy_linear(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """Return ``x @ weight.T + bias``."""
    y: Floats = x @ weight.T
    y += bias
    return y


def layers_of(weights: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return pairs of weight and bias, in order."""
    return [(weights[f"fc{i}.weight"], weights[f"fc{i}.bias"]) for i in range(1, len(weights) // 2 + 1)]


# ---- the run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A row of the table; times are medians in microseconds, None where nothing was trained.

    Attributes
    ----------
    name : str
    accuracy : float
        Share of the test images.
    loss : float or None
        Mean training loss of the last epoch.
    file_bytes : int
    step_us : float or None
        The optimizer's step.
    predict_us, predict_batch_us : float
        An image by itself; an image in a batch.
    """

    name: str
    accuracy: float
    loss: float | None
    file_bytes: int
    step_us: float | None
    predict_us: float
    predict_batch_us: float


@dataclass(frozen=True)
class Summary:
    """The results of the demo, as the table and ``--json`` show them."""

    dataset: str
    split: str
    train_images: int
    test_images: int
    layers: tuple[int, ...]
    parameters: int
    epochs: int
    fine_tune_epochs: int
    bits: int
    sparsity: float
    zeros_kept: bool
    same_weights: bool
    predict_batch: int
    threads: int
    variants: tuple[Variant, ...]
    file: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """The summary, and some test images with what the packed model takes them for."""

    summary: Summary
    images: Floats
    labels: tuple[str, ...]
    predictions: tuple[str, ...]


@dataclass
class _Trainee:
    """A network in training, and what was measured while it trained."""

    network: Network
    optimizer: Optimizer
    step_seconds: list[float]
    loss: float = math.nan


def train(trainees: Sequence[_Trainee], data: Dataset, epochs: int, phase: str, notify: Notify) -> None:
    """Train networks side by side, each on the same batches; the steps of their optimizers are timed in turns."""
    rng = np.random.default_rng(SEED)
    steps = len(data.train_images) // data.batch
    for epoch in range(epochs):
        order = rng.permutation(len(data.train_images))
        losses = np.zeros(len(trainees))
        for step in range(steps):
            chosen = order[step * data.batch : (step + 1) * data.batch]
            images, labels = data.train_images[chosen], data.train_labels[chosen]
            for i, trainee in enumerate(trainees):
                losses[i] += trainee.network.backpropagate(images, labels)
                start = time.perf_counter()
                trainee.optimizer.step(trainee.network.grads)
                trainee.step_seconds.append(time.perf_counter() - start)
            if step % 10 == 9 or step == steps - 1:
                text = " / ".join(f"{loss / (step + 1):.4f}" for loss in losses)
                notify(phase, epoch * steps + step + 1, epochs * steps, f"loss {text}")
        for trainee, loss in zip(trainees, losses, strict=True):
            trainee.loss = float(loss) / steps


def measure(predictors: Sequence[Predictor], images: Floats, notify: Notify) -> list[tuple[float, float]]:
    """Return for each predictor the median microseconds for an image by itself, and for one in the batch."""
    one: list[list[float]] = [[] for _ in predictors]
    batch: list[list[float]] = [[] for _ in predictors]
    rounds = 10
    for i in range(rounds):
        for predictor, ones, batches in zip(predictors, one, batch, strict=True):
            # Threads of NumPy's BLAS may still be spinning: let them go to sleep.
            time.sleep(0.04)
            _timed(predictor, images, batches, 2)
            time.sleep(0.04)
            _timed(predictor, images[i % len(images)], ones, 30)
        notify("measure", i + 1, rounds, "")
    return [(1e6 * median(a), 1e6 * median(b) / len(images)) for a, b in zip(one, batch, strict=True)]


def _timed(predictor: Predictor, images: Floats, seconds: list[float], times: int) -> None:
    predictor(images)
    for _ in range(times):
        start = time.perf_counter()
        predictor(images)
        seconds.append(time.perf_counter() - start)


def run(data: Dataset, file: Path, *, epochs: int | None = None, notify: Notify = lambda *_: None) -> Result:
    """Train, prune, fine-tune, pack, save, load and classify, beside the same network in plain NumPy.

    Parameters
    ----------
    data : Dataset
    file : Path
        Where the packed model goes.
    epochs : int, optional
        Instead of the data set's; fine-tuning takes half as many.
    notify : callable
        Called with a phase, steps done, steps in all, and a text, to show progress.

    Returns
    -------
    Result

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If there are fewer training images than a batch has.
    """
    started = time.perf_counter()
    if len(data.train_images) < data.batch:
        raise ValueError(f"{data.name}: expected at least {data.batch} training images, got {len(data.train_images)}")
    epochs = epochs or data.epochs
    fine_tune_epochs = -(-epochs // 2)
    sizes = (data.train_images.shape[1], *data.hidden, len(data.classes))

    # The same network twice, from the same seed on the same batches: by NumPy alone, and with fastopt's Adam.
    plain, network = Network(sizes, data.batch), Network(sizes, data.batch)
    rival, dense = _Trainee(plain, NumpyAdam(plain.params), []), _Trainee(network, fo.Adam(network.params), [])
    train([rival, dense], data, epochs, "train", notify)
    trained = {name: param.copy() for name, param in network.params.items()}

    # Prune the weights, not the biases; what is zero stays zero while the others make up for it.
    weights = {name: param for name, param in network.params.items() if name.endswith(".weight")}
    masks = fo.prune_(weights, sparsity=SPARSITY, scope="global")
    pruned = _Trainee(network, fo.Adam(network.params, keep_zeros=True), [])
    train([pruned], data, fine_tune_epochs, "fine-tune", notify)
    zeros_kept = all(not weights[name][~mask].any() for name, mask in masks.items())

    options: dict[str, Any] = {"bits": BITS, "include": ["*.weight"], "min_size": 0}
    quantized = fo.pack(trained, **options)
    packed = fo.pack(network.params, sparsity=0.0, **options)  # what is zero already is left out
    sizes_on_disk = [_file_size(model) for model in (fo.PackedModel(plain.params), fo.PackedModel(trained), quantized)]
    packed.save(file)
    loaded = fo.load(file)  # memory-mapped: products read the packed weights where they lie in the file
    for name, mask in masks.items():
        zeros_kept = zeros_kept and not unpacked(loaded[name])[~mask].any()

    predictors = [Predictor(plain.params, numpy_linear)]
    predictors += [Predictor(model, fo.linear) for model in (trained, quantized, loaded)]
    times = measure(predictors, data.test_images[:PREDICT_BATCH], notify)
    predictions = [predictor(data.test_images) for predictor in predictors]
    variants = tuple(
        Variant(
            name,
            accuracy=float((predicted == data.test_labels).mean()),
            loss=trainee.loss if trainee else None,
            file_bytes=size,
            step_us=1e6 * median(trainee.step_seconds) if trainee else None,
            predict_us=one,
            predict_batch_us=batch,
        )
        for name, trainee, predicted, size, (one, batch) in zip(
            ("NumPy fp32", "fastopt fp32", f"fastopt {BITS}-bit", f"fastopt {BITS}-bit, pruned"),
            (rival, dense, None, pruned),
            predictions,
            (*sizes_on_disk, file.stat().st_size),
            times,
            strict=True,
        )
    )
    summary = Summary(
        dataset=data.name,
        split=data.split,
        train_images=len(data.train_images),
        test_images=len(data.test_images),
        layers=sizes,
        parameters=sum(param.size for param in trained.values()),
        epochs=epochs,
        fine_tune_epochs=fine_tune_epochs,
        bits=BITS,
        sparsity=SPARSITY,
        zeros_kept=zeros_kept,
        same_weights=all(np.array_equal(plain.params[name], trained[name]) for name in trained),
        predict_batch=min(PREDICT_BATCH, len(data.test_images)),
        threads=fo.get_num_threads(),
        variants=variants,
        file=str(file),
        seconds=time.perf_counter() - started,
    )
    shown = range(min(12, len(data.test_images)))
    return Result(
        summary,
        images=data.test_images[shown].reshape(-1, *data.image_shape),
        labels=tuple(data.classes[data.test_labels[i]] for i in shown),
        predictions=tuple(data.classes[predictions[-1][i]] for i in shown),
    )


def _file_size(model: fo.PackedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        model.save(path)
        return path.stat().st_size
