"""Whether a run has been told to stop, and after which step all of its processes do.

SIGTERM, SIGUSR1, Ctrl-C and `train.stop_after` end a run after the step under way. Any of its processes may be told,
and the others learn of it. They must end after the same step, as no step can be taken without one of them, and at that
moment each may have begun another one. So a thread in each of them holds its training loop before its next step, says
which step it has begun, and reads the same of the others; the newest of these steps is the last that all of them take.
No thread waits for a device meanwhile, and in a run that nobody stops the loop only reads a variable.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import jax

from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config, read_duration

_POLL_SECONDS = 0.5  # between looks at whether another process has been told


class Stop:
    """Use as a context manager around the steps of a run: during the block, signals are taken as requests to stop.

    A second Ctrl-C raises KeyboardInterrupt at once. Signals are left as they are outside the main thread, which alone
    may change them.
    """

    def __init__(self, config: Config, start_step: int):
        self._begun = start_step  # the newest step that this process has begun
        self._last: int | None = None  # the last step of the run, once that is known
        self._told = hosts.ignored_signal()  # what this process was told to stop by
        self.reason = ""  # what the run was told to stop by, once its last step is known
        self._lock = threading.Lock()  # held while the processes agree, so that none begins a step
        self._ended = threading.Event()
        self._deadline = time.monotonic() + read_duration(config.train.stop_after) - seconds_since_start()
        self._timed_reason = f"train.stop_after {config.train.stop_after}"
        self._handlers = {}
        self._thread = threading.Thread(target=self._agree, name="agree_on_stop", daemon=True)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._take)
        if jax.process_count() > 1:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        """Takes a signal. It may come between any two instructions, so this locks nothing and only notes it."""
        name = hosts.INTERRUPT if number == signal.SIGINT else signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._told:
            self._told = name
            again = "; once more, and it ends at once" if number == signal.SIGINT else ""
            hosts.write_stderr(f"\n{name}: the run stops after this step, and saves it{again}\n")

    def ends_before(self, step: int) -> bool:
        """Whether the run is to end before this step, which otherwise begins. Every process asks before every step."""
        if time.monotonic() > self._deadline and not self._told:
            self._told = self._timed_reason
        if self._told and jax.process_count() == 1:
            self.reason, self._last = self._told, self._begun
        with self._lock:
            if self._last is not None and step > self._last:
                return True
            self._begun = step
        return False

    def _agree(self) -> None:
        """Waits until a process of the run has been told to stop, and finds the last step with the others.

        Where another process has ended, after its last step or as it failed, there is no answer to wait for.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError, TimeoutError):
            while not hosts.read_notice("stop"):
                if self._told:
                    hosts.post_notice("stop", self._told)
                elif self._ended.wait(_POLL_SECONDS):
                    return
            with self._lock:
                answers = hosts.gather_answers("stop after", str(self._begun))
                self._last, self.reason = max(map(int, answers)), hosts.read_notice("stop")


def seconds_since_start() -> float:
    """How long this process has been running (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
