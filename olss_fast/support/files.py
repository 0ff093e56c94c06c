"""Reading and writing whole files: a crash, a full disk or a hostile path ends in a named error."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from olss_fast.errors import OlssError, PlanFileError
from olss_fast.support.text import printable

AnyPath = str | os.PathLike[str]

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would exceed a size limit of the process or file system; raise it or choose another folder",
    errno.EACCES: "permission denied; choose a place you may use, or change its permissions",
    errno.EPERM: "permission denied; choose a place you may use, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "it is a folder; give the path of a file",
    errno.ELOOP: "the path is a loop of symbolic links; give the path of the file itself",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def write_atomically(
    path: AnyPath, data: bytes | Sequence[memoryview], *, error: type[OlssError] = PlanFileError
) -> None:
    """Write `data` to `path` so that after a crash the file is the old one or the new one, never a part.

    A temporary file in the same folder is written, flushed to the disk and renamed over `path`; then the folder is
    flushed. If anything fails the temporary file is removed and what was at `path` stays as it was. Where the system
    can (Linux), the temporary file has no name before it is whole, so a process killed outright leaves no part of one;
    elsewhere it may leave a `.<random>.tmp` file, which is safe to delete.

    Raises `error` (PlanFileError unless told): the disk is full, the folder is missing or may not be written, or
    `path` is a folder, a device or a symbolic link (a rename would replace the link and not what it points to).
    """
    buffers = [memoryview(data)] if isinstance(data, bytes) else data
    try:
        target = Path(path)
        _check_target(target)
        _write_new(target.parent / f".{os.urandom(8).hex()}.tmp", target, buffers)
        _flush_folder(target.parent)
    except (OSError, ValueError, TypeError) as cause:
        hint = ", and create the folder first" if isinstance(cause, FileNotFoundError) else ""
        raise error(f"cannot write {sum(map(len, buffers))} bytes to {_shown(path)}: {reason(cause)}{hint}") from cause


@contextlib.contextmanager
def opened(path: AnyPath, *, error: type[OlssError] = PlanFileError) -> Iterator[BinaryIO]:
    """A regular file (or what a symbolic link leads to), open for reading.

    Raises `error`: nothing there, a folder, device or pipe, or not readable, now or within the block.
    """
    try:
        with open_regular(Path(path)) as file:
            yield file
    except (OSError, ValueError, TypeError) as cause:
        if isinstance(cause, OlssError):
            raise
        raise error(f"cannot read {_shown(path)}: {reason(cause)}") from cause


def read_bounded(path: AnyPath, limit: int, *, error: type[OlssError] = PlanFileError) -> bytes:
    """The bytes of a file, refused before reading if beyond `limit`. Raises `error`: as `opened`, or it is larger."""
    with opened(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"it has {size} bytes; expected at most {limit}; is it the right file?")
        data = file.read(size + 1)  # reading allocates what is asked for
        if len(data) > size:
            raise OSError(f"it grew beyond {size} bytes while it was read; is it the right file?")
    return data


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, through symbolic links; OSError for a folder, device or pipe."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would block, a device may never end
        raise OSError(f"it is {_kind(mode)}; give the path of a file")
    return path.open("rb")


def _check_target(target: Path) -> None:
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(f"it is {_kind(mode)}; give the path of a file, or of one to be created")


def _write_new(temporary: Path, target: Path, buffers: Sequence[memoryview]) -> None:
    descriptor = _nameless(target.parent)
    named = descriptor is None
    try:
        with os.fdopen(_named(temporary) if descriptor is None else descriptor, "wb") as file:
            file.writelines(buffers)
            file.flush()
            os.fsync(file.fileno())
            if not named:
                # A folder, unused beside an absolute path, is what makes Python follow the link to the file.
                here = f"/proc/self/fd/{file.fileno()}"
                os.link(here, temporary, src_dir_fd=file.fileno(), follow_symlinks=True)
                named = True
        temporary.replace(target)
    except BaseException:  # also on Ctrl-C: leave nothing half-written behind
        if named:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise


def _named(temporary: Path) -> int:
    # O_EXCL never follows a link that somebody placed there; mode 0666 leaves the permissions to the user's umask.
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _nameless(folder: Path) -> int | None:
    """A file that the folder does not list yet; None where the system or the file system has no such thing."""
    flag = getattr(os, "O_TMPFILE", 0)
    if not flag or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, flag | os.O_WRONLY, 0o666)
    except OSError as cause:
        if cause.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return None  # the second way has the better message for a folder that is missing
        raise


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can do that."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as cause:
        # A folder that may be written but not listed, or a file system that cannot flush folders: the file is whole.
        if cause.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a symbolic link" if stat.S_ISLNK(mode) else "a device, pipe or socket"


def reason(cause: Exception) -> str:
    """Why the system refused, and what to do about it."""
    number = cause.errno if isinstance(cause, OSError) else None
    return _ADVICE.get(number, str(cause)) if number is not None else str(cause)


def _shown(path: object) -> str:
    """The path in quotes, shortened in the middle if long."""
    text = printable(repr(os.fspath(path) if isinstance(path, str | os.PathLike) else path))
    return text if len(text) <= 200 else text[:100] + "…" + text[-99:]
