"""Imports of the package point down its list of layers, and stand at the top of their modules."""

import ast
from pathlib import Path

import fastopt

ROOT = Path(fastopt.__file__).parent
# From the ground up.
LAYERS = [
    ["_core", "_types", "_text", "_svg"],
    ["_checks"],
    ["config", "progress", "schedules"],
    ["tensors"],
    ["files"],
    ["train", "models"],
    ["formats"],
    ["torch"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports_of(tree, *, inside=False):
    """Yield the modules of fastopt that are imported at the top of a module, or `inside` its functions."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (id(node) not in top) == inside:
            names = {_module(node.module or "", a.name) for a in node.names}
            yield from (name for name in names if name.startswith("fastopt."))


def _module(package, name):
    """The module that `from package import name` needs: the package, or one in it."""
    inner = f"{package}.{name}"
    path = ROOT.joinpath(*inner.split(".")[1:])
    return inner if package == "fastopt" or path.with_suffix(".py").exists() or path.is_dir() else package


def graph():
    found = {}
    for path in MODULES:
        name = ".".join(("fastopt", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = list(imports_of(ast.parse(path.read_text("utf-8"))))
    return found


def test_imports_point_down():
    for module, imported in graph().items():
        own = module.split(".")[1]
        for name in imported:
            layer = name.split(".")[1]
            if (
                layer in HEIGHT
            ):  # else a name of fastopt/__init__.py, which is above all but the demo and the command line
                assert HEIGHT[layer] < HEIGHT[own] or layer == own, f"{module} imports {name}"
            else:
                assert own in ("demo", "cli"), f"{module} imports {name}"


def test_functions_import_nothing_of_the_package():
    for path in MODULES:
        if "cli" not in path.relative_to(ROOT).parts:  # the command line starts fast
            inside = set(imports_of(ast.parse(path.read_text("utf-8")), inside=True))
            assert not inside - {"fastopt.torch.transformers"}, path  # which needs a package that is optional


def test_no_circle():
    open_, done = [], set()

    def visit(module):
        assert module not in open_, " -> ".join([*open_, module])
        if module not in done:
            open_.append(module)
            for name in arrows.get(module, ()):
                visit(name)
            done.add(open_.pop())

    arrows = graph()
    for module in arrows:
        visit(module)
