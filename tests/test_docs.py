"""Examples of README and docstrings run, and what is public is documented."""

import doctest
import inspect
import pkgutil
import re
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
    if name.endswith(".transformers"):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    threads = fo.get_num_threads()
    failed, _ = doctest.testmod(import_module(name), optionflags=OPTIONS)
    fo.set_num_threads(threads)
    assert failed == 0


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in PAGES if ">>> " in p.read_text("utf-8")])
def test_pages(page, tmp_path, monkeypatch):
    if "pytorch" in page:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=OPTIONS)
    assert failed == 0
    assert tried > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages(page):
    for target in re.findall(r"\]\(([^)]*)\)", page.read_text("utf-8").replace("\n", " ")):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_page_of_the_command_line_has_every_command():
    from typer.main import get_command

    from fastopt.cli.show_commands import app

    page = (ROOT / "docs/reference/command-line.md").read_text("utf-8")
    assert set(re.findall(r"^```{help} (\w+)", page, re.MULTILINE)) == set(get_command(app).commands)


@pytest.mark.parametrize("name", [name for name in fo.__all__ if not name.startswith("__") and name != "schedules"])
def test_public_names_are_documented(name):
    item = getattr(fo, name)
    text = inspect.getdoc(item) or ""
    assert "Parameters\n" in text or "Returns\n" in text or "Attributes\n" in text or name == "show_config", name
    if inspect.isfunction(item):
        assert "Examples\n" in text or name == "load", name


def test_the_public_face_is_small():
    assert len(fo.__all__) <= 45
    assert sorted(fo.__all__) == sorted(set(fo.__all__))


def options_of(cls):
    """Return the options in the section "Parameters" of a docstring, and the text from there on."""
    text = inspect.getdoc(cls).split("Parameters\n----------\n")[1]
    lines = text.split("\n\n")[0].splitlines()
    return {name.strip() for line in lines if " : " in line for name in line.split(":")[0].split(",")}, text


@pytest.mark.parametrize("cls", [*fo.Optimizer.__subclasses__(), fo.AdamW])
def test_optimizers_document_every_option(cls):
    """A class lists its own options, and points to `Optimizer`, which lists those that all classes share."""
    listed, text = options_of(cls)
    assert listed == set(inspect.signature(cls).parameters) - {"common"}
    options, after = text.split("\n\n")[:2]
    assert options.splitlines()[-2:] == ["**common", "    The options that all optimizers share; see `Optimizer`."]
    assert after.startswith("Raises\n")


def test_the_base_class_documents_every_common_option():
    assert options_of(fo.Optimizer)[0] == {"params", "lr", *Common.__annotations__}
