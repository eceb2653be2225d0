"""Files that are written whole or not at all, beside other processes, and whatever stands in their way."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import run_python

import fastopt as fo
from fastopt.files.atomic import open_regular, replacing, temporary_beside, write_text

W = {"w": np.arange(4096, dtype="f4").reshape(64, 64)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- two processes -----------------------------------------------------------------------------------------------

WRITER = """
    import itertools, sys
    import numpy as np
    import fastopt as fo
    folder, kind, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
    print("ready", flush=True)
    for i in itertools.count(first, 2):
        # Two layouts that differ in order, so that the header of one beside the data of the other is seen.
        names = ["a", "b", "c"] if i % 4 < 2 else ["c", "b", "a"]
        arrays = {name: np.full((len(name) + ord(name) - 90, 50), i, "f4") for name in names}
        if kind == "model":
            fo.PackedModel(arrays).save(folder + "/m.safetensors")
        elif kind == "checkpoint":
            fo.save_checkpoint({"epoch": i, "arrays": arrays}, folder + "/m.safetensors")
        else:
            np.savez(f"{folder}/{first}.npz", **arrays)
            fo.pack_file(f"{folder}/{first}.npz", folder + "/m.index.json", bits=8, min_size=1)
            if i < 8:  # removed by the other writer, if it could
                fo.pack_file(f"{folder}/{first}.npz", folder + "/m.index.json", bits=8, min_size=1)
    """


@pytest.mark.parametrize("kind", ["model", "checkpoint", "index"])
def test_readers_beside_two_writers_see_one_model(kind, tmp_path):
    """Every tensor holds the number of the save that wrote it; two numbers in one load are two files mixed."""
    path = tmp_path / ("m.index.json" if kind == "index" else "m.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code = "\n".join(line[4:] for line in WRITER.splitlines())
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path, kind, str(first)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen, end = set(), time.monotonic() + 1.5
        while time.monotonic() < (end if len(seen) > 3 else deadline):
            if kind == "checkpoint":
                state = fo.load_checkpoint(path)
                found = {state["epoch"]} | {float(v) for a in state["arrays"].values() for v in a[[0, -1], 0]}
            else:
                model = fo.load(path).unpack() if len(seen) % 2 else fo.open_weights(path)
                found = {float(v) for array in model.values() for v in array[[0, -1], 0]}
            assert len(found) == 1
            seen |= found
        assert len(seen) > 3
        assert [writer.poll() for writer in writers] == [None, None]
    finally:
        for writer in writers:
            writer.kill()
    for writer in writers:
        assert writer.communicate()[1] == ""


# ---- what stands in the way --------------------------------------------------------------------------------------

EXPORTS = {"npz": "m.npz", "c": "m.c", "onnx": "m.onnx", "gguf": "m.gguf", "mlx": "m.safetensors"}


def writers_of(path):
    packed = fo.pack(W, bits=4)
    return {
        "save": lambda: packed.save(path),
        "checkpoint": lambda: fo.save_checkpoint(W, path),
        "text": lambda: write_text(path, "text"),
    }


@pytest.mark.parametrize("kind", ["save", "checkpoint", "text", "pack_file", "unpack_file", "shards", *EXPORTS])
def test_a_pipe_is_refused_and_stays(kind, tmp_path):
    path = tmp_path / EXPORTS.get(kind, "m.index.json" if kind == "shards" else "m.safetensors")
    os.mkfifo(path)
    np.savez(tmp_path / "source.npz", **W)
    if kind in EXPORTS:
        pytest.importorskip({"onnx": "onnx", "gguf": "gguf"}.get(kind, "numpy"))
        write = lambda: fo.export(W, path, to=kind)  # noqa: E731
    elif kind == "unpack_file":
        write = lambda: fo.unpack_file(tmp_path / "source.npz", path)  # noqa: E731
    elif kind in ("pack_file", "shards"):
        write = lambda: fo.pack_file(tmp_path / "source.npz", path, bits=8)  # noqa: E731
    else:
        write = writers_of(path)[kind]
    with pytest.raises(OSError, match=f"Not a regular file: '{path}'"):
        write()
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == sorted([path.name, "source.npz"])


@pytest.mark.parametrize("other", ["m.c", "m.h", "fastopt.h"])
def test_files_that_belong_together_are_refused_together(other, tmp_path):
    os.mkfifo(tmp_path / other)
    with pytest.raises(OSError, match=f"Not a regular file: '{tmp_path / other}'"):
        fo.export(W, tmp_path / "m.c", to="c")
    assert names(tmp_path) == [other]


@pytest.mark.parametrize("mode", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_a_device_is_refused(mode, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    real = os.stat

    def faked(name, *args, **kwargs):
        info = real(name, *args, **kwargs)
        if str(name) == str(path):
            info = os.stat_result([mode | 0o666, *info[1:]])
        return info

    monkeypatch.setattr(os, "stat", faked)
    for write in writers_of(path).values():
        with pytest.raises(OSError, match="Not a regular file"):
            write()
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]


def test_a_file_that_becomes_a_pipe_meanwhile_is_refused(tmp_path):
    path = tmp_path / "m.txt"
    with pytest.raises(OSError, match="Not a regular file"), replacing(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"new")
        os.mkfifo(path)
    assert names(tmp_path) == ["m.txt"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.index.json", "m.npz", "m.npy", "m.pt", "m.onnx", "m"])
def test_a_pipe_is_not_read(name, tmp_path):
    if name in ("m.pt", "m.onnx"):
        pytest.importorskip({"m.pt": "torch", "m.onnx": "onnx"}[name])
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="Not a regular file"):
        fo.open_weights(tmp_path / name)
    with pytest.raises(OSError, match="Not a regular file"):
        fo.load(tmp_path / name)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        open_regular(tmp_path)


def test_links_laid_in_the_way_are_not_followed(tmp_path, monkeypatch):
    victim, target = tmp_path / "victim", tmp_path / "m.safetensors"
    victim.write_bytes(b"mine")
    tokens = iter([8 * b"a", 8 * b"a", 8 * b"b"])
    monkeypatch.setattr("secrets.token_hex", lambda n: next(tokens).decode())
    (tmp_path / ".m.safetensors.aaaaaaaa.part").symlink_to(victim)
    fo.save_checkpoint(W, target)
    monkeypatch.undo()
    assert victim.read_bytes() == b"mine"
    assert np.array_equal(fo.load_checkpoint(target)["w"], W["w"])
    target.unlink()
    target.symlink_to(tmp_path / "loop")
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        fo.save_checkpoint(W, target)


# ---- permissions, owners, folders --------------------------------------------------------------------------------


def test_permissions_of_new_and_old_files(tmp_path):
    code = """
        import os, sys
        import fastopt as fo
        for umask in (0o022, 0o077, 0o027, 0o777):
            os.umask(umask)
            fo.save_checkpoint({"a": 1}, f"{sys.argv[1]}/{umask:o}")
            assert os.umask(umask) == umask
            assert os.stat(f"{sys.argv[1]}/{umask:o}").st_mode & 0o7777 == 0o666 & ~umask, umask
        for mode in (0o600, 0o640, 0o666, 0o444, 0o200, 0o4755):
            os.chmod(f"{sys.argv[1]}/22", mode)
            fo.save_checkpoint({"a": mode}, f"{sys.argv[1]}/22")
            assert os.stat(f"{sys.argv[1]}/22").st_mode & 0o7777 == mode & 0o777, oct(mode)
        """
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root alone gives files away")
def test_the_owner_is_kept(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    os.chown(path, 65534, 65534)
    path.chmod(0o640)
    fo.save_checkpoint(W, path)
    info = path.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (65534, 65534, 0o640)


def test_a_group_that_cannot_be_kept_gets_no_more_than_everybody(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    path.chmod(0o664)
    real = os.stat

    def faked(name, *args, **kwargs):
        info = real(name, *args, **kwargs)
        return os.stat_result([*info[:4], 12345, 12345, *info[6:]]) if str(name) == str(path) else info

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "stat", faked)
    monkeypatch.setattr(os, "fchown", refuse)
    write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_other_hard_links_keep_the_old_content(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "other")
    write_text(path, "new")
    assert (tmp_path / "other").read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_folder_that_cannot_be_read_can_be_written_to(tmp_path, monkeypatch):
    real = os.open

    def faked(path, flags, *args, **kwargs):
        if flags & os.O_DIRECTORY:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", faked)
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "no", str(path))))
    for write in writers_of(tmp_path / "m.safetensors").values():
        write()
    np.savez(tmp_path / "source.npz", **W)
    fo.pack_file(tmp_path / "source.npz", tmp_path / "m.index.json", bits=8)
    monkeypatch.undo()
    assert len(fo.load(tmp_path / "m.index.json")) == 1


def test_long_names(tmp_path):
    path = tmp_path / ("ä" * 120 + ".safetensors")
    fo.save_checkpoint(W, path)
    assert names(tmp_path) == [path.name]
    with pytest.raises(OSError, match=r"File name too long: '.*ä"):
        fo.save_checkpoint(W, tmp_path / ("ä" * 200))


def test_errors_name_the_target_whatever_its_path_looks_like(tmp_path, monkeypatch):
    np.savez(tmp_path / "source.npz", **W)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()

    def full(file, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastopt.files.safetensors_file.write_array", full)
    for target in ("small/m.safetensors", "small/m.index.json"):
        with pytest.raises(OSError, match="No space left on device") as caught:
            fo.pack_file("source.npz", target, bits=8)
        assert caught.value.filename == str(tmp_path / target)
    assert names(tmp_path / "small") == []


# ---- what a killed process leaves --------------------------------------------------------------------------------


def test_files_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    target = tmp_path / "m[1].safetensors"
    code = """
        import os, sys
        from pathlib import Path
        import fastopt as fo
        from fastopt.files.atomic import temporary_beside
        with temporary_beside(Path(sys.argv[1])) as one, temporary_beside(Path(sys.argv[1])) as other:
            os.kill(os.getpid(), 9)
        """
    assert run_python(code, target).returncode == -9
    left = names(tmp_path)
    assert len(left) == 2
    assert all(name.startswith(".m[1].safetensors.") and name.endswith(".part") for name in left)
    (tmp_path / ".m[1].safetensors.notes.part").write_bytes(b"a file of the user")
    with temporary_beside(target) as living:
        write_text(target, "new")
        assert living.path.exists()
    assert names(tmp_path) == [".m[1].safetensors.notes.part", target.name]


def test_a_file_removed_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    real, calls = os.fstat, []

    def faked(handle):
        info = real(handle)
        if stat.S_ISREG(info.st_mode) and len(calls) < 2:
            calls.append(info)
            if len(calls) == 2:  # after the lock
                next(tmp_path.glob(".m.*")).unlink()
                info = real(handle)
        return info

    monkeypatch.setattr(os, "fstat", faked)
    write_text(tmp_path / "m", "text")
    assert names(tmp_path) == ["m"]
    assert len(calls) == 2
