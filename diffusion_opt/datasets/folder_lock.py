"""One run for each working folder: the second one is told who is at work there.

Two runs that write to one folder overwrite each other's files, and one of them ends with an error about a file that
vanished, or worse, without one. `folder_lock` holds a file in the folder by `flock`. The kernel gives such a lock up
when its process ends, in whatever way, so a lock left by a killed run stops nobody. The file says who holds it.

The processes that torchrun starts are one run. The first of them takes the lock; the trainer tells the others.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


class FolderInUseError(OSError):
    """Another run works in the folder; the message says which."""


@contextmanager
def folder_lock(folder: Path, work: str = "run") -> Iterator[None]:
    """Hold `folder` for one kind of work while the block runs. Makes the folder if it is not there.

    Locks of different `work` do not exclude each other. Raises FolderInUseError, naming the process that holds it, if
    another one does. On a file system that has no locks a warning says so and the block runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{work}.lock"
    descriptor = _take(path, folder, work)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: `_take` notices that its file has no name any more
        os.close(descriptor)


def _take(path: Path, folder: Path, work: str) -> int:
    """An open descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise FolderInUseError(
                f"{folder} is in use ({work}) by {holder}; wait until it has ended, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run in it", stacklevel=4)
            return descriptor
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its holder gave it up, and removed the file, between our two calls


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _this_process() -> dict[str, str | int]:
    started = datetime.now().isoformat(sep=" ", timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": started, "command": " ".join(sys.argv)[:300]}


def _holder(content: bytes) -> str:
    if not content:
        return "a process that has only just started"
    told = json.loads(content)
    return f"process {told['process']} on {told['host']} since {told['since']} ({told['command']})"
