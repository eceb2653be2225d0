"""Four ranks of MPI: the programs of the page, and steps whose ranks fail."""

import shutil
import sys
from pathlib import Path
from textwrap import dedent

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

from engines import contents, program, run_program

MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")


def on_ranks(text, folder, *more, ranks=4):
    return run_program(text, folder, MPIEXEC, "-n", str(ranks), sys.executable, *more)


def test_pack(model, alone, tmp_path):
    assert "12 packed" in on_ranks(program("Pack with MPI"), tmp_path, "-m", "mpi4py.futures")
    assert contents(tmp_path / "packed") == alone


def test_train(tmp_path):
    check = """
        digests = comm.allgather(w.tobytes())
        assert all(digest == digests[0] for digest in digests)
        assert abs(w - 1).max() < 0.2, w
        assert opt.steps == 20
    """
    on_ranks(program("Train with MPI") + dedent(check), tmp_path)


def test_the_steps_are_those_of_one_process(tmp_path):
    """Each rank computes the steps of one process, with the sums of all ranks."""
    on_ranks(
        dedent("""
        from mpi4py import MPI
        import numpy as np
        import fastopt as fo

        comm = MPI.COMM_WORLD
        shapes = {"w": (640, 80), "b": (7,)}
        every = [{n: np.random.default_rng((r, len(n))).integers(-9, 9, s).astype("f4") for n, s in shapes.items()}
                 for r in range(comm.size)]  # whose sums are exact in any order
        w, v = ({n: np.ones(s, "f4") for n, s in shapes.items()} for _ in range(2))
        opt, alone = fo.Adam(w, max_norm=0.5), fo.Adam(v, max_norm=0.5)
        for step in range(3):
            norm = opt.step(every[comm.rank], grad_scale=0.5, reduce=lambda b: comm.Allreduce(MPI.IN_PLACE, b))
            sums = {n: sum(g[n] for g in every) for n in shapes}
            assert norm == alone.step(sums, grad_scale=0.5 / comm.size)
        assert all((w[n] == v[n]).all() for n in shapes)
        """),
        tmp_path,
    )


def test_a_rank_that_fails(tmp_path):
    printed = on_ranks(
        dedent("""
        from mpi4py import MPI
        import numpy as np
        import fastopt as fo

        comm = MPI.COMM_WORLD

        def texts_of(gradient):
            # what every rank says if the third one has this gradient
            w = np.zeros(5, "f4")
            opt = fo.SGD([w])
            try:
                mine = gradient if comm.rank == 2 else np.ones(5, "f4")
                opt.step([mine], reduce=lambda buffer: comm.Allreduce(MPI.IN_PLACE, buffer))
                text = f"skipped {opt.skipped}"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            assert not w.any()
            return comm.gather(text)

        for gradient in (None, np.ones(4, "f4"), np.full(5, np.nan, "f4")):
            texts = texts_of(gradient)
            if comm.rank == 0:
                print(*texts, sep="\\n")
        """),
        tmp_path,
    )
    other = "RuntimeError: reduce: another rank failed, and no rank has stepped"
    assert printed.splitlines() == [
        *["ValueError: gradient of '0': only some ranks have one; no rank has stepped"] * 4,
        *(other, other, "ValueError: gradient of '0': expected shape (5,), got (4,)", other),
        *["skipped 1"] * 4,
    ]


def test_zero(tmp_path):
    """States on all ranks; the parameters are those of one process to the rounding of its norm."""
    check = """
        digests = comm.allgather(flat.tobytes())
        assert all(digest == digests[0] for digest in digests)
        assert abs(params["w"] - 1).max() < 0.5, params["w"]
        (state,) = opt.state_dict()["state"].values()
        assert state["exp_avg"].size == share

        whole = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        alone, rngs = fo.AdamW(whole, lr=0.1, max_norm=1.0), [np.random.default_rng(rank) for rank in range(comm.size)]
        for step in range(20):
            total = {name: np.zeros_like(param) for name, param in whole.items()}
            for rng in rngs:
                x = rng.standard_normal((32, 8)).astype(np.float32)
                error = (whole["w"] - 1) @ x.T + whole["b"][:, None]
                total["w"] += error @ x / len(x)
                total["b"] += error.mean(1)
            alone.step(total, grad_scale=1 / comm.size)
        for name in shapes:
            np.testing.assert_allclose(params[name], whole[name], rtol=1e-3, atol=1e-4)
    """
    on_ranks(program("Train with states on all ranks (ZeRO)") + dedent(check), tmp_path)
