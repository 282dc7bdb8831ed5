"""Locks of what is kept in the cache, which runs and hosts share: one process makes it, and the others wait.

A lock is kept by the operating system, and is free when the last process that has it has ended, however it ended. It is
a file beside what it locks, NAME.lock, which stays; its contents only say who had it last. What is being made has a
name of its own until it is whole, and that name is the same after a kill, so that what was left is used or replaced.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock that this process has."""

    descriptor: int | None  # of the open file: a child that inherits it has the lock too; None: there are no locks

    def name_partial(self, path: Path) -> Path:
        """What `path` is called until it is whole.

        On a file system without locks, each process has a name of its own, and the last to finish gives `path` its
        name. What processes of this host have left there, who were killed, is removed.
        """
        if self.descriptor is not None:
            return path.with_suffix(".partial")
        mine = f"{path.stem}.{socket.gethostname()}-"
        for leftover in path.parent.glob(f"{mine}*"):
            process = leftover.name.removeprefix(mine)
            if process.isdigit() and not Path("/proc", process).exists():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        return path.with_suffix(f".{socket.gethostname()}-{os.getpid()}")


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[Lock]:
    """Keeps other processes from making what `path` names, or what is in it, during the block.

    Where another process has the lock, a warning says which, and this one waits for it. The other may have removed the
    folder by then, which is made again. Raises OSError if it cannot be written to.
    """
    file, has_lock = _open_lock(path)
    with file:
        if has_lock:
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield Lock(descriptor=file.fileno() if has_lock else None)  # released when the file is closed


def _open_lock(path: Path) -> tuple[TextIO, bool]:
    """The file that stands for the lock, and whether it could be locked, when no other process has it."""
    name = path.with_suffix(".lock")
    while True:
        name.parent.mkdir(parents=True, exist_ok=True)
        file = name.open("a+")
        try:
            _acquire(file.fileno(), path)
        except OSError:  # such as NFS without its lock service
            return file, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), name.stat()):
                return file, True
        file.close()  # it is another now, or none


def _acquire(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = ""
        with contextlib.suppress(FileNotFoundError):
            owner = path.with_suffix(".lock").read_text().strip()
        owner = owner or "which has only begun"
        logger.warning("another process (%s) makes %s; this one waits until it has ended", owner, path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
