"""How long a step, a batch or a save may take, and what is said of one that takes longer."""

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small_runs import small

from gemma2_jax.cluster import coordinator, hosts
from gemma2_jax.config import GuardConfig
from gemma2_jax.training import watchdog


@pytest.fixture
def reports(monkeypatch) -> list[str]:
    """What the watchdog says as it ends the run, which here goes on."""
    said: list[str] = []
    monkeypatch.setattr(hosts, "end_stuck", said.append)
    return said


def guarded(tmp_path, seconds: float):
    return replace(small("tiny_lora", tmp_path, steps=3), guard=GuardConfig(stuck_seconds=seconds))


def test_how_long_something_may_take_is_learned(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = watchdog.Watchdog(guarded(tmp_path, 1.0))
    assert watch.allowed_seconds("step") == 6, "the first of a kind has no example"
    for kind, count, seconds in (("step", 2, 1.0), ("batch", 1, 1.5), ("step", 1, 0.25), ("checkpoint", 1, 0.75)):
        watch.begin(kind, 4, count)
        now[0] += seconds
    watch.begin("step", 5)
    assert watch.allowed_seconds("step") == 5 * 0.5
    assert watch.allowed_seconds("step", count=10) == 5 * 0.5 * 10
    assert watch.allowed_seconds("batch") == 5 * 1.5
    assert watch.allowed_seconds("evaluation") == 6
    assert watch.allowed_seconds("checkpoint") == 5 * 0.75 + 3600, "it may wait for the write before it"
    watch._floor = 600.0
    assert watch.allowed_seconds("step", count=10) == 600


@pytest.mark.parametrize("kind", ["batch", "evaluation", "checkpoint"])
def test_what_takes_too_long_is_named(kind, reports, tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_PERIOD_SECONDS", 0.01)
    beats = []
    monkeypatch.setattr(hosts, "send_heartbeat", beats.append)
    watch = watchdog.Watchdog(guarded(tmp_path, 1))
    watch._floor = 0.05
    with watch:
        watch._extra = {}
        for step in (1, 2):
            watch.begin(kind, step)
        deadline = time.monotonic() + 10
        while not reports and time.monotonic() < deadline:
            time.sleep(0.01)
    doing = {
        "batch": "waiting for the batch of step 2",
        "evaluation": "evaluating after step 2",
        "checkpoint": "saving step 2",
    }
    [said] = reports
    assert said.startswith(f"has been {doing[kind]} for 0 s, and may take 0 s for it (guard.stuck_seconds is 0.05)")
    assert beats[-1] == doing[kind]


def test_time_in_which_the_process_was_stopped_is_not_counted(reports, tmp_path, monkeypatch):
    """As by Ctrl-Z: the thread has not looked meanwhile, and what took so long is no example for others."""
    now = [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = watchdog.Watchdog(guarded(tmp_path, 100.0))

    class Looks:
        """An event that ends the watch after some looks, between which time passes."""

        def __init__(self, *passed: float):
            self.passed = iter(passed)

        def wait(self, seconds: float) -> bool:
            step = next(self.passed, None)
            now[0] += step or 0.0
            return step is None

    watch.begin("step", 1)
    watch._ended = Looks(1.0, 1.0, 5000.0, 1.0)
    watch._watch()
    assert reports == []
    assert watch._activity.seconds == 1 + 1 + 2 + 1
    watch.begin("batch", 2)
    assert watch._longest["step"] <= 1 + 1 + 2 + 1 + 2
    watch.begin("step", 2)
    watch._ended = Looks(*[1.0] * 200)
    watch._watch()
    assert reports[0].startswith("has been waiting for the end of step 2 for 101 s, and may take 100 s for it")


def test_a_run_that_is_not_to_be_watched_is_not(tmp_path, monkeypatch):
    before, beats = threading.active_count(), []
    monkeypatch.setattr(hosts, "send_heartbeat", beats.append)
    with watchdog.Watchdog(guarded(tmp_path, 0)) as watch:
        watch.begin("step", 1)
        assert threading.active_count() == before and beats == [""]


@pytest.mark.parametrize("seconds", [1e-3, -1.0, math.inf, math.nan])
def test_times_in_which_nothing_can_be_watched_are_refused(seconds):
    end = "so give at least 1, or 0 to let everything" if seconds == 1e-3 else "must not be negative, nor infinite"
    with pytest.raises(ValueError, match=f"guard.stuck_seconds is {seconds}; .*{end}"):
        GuardConfig(stuck_seconds=seconds)


class Recorder:
    """A connection of the coordinator to a process, which keeps what is written to it."""

    def __init__(self):
        self.text = b""

    def write(self, text: bytes) -> None:
        self.text += text


WAITING = "waiting for the batch of step 7"
ALIKE = "so have all others, so that what connects them may be the reason"
UNHEARD = "process 1 on b (pid 1) has not been heard of at its steps"
SILENT = "process 1 on b (pid 1) has not answered for 33 s, and was waiting for the batch of step 7 then"
VERDICTS = {
    "stopped": ({1: (70.0, WAITING)}, SILENT),
    "waiting": ({1: (103.0, WAITING)}, f"process 1 on b (pid 1) is {WAITING}"),
    "alike": ({1: (103.0, "starting step 7")}, ALIKE),
    "unheard": ({}, UNHEARD),
    "done": ({1: (math.inf, "done with its steps")}, "process 1 on b (pid 1) is done with its steps"),
    "ended": ({1: (70.0, "starting step 6"), 2: (60.0, "evaluating after step 6")}, ALIKE),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_process_that_others_wait_for_is_named(case, monkeypatch):
    heartbeats, reason = VERDICTS[case]
    now = [100.0]
    monkeypatch.setattr(coordinator, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(coordinator, "_HEARTBEAT_SECONDS", 0)

    async def report() -> list[bytes]:
        meeting = coordinator.Coordinator(3, 60)
        writers = {index: Recorder() for index in range(3)}
        meeting._writers, meeting._names = writers, {at: f"process {at} on {'abc'[at]} (pid {at})" for at in range(3)}
        meeting._gone = {1, 2} if case == "ended" else set()
        meeting._heartbeats = {0: (99.0, "starting step 7"), 2: (103.0, "starting step 7"), **heartbeats}
        meeting._call_out(meeting._end_stuck, 0, "has been starting step 7 for 60 s")
        now[0] = 103.0
        await asyncio.sleep(0.01)
        return [writer.text for writer in writers.values()]

    [verdict] = set(asyncio.run(report()))
    text = f"process 0 on a (pid 0) has been starting step 7 for 60 s; {reason}"
    assert verdict.decode() == f'{{"verdict": "{text}", "status": 76}}\n'


PREPARES = (70.0, coordinator.PREPARING)


@pytest.mark.parametrize(
    ("heartbeats", "reason"),
    [
        (
            {0: PREPARES, 1: (108.0, coordinator.PREPARING)},
            "process 0 has not answered for 40 s, and was preparing its",
        ),
        ({0: (98.0, coordinator.PREPARING), 1: (108.0, coordinator.PREPARING)}, ""),
        ({0: (70.0, "saving step 9"), 1: (108.0, coordinator.PREPARING)}, ""),
    ],
)
def test_a_process_that_stands_still_before_its_steps_is_named(heartbeats, reason, monkeypatch):
    now = [109.0]
    monkeypatch.setattr(coordinator, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(coordinator, "_HEARTBEAT_SECONDS", 0)
    monkeypatch.setattr(coordinator, "_PREPARING_SECONDS", 30)

    async def look() -> bytes:
        meeting = coordinator.Coordinator(2, 60)
        meeting._writers, meeting._names = {0: Recorder(), 1: (told := Recorder())}, {0: "process 0", 1: "process 1"}
        meeting._heartbeats = heartbeats
        meeting._look()
        now[0] = 110.0
        await asyncio.sleep(0.01)
        return told.text

    told = asyncio.run(look())
    assert told == (f'{{"verdict": "{reason} first step then", "status": 76}}\n'.encode() if reason else b"")


def test_heartbeats_begin_before_the_steps(monkeypatch):
    """And end with those of the steps; without a watch on these, none is waited for."""
    sent = []
    connection = hosts._CoordinatorConnection.__new__(hosts._CoordinatorConnection)
    connection._at_steps, connection._send = threading.Event(), lambda **message: sent.append(message)
    monkeypatch.setattr(hosts, "_PERIOD_SECONDS", 0.001)
    thread = threading.Thread(target=connection.send_first_heartbeats)
    thread.start()
    while len(sent) < 2:
        time.sleep(0.001)
    connection.send_heartbeat("")
    thread.join(10)
    assert sent[:2] == [{"heartbeat": coordinator.PREPARING}] * 2 and sent.count({"heartbeat": ""}) == 1


async def follow(*messages: dict, is_gone: bool) -> list[bytes]:
    """What two processes are told when the first has sent these messages, and the second has failed in a collective."""
    meeting, reader = coordinator.Coordinator(2, 60), asyncio.StreamReader()
    writers = {index: Recorder() for index in range(2)}
    meeting._writers, meeting._names = writers, {0: "process 0", 1: "process 1"}
    for message in messages:
        reader.feed_data(json.dumps(message).encode() + b"\n")
    if is_gone:
        reader.feed_eof()
    following = asyncio.create_task(meeting._follow(0, reader))
    await asyncio.sleep(0.01)
    meeting._call_out(meeting._end_silent, 1, "failed: a collective")
    await asyncio.sleep(0.01)
    following.cancel()
    return [writer.text for writer in writers.values()]


def test_a_process_that_has_left_its_steps_is_not_silent(monkeypatch):
    """The failure of process 1 has another reason, which a verdict of silence would hide."""
    monkeypatch.setattr(coordinator, "_HEARTBEAT_SECONDS", 0)
    saving = {"heartbeat": "saving step 9"}
    [verdict] = set(asyncio.run(follow(saving, is_gone=False)))
    assert b"process 1 failed: a collective; process 0 has not answered for 0 s, and was saving step 9" in verdict
    assert asyncio.run(follow(saving, {"heartbeat": ""}, is_gone=False)) == [b"", b""]
    assert asyncio.run(follow({"heartbeat": coordinator.PREPARING}, is_gone=False)) == [b"", b""]


def test_the_verdict_of_a_process_that_has_ended_since_is_its_own(monkeypatch):
    """The coordinator was stopped meanwhile: it reads that the process is stuck, and that it is gone."""
    monkeypatch.setattr(coordinator, "_HEARTBEAT_SECONDS", 0)
    [verdict] = set(asyncio.run(follow({"stuck": "has been saving step 9 for 9 s"}, is_gone=True)))
    assert b"process 0 has been saving step 9 for 9 s" in verdict and b'"status": 76' in verdict


def test_the_end_of_the_steps_is_told(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(hosts, "send_heartbeat", beats.append)
    with watchdog.Watchdog(guarded(tmp_path, 600)) as watch:
        watch.begin("step", 1)
    assert beats[-1] == ""


def test_one_process_ends_by_itself_with_its_stacks():
    code = "def stuck():\n    hosts.end_stuck('has been saving step 5 for 9 s')\n"
    ended = subprocess.run(
        [sys.executable, "-c", f"from gemma2_jax.cluster import hosts\n{code}stuck()"], capture_output=True, text=True
    )
    assert ended.returncode == 76, ended.stderr
    assert 'File "<string>", line 3 in stuck' in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: process ") and " has been saving step 5 for 9 s; every process ends here." in last


def test_an_interactive_session_is_left_alone(monkeypatch, capfd):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    hosts.end_stuck("has been saving step 5 for 9 s")
    assert capfd.readouterr().err.splitlines()[-1].startswith("warning: process ")
