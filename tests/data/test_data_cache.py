"""Locks of the cache, on file systems that have them and others."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

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
