"""Fuzz what reads foreign input, guided by the coverage of the code: ``nox -s fuzz -- 600`` does it, ten minutes each.

``python fuzz_python.py TARGET FOLDER [options of libFuzzer]``: new inputs go into FOLDER. An input that makes an error
which is not documented is written to the folder ``-artifact_prefix``; put it into corpus/TARGET when it is mended.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["fastopt"]):
    from fuzz.targets import TARGETS


def main() -> None:
    name, folder, *options = sys.argv[1:]
    target = TARGETS[name]
    for seed, content in target.seeds().items():
        (Path(folder) / seed).write_bytes(content)
    path = Path(tempfile.mkdtemp()) / target.file

    def test_one_input(data: bytes) -> None:
        path.write_bytes(data)
        target.run(path)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return target.mutate(data, max_size, seed, atheris.Mutate)

    corpus = Path(__file__).parent / "corpus" / name
    folders = [folder, str(corpus)] if corpus.exists() else [folder]
    atheris.Setup([sys.argv[0], *folders, *options], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
