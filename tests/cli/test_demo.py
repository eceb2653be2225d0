"""The demo, end to end on few epochs."""

import base64
import gzip
import json

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

import fastopt as fo
from fastopt.cli import timing
from fastopt.cli.show_commands import app
from fastopt.demo import run as demo

PNG = b"\x89PNG\r\n\x1a\n"


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_folder(folder, zipped=False, test="t10k"):
    """Images of 6 x 5 with a bright row that tells the class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 512), (test, 64)):
        labels = rng.integers(0, 3, count).astype(np.uint8)
        images = rng.integers(0, 100, (count, 6, 5)).astype(np.uint8)
        images[np.arange(count), labels] += 150
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


def test_demo_on_digits(tmp_path):
    result = run("demo", "--json", "--epochs", 4, "--out", tmp_path)
    assert result.stderr == ""  # no progress where there is no terminal, and in JSON no warning beside it
    summary = json.loads(result.stdout)

    plain, full, packed, pruned = summary["variants"]
    assert plain["accuracy"] > 0.93
    for variant in (full, packed, pruned):
        assert variant["accuracy"] >= plain["accuracy"] - 0.01
    assert summary["same_weights"]
    assert full["loss"] == plain["loss"]
    assert pruned["file_bytes"] < packed["file_bytes"] / 1.5 < plain["file_bytes"] / 8
    assert packed["step_us"] is None

    file = tmp_path / "fastopt-demo.safetensors"
    assert summary["file"] == str(file)
    assert pruned["file_bytes"] == file.stat().st_size
    with safe_open(file, framework="numpy") as opened:
        assert "fc1.weight.row_offsets" in opened.keys()  # noqa: SIM118 (a safe_open is not iterable)
    weights = fo.load(file).unpack()
    shapes = [(1024, 64), (1024,), (512, 1024), (512,), (10, 512), (10,)]
    assert [w.shape for w in weights.values()] == shapes
    zeros = sum(int((w == 0).sum()) for name, w in weights.items() if name.endswith("weight"))
    total = sum(w.size for name, w in weights.items() if name.endswith("weight"))
    assert summary["zeros_kept"]
    assert zeros >= round(0.8 * total)

    assert summary["page"] == str(tmp_path / "fastopt-demo.html")
    page = (tmp_path / "fastopt-demo.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 12
    assert page.count("fastopt 4-bit, pruned</text>") == 5  # in all panels
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("others", "busy"), [(None, False), (0.0, False), (999.0, True)])
def test_a_busy_machine_gives_one_thread(others, busy, monkeypatch):
    monkeypatch.setattr(timing.Disturbance, "cores", lambda self: others)
    before = fo.get_num_threads()
    with timing.calm() as found:
        assert found is busy
        assert fo.get_num_threads() == (1 if busy else before)
    assert fo.get_num_threads() == before
    doubt = timing.doubts([], others, 1)
    assert ("other programs kept 999.0 of" in doubt) if busy else doubt is None


@pytest.mark.parametrize("zipped", [False, True])
def test_demo_on_idx_files(tmp_path, zipped):
    folder = write_folder(tmp_path, zipped, test="test" if zipped else "t10k")
    out = tmp_path / "new" / "out"
    result = run("demo", "--data", folder, "--out", out, "--epochs", 12)
    assert "512 images to train, 64 to test" in " ".join(result.stdout.split())
    for name in ("NumPy fp32", "fastopt fp32", "fastopt 4-bit", "fastopt 4-bit, pruned"):
        assert name in result.stdout
    assert (out / "fastopt-demo.safetensors").exists()
    page = (out / "fastopt-demo.html").read_text(encoding="utf-8")
    first = base64.b64decode(page.split("base64,")[1].split('"')[0])
    assert first.startswith(PNG)
    assert first[16:24] == b"\0\0\0\5\0\0\0\6"  # 5 columns, 6 rows


def test_idx_is_read_as_written(tmp_path):
    data = demo.load_idx_folder(write_folder(tmp_path))
    assert data.image_shape == (6, 5)
    assert data.classes == ("0", "1", "2")
    assert data.train_images.shape == (512, 30)
    assert data.train_images.dtype == np.float32
    raw = demo.read_idx(tmp_path / "train-images-idx3-ubyte")
    np.testing.assert_array_equal(data.train_images.reshape(raw.shape), raw.astype(np.float32) / np.float32(255))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, "has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        (LABELS, None, "has no train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", None, "has no t10k-images-idx3-ubyte"),
        (IMAGES, b"", "not an idx file"),
        (IMAGES, b"\x89PNG", "not an idx file of unsigned bytes: it starts with '89 50 4e 47'"),
        (IMAGES, b"\0\0\x08\3\0\0", "ends inside its header"),
        (IMAGES, b"\0\0\x08\3" + b"\xff" * 12, "needs 79228162458924105385300197375 bytes, got 0"),
        (IMAGES, idx(np.zeros((512, 6, 5), np.uint8)) + b"\0", "needs 15360 bytes, got 15361"),
        (IMAGES, idx(np.zeros((0, 6, 5), np.uint8)), "expected images, rows and columns, got shape (0, 6, 5)"),
        (IMAGES, idx(np.zeros((512, 6, 4), np.uint8)), "images of (6, 5), but (6, 4) in"),
        (IMAGES, idx(np.zeros(512, np.uint8)), "expected images, rows and columns, got shape (512,)"),
        (LABELS, idx(np.zeros(511, np.uint8)), "expected 512 labels, one an image, got shape (511,)"),
    ],
)
def test_bad_idx_folder(tmp_path, name, content, message):
    path = write_folder(tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    line = run("demo", "--data", tmp_path, "--out", tmp_path / "out", code=1).stderr
    assert line.startswith("fastopt: ")
    assert line.count("\n") == 1
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"plain", gzip.compress(b"x" * 1000)[:-9]])
def test_bad_gzip(tmp_path, content):
    path = write_folder(tmp_path, zipped=True) / f"{IMAGES}.gz"
    path.write_bytes(content)
    assert f"{path}: not a whole gzip file" in run("demo", "--data", tmp_path, code=1).stderr


def test_missing_folder(tmp_path):
    missing = tmp_path / "nowhere"
    assert run("demo", "--data", missing, code=1).stderr == f"fastopt: {missing}: no such folder\n"
    result = CliRunner().invoke(app, ["--debug", "demo", "--data", str(missing)])
    assert isinstance(result.exception, FileNotFoundError)


def test_too_few_images(tmp_path):
    write_folder(tmp_path)
    (tmp_path / IMAGES).write_bytes(idx(np.zeros((9, 6, 5), np.uint8)))
    (tmp_path / LABELS).write_bytes(idx(np.zeros(9, np.uint8)))
    assert "expected at least 256 training images, got 9" in run("demo", "--data", tmp_path, code=1).stderr


def test_interruption(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
    assert run("demo", "--out", tmp_path, code=130).stderr == "fastopt: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["demo", "--epochs", "0"], ["demo", "--nonsense"]])
def test_usage_errors(args):
    assert run(*args, code=2).stdout == ""


def test_help():
    text = run("demo", "--help").stdout
    assert "--data" in text
    assert "fastopt demo --json" in text
