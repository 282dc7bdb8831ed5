"""Whether a run is stuck: a step, a batch, a save or the like that takes much longer than those before it.

A process that waits for a GPU, for the network or for a disk may wait for ever, and cannot see it itself. So a thread
of each process looks at what the training loop is doing, and for how long. Where that is longer than it may be, all
processes end with a status by which a launcher starts them again, and say which of them is stuck or silent, where, and
what its threads are doing.

How long something may take is learned: five times the longest so far of its kind, and at least `guard.stuck_seconds`.
The first of a kind may take six times that, as it has no example and may have to connect, to read or to compile.

A process whose interpreter stands still cannot say so, as when it is stopped by SIGSTOP. The others wait for it then,
and the coordinator names it by its silence. Time in which this process itself was stopped is not counted.
"""

import threading
import time
from dataclasses import dataclass
from typing import Literal

from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config

type Kind = Literal["batch", "dispatch", "step", "evaluation", "samples", "checkpoint"]

_PHRASES: dict[Kind, str] = {
    "batch": "waiting for the batch of step {}",
    "dispatch": "starting step {}",
    "step": "waiting for the end of step {}",
    "evaluation": "evaluating after step {}",
    "samples": "making samples after step {}",
    "checkpoint": "saving step {}",
}
_LONGEST_FACTOR = 5  # of the longest of a kind so far, that one may take
_FIRST_FACTOR = 6  # of guard.stuck_seconds, that the first of a kind may take
_PERIOD_SECONDS = 1.0  # between looks at the loop, and heartbeats


@dataclass
class _Activity:
    """What the training loop is doing."""

    kind: Kind
    step: int
    count: int  # of such things that it waits for
    started: float  # by the clock
    seconds: float = 0.0  # for which the thread has seen it, less those in which the process was stopped

    def __str__(self) -> str:
        return _PHRASES[self.kind].format(self.step)

    @property
    def seconds_each(self) -> float:
        """How long each of the things took, if they end now."""
        return min(time.monotonic() - self.started, self.seconds + 2 * _PERIOD_SECONDS) / self.count


class Watchdog:
    """Watches the steps of a run. Use as a context manager around them; does nothing if `guard.stuck_seconds` is 0."""

    def __init__(self, config: Config):
        self._floor = config.guard.stuck_seconds
        # A save waits for the write before it, which has a deadline of its own.
        self._extra: dict[Kind, float] = {"checkpoint": config.train.save_deadline}
        self._longest: dict[Kind, float] = {}  # seconds of one, by kind
        self._activity: _Activity | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._floor:
            self._thread.start()
        else:
            hosts.send_heartbeat("")  # from here on, none is waited for
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._floor:
            self._thread.join(_PERIOD_SECONDS)

    def begin(self, kind: Kind, step: int, count: int = 1) -> None:
        """Says what the loop does from here on, of which step, and that it ends `count` things of its kind at once."""
        last, self._activity = self._activity, _Activity(kind, step, count, time.monotonic())
        if last is not None:
            self._longest[last.kind] = max(self._longest.get(last.kind, 0.0), last.seconds_each)

    def allowed_seconds(self, kind: Kind, count: int = 1) -> float:
        """How long so many of a kind may take."""
        longest = self._longest.get(kind)
        learned = self._floor * _FIRST_FACTOR if longest is None else longest * _LONGEST_FACTOR * count
        return max(self._floor, learned) + self._extra.get(kind, 0.0)

    def _watch(self) -> None:
        """Looks at the loop until its end, or until it has been doing one thing for too long."""
        looked = time.monotonic()
        while not self._ended.wait(min(_PERIOD_SECONDS, self._floor / 2)):
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * _PERIOD_SECONDS), now
            activity = self._activity
            if activity is None:
                continue
            activity.seconds += passed
            hosts.send_heartbeat(str(activity))
            allowed = self.allowed_seconds(activity.kind, activity.count)
            if activity.seconds > allowed:
                hosts.end_stuck(
                    f"has been {activity} for {activity.seconds:.0f} s, and may take {allowed:.0f} s for it "
                    f"(guard.stuck_seconds is {self._floor:g})"
                )
                return
        hosts.send_heartbeat("")
