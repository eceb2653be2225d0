"""Regular files: opened for reading, and written whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fastopt._types import PathLike

_LFS = b"version https://git-lfs"
LOCK = "lock"  # the file that shows that a folder of temporary files is in use
_FOLDER = ".parts"
_LONGEST_NAME = 200  # bytes; a temporary name is longer, and file systems allow 255

# ---- reading -----------------------------------------------------------------------------------------------------


def open_regular(path: PathLike) -> IO[bytes]:
    """Open a regular file for reading.

    Raises
    ------
    OSError
        If it cannot be opened, or is a folder, a pipe or a device, which could block for good.
    ValueError
        If git-lfs has left a pointer in place of the file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _require_regular(os.fstat(handle), path)
        file = os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise
    if file.peek(len(_LFS)).startswith(_LFS):
        file.close()
        raise ValueError(f"{path}: is a pointer of git-lfs, not the file; 'git lfs pull' fetches it")
    return file


def _require_regular(info: os.stat_result, path: PathLike) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


# ---- writing -----------------------------------------------------------------------------------------------------


class Temporary(NamedTuple):
    """A file that is being written, and the permissions that it gets if it is a new one."""

    path: Path
    mode: int


def write_text(path: PathLike, text: str) -> None:
    """Write a text, which replaces `path` when it is complete and on the disk."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write to; on success move it there, durably, otherwise remove it.

    A symbolic link is followed. The new file has the permissions of the old one, and its owner and group as far as
    the system allows. Other hard links to the old file keep the old content.

    Raises
    ------
    OSError
        If the file cannot be written, or if `path` is a folder, a pipe or a device; it is then as it was before.
    """
    target = real_path(path)
    with naming(target), temporary_beside(target) as temporary:
        yield temporary.path
        move(temporary, target)


