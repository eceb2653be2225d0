"""Every table of kernels gives the same bits; ``kernel_digest.cpp`` prints what they are."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import run, run_python

from fastopt import _core

ROOT = Path(__file__).parents[2]
ISAS = _core.available_isas()

CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
CROSS_OPTIONS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)


def build(directory, *options):
    cmake = Path(pytest.importorskip("cmake").CMAKE_BIN_DIR) / "cmake"
    ninja = Path(pytest.importorskip("ninja").BIN_DIR) / "ninja"
    settings = [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release", "-DFASTOPT_DIGEST=ON"]
    run(cmake, "-S", ROOT, "-B", directory, "-G", "Ninja", *settings, *options)
    run(cmake, "--build", directory)
    return directory


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def cross(tmp_path_factory):
    if not CROSS_COMPILER:
        pytest.skip("no compiler for aarch64")
    return build(tmp_path_factory.mktemp("aarch64"), *CROSS_OPTIONS)


@pytest.fixture(scope="session")
def emulator(cross):
    if not EMULATOR:
        pytest.skip("no emulator of aarch64")

    def emulate(cpu, *arguments):
        return run(EMULATOR, "-cpu", cpu, cross / "kernel_digest", *arguments)

    return emulate


@pytest.fixture(scope="session")
def expected(native):
    return run(native / "kernel_digest", ISAS[0]).splitlines()


def differing_cases(text, expected):
    lines = text.splitlines()
    assert len(lines) == len(expected) > 1000
    return [ours for ours, theirs in zip(lines, expected, strict=True) if ours != theirs]


def test_digest_knows_the_same_tables(native):
    assert run(native / "kernel_digest").split() == ISAS


@pytest.mark.parametrize("isa", ISAS[1:])
def test_same_bits_as_the_baseline(native, expected, isa):
    assert differing_cases(run(native / "kernel_digest", isa), expected) == []


@pytest.mark.parametrize(("cpu", "isas"), [("cortex-a72", ["neon"]), ("max", ["neon", "dotprod"])])
def test_arm_tables_are_those_of_the_cpu(emulator, cpu, isas):
    assert emulator(cpu).split() == isas


@pytest.mark.parametrize(("cpu", "isa"), [("cortex-a72", "neon"), ("max", "dotprod")])
def test_arm_gives_the_same_bits(emulator, expected, cpu, isa):
    assert differing_cases(emulator(cpu, isa), expected) == []


@pytest.mark.parametrize("tables", ["native", "cross"])
def test_no_weak_symbols(tables, request):
    """The linker keeps one copy of a weak symbol: AVX-512 code could then run on any CPU."""
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("no nm")
    objects = sorted(request.getfixturevalue(tables).rglob("kernels.cpp.o"))
    assert len(objects) > 1
    for path in objects:
        symbols = run(nm, "--demangle", path).splitlines()
        assert any(f"fastopt::{table}_" in line for line in symbols for table in ("kernels", "products"))
        assert [line for line in symbols if line[17] in "WVu"] == []


def import_with_isa(isa):
    code = "from fastopt import _core; print(_core.isa())"
    return run_python(code, env={**os.environ, "FASTOPT_ISA": isa})


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_a_table(isa):
    assert import_with_isa(isa).stdout.strip() == isa


def test_environment_names_an_unknown_table():
    done = import_with_isa("nonsense")
    assert done.returncode != 0
    message = f"isa: expected one of {', '.join(ISAS)} (what this CPU runs), got 'nonsense'"
    assert f"ValueError: {message}" in done.stderr
