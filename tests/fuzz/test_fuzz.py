"""The targets of the fuzzer, without it: what it found before, and a few changed inputs of each kind."""

import random
from pathlib import Path

import pytest
from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
pytestmark = pytest.mark.filterwarnings("ignore:no tensor is packed", "ignore:.*tensors are decoded")


@pytest.fixture(params=TARGETS)
def target(request):
    target = TARGETS[request.param]
    if target.extra:
        pytest.importorskip(target.extra)
    return target


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_the_fuzzer_found(path, tmp_path):
    """Sound files, files that once were trouble, and those that reach far into the checks."""
    target = TARGETS[path.parent.name]
    if target.extra:
        pytest.importorskip(target.extra)
    given = tmp_path / target.file
    given.write_bytes(path.read_bytes())
    target.run(given)


def test_seeds_and_what_becomes_of_them(target, tmp_path):
    """Only the errors that are documented, whatever is changed."""
    rng = random.Random(0)

    def flip(data, max_size):
        changed = bytearray(data or b" ")
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed) + 1) : rng.randrange(4)] = rng.randbytes(rng.randrange(3))
        return bytes(changed)[:max_size]

    path = tmp_path / target.file
    for seed in target.seeds().values():
        for number in range(20):
            data = seed if number == 0 else target.mutate(seed, 1 << 16, number, flip)
            path.write_bytes(data)
            target.run(path)
