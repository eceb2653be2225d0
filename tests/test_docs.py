"""Examples of README and docstrings run, and what is public is documented."""

import doctest
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import fastopt as fo
from fastopt.train.optimizer import Common

ROOT = Path(__file__).parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Modules of the command line need its extra and have no examples of their own.
MODULES = [m.name for m in pkgutil.walk_packages(fo.__path__, "fastopt.") if m.name != "fastopt._core"]


@pytest.mark.parametrize("name", ["fastopt", *MODULES])
def test_docstrings(name, tmp_path, monkeypatch):
    if name.startswith("fastopt.torch"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    threads = fo.get_num_threads()
    failed, _ = doctest.testmod(import_module(name), optionflags=OPTIONS)
    fo.set_num_threads(threads)
    assert failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/format.md"])
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=OPTIONS)
    assert failed == 0
    assert tried > 0


@pytest.mark.parametrize("name", [name for name in fo.__all__ if not name.startswith("__") and name != "schedules"])
def test_public_names_are_documented(name):
    item = getattr(fo, name)
    text = inspect.getdoc(item) or ""
    assert "Parameters\n" in text or "Returns\n" in text or "Attributes\n" in text or name == "show_config", name
    if inspect.isfunction(item):
        assert "Examples\n" in text or name == "load", name


@pytest.mark.parametrize("cls", [*fo.Optimizer.__subclasses__(), fo.AdamW])
def test_optimizers_document_every_option(cls):
    sections = inspect.getdoc(cls).split("Parameters\n----------\n")[1].split("\n\n")
    listed = {
        name.strip() for line in sections[0].splitlines() if " : " in line for name in line.split(":")[0].split(",")
    }
    own = set(inspect.signature(cls).parameters) - {"common"}
    assert listed == own | set(Common.__annotations__)
    assert sections[1].startswith("Raises\n")
