"""Settings of Sphinx; ``nox -s docs`` builds the pages into build/docs."""

import importlib.metadata
import os
import subprocess
import sys

from docutils import nodes
from docutils.parsers.rst import Directive

project = "fastopt"
release = importlib.metadata.version(project)
copyright = "the fastopt developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
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


def setup(app: object) -> None:
    """Add the directive to Sphinx."""
    app.add_directive("help", Help)  # type: ignore[attr-defined]
