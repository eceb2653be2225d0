"""Settings of Sphinx; ``nox -s docs`` builds the pages into build/docs."""

import importlib.metadata
import os
import subprocess
import sys
from functools import partial
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils.math.latex2mathml import tex2mathml

project = "fastopt"
release = importlib.metadata.version(project)
copyright = "the fastopt developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
suppress_warnings = ["myst.xref_missing", "ref.python"]  # of links to sources, and of attributes that share a name
autodoc_mock_imports = ["transformers"]
autodoc_typehints = "none"  # the docstrings have them
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
default_role = "code"


class Help(Directive):
    """A directive that shows the text which a command prints with ``--help``."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the text as one block."""
        command = [sys.executable, "-m", "fastopt", *self.arguments, "--help"]
        environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
        text = subprocess.run(command, env=environment, check=True, capture_output=True, encoding="utf-8").stdout
        return [nodes.literal_block(text, "\n".join(line.rstrip() for line in text.splitlines()), language="text")]


def formula(translator: Any, node: nodes.Element, block: bool) -> None:
    """Write a formula as MathML, which browsers show without a script from elsewhere."""
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Add the directive and the formulas to Sphinx."""
    app.add_directive("help", Help)
    app.add_html_math_renderer("mathml", (partial(formula, block=False), None), (partial(formula, block=True), None))