def real_path(path: PathLike) -> Path:
    """Return an absolute path without symbolic links; a loop of links stays in it, for the system to report."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Temporary]:
    """Create a file beside `target`, under a name that nobody can guess, and remove it unless it was moved.

    A lock tells a file that is being written from one that a killed process left. The latter are removed here.
    """
    existing = _existing(target)
    _remove_abandoned(target)
    while True:
        path = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.part")
        handle, ours = -1, True
        try:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                handle = os.open(path, flags, 0o666 if existing is None else 0o600)
            except FileExistsError:
                ours = False
                continue
            mode = stat.S_IMODE(os.fstat(handle).st_mode)  # as the umask, or the folder, wants it
            os.fchmod(handle, mode | 0o600)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink == 0:  # another process took it for abandoned before the lock was held
                continue
            yield Temporary(path, mode)
            return
        finally:
            if ours:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if handle >= 0:
                os.close(handle)


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Temporary]:
    """Create a folder beside `target` for files of several processes, and remove it with all that is in it.

    The file `LOCK` in it is locked as long as it is used; folders that a killed process left are removed here. The mode
    is that of new files.
    """
    _existing(target)
    _remove_abandoned(target)
    while True:
        folder = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{_FOLDER}")
        handle, made = -1, False
        try:
            folder.mkdir()
            made = True
            try:
                handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(handle, fcntl.LOCK_EX)
            except FileNotFoundError:
                continue
            if os.fstat(handle).st_nlink == 0:  # another process took it for abandoned before the lock was held
                continue
            yield Temporary(folder, stat.S_IMODE(os.fstat(handle).st_mode))
            return
        finally:
            if made:
                _remove_folder(folder)
            if handle >= 0:
                os.close(handle)


def move(temporary: Temporary, target: Path, *, durably: bool = True) -> None:
    """Move a finished file to its place: first its content, then its name reach the disk.

    Without `durably` the name may not yet be on the disk; `sync_folder` does that for several files at once.
    """
    existing = _existing(target)
    # Both are opened first: what fails after the replacement cannot be undone. The file is opened anew, as a writer
    # may have put another one under the name.
    folder = _open_folder(target.parent)
    try:
        handle = os.open(temporary.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fchmod(handle, temporary.mode if existing is None else _keep_owner(handle, existing))
            os.fsync(handle)
            temporary.path.replace(target)
            if folder is None and durably:
                os.fsync(handle)
        finally:
            os.close(handle)
        if folder is not None and durably:
            _sync_entries(folder)
    finally:
        if folder is not None:
            os.close(folder)


def sync_folder(path: Path) -> None:
    """Wait until the entries of a folder are on the disk, if it can be opened."""
    folder = _open_folder(path)
    if folder is not None:
        try:
            _sync_entries(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, for changes of several files; without one if the file system has no locks."""
    handle = _open_folder(folder)
    try:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def naming(target: Path) -> Iterator[None]:
    """Let an error of the system name the file that cannot be written instead of a temporary one beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            if str(target) in str(error):
                raise
            raise OSError(f"{target}: cannot be written: {error}") from error
        if error.filename is not None:
            named, folder = real_path(os.fsdecode(error.filename)), real_path(target).parent
            place = named.parent if named.parent.name.endswith(_FOLDER) else named
            temporary = place.parent == folder and place.name.startswith((".", "tmp"))
            if named != folder and not temporary:  # an error about another file
                raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def _existing(target: Path) -> os.stat_result | None:
    try:
        info = target.stat()
    except FileNotFoundError:
        return None
    _require_regular(info, target)
    return info


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_NAME:
        return f".{hashlib.sha256(name).hexdigest()}."
    return f".{target.name}."


def _remove_abandoned(target: Path) -> None:
    ours = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{16}\.parts?")
    with contextlib.suppress(OSError):  # a folder that cannot be listed, files of others: they stay
        for path in target.parent.iterdir():
            if not ours.fullmatch(path.name):
                continue
            if path.name.endswith(_FOLDER):
                _remove_unlocked_folder(path)
            else:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.fstat(handle).st_mode) and os.path.samestat(os.fstat(handle), path.lstat()):
                path.unlink()
        finally:
            os.close(handle)


def _remove_unlocked_folder(folder: Path) -> None:
    with contextlib.suppress(OSError), _opened_folder(folder) as inside:
        try:  # NFS locks only what is opened for writing
            handle = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside)
        except FileNotFoundError:
            folder.rmdir()
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_folder(folder)
        finally:
            os.close(handle)


def _remove_folder(folder: Path) -> None:
    """Remove a folder and its files; a process that still writes to it finds no place for new ones."""
    with contextlib.suppress(OSError):
        renamed = folder.with_name(f"{folder.name[: -16 - len(_FOLDER)]}{secrets.token_hex(8)}{_FOLDER}")
        folder.rename(renamed)
        with _opened_folder(renamed) as inside:
            for name in sorted(os.listdir(inside), key=lambda name: name == LOCK):  # noqa: PTH208 - of a handle
                os.unlink(name, dir_fd=inside)
        renamed.rmdir()


@contextlib.contextmanager
def _opened_folder(path: Path) -> Iterator[int]:
    """Open a folder, whose files are then found in it even if a link takes its place."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def _keep_owner(handle: int, existing: os.stat_result) -> int:
    """Give a file the owner of another as far as the system allows; return the permissions that fit."""
    mode, mine = existing.st_mode & 0o777, os.fstat(handle)
    if (existing.st_uid, existing.st_gid) == (mine.st_uid, mine.st_gid):
        return mode
    for owner in (existing.st_uid, -1):
        with contextlib.suppress(OSError):
            os.fchown(handle, owner, existing.st_gid)
            return mode
    if existing.st_gid == mine.st_gid:
        return mode
    return mode & ~0o070 | (mode & 0o007) << 3  # the group is another one: it may do what everybody may


def _open_folder(path: Path) -> int | None:
    """Return a handle of a folder; None for one that may be written to but not read."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return None


def _sync_entries(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot sync folders
            raise
