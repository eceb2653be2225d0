"""The entry point, which runs without the packages of the extra ``cli``."""

import sys


def main() -> None:
    """Run the command line; if its extra is not installed, print so in one line and exit with code 1."""
    try:
        from fastopt.cli.show_commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit("fastopt: the command line needs typer and rich: pip install typer rich")
    app(prog_name="fastopt")


if __name__ == "__main__":
    main()
