"""Train and pack the network of ``fastopt demo``, and write it and some test images as C."""

import argparse
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

    data, file = demo.load_digits(), folder / "fastopt-demo.safetensors"
    demo.run(data, file, epochs=arguments.epochs)
    model = fo.load(file)
    fo.export(model, folder / "model.c", to="c")
    content = np.frombuffer(file.read_bytes(), np.uint8)
    (folder / "file.h").write_text(array("file_bytes", content) + f"enum {{ FILE_SIZE = {content.size} }};\n")

    images, labels = data.test_images[:IMAGES], data.test_labels[:IMAGES]
    predictions = demo.Predictor(model, fo.linear)(images)
    pixels = (16 * images).astype(np.uint8)
    (folder / "digits.h").write_text(
        f"#include <stdint.h>\nenum {{ IMAGES = {len(images)}, IMAGE_SIZE = {images.shape[1]} }};\n"
        + array("images", pixels)
        + "".join(
            f'static const char {name}[] = "{"".join(map(str, digits))}";\n'
            for name, digits in (("labels", labels), ("predictions", predictions))
        )
    )


def array(name: str, values: np.ndarray) -> str:
    """Return a constant array in C."""
    sizes = "".join(f"[{n}]" for n in values.shape)
    rows = ",\n".join(
        "{" * (values.ndim - 1) + ",".join(map(str, r)) + "}" * (values.ndim - 1) for r in np.atleast_2d(values)
    )
    return f"static const uint8_t {name}{sizes} = {{\n{rows}}};\n"


main()
