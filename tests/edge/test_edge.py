"""cpp/edge/fastopt.h computes what Python does, wherever it is compiled for, and refuses what is not a file."""

import functools
import itertools
import json
import os
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import helpers
import ml_dtypes
import numpy as np
import pytest
from helpers import BITS, same_bits

import fastopt as fo

ROOT = Path(__file__).parents[2]
EDGE = ROOT / "cpp" / "edge"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]

TRY, DEQUANTIZE, LINEAR, LINEAR_INT8, EMBEDDING = range(5)

CODES = re.search(r"enum \{\s*(FO_OK,.*?)\s*\};", (EDGE / "fastopt.h").read_text(), re.DOTALL)[1].split(",")
CODES = [code.strip() for code in CODES]


def need(*tools):
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"no {tool}")


run = functools.partial(helpers.run, text=False)


# ---- builds of the driver: compiler, options, and what runs it -----------------------------------------------------

SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffreestanding"]
# A copy of the products for each width takes most of a compiler's time, and ten times as much with sanitizers: gnu,
# clang, aarch64 and riscv64 have these copies, the other builds have one.
ONE_COPY = "-DFO__INLINE=static inline"
BUILDS = {
    "sanitized": ("cc", ["-std=c99", *SANITIZE, ONE_COPY], []),
    "scalar": ("cc", ["-std=c99", "-O2", "-DFO_PORTABLE", ONE_COPY], []),
    "gnu": ("cc", ["-std=gnu17", "-O3", "-march=native", "-ffp-contract=fast"], []),
    "clang": ("clang", ["-std=gnu17", "-O2", "-march=native", "-ffp-contract=fast"], []),
    "c++": ("c++", ["-std=c++11", "-O1", ONE_COPY, "-x", "c++"], []),
    "aarch64": ("aarch64-linux-gnu-gcc", ["-std=gnu17", "-O2", "-static"], ["qemu-aarch64", "-cpu", "cortex-a72"]),
    "aarch64-dotprod": (
        "aarch64-linux-gnu-gcc",
        ["-std=c99", "-O2", "-static", "-march=armv8.2-a+dotprod", ONE_COPY],
        ["qemu-aarch64", "-cpu", "max"],
    ),
    "armhf": (
        "arm-linux-gnueabihf-gcc",
        ["-std=c99", "-O2", "-static", "-mfpu=neon", ONE_COPY],
        ["qemu-arm", "-cpu", "max"],
    ),
    "riscv64": ("riscv64-linux-gnu-gcc", ["-std=gnu17", "-O2", "-static"], ["qemu-riscv64"]),
}


# Other instruction sets, and the flags of /proc/cpuinfo that a CPU must have for those of x86-64.
ALSO = {
    "arm-dsp": (
        "arm-linux-gnueabihf-gcc",
        ["-std=gnu17", "-O2", "-static", "-march=armv7-a", "-mfpu=vfpv3-d16"],
        ["qemu-arm", "-cpu", "max"],
    ),
    "ssse3": ("gcc", ["-std=gnu17", "-O2", "-mssse3", "-ffp-contract=fast", ONE_COPY], []),
    "avx2": ("gcc", ["-std=gnu17", "-O2", "-march=x86-64-v3", *SANITIZE[2:4], ONE_COPY], []),
    "vnni": ("gcc", ["-std=gnu17", "-O2", "-march=cascadelake", *SANITIZE[2:4], ONE_COPY], []),
}
CPU_FLAGS = {"ssse3": {"ssse3"}, "avx2": {"avx2", "fma", "f16c", "bmi2"}, "vnni": {"avx512vl", "avx512_vnni"}}


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    folder, built = tmp_path_factory.mktemp("edge"), {}

    def get(name):
        if name not in built:
            compiler, options, emulator = {**BUILDS, **ALSO}[name]
            need(compiler, *emulator[:1])
            run(compiler, *options, *STRICT, ROOT / "tests" / "edge" / "edge_driver.c", "-o", folder / name)
            built[name] = [*emulator, folder / name]
        return built[name]

    return get


@pytest.fixture(scope="session", params=BUILDS)
def driver(request, build):
    return Driver(build(request.param))


@pytest.fixture(scope="session")
def sanitized(build):
    return Driver(build("sanitized"))


class Driver:
    """A build of the driver, and requests that it will answer together."""

    def __init__(self, command, requests=()):
        self.command, self.requests = command, list(requests)

    def ask(self, operation, file, name="", x=b"", size=0, *, bias="", offset=0):
        name, bias, x = name.encode(), bias.encode(), bytes(x)
        head = struct.pack("<7I", operation, offset, len(name), len(bias), len(file), len(x), 4 * size)
        self.requests.append((b"".join([head, name, bias, file, x]), size))

    def answers(self):
        """Return a code and an array of floats for each request."""
        text, at, result = run(*self.command, input=b"".join(text for text, _ in self.requests)), 0, []
        for _, size in self.requests:
            code = int.from_bytes(text[at : at + 4], "little")
            result.append((CODES[code], np.frombuffer(text, "<f4", size, at + 4)))
            at += 4 + 4 * size
        assert at == len(text)
        self.requests.clear()
        return result

    def answer(self, *request, **options):
        self.ask(*request, **options)
        (answer,) = self.answers()
        return answer


