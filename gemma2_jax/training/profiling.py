"""A window of steps recorded as an XLA trace, which XProf and TensorBoard open."""

import jax

from gemma2_jax.config import Config


class Trace:
    """Records steps [start, start + steps) of this process into WORKDIR/profile. Use as a context manager."""

    def __init__(self, config: Config, first_step: int):
        self._folder = config.output / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process-{jax.process_index()}"  # a trace is named after its host, which may run several
        self._start = first_step + config.profile.start + 1
        self._stop = self._start + config.profile.steps
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        self._finish()

    def before_step(self, step: int) -> None:
        """Starts or stops the trace where `step` is the first one in, or out of, the window."""
        if step == self._stop:
            self._finish()
        elif self._start <= step < self._stop and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def _finish(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
