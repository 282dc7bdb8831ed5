"""A window of steps recorded as an XLA trace, which XProf and TensorBoard open and `profile_tables` reads.

The window is that of the config, or begins when it is asked for: by SIGUSR2, or by a file in the working directory.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax

from gemma2_jax.cluster import jax_internals
from gemma2_jax.config import Config
from gemma2_jax.training import profile_tables
from gemma2_jax.training.metrics import Metrics

REQUEST_FILE = "profile.request"
REQUESTED_STEPS = 3  # in a trace that is asked for, where the config has no number
_LOOK_SECONDS = 5.0  # between two looks for the file
_WRITE_ERRORS = (OSError, jax.errors.JaxRuntimeError)  # of a disk that is full


class Trace:
    """Records steps of this process into WORKDIR/profile. Use as a context manager.

    The devices are waited for while a trace is started and stopped, so that it holds whole steps and nothing else: it
    ends before an evaluation or a save, even where more steps are asked for.
    Process 0 looks for WORKDIR/profile.request; a signal asks the process that gets it.
    """

    def __init__(self, config: Config, start_step: int, log: Metrics, train_step: jax.stages.Compiled):
        self._output, self._last_step = config.output, config.steps
        self._folder = config.output / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process-{jax.process_index()}"  # a trace is named after its host, which may run several
        self._steps = config.profile.steps or REQUESTED_STEPS
        evaluations = [config.train.eval_every] if config.data.has_eval and config.train.eval_every else []
        self._breaks = [config.train.checkpoint_every, *evaluations]  # every so many steps something else is done
        self._begin = start_step + config.profile.start + 1 if config.profile.steps else None
        self._log, self._train_step = log, train_step
        self._window = range(0)  # the steps being traced
        self._taken = start_step
        self._is_signaled = False
        self._next_look = 0.0
        self._former_handler: Any = None
        self.folder: Path | None = None  # of the last trace that was written

    def __enter__(self) -> "Trace":
        if threading.current_thread() is threading.main_thread():  # others may not handle signals
            self._former_handler = signal.signal(signal.SIGUSR2, self._take_signal)
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: Any) -> None:
        if self._former_handler is not None:
            signal.signal(signal.SIGUSR2, self._former_handler)
        if not self._window:
            return
        if failed is None and self._taken in self._window:  # the run was told to stop, or got no better
            self._finish()
        else:
            with contextlib.suppress(*_WRITE_ERRORS):  # what the run fails for is to be said
                _stop_trace()

    def before_step(self, step: int) -> None:
        """Starts a trace before this step if one is due or asked for."""
        if not self._window and (step == self._begin or self._is_requested()):
            with self._log.pause():
                jax.profiler.start_trace(self._folder)
            self._window = range(step, self._find_last(step) + 1)

    def _find_last(self, step: int) -> int:
        """The last step of a trace that begins with this one: what comes between steps would be counted as theirs."""
        breaks = (step - 1 + every - (step - 1) % every for every in self._breaks)
        return min(step + self._steps - 1, self._last_step, *breaks)

    def after_step(self, step: int) -> None:
        """Stops the trace after the last step of its window, and writes what is to lie beside it."""
        self._taken = step
        if self._window and step == self._window[-1]:
            self._finish()

    def _finish(self) -> None:
        """Ends the trace after the last step that was taken. Where it cannot be written, that is said."""
        steps, self._window = range(self._window[0], self._taken + 1), range(0)
        which = f"step {steps[0]} is" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]} are"
        with self._log.pause():
            try:
                _stop_trace()
                folder = max((self._folder / "plugins" / "profile").iterdir())  # named by the time
                jax.profiler.save_device_memory_profile(str(folder / "memory.prof"))
                self._write_scopes(folder, steps)
                self.folder, text = folder, f"{which} traced in {folder}"
            except _WRITE_ERRORS as error:
                text = f"{which} not traced, as {self._folder} could not be written to ({error}); training goes on"
        self._log.log_event(steps[-1], "profile", text)

    def _write_scopes(self, folder: Path, steps: range) -> None:
        program = self._train_step.as_text() or ""
        partial = folder / f"{profile_tables.SCOPES_FILE}.partial"
        partial.write_text(profile_tables.scopes_json(program, steps[0], len(steps)))
        partial.replace(folder / profile_tables.SCOPES_FILE)

    def _take_signal(self, *_: Any) -> None:
        self._is_signaled = True

    def _is_requested(self) -> bool:
        if self._is_signaled:
            self._is_signaled = False
            return True
        if jax.process_index() != 0 or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_SECONDS
        try:
            os.unlink(self._output / REQUEST_FILE)
        except OSError:  # there is none, or what has this name is a folder
            return False
        return True


def _stop_trace() -> None:
    """Ends JAX's trace, and writes it. Raises one of _WRITE_ERRORS where it cannot be written, as the disk is full."""
    try:
        jax.profiler.stop_trace()
    finally:
        jax_internals.reset_profiler()