def saved(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    fo.PackedModel(tensors).save(path)
    return path.read_bytes()


# ---- the same numbers as in Python ---------------------------------------------------------------------------------


def tensors(rng):
    """Every width, grouping, type of parameters and layout, in odd sizes."""
    result, params = {}, itertools.cycle(["float16", "float32", "float32", "float16", "float32"])
    for (rows, cols), bits in itertools.product([(1, 1), (3, 17), (5, 130), (7, 333), (2, 1100)], BITS):
        w = rng.standard_normal((rows, cols)).astype("f4")
        for group in (-1, None, 64, 32, 16, 20, 7):
            q = fo.quantize(w, bits, group_size=group, param_dtype=next(params))
            result[f"{rows}x{cols} {bits} bits, groups of {group}, {q.scale.dtype}"] = q
        result[f"{rows}x{cols} {bits} bits, outliers"] = fo.quantize(w, bits, outliers=0.02)
    largest = np.ones((2, 192), "f4")
    largest[:, ::8] = -1
    for bits, group in itertools.product(BITS, (64, 32, 24, 16)):
        result[f"2x192 {bits} bits, groups of {group}, largest codes"] = fo.quantize(largest, bits, group_size=group)
    result["tiny"] = fo.quantize(w * np.float32(1e-9), 4)
    bits = itertools.cycle(BITS)
    for share, (rows, cols) in itertools.product([0.3, 0.95, 1.0], [(1, 5), (4, 64), (9, 333)]):
        w = fo.prune(rng.standard_normal((rows, cols)).astype("f4"), sparsity=share).to_dense()
        for layout in ("mask", "index16", "index8", "1x16"):
            s = fo.SparseTensor.from_dense(w, layout=layout)
            result[f"{rows}x{cols} {layout}, {share}"] = s
            result[f"{rows}x{cols} {layout}, {share}, codes"] = s.quantize(next(bits))
        half = fo.SparseTensor.from_dense(w.astype("f2"))
        result[f"{rows}x{cols} float16, {share}"] = half
        result[f"{rows}x{cols} bfloat16, {share}"] = fo.SparseTensor.from_dense(w.astype(ml_dtypes.bfloat16))
        result[f"{rows}x{cols} whole, {share}"] = fo.SparseTensor.from_dense(w).quantize(4, group_size=None)
    w = rng.standard_normal((6, 75)).astype("f4")
    for pattern in ("2:4", "1:2", "3:8"):
        result[pattern] = fo.prune(w, pattern=pattern)
        result[f"{pattern}, 4 bits"] = fo.prune(w, pattern=pattern).quantize(4)
    for dtype in ("f4", "f2", ml_dtypes.bfloat16):
        result[f"plain {np.dtype(dtype)}"] = w.astype(dtype)
    result["three axes"] = fo.quantize(rng.standard_normal((3, 5, 7)).astype("f4"), 4)
    result["one axis"] = fo.quantize(rng.standard_normal(50).astype("f4"), 2)
    result['\u00e9 "\\ \U0001f600'] = w
    result["no rows"], result["no columns"] = (fo.quantize(np.empty(n, "f4"), 4) for n in ((0, 9), (9, 0)))
    return result


def matrix(tensor):
    """The weight in float32, as a matrix."""
    dense = fo.PackedModel({"w": tensor}).unpack()["w"].astype("f4")
    return dense.reshape(dense.shape[0] if dense.ndim > 1 else 1, -1) if dense.size else dense


def rounded(x):
    """x in whole numbers times a scale, a row each, as fo_round_int8 makes it."""
    f = np.float32
    scale = np.maximum(abs(x).max(axis=1, initial=0) / f(127), np.finfo(f).tiny).astype(f)
    number = x / scale[:, None]
    return np.trunc(number + np.copysign(f(0.5), number)).astype(np.float64) * scale[:, None]


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Requests for every tensor, and what comes out in Python: by operation, then by name."""
    rng, tmp_path = np.random.default_rng(20261122), tmp_path_factory.mktemp("models")
    weights = tensors(rng)
    biases = {name: rng.standard_normal(len(matrix(w))).astype("f4") for name, w in weights.items()}
    result = {operation: (Driver([]), {}) for operation in (DEQUANTIZE, LINEAR, LINEAR_INT8)}
    for i, (name, tensor) in enumerate(weights.items()):
        w, bias = matrix(tensor), biases[name] if i % 3 else np.float32(0)
        file = b""
        if i % 8 == 0:
            names = list(weights)[i : i + 8]
            file = saved({n: weights[n] for n in names} | {f"bias of {n}": biases[n] for n in names}, tmp_path)
        requests, expected = result[DEQUANTIZE]
        requests.ask(DEQUANTIZE, file, name, size=w.size, offset=i % 4)
        expected[name] = w
        x = rng.standard_normal(([1, 2, 6][i % 3], w.shape[1])).astype("f4")
        if "largest" in name:
            x = np.ones_like(x)
        for operation, number in ((LINEAR, x.astype("f8")), (LINEAR_INT8, rounded(x))):
            requests, expected = result[operation]
            options = {"bias": f"bias of {name}" if i % 3 else "", "offset": i % 4}
            requests.ask(operation, file, name, x.tobytes(), len(x) * len(w), **options)
            size = np.linalg.norm(number, axis=1, keepdims=True) * np.linalg.norm(w.astype("f8"), axis=1) + abs(bias)
            expected[name] = number @ w.astype("f8").T + bias, size
    return result


def test_decodes_to_the_same_bits(driver, cases):
    requests, expected = cases[DEQUANTIZE]
    answers = Driver(driver.command, requests.requests).answers()
    for (name, w), (code, values) in zip(expected.items(), answers, strict=True):
        assert code == "FO_OK", name
        assert same_bits(values.reshape(w.shape), w), name


def test_halves_of_every_kind(driver, tmp_path):
    every = np.arange(1 << 16, dtype=np.uint16).view("f2")
    code, values = driver.answer(DEQUANTIZE, saved({"w": every}, tmp_path), "w", size=1 << 16)
    assert code == "FO_OK"
    assert same_bits(values, every.astype("f4"))


@pytest.mark.parametrize("operation", [LINEAR, LINEAR_INT8])
def test_products_are_within_1e_6(driver, cases, operation):
    requests, expected = cases[operation]
    answers = Driver(driver.command, requests.requests).answers()
    for (name, (product, size)), (code, y) in zip(expected.items(), answers, strict=True):
        assert code == "FO_OK", name
        assert (abs(y.reshape(product.shape) - product) <= 1e-6 * size).all(), name


@pytest.mark.parametrize("name", [*BUILDS, *ALSO])
def test_same_bits_with_vectors(build, cases, name):
    """Dense codes whose groups start on bytes have the same products on every CPU."""
    if name in CPU_FLAGS:
        flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
        if not CPU_FLAGS[name] <= set(flags):
            pytest.skip(f"no CPU with {CPU_FLAGS[name]}")
    for operation in (LINEAR, LINEAR_INT8):
        requests, expected = cases[operation]
        portable = Driver(build("scalar"), requests.requests).answers()
        answers = Driver(build(name), requests.requests).answers()
        compared = 0
        for case, (_, y), (_, same) in zip(expected, answers, portable, strict=True):
            dense = re.fullmatch(r"\d+x\d+ (\d) bits, groups of (-1|None|\d+), .*", case)
            if dense and (dense[2] in ("-1", "None") or int(dense[1]) * int(dense[2]) % 8 == 0):
                assert same_bits(y, same), case
                compared += 1
        assert compared > 100


def test_numbers_without_a_unit(build, rng, tmp_path):
    """Rows of x that are not finite, very large or very small are multiplied in floats, and leave the others alone."""
    w, driver = fo.quantize(rng.standard_normal((8, 96)).astype("f4"), 4), Driver(build("gnu"))
    x = rng.standard_normal((6, 96)).astype("f4")
    x[1, 5], x[2], x[4], x[5] = np.nan, x[2] * np.float32(1e30), x[4] * np.float32(1e-30), 0
    code, y = driver.answer(LINEAR, saved({"w": w}, tmp_path), "w", x.tobytes(), 48)
    y, exact = y.reshape(6, 8), x.astype("f8") @ matrix(w).T.astype("f8")
    assert code == "FO_OK"
    assert np.isnan(y[1]).all()
    assert (y[5] == 0).all()
    for row in (0, 2, 3, 4):
        assert np.linalg.norm(y[row] - exact[row]) < 1e-6 * np.linalg.norm(exact[row])


def test_same_products_as_python(build, rng, tmp_path):
    driver = Driver(build("gnu"))
    for bits, group in ((8, -1), (4, 32), (2, 16), (4, -1), (3, 32), (5, -1), (6, 128)):
        w = fo.quantize(rng.standard_normal((64, 4096)).astype("f4"), bits, group_size=group)
        x = rng.standard_normal((2, 4096)).astype("f4")
        code, y = driver.answer(LINEAR, saved({"w": w}, tmp_path), "w", x.tobytes(), 128)
        python = fo.linear(x, w)
        assert code == "FO_OK"
        assert np.linalg.norm(y.reshape(2, 64) - python) < 1e-6 * np.linalg.norm(python)


def test_embedding(driver, rng, tmp_path):
    q = fo.quantize(rng.standard_normal((20, 33)).astype("f4"), 4, outliers=0.05)
    s = fo.prune(rng.standard_normal((20, 33)).astype("f4"), sparsity=0.9).quantize(8)
    file, ids = saved({"q": q, "s": s}, tmp_path), np.array([3, 19, 3, 0], np.uint32)
    assert same_bits(driver.answer(EMBEDDING, file, "q", ids, 4 * 33)[1].reshape(4, 33), fo.embedding(q, ids))
    assert same_bits(driver.answer(EMBEDDING, file, "s", ids, 4 * 33)[1].reshape(4, 33), s[ids])
    assert driver.answer(EMBEDDING, file, "q", ids + 1, 4 * 33)[0] == "FO_BAD_ROW"
    assert driver.answer(EMBEDDING, file, "q", ids, 4 * 33 - 1)[0] == "FO_BAD_SIZE"


# ---- what does not fit is refused ----------------------------------------------------------------------------------


def test_sizes_are_checked(sanitized, rng, tmp_path):
    w = fo.quantize(rng.standard_normal((4, 6)).astype("f4"))
    file = saved({"w": w, "b": np.zeros(3, "f4"), "ids": np.zeros(4, "i4"), "wide": np.zeros((4, 6))}, tmp_path)
    x = np.zeros(12, "f4")
    for operation in (LINEAR, LINEAR_INT8):
        assert sanitized.answer(operation, file, "w", x, 8)[0] == "FO_OK"
        assert sanitized.answer(operation, file, "w", x, 4)[0] == "FO_BAD_SIZE"
        assert sanitized.answer(operation, file, "w", x, 9)[0] == "FO_BAD_SIZE"
        assert sanitized.answer(operation, file, "w", x[:11], 8)[0] == "FO_BAD_SIZE"
        assert sanitized.answer(operation, file, "w", x, 8, bias="b")[0] == "FO_BAD_SIZE"
        assert sanitized.answer(operation, file, "wide", x, 8)[0] == "FO_UNSUPPORTED_DTYPE"
        assert sanitized.answer(operation, file, "v", x, 8)[0] == "FO_NOT_FOUND"
        assert sanitized.answer(operation, file, "__metadata__", x, 8)[0] == "FO_NOT_FOUND"
    assert sanitized.answer(LINEAR_INT8, file, "w", np.full(6, np.nan, "f4"), 4)[0] == "FO_NOT_FINITE"
    assert sanitized.answer(DEQUANTIZE, file, "ids", size=4)[0] == "FO_UNSUPPORTED_DTYPE"


def small_model(rng):
    w = rng.standard_normal((3, 21)).astype("f4")
    sparse = fo.prune(w, sparsity=0.8)
    return {
        "w": fo.quantize(w, 4, outliers=0.1),
        "fc1.weight": sparse.to_layout("index16").quantize(8),
        '\u00e9"\\': fo.SparseTensor.from_dense(sparse.to_dense(), layout="1x16"),
        "": sparse.to_layout("mask"),
    }


def test_every_truncation_is_refused(sanitized, rng, tmp_path):
    file = saved(small_model(rng), tmp_path)
    for size in range(1, len(file)):
        sanitized.ask(TRY, file[:size])
    assert {code for code, _ in sanitized.answers()} <= {"FO_TRUNCATED", "FO_BAD_HEADER"}
    assert sanitized.answer(TRY, file)[0] == "FO_OK"
    assert sanitized.answer(TRY, file + b"\0")[0] == "FO_BAD_HEADER"


def test_corpus_of_the_fuzzer(sanitized):
    files = [path.read_bytes() for path in sorted((ROOT / "tests" / "fuzz" / "corpus_edge").iterdir())]
    for file in files:
        sanitized.ask(TRY, file)
    assert [code for code, _ in sanitized.answers()] == ["FO_OK"] * len(files)


def test_flipped_bits_are_harmless(sanitized, rng, tmp_path):
    """The sanitizers see that nothing outside is read, whatever is said of the tensors."""
    file = saved(small_model(rng), tmp_path)
    for at in range(len(file)):
        wrong = bytearray(file)
        wrong[at] ^= 1 << rng.integers(8)
        sanitized.ask(TRY, bytes(wrong))
    assert len({code for code, _ in sanitized.answers()}) > 3


def written(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def packed(description, arrays, name="w"):
    """A file whose metadata describes one packed tensor; what is not ASCII is escaped, in the metadata twice."""
    header, data = {"__metadata__": {"fastopt": json.dumps({"version": 1, "tensors": {name: description}})}}, b""
    for part, array in arrays.items():
        kind = {"f": "F", "u": "U", "i": "I"}[array.dtype.kind] + str(8 * array.itemsize)
        offsets = [len(data), len(data) + array.nbytes]
        header[f"{name}.{part}"] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return written(header, data)


QUANTIZED = {"kind": "quantized", "bits": 4, "group_size": 3, "shape": [2, 5], "dtype": "float32"}
CODES_OF_W = {
    "codes": np.zeros((2, 3), "u1"),
    "scale": np.ones((2, 2), "f2"),
    "minimum": np.zeros((2, 2), "f2"),
}
OUTLIERS = {"outlier_index": np.array([3, 9], "u4"), "outlier_value": np.ones(2, "f4")}
SPARSE = {"kind": "sparse", "layout": "mask", "shape": [2, 5]}
MASK = {
    "positions": np.array([[3], [16]], "u1"),
    "row_offsets": np.array([0, 2, 3]),
    "values": np.ones(3, "f4"),
}
INDEX = {**MASK, "positions": np.array([0, 4, 2], "u2")}
INDEX8 = {**MASK, "positions": np.array([0, 3, 2], "u1")}
FITS = [
    (QUANTIZED, CODES_OF_W),
    ({**QUANTIZED, "outliers": 2}, {**CODES_OF_W, **OUTLIERS}),
    (SPARSE, MASK),
    ({**SPARSE, "layout": "index16"}, INDEX),
    ({**SPARSE, "layout": "index8"}, INDEX8),
    ({**SPARSE, "layout": "3:8"}, MASK),
]
NOTHING = {"codes": np.zeros(0, "u1"), "scale": np.ones((1, 1), "f2"), "minimum": np.ones((1, 1), "f2")}
MISFITS = [
    ("FO_TOO_LARGE", {**QUANTIZED, "shape": [2**41, 2**24], "group_size": None}, NOTHING),  # 2^64 bytes
    ("FO_BAD_METADATA", {**QUANTIZED, "kind": "dense"}, CODES_OF_W),
    ("FO_BAD_METADATA", {**QUANTIZED, "shape": [2, -5]}, CODES_OF_W),
    ("FO_BAD_METADATA", {**QUANTIZED, "shape": [1] * 33}, CODES_OF_W),
    ("FO_TOO_LARGE", {**QUANTIZED, "shape": [2**33, 2**33]}, CODES_OF_W),
    ("FO_TOO_LARGE", {**QUANTIZED, "shape": [1, 2**32]}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "shape": [2, 7]}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "bits": 7}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "bits": 4.0}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "bits": 2**64 + 4}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "group_size": 0}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "group_size": -2}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "group_size": 2}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "group_size": None}, CODES_OF_W),
    ("FO_BAD_TENSOR", QUANTIZED, {**CODES_OF_W, "scale": np.ones((2, 2), "f8")}),
    ("FO_BAD_TENSOR", QUANTIZED, {**CODES_OF_W, "minimum": np.ones((2, 2), "f4")}),
    ("FO_BAD_TENSOR", QUANTIZED, {**CODES_OF_W, "codes": np.zeros((2, 3), "i1")}),
    ("FO_BAD_TENSOR", {**QUANTIZED, "outliers": 2}, CODES_OF_W),
    ("FO_BAD_TENSOR", {**QUANTIZED, "outliers": 3}, {**CODES_OF_W, **OUTLIERS}),
    ("FO_BAD_TENSOR", {**QUANTIZED, "outliers": 2}, {**CODES_OF_W, **OUTLIERS, "outlier_index": np.array([9, 3])}),
    ("FO_BAD_TENSOR", {**QUANTIZED, "outliers": 2}, {**CODES_OF_W, **OUTLIERS, "outlier_index": np.array([3, 10])}),
    ("FO_BAD_TENSOR", {**QUANTIZED, "outliers": 2}, {**CODES_OF_W, **OUTLIERS, "outlier_index": np.array([-1, 3])}),
    ("FO_UNSUPPORTED_LAYOUT", {**SPARSE, "layout": "csr"}, MASK),
    ("FO_UNSUPPORTED_DTYPE", SPARSE, {**MASK, "values": np.ones(3)}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "values": np.ones(4, "f4")}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "positions": np.array([[3], [17]], "u1")}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "positions": np.array([[3], [32]], "u1")}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "row_offsets": np.array([0, 3, 3])}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "row_offsets": np.array([1, 2, 3])}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "row_offsets": np.array([0, -1, 3])}),
    ("FO_BAD_TENSOR", SPARSE, {**MASK, "row_offsets": np.array([0, 2])}),
    ("FO_BAD_TENSOR", {**SPARSE, "layout": "1x16"}, {**MASK, "values": np.ones(33, "f4")}),
    ("FO_BAD_TENSOR", {**SPARSE, "layout": "index16"}, {**INDEX, "positions": np.array([4, 4, 2], "u2")}),
    ("FO_BAD_TENSOR", {**SPARSE, "layout": "index16"}, {**INDEX, "positions": np.array([0, 5, 2], "u2")}),
    ("FO_BAD_TENSOR", {**SPARSE, "layout": "index16"}, INDEX8),
    (
        "FO_BAD_TENSOR",
        {**SPARSE, "layout": "index16", "shape": [3, 5]},
        {"positions": np.array([0, 1], "u2"), "row_offsets": np.array([0, 2, 1, 2]), "values": np.ones(2, "f4")},
    ),
    ("FO_BAD_TENSOR", {**SPARSE, "layout": "index8"}, {**INDEX8, "positions": np.array([0, 4, 2], "u1")}),
    (
        "FO_UNSUPPORTED_OUTLIERS",
        {**SPARSE, "values": {"bits": 8, "group_size": -1, "dtype": "float32", "outliers": 0}},
        MASK,
    ),
]


def test_parts_must_fit(sanitized):
    for description, arrays in FITS:
        sanitized.ask(DEQUANTIZE, packed(description, arrays), "w", size=10)
    for _, description, arrays in MISFITS:
        sanitized.ask(DEQUANTIZE, packed(description, arrays), "w", size=10)
    codes = [code for code, _ in sanitized.answers()]
    assert codes == ["FO_OK"] * len(FITS) + [code for code, _, _ in MISFITS]


def test_escapes_in_names(sanitized):
    names = [
        "\u00e9",
        "\u20ac and \U0001f600",
        'tab\t, line\n, quotes " and \\ and /',
        "\x01\x7f\u0080\uffff\U0010ffff",
    ]
    for name in names:
        file = packed(QUANTIZED, CODES_OF_W, name)
        sanitized.ask(DEQUANTIZE, file, name, size=10)
        sanitized.ask(DEQUANTIZE, file, name + "x", size=10)
        sanitized.ask(DEQUANTIZE, file, name[:-1], size=10)
    assert [code for code, _ in sanitized.answers()] == ["FO_OK", "FO_NOT_FOUND", "FO_NOT_FOUND"] * len(names)


@pytest.mark.parametrize("name", ["w", '\u00e9 "\\ \U0001f600', "n" * 255])
def test_tied_tensors_are_found_under_each_name(driver, rng, name, tmp_path):
    w = rng.standard_normal((8, 64)).astype("f4")
    weights = {name: w, "tied \u20ac": w, "apart": w + 1, "bias": w[0], "tied bias": w[0]}
    model = fo.pack(weights, bits=4, min_size=0)
    file, plain = saved(model, tmp_path), tmp_path / "plain.safetensors"
    assert "tied" in json.loads(fo.files.container.MappedFile(tmp_path / "model.safetensors").metadata["fastopt"])
    fo.unpack_file(tmp_path / "model.safetensors", plain)
    for tensor in weights:
        driver.ask(DEQUANTIZE, file, tensor, size=weights[tensor].size)
        driver.ask(DEQUANTIZE, plain.read_bytes(), tensor, size=weights[tensor].size)
    dense = model.unpack()
    expected = [dense[tensor] for tensor in weights for _ in range(2)]
    for array, (code, values) in zip(expected, driver.answers(), strict=True):
        assert code == "FO_OK"
        assert same_bits(values, array.ravel())
    assert driver.answer(DEQUANTIZE, file, "tied")[0] == "FO_NOT_FOUND"


def test_tied_names_are_checked(sanitized):
    def plain(tied):
        return written({"w": PLAIN, "n" * 256: {**PLAIN, "data_offsets": [8, 16]}, "__metadata__": tied}, bytes(16))

    def about(tied):
        return plain({"fastopt": json.dumps({"version": 2, "tensors": {}, "tied": tied})})

    found = [{"a": "w"}, {"b": 3, "a": "w"}, {"a": "w", "w": "a"}]
    lost = [{"a": "n" * 256}, {"a": "b", "b": "w"}, {"a": "a"}, {"a": "w\0"}, {"a": 3}, {"a": {"a": "w"}}, {"a": ""}]
    for make in (about, plain):
        for tied in found + lost:
            sanitized.ask(DEQUANTIZE, make(tied), "a", size=2)
    for tied in (["a", "w"], "a", None):
        sanitized.ask(DEQUANTIZE, about(tied), "a", size=2)
    codes = [code for code, _ in sanitized.answers()]
    assert codes == (["FO_OK"] * len(found) + ["FO_NOT_FOUND"] * len(lost)) * 2 + ["FO_NOT_FOUND"] * 3


def nested(depth):
    return [nested(depth - 1)] if depth else []


PLAIN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
HEADERS = [
    ("FO_OK", {}, b""),
    ("FO_OK", {"w": PLAIN}, bytes(8)),
    ("FO_OK", {"w": {**PLAIN, "dtype": "F4_OF_A_LATER_DAY"}}, bytes(8)),
    ("FO_OK", {"w": {**PLAIN, "more": [1.5e-3, -0, {"a": None, "b": [True, False, "\U0001f600"]}]}}, bytes(8)),
    ("FO_OK", {"w": {**PLAIN, "more": nested(20)}}, bytes(8)),
    ("FO_BAD_HEADER", {"w": {**PLAIN, "more": nested(30)}}, bytes(8)),
    ("FO_TRUNCATED", {"w": PLAIN}, bytes(7)),
    ("FO_BAD_HEADER", {"w": PLAIN}, bytes(9)),
    ("FO_BAD_HEADER", {"w": {**PLAIN, "data_offsets": [8, 0]}}, bytes(8)),
    ("FO_BAD_HEADER", {"w": {**PLAIN, "data_offsets": [0, 4]}}, bytes(4)),
    ("FO_BAD_HEADER", {"w": PLAIN, "v": PLAIN}, bytes(8)),
    ("FO_BAD_HEADER", {"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    ("FO_BAD_HEADER", {"w": 3}, bytes(8)),
    ("FO_BAD_HEADER", b"", b""),
    ("FO_BAD_HEADER", b"[]", b""),
    ("FO_BAD_HEADER", b"{} x", b""),
    ("FO_BAD_HEADER", b'{"w":}', b""),
    ("FO_BAD_HEADER", b'{"w":01}', b""),
    ("FO_BAD_HEADER", b'{"w":"\\ud800"}', b""),
    ("FO_BAD_HEADER", b'{"w\n":1}', b""),
    ("FO_BAD_HEADER", b'{"w":' + b"[" * 1000000, b""),
    ("FO_BAD_METADATA", {"__metadata__": {"fastopt": 3}}, b""),
    ("FO_BAD_METADATA", {"__metadata__": {"fastopt": "["}}, b""),
    ("FO_BAD_METADATA", {"__metadata__": {"fastopt": "{} {}"}}, b""),
    ("FO_BAD_METADATA", {"__metadata__": {"fastopt": "{}"}}, b""),
    ("FO_BAD_VERSION", {"__metadata__": {"fastopt": '{"version": 99}'}}, b""),
]


def test_headers_are_checked(sanitized):
    for _, header, data in HEADERS:
        sanitized.ask(TRY, written(header, data))
    sanitized.ask(DEQUANTIZE, written(TWICE), "w")
    sanitized.ask(TRY, struct.pack("<Q", 2**64 - 1) + b"{}")
    codes = [code for code, _ in sanitized.answers()]
    assert codes == [*(code for code, _, _ in HEADERS), "FO_NOT_FOUND", "FO_TRUNCATED"]


# ---- exported to C -------------------------------------------------------------------------------------------------

EXAMPLE = EDGE / "example"
TARGETS = {
    "host": ["cc"],
    "aarch64": ["aarch64-linux-gnu-gcc", "qemu-aarch64"],
    "aarch64-dotprod": ["aarch64-linux-gnu-gcc", "qemu-aarch64"],
    "armhf": ["arm-linux-gnueabihf-gcc", "qemu-arm"],
    "riscv64": ["riscv64-linux-gnu-gcc", "qemu-riscv64"],
    "cortex-m3": ["arm-none-eabi-gcc", "qemu-system-arm"],
    "cortex-m4": ["arm-none-eabi-gcc", "qemu-system-arm"],
    "cortex-m7": ["arm-none-eabi-gcc", "qemu-system-arm"],
}


def make(goal, target, **variables):
    need("make", *TARGETS[target])
    settings = [f"{name}={value}" for name, value in variables.items()]
    return run("make", "-s", "-C", EXAMPLE, goal, f"TARGET={target}", f"PYTHON={sys.executable}", *settings).decode()


@pytest.fixture(scope="session")
def checked(tmp_path_factory):
    """Tensors, exported beside a vector to multiply them with."""
    rng, folder = np.random.default_rng(20261122), tmp_path_factory.mktemp("exported")
    weights = {name: w for name, w in tensors(rng).items() if matrix(w).size}
    weights = {
        f"w{i}": w for i, w in enumerate(weights.values()) if i % 3 == 0 or not isinstance(w, fo.QuantizedTensor)
    }
    fo.export(weights, folder / "model.c", to="c")
    x = rng.standard_normal(1200).astype("f4")
    words = ",".join(map(str, x.view("u4")))
    (folder / "digits.h").write_text(
        f"static const uint32_t x_bits[] = {{{words}}};\n"
        f"static const fo_tensor *const tensors[] = {{{','.join(f'&model_{name}' for name in weights)}}};\n"
    )
    return folder, weights, x


@pytest.mark.parametrize("target", ["host", "cortex-m3", "cortex-m4", "cortex-m7"])
def test_exported_tensors(checked, target, tmp_path):
    folder, weights, x = checked
    lines = make(
        "run", target, BUILD=tmp_path, MODEL=folder, MAIN=ROOT / "tests" / "edge" / "edge_check.c"
    ).splitlines()
    for (name, tensor), line in zip(weights.items(), lines[: len(weights)], strict=True):
        w = matrix(tensor)
        rows, cols = w.shape
        words = np.array([int(word, 16) for word in line.split()[: 1 + 2 * rows]], np.uint32)
        assert line.endswith(" done"), name
        assert words[0] == zlib.adler32(w.tobytes()), name
        for y, number in (
            (words[1 : 1 + rows], x[None, :cols].astype("f8")),
            (words[1 + rows :], rounded(x[None, :cols])),
        ):
            size = np.linalg.norm(number) * np.linalg.norm(w.astype("f8"), axis=1)
            assert (abs(y.view("f4") - w.astype("f8") @ number[0]) <= 1e-6 * size).all(), name


def test_export_compiles_as_c_and_c_plus_plus(checked, tmp_path):
    folder, _, _ = checked
    for compiler, standard in (("cc", "-std=c99"), ("c++", "-std=c++11")):
        need(compiler)
        language = ["-x", "c++"] if compiler == "c++" else []
        run(compiler, standard, *STRICT, *language, "-c", folder / "model.c", "-o", tmp_path / "model.o")


def test_export_refuses_by_name(tmp_path):
    w = np.eye(4, dtype="f4")
    with pytest.raises(ValueError, match="'w': float64 is not known"):
        fo.export({"w": w.astype("f8")}, tmp_path / "m.c", to="c")
    with pytest.raises(ValueError, match=r"'a_b' and 'a\.b': both would be m_a_b"):
        fo.export({"a.b": w, "a_b": w}, tmp_path / "m.c", to="c")
    with pytest.raises(ValueError, match="path: expected a name that ends in"):
        fo.export({"w": w}, tmp_path / "m.h", to="c")
    with pytest.raises(ValueError, match="starts with a letter"):
        fo.export({"w": w}, tmp_path / "4bit.c", to="c")
    assert list(tmp_path.iterdir()) == []
    fo.export({"*/ \n": w}, tmp_path / "m.c", to="c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastopt.h", "m.c", "m.h"]
    assert (tmp_path / "fastopt.h").read_bytes() == (EDGE / "fastopt.h").read_bytes()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # its matrices are small
    run(sys.executable, EXAMPLE / "model.py", folder, "--epochs", "2", env=environment)
    return folder


@pytest.fixture(scope="session")
def on_host(digits, tmp_path_factory):
    return make("run", "host", BUILD=tmp_path_factory.mktemp("host"), MODEL=digits).splitlines()


RUNS = [(target, "arrays") for target in TARGETS]
RUNS += [(target, "file") for target in ("host", "aarch64-dotprod", "armhf", "cortex-m3", "cortex-m4")]


@pytest.mark.parametrize(("target", "source"), RUNS)
def test_same_predictions_everywhere(digits, on_host, target, source, tmp_path):
    lines = make("run", target, FROM=source, BUILD=tmp_path, MODEL=digits).splitlines()
    assert lines[:2] == on_host
    assert lines[0].endswith("60 as in Python of 60")
    assert int(lines[1].split()[2]) >= 50  # right, in int8
    if target.startswith("cortex"):
        assert re.fullmatch(r"stack \d+ bytes at most", lines[2])
        assert re.fullmatch(r"flash \d+ bytes: code \d+, model \d+, images \d+; RAM \d+ bytes and the stack", lines[3])


@pytest.mark.parametrize("target", ["host", "aarch64", "cortex-m3", "cortex-m4"])
def test_depthwise_network(digits, target, tmp_path):
    """The other network of the example: depthwise convolutions, in the function that was generated."""
    lines = make("run", target, NET="vision", BUILD=tmp_path, MODEL=digits).splitlines()
    assert lines[0].endswith("60 as in Python of 60")
    if target.startswith("cortex"):
        code, model, ram = (int(re.search(rf"{word} (\d+)", lines[3])[1]) for word in ("code", "model", "RAM"))
        assert code < (8 if target == "cortex-m4" else 10) * 1024
        assert model < 4608
        assert ram < 5632


def test_product_takes_little_code(tmp_path):
    """The product of dense codes with floats, and all that it calls, on a Cortex-M4."""
    need("arm-none-eabi-gcc", "arm-none-eabi-nm")
    source, program = tmp_path / "product.c", tmp_path / "product"
    call = "fo__multiply_codes(w, &fo__kind_f32, x, 1, y)"
    source.write_text(
        '#define FASTOPT_IMPLEMENTATION\n#include "fastopt.h"\n'
        f"void start(const fo_tensor *w, const uint8_t *x, float *y) {{ {call}; }}\n"
    )
    cpu = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]
    options = ["-std=c99", "-Os", "-ffreestanding", "-nostartfiles", "-ffunction-sections", "-fdata-sections"]
    run("arm-none-eabi-gcc", *cpu, *options, "-Wl,--gc-sections,-e,start", f"-I{EDGE}", source, "-o", program)
    symbols = [line.split() for line in run("arm-none-eabi-nm", "-S", "-t", "d", program).decode().splitlines()]
    sizes = {symbol[3]: int(symbol[1]) for symbol in symbols if len(symbol) == 4 and symbol[2] in "tT"}
    called = {"fo__multiply_codes", "fo__add_eights", "fo__code", "fo__float", "fo__row_bytes"}
    # The rest is for x that has no unit.
    assert called <= sizes.keys()
    assert sum(sizes[name] for name in called) < 1536, sizes


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/deploy-in-c.md"])
def test_examples_of_pages(page, rng, tmp_path):
    need("cc")
    readme = (ROOT / page).read_text("utf-8")
    source = re.search(r"```c\n(.*?)```", readme, re.DOTALL)[1]
    main = """
#include <stdio.h>
int main(void) {
  static unsigned char file[1 << 20];
  static float x[512], y[256];
  size_t n = fread(x, 4, 512, stdin), size = fread(file, 1, sizeof file, stdin);
  int code = product(file, size, x, y);
  if (code) puts(fo_message(code));
  return code || n != 512 || fwrite(y, 4, 256, stdout) != 256;
}
"""
    (tmp_path / "readme.c").write_text(source + main)
    run("cc", "-std=c99", *STRICT, f"-I{EDGE}", tmp_path / "readme.c", "-o", tmp_path / "readme")
    w, b = rng.standard_normal((256, 512)).astype("f4"), rng.standard_normal(256).astype("f4")
    x, model = rng.standard_normal(512).astype("f4"), fo.pack({"w": w, "b": b}, bits=4)
    y = np.frombuffer(run(tmp_path / "readme", input=x.tobytes() + saved(model, tmp_path)), "f4")
    python = fo.linear(x, model["w"], b)
    assert np.linalg.norm(y - python) < 1e-6 * np.linalg.norm(python)
