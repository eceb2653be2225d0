"""Train and pack a smaller network than ``fastopt demo`` on its images, and write it and some of them as C."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

import fastopt as fo
from fastopt.demo import run as demo

IMAGES = 60


def main() -> None:
    """Write model.c, model.h, file.h, digits.h and fastopt-demo.safetensors to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    data = dataclasses.replace(demo.load_digits(), hidden=(256, 128), batch=32, epochs=30)  # for little flash
    file = folder / "fastopt-demo.safetensors"
    demo.run(data, file, epochs=arguments.epochs)
    model, layer = fo.load(file), fo.Layer
    graph = [layer("fc1", activation="relu"), layer("fc2", activation="relu"), layer("fc3")]
    fo.export(model, folder / "model.c", to="c", graph=graph, int8=True)
    content = np.frombuffer(file.read_bytes(), np.uint8)
    (folder / "file.h").write_text(array("file_bytes", content) + f"enum {{ FILE_SIZE = {content.size} }};\n")

    vision = fo.pack(train_vision(data, arguments.epochs or 40), bits=8, min_size=64)
    fo.export(vision, folder / "vision.c", to="c", graph=VISION, input_shape=(1, 8, 8), int8=True)

    images, labels = data.test_images[:IMAGES], data.test_labels[:IMAGES]
    predictions = {"predictions": demo.Predictor(model, fo.linear)(images)}
    predictions["vision_predictions"] = Vision(vision.unpack()).scores(images).argmax(axis=1)
    pixels = (16 * images).astype(np.uint8)
    (folder / "digits.h").write_text(
        "#include <stdint.h>\n"
        f"enum {{ IMAGES = {len(images)}, IMAGE_SIZE = {images.shape[1]}, CLASSES = {len(data.classes)} }};\n"
        + array("images", pixels)
        + "".join(
            f'static const char {name}[] = "{"".join(map(str, digits))}";\n'
            for name, digits in {"labels": labels, **predictions}.items()
        )
    )


# ---- a network of depthwise convolutions ---------------------------------------------------------------------------

VISION = [
    fo.Layer("conv", "conv", padding=1, activation="relu"),
    fo.Layer("deep1", "depthwise", padding=1, stride=2, activation="relu"),
    fo.Layer("point1", "conv", activation="relu"),
    fo.Layer("deep2", "depthwise", padding=1, activation="relu"),
    fo.Layer("point2", "conv", activation="relu"),
    fo.Layer("pool", "global_pool"),
    fo.Layer("fc"),
]
SHAPES = {"conv": (8, 1, 3, 3), "deep1": (8, 1, 3, 3), "point1": (24, 8, 1, 1), "deep2": (24, 1, 3, 3)}
SHAPES |= {"point2": (48, 24, 1, 1), "fc": (10, 48)}


class Vision:
    """The graph `VISION` in NumPy, with its gradients."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Return the scores of the classes, and keep what the gradients need."""
        x, self.kept = images.reshape(-1, 1, 8, 8), []
        for layer in VISION[:5]:
            w, bias = (self.weights[f"{layer.name}.{part}"] for part in ("weight", "bias"))
            size, step, pad = w.shape[2], layer.stride or 1, layer.padding
            padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
            patches = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))[:, :, ::step, ::step]
            rule = "bchwij,cij->bchw" if layer.kind == "depthwise" else "bchwij,ocij->bohw"
            kernel = w[:, 0] if layer.kind == "depthwise" else w
            y = np.einsum(rule, patches, kernel, optimize=True) + bias[:, None, None]
            self.kept.append((layer, rule, kernel, patches, padded.shape, y > 0))
            x = np.maximum(y, 0)
        self.pooled = x.mean(axis=(2, 3))
        self.last = x.shape
        return self.pooled @ self.weights["fc.weight"].T + self.weights["fc.bias"]

    def gradients(self, dy: np.ndarray) -> dict[str, np.ndarray]:
        """Return the gradients, given that of the scores."""
        grads = {"fc.weight": dy.T @ self.pooled, "fc.bias": dy.sum(axis=0)}
        dx = np.broadcast_to((dy @ self.weights["fc.weight"])[..., None, None], self.last) / np.prod(self.last[2:])
        for layer, rule, kernel, patches, shape, positive in reversed(self.kept):
            dy, step, pad = dx * positive, layer.stride or 1, layer.padding
            inputs, output = rule.split("->")
            x, w = inputs.split(",")
            grads[f"{layer.name}.bias"] = dy.sum(axis=(0, 2, 3))
            gradient = np.einsum(f"{x},{output}->{w}", patches, dy, optimize=True)
            grads[f"{layer.name}.weight"] = gradient.reshape(self.weights[f"{layer.name}.weight"].shape)
            spread, whole = np.einsum(f"{output},{w}->{x}", dy, kernel, optimize=True), np.zeros(shape, np.float32)
            height, width = dy.shape[2:]
            for i in range(kernel.shape[-2]):
                for j in range(kernel.shape[-1]):
                    whole[:, :, i : i + step * height : step, j : j + step * width : step] += spread[..., i, j]
            dx = whole[:, :, pad : shape[2] - pad, pad : shape[3] - pad]
        return {name: np.ascontiguousarray(grad, np.float32) for name, grad in grads.items()}


def train_vision(data: demo.Dataset, epochs: int) -> dict[str, np.ndarray]:
    """Train `VISION` on the images."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        weights[f"{name}.weight"] = (deviation * rng.standard_normal(shape)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    network, optimizer, batch = Vision(weights), fo.Adam(weights, lr=4e-3), 64
    for _ in range(epochs):
        order = rng.permutation(len(data.train_labels))
        for begin in range(0, len(order) - batch + 1, batch):
            rows = order[begin : begin + batch]
            scores = network.scores(data.train_images[rows])
            share = np.exp(scores - scores.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            share[np.arange(batch), data.train_labels[rows]] -= 1
            optimizer.step(network.gradients(share / batch))
    return weights


def array(name: str, values: np.ndarray) -> str:
    """Return a constant array in C."""
    sizes = "".join(f"[{n}]" for n in values.shape)
    rows = ",\n".join(
        "{" * (values.ndim - 1) + ",".join(map(str, r)) + "}" * (values.ndim - 1) for r in np.atleast_2d(values)
    )
    return f"static const uint8_t {name}{sizes} = {{\n{rows}}};\n"


main()
