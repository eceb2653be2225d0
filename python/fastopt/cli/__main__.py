"""The command line's door: what runs before its extra is known to be installed."""

import sys


def main() -> None:
    """Run the command line; without its extra, say so in one line and exit with status 1."""
    try:
        from fastopt.cli.show_commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit("fastopt: the command line needs its extra: pip install 'fastopt[cli]'")
    app(prog_name="fastopt")
