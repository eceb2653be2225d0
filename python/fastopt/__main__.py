"""``python -m fastopt`` is the command ``fastopt``."""

from fastopt.cli.__main__ import main

if __name__ == "__main__":
    main()
