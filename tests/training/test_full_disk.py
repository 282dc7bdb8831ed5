"""Disks that fill up while a run is under way, of its working directory or of its log: the run goes on, and says so.

/dev/full takes no byte of what is written to it, as a full disk does.
"""

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import small

from gemma2_jax import command_line, train
from gemma2_jax.cluster import hosts
from gemma2_jax.training.guard import Guard
from gemma2_jax.training.progress import ConsoleLines
from gemma2_jax.training.stopping import Stop
from gemma2_jax.training.trackers import MetricsFile

FULL = "/dev/full"
NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """A file that takes so many bytes more."""

    def __init__(self, room: int):
        self.room, self.data = room, b""

    def write(self, data) -> int:
        taken = bytes(data)[: self.room]
        if not taken:
            raise NO_ROOM
        self.room, self.data = self.room - len(taken), self.data + taken
        return len(taken)

    def close(self) -> None:
        pass


class Log(io.StringIO):
    """Standard output or standard error, whose writes fail with this error."""

    def __init__(self, error: OSError):
        super().__init__()
        self._error = error

    def write(self, *_):
        raise self._error


def test_lines_of_metrics_wait_for_room(capsys):
    lines = [{"step": step, "loss": step / 2} for step in range(5)]
    file = MetricsFile(Path("metrics.jsonl"))
    file._file = disk = Disk(40)  # one line and a part of the next
    for line in lines[:3]:
        file.log(line)
    said = "warning: metrics.jsonl cannot be written to (No space left on device); training goes on, and lines wait\n"
    assert capsys.readouterr().err == said
    disk.room = 1000
    file.log(lines[3])
    assert capsys.readouterr().err == "metrics.jsonl has the lines that waited\n"
    assert [json.loads(line) for line in disk.data.splitlines()] == lines[:4]
    disk.room = 0
    file.log(lines[4])
    file.close(failed=False)
    end = "warning: metrics.jsonl lacks the last 1 line(s) of this run (No space left on device)\n"
    assert capsys.readouterr().err == said + end


def test_a_log_without_room_ends_no_run(capsys, monkeypatch):
    shown = ConsoleLines(Console(file=Log(NO_ROOM)), start_step=0, steps=2)
    for step in (1, 2):
        shown.log({"step": step, "event": "skip", "text": "skipped"})
    said = "warning: standard output cannot be written to (No space left on device); training goes on\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(Console, "on_broken_pipe", sys.exit)  # as rich ends the process
    with pytest.raises(SystemExit):
        ConsoleLines(Console(file=Log(BrokenPipeError())), start_step=0, steps=2).print("read by nobody")


def test_standard_error_without_room_ends_nothing(tmp_path, monkeypatch):
    """Neither the thread that follows a write, nor the loop in which a signal comes, nor the watchdog."""
    full = os.open(FULL, os.O_WRONLY)
    monkeypatch.setattr(hosts, "_STDERR", full)
    monkeypatch.setattr(sys, "stderr", Log(NO_ROOM))
    command_line.notify("the checkpoint of step 5 was not saved")
    stop = Stop(small("tiny_lora", tmp_path), 0)
    stop._take(signal.SIGTERM, None)
    assert stop.ends_before(1) and stop.reason == "SIGTERM"
    monkeypatch.setattr(os, "_exit", sys.exit)
    for end in (hosts._end_process, lambda reason, status: train._end_process(status, reason)):
        with pytest.raises(SystemExit) as raised:
            end("was interrupted", 75)
        assert raised.value.code == 75
    os.close(full)


def test_documents_of_a_skip_that_cannot_be_listed(tmp_path):
    (tmp_path / "skipped.jsonl").symlink_to(FULL)
    guard = Guard(small("tiny_lora", tmp_path), lambda _: "the loss is not finite", lambda _: [{"text": "Hi"}])
    said = guard.see(1, {"loss": float("nan"), "grad_norm": 1.0, "taken": False})
    assert said.endswith(
        f"its documents cannot be listed, as {tmp_path}/skipped.jsonl cannot be written to (No space left on device)"
    )


def test_how_far_a_run_got_is_read_from_the_end_of_its_metrics(tmp_path):
    """Which may be long; and it got as far as its newest checkpoint, where its metrics lack the last lines."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(50_000))
    assert train.describe_interruption(tmp_path).startswith("interrupted after step 49999; no checkpoint is kept")
    (tmp_path / "checkpoints" / "50003").mkdir(parents=True)
    assert train.describe_interruption(tmp_path).startswith(
        "interrupted after step 50003; the checkpoint of step 50003"
    )
