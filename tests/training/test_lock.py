"""One run at a time in a working directory, and folders that cannot be written to."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small

from gemma2_jax.training import loop
from gemma2_jax.training.lock import lock_workdir


def test_a_second_run_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the refusal comes before any data is looked for
    owner = rf"another run writes to {tmp_path} \(pid {os.getpid()} on {re.escape(socket.gethostname())}\); give"
    with lock_workdir(tmp_path):
        before = (tmp_path / "run.lock").read_text()
        with pytest.raises(ValueError, match=owner):
            loop.train(small("tiny_lora", tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        assert (tmp_path / "run.lock").read_text() == before
    with lock_workdir(tmp_path):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = f"""
import pathlib, time
from gemma2_jax.training.lock import lock_workdir
with lock_workdir(pathlib.Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"pid {process.pid} on "), lock_workdir(tmp_path):
        pass
    process.kill()
    process.communicate()
    with lock_workdir(tmp_path):
        assert f"pid {os.getpid()} on " in (tmp_path / "run.lock").read_text()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_workdir(tmp_path):
        said = f"warning: {tmp_path} cannot be locked (No locks available); see to it that no other run uses it\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("case", ["a file", "below a file", "not permitted"])
def test_a_workdir_that_cannot_be_written(case, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    workdir = tmp_path / {"a file": "file", "below a file": "file/run", "not permitted": "run"}[case]
    reason = rf"{tmp_path}/file is a file"
    if case == "not permitted":  # which holds for root too, who runs the tests in a container

        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(workdir))

        monkeypatch.setattr(os, "mkdir", refuse)
        reason = f"{workdir}: Permission denied"
    with (
        pytest.raises(OSError, match=rf"^{workdir} cannot be written to \({reason}\); give another --workdir$"),
        lock_workdir(workdir),
    ):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "checkpoints", "best", "tensorboard"])
def test_what_has_the_name_of_what_a_run_writes(name, tmp_path):
    """Said at the start, not when it is first written to, and without waiting for a reader of a pipe."""
    kind = "file" if "." in name else "folder"
    end = f"and the run writes a {kind} of that name; move it away, or give another --workdir"
    for make in (os.mkfifo, Path.mkdir if kind == "file" else Path.touch, lambda path: path.symlink_to("nowhere")):
        make(tmp_path / name)
        with (
            pytest.raises(ValueError, match=f"^{tmp_path / name} is not a {kind}, {end}$"),
            lock_workdir(tmp_path),
        ):
            pass
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
