"""Atomic writes: a file is either the old version or the new one, never half of the new one."""

import contextlib
import errno
import fcntl
import os
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace `path` with what the block writes to the yielded path, or leave it untouched.

    The yielded path is `.{stem}.partial{suffix}` in the folder of `path`, an empty file at first.
    It keeps the suffix because some writers choose a format by it. When the block ends, the file is
    flushed to disk and renamed. When the block raises, the temporary file is removed. After
    `kill -9` or a power cut it stays behind, and the next write to the same target truncates it.
    A lock on it keeps two live processes apart; the system drops the lock when its owner dies.

    Give `torch.save` an `open(temporary, "wb")`, not the path: `torch.save` turns a full disk into
    a RuntimeError, and the OSError can be recovered from it only if a Python file raised it.

    Args:
        path: target file; missing folders are created.

    Yields:
        the temporary path to write to.

    Raises:
        OSError: the file cannot be written (full disk, no permission, a directory, another process
            is writing it). The message names the target and says that the previous file is intact.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        if target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _create_locked(temporary)
    except OSError as error:
        raise _not_saved(target, error) from error
    try:
        yield temporary
        # The writer may have replaced the inode: sync the file that will be renamed.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        disk_error = _disk_error(error)
        if disk_error is not None:
            raise _not_saved(target, disk_error) from error
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system drops a dead owner's lock.

    Raises:
        OSError: another process holds it; the message names the process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            message = f"in use by {owner}; wait for it, or stop it"
            raise OSError(errno.EBUSY, message, str(Path(path).parent)) from None
        except OSError as error:
            message = f"its file system cannot lock files: {error.strerror}"
            raise OSError(error.errno, message, str(Path(path).parent)) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held.add(descriptor)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


# Locks of `exclusive`. A forked process would keep them when its parent is killed.
_held: set[int] = set()


def _close_locks() -> None:
    for descriptor in _held:
        os.close(descriptor)


os.register_at_fork(after_in_child=_close_locks)


def _create_locked(temporary: Path) -> int:
    """Create `temporary`, or truncate an abandoned one; returns a locked descriptor."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and flock, the previous owner may have renamed this inode to the target. Then
        # it is not ours.
        if not (temporary.exists() and os.path.samestat(os.fstat(descriptor), os.stat(temporary))):
            raise BlockingIOError
        os.ftruncate(descriptor, 0)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise OSError(errno.EBUSY, "another process is writing it") from None
        raise
    return descriptor


def check_zip(path: str | os.PathLike[str]) -> None:
    """Compares the checksums in a file of `torch.save`, which `torch.load` does not do. A file that
    is no zip file passes.

    Raises:
        ValueError: one is wrong.
        zipfile.BadZipFile, zlib.error, OSError: the file is damaged otherwise.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")


def fsync_folder(folder: Path) -> None:
    """Flushes to disk what was created in the folder, or renamed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: BaseException) -> OSError | None:
    """`error` itself if it is an OSError, or the OSError that a writer was handling."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    return None


def _not_saved(target: Path, error: OSError) -> OSError:
    intact = "; the previous file is intact" if target.is_file() else ""
    reason = error.strerror or str(error)
    # OSError chooses the subclass (PermissionError, ...) from errno.
    return OSError(error.errno or errno.EIO, f"{target}: not saved: {reason}{intact}")
