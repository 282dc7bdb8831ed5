"""Runs that are told to stop: after which step they do, on one process and on several, and that nothing is lost."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from small_runs import lines_of, small

from gemma2_jax import config as configs
from gemma2_jax.cluster import hosts
from gemma2_jax.training import loop, stopping

pytestmark = pytest.mark.usefixtures("compiled_once")

DURATIONS = {"": float("inf"), "3h50m": 13_800, "90m": 5_400, "45s": 45, "1d2h": 93_600, "50": 0, "5 m": 0, "0s": 0}


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_times_are_read(text, seconds):
    assert configs.read_duration(text) == seconds
    if seconds == 0:
        with pytest.raises(ValueError, match=f"train.stop_after is '{text}'; it must be a time such as 3h50m"):
            configs.TrainConfig(stop_after=text)


def test_the_age_of_a_process_is_known():
    first = stopping.seconds_since_start()
    time.sleep(0.05)
    assert first + 0.04 < stopping.seconds_since_start() < first + 5
    assert 0 < first < 3600


def send_signal(step: int, number: int, times: int = 1):
    """What calls take_steps' `ends_before`, and sends this process a signal in the step after `step`."""
    ask = stopping.Stop.ends_before

    def ends_before(self, following):
        ended = ask(self, following)
        if following == step and not ended:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return ended

    return ends_before


@pytest.mark.parametrize("number", [signal.SIGUSR1])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(number, tmp_path, monkeypatch):
    whole = loop.train(small("tiny_lora", tmp_path / "whole", steps=6))
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(stopping.Stop, "ends_before", send_signal(3, number))
        stopped = loop.train(small("tiny_lora", tmp_path / "parts", steps=6))
    assert signal.getsignal(number) == handler
    assert (stopped.step, stopped.stopped) == (3, "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
    [event] = [line for line in lines_of(tmp_path / "parts") if "event" in line]
    assert (event["step"], event["event"], event["text"]) == (3, "stop", f"stopped by {stopped.stopped}")
    resumed = loop.train(small("tiny_lora", tmp_path / "parts", steps=6))
    assert (resumed.step, resumed.stopped, [*resumed.losses]) == (6, "", [4, 5, 6])
    assert stopped.losses | resumed.losses == whole.losses
    for path, value in whole.state.params.items():
        np.testing.assert_array_equal(value, resumed.state.params[path], err_msg=path)


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping.Stop, "ends_before", send_signal(2, signal.SIGINT, times=2))
    with pytest.raises(KeyboardInterrupt):
        loop.train(small("tiny_lora", tmp_path, steps=6))
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_the_time_of_a_run_may_be_limited(tmp_path, monkeypatch):
    config = small("tiny_lora", tmp_path, steps=6)
    ages = iter([100.0])
    monkeypatch.setattr(stopping, "seconds_since_start", lambda: next(ages))
    result = loop.train(replace(config, train=replace(config.train, stop_after="1m40s")))
    assert (result.step, result.stopped) == (0, "train.stop_after 1m40s")


class Board:
    """Notices and answers of several processes, here of as many threads."""

    def __init__(self, count: int):
        self.count, self.notices, self.answers, self.changed = count, {}, {}, threading.Condition()

    def gather(self, question: str, answer: str) -> list[str]:
        with self.changed:
            self.answers.setdefault(question, []).append(answer)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(self.answers[question]) == self.count, timeout=20)
            return self.answers[question]


@pytest.mark.parametrize("told", [(0,), (2,), (0, 1, 2)])
def test_processes_end_after_the_same_step(told, tmp_path, monkeypatch):
    """Three loops of different pace, of which some are told: all end after one step, and none goes beyond it."""
    board, taken = Board(3), {}
    monkeypatch.setattr(stopping, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(stopping.jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts, "post_notice", board.notices.__setitem__)
    monkeypatch.setattr(hosts, "read_notice", lambda topic: board.notices.get(topic, ""))
    monkeypatch.setattr(hosts, "gather_answers", board.gather)
    reached = threading.Barrier(3)  # a step is taken by all processes or by none, two steps at most ahead

    def run(index: int) -> None:
        with stopping.Stop(small("tiny_lora", tmp_path), 0) as stop:
            step = 0
            while not stop.ends_before(step + 1):
                step += 1
                if step == 20 and index in told:
                    stop._told = "SIGTERM"
                time.sleep(0.001 * index)
                reached.wait(timeout=20)
            taken[index] = (step, stop.reason)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(taken.values())) == 1, taken
    step, reason = taken[0]
    assert step >= 20
    assert reason == "SIGTERM"


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")]
)
def test_a_signal_that_python_ignored_stops_the_run_before_its_first_step(number, name, tmp_path):
    """As in a callback of the garbage collector, of which JAX has one."""
    with hosts.end_when_told():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with stopping.Stop(small("tiny_lora", tmp_path), 0) as stop:
            assert stop.ends_before(1)
            assert stop.reason == name
    with stopping.Stop(small("tiny_lora", tmp_path), 0) as stop:
        assert not stop.ends_before(1), "it was for the run before"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
