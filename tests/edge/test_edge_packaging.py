"""Other people's builds find cpp/edge/fastopt.h: CMake, in the tree or installed, and PlatformIO."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import run

import fastopt as fo

EDGE = Path(__file__).parents[2] / "cpp" / "edge"
CONSUMER = """
cmake_minimum_required(VERSION 3.15)
project(consumer LANGUAGES C)
if(EDGE)
  add_subdirectory(${EDGE} edge)
else()
  find_package(fastopt_edge REQUIRED)
endif()
add_executable(consumer consumer.c)
target_link_libraries(consumer PRIVATE fastopt::edge)
"""
PROGRAM = """
#define FASTOPT_IMPLEMENTATION
#include "fastopt.h"
int main(void) { return *fo_message(FO_OK) != 'd'; }
"""


@pytest.mark.parametrize("installed", [False, True])
def test_cmake_target(tmp_path, installed):
    if not shutil.which("cmake") or not shutil.which("cc"):
        pytest.skip("no cmake or cc")
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    (tmp_path / "consumer.c").write_text(PROGRAM)
    where = f"-DEDGE={EDGE}"
    if installed:
        run("cmake", "-S", EDGE, "-B", tmp_path / "edge", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}")
        run("cmake", "--install", tmp_path / "edge")
        where = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", where)
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "consumer")


def test_platformio_description():
    library = json.loads((EDGE / "library.json").read_text())
    cmake = (EDGE / "CMakeLists.txt").read_text()
    assert (EDGE / library["headers"]).exists()
    assert library["license"] == "BSD-3-Clause"
    assert library["version"] == fo.__version__
    assert f"VERSION {fo.__version__} " in cmake
