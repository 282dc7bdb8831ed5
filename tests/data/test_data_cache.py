"""Locks of the cache, on file systems that have them and others."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from gemma2_jax.data.cache import hold_lock

HOLD = """
import pathlib, sys, time
from gemma2_jax.data.cache import hold_lock
with hold_lock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_process_that_was_killed_has_no_lock(tmp_path, caplog):
    path = tmp_path / "store"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        assert (tmp_path / "store.lock").read_text() == f"pid {process.pid} on {socket.gethostname()}\n"
        process.kill()
    with hold_lock(path) as lock:
        assert lock.name_partial(path) == tmp_path / "store.partial"
        assert (tmp_path / "store.lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"
    assert not caplog.messages


def test_without_locks_each_process_has_its_own_name(tmp_path, monkeypatch):
    """And what killed processes of this host have left is removed, a folder or a file."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    kept = [f"store.{host}-{os.getppid()}", f"store.else-{ended.pid}", f"other.{host}-{ended.pid}"]
    for name in (*kept, f"store.{host}-{ended.pid}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").touch()
    (tmp_path / f"plan.{host}-{ended.pid}").touch()
    with hold_lock(tmp_path / "store") as lock:
        assert lock.name_partial(tmp_path / "store") == tmp_path / f"store.{host}-{os.getpid()}"
        assert lock.name_partial(tmp_path / "plan.npy") == tmp_path / f"plan.{host}-{os.getpid()}"
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "store.lock"}


def test_a_lock_whose_folder_was_removed_is_made_again(tmp_path):
    """The one that waited for it would have a lock that nobody else sees."""
    path, entered, seen = tmp_path / "partial" / "build", threading.Event(), []

    def wait_and_enter() -> None:
        with hold_lock(path):
            entered.set()
            with path.with_suffix(".lock").open("a+") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(path.with_suffix(".lock").read_text())

    with hold_lock(path):
        waiting = threading.Thread(target=wait_and_enter)
        waiting.start()
        assert not entered.wait(0.2)
        shutil.rmtree(path.parent)
    waiting.join(10)
    assert seen == [f"pid {os.getpid()} on {socket.gethostname()}\n"]
