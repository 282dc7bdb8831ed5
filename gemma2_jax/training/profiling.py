"""A window of steps recorded as an XLA trace, which XProf and TensorBoard open."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from gemma2_jax.config import Config


class Trace:
    """Records steps [start, start + steps) of this process into WORKDIR/profile. Use as a context manager.

    `pause` is entered while the trace is started and stopped. It waits for the steps dispatched before, so that the
    trace holds the whole window and nothing else.
    """

    def __init__(self, config: Config, start_step: int, pause: Callable[[], AbstractContextManager]):
        self._folder = config.output / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process-{jax.process_index()}"  # a trace is named after its host, which may run several
        self._window = range(0)
        if config.profile.steps:
            begin = start_step + config.profile.start + 1
            self._window = range(begin, min(begin + config.profile.steps, config.steps + 1))
        self._pause = pause
        self._running = False
        self.folder: Path | None = None  # where the trace is, once one has been written

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()

    def before_step(self, step: int) -> None:
        """Starts the trace before the first step of the window."""
        if self._window and step == self._window[0]:
            with self._pause():
                jax.profiler.start_trace(self._folder)
            self._running = True

    def after_step(self, step: int) -> None:
        """Stops the trace after the last step of the window."""
        if self._running and step == self._window[-1]:
            with self._pause():
                self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self.folder = self._folder
