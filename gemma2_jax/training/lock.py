"""A lock that lets one run at a time use a working directory, and is freed however its process ends.

Two runs in one folder would delete each other's checkpoints. The lock is kept by the operating system, not by the
contents of the file WORKDIR/run.lock, which only say who has it; the file stays when the run ends.
"""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from gemma2_jax.cluster import hosts
from gemma2_jax.convert.files.folder import explain_write_failure


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it during the block. Process 0 does it for all of them.

    Raises ValueError where another run has the folder, and OSError where it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with hosts.process_zero_first("lock_workdir"):
            if jax.process_index() == 0:
                stack.enter_context(_lock_file(workdir / "run.lock"))
        yield


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    with explain_write_failure(path.parent, "give another --workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "which has only begun"
            raise ValueError(
                f"another run writes to {path.parent} ({owner}); give another --workdir, or wait until it has ended"
            ) from error
        except OSError as error:  # such as NFS without its lock service
            print(
                f"warning: {path.parent} cannot be locked ({error.strerror}); see to it that no other run uses it",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
