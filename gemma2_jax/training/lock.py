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

_LOCK = "run.lock"
# What a run writes into its folder; some of it hours after its start.
_FILES = (_LOCK, "config.txt", "metrics.jsonl", "environment.json", "skipped.jsonl")
_FOLDERS = ("checkpoints", "tokenizer", "adapters", "best", "profile", "tensorboard", "trackers")


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it during the block. Process 0 does it for all of them.

    Raises ValueError where another run has the folder, or something else has the name of what a run writes into it, and
    OSError where it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with hosts.process_zero_first("lock_workdir"):
            if jax.process_index() == 0:
                stack.enter_context(_lock_file(workdir / _LOCK))
        yield


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    with explain_write_failure(path.parent, "give another --workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_names(path.parent)
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


def _check_names(workdir: Path) -> None:
    """Raises ValueError where what a run writes cannot have its name, before the run has taken a step."""
    for names, kind, is_kind in ((_FILES, "file", Path.is_file), (_FOLDERS, "folder", Path.is_dir)):
        for path in (workdir / name for name in names):
            if os.path.lexists(path) and not is_kind(path):
                raise ValueError(
                    f"{path} is not a {kind}, and the run writes a {kind} of that name; move it away, or give another "
                    "--workdir"
                )
