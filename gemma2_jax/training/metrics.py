"""What a run measures while it trains, as lines of metrics.jsonl. `trackers` has where they go, `speed` how fast it is.

The loop hands over each step's metrics as arrays on the devices and goes on. They are read when a step is to be logged
and the step after it is under way, so that no device waits for the host; and before an evaluation or a save.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from gemma2_jax.cluster import devices
from gemma2_jax.config import Config
from gemma2_jax.training import trackers
from gemma2_jax.training.guard import Guard
from gemma2_jax.training.progress import perplexity
from gemma2_jax.training.speed import Speed
from gemma2_jax.training.watchdog import Watchdog

NOT_LOGGED = ("tokens", "taken", "fault")  # of a step's metrics, as they are not of its line


class Metrics:
    """Metrics of one run. Use as a context manager.

    `losses` and `eval_losses` hold what has been logged, by step, in nats per target token.
    """

    def __init__(
        self,
        config: Config,
        console: Console,
        *,
        start_step: int,
        guard: Guard,
        watchdog: Watchdog,
        eval_sources: Sequence[str] = (),  # names of the sources of held-out data
        count_epochs: Callable[[int], dict[str, float]] = lambda step: {},  # by source, where there are several
    ):
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self._config, self._console, self._start_step, self._guard = config, console, start_step, guard
        self._watchdog = watchdog
        self._eval_sources, self._count_epochs = eval_sources, count_epochs
        self._trackers: list[trackers.Tracker] = []
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []  # steps whose metrics have not been read
        self._counted_step = start_step  # the last step whose tokens the speed has counted
        self._speed = Speed(config)
        self._pause_started = math.nan  # when steps were last waited for, to do something else

    def __enter__(self) -> "Metrics":
        self._trackers = trackers.open_trackers(self._config, self._console, self._start_step)
        self._speed.start()
        return self

    def __exit__(self, failed, *_) -> None:
        with contextlib.ExitStack() as stack:  # one that cannot be closed leaves none of the others open
            for tracker in self._trackers:
                stack.push(functools.partial(_close_tracker, tracker, failed))
            if failed is None:
                self.flush()

    def log(self, line: Mapping[str, Any]) -> None:
        """Gives a line to every tracker: its step, and numbers, texts or lists of texts by name."""
        timed = {**line, "time": round(time.time(), 3)}
        for tracker in self._trackers:
            tracker.log(timed)

    def log_event(self, step: int, event: str, text: str) -> None:
        """Logs what happened after a step: what it is called, such as skip, and a sentence, which is shown."""
        self.log({"step": step, "event": event, "text": text})

    def wait(self) -> contextlib.AbstractContextManager[None]:
        """A block that gets the next batch. Its time counts as waiting where the step before has ended by then."""
        return self._speed.wait(lambda: all(_is_ready(values["tokens"]) for _, values in self._pending[-1:]))

    def step(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of `step`, which was just dispatched, and logs the step before it if that is due.

        The first step is read in any case: it is the watchdog's example of how long many of them may take.
        """
        if self._pending and (self._is_logged(step - 1) or step - 1 == self._start_step + 1):
            self._pending.append((step, values))
            self._read(step - 1)
        else:
            self._pending.append((step, values))

    def flush(self) -> None:
        """Waits for every step, and logs the last if that is due."""
        if self._pending:
            self._read(self._pending[-1][0])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for every step before the block, whose time is left out of the speed of training."""
        self.flush()
        self._speed.stop()
        self._pause_started = time.perf_counter()
        yield
        self._speed.start()

    def log_evaluation(self, step: int, losses: np.ndarray) -> None:
        """Logs a held-out loss (nats per target token): a scalar, or that of all sources and that of each.

        To be called at the end of the pause in which it was computed, whose seconds are logged too.
        """
        loss, *source_losses = np.atleast_1d(losses).tolist()
        named = zip(self._eval_sources, source_losses, strict=False)  # none of a single source
        by_set = {"": loss} | {f"/{name}": value for name, value in named if math.isfinite(value)}
        losses_by_set = {f"eval_loss{name}": value for name, value in by_set.items()}
        perplexities = {f"eval_perplexity{name}": round(perplexity(value), 4) for name, value in by_set.items()}
        self.eval_losses[step] = loss
        self.log({"step": step, **losses_by_set, **perplexities, "eval_seconds": self._paused_seconds()})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Logs what `samples.Sampler` has made, at the end of the pause in which it did."""
        self.log({"step": step, "samples": samples, "sample_seconds": self._paused_seconds()})

    def log_checkpoint(self, step: int) -> None:
        """Logs the seconds that training has stood still for a checkpoint, at the end of that pause."""
        self.log({"step": step, "checkpoint_seconds": self._paused_seconds()})

    def _paused_seconds(self) -> float:
        return round(time.perf_counter() - self._pause_started, 3)

    def _is_logged(self, step: int) -> bool:
        return step % self._config.train.log_every == 0 or step == self._config.steps

    def _read(self, step: int) -> None:
        """Waits for the steps up to this one, shows them to the guard, and logs this one if that is due."""
        count = sum(number <= step for number, _ in self._pending)
        self._watchdog.begin("step", step, count)
        ended, self._pending = self._pending[:count], self._pending[count:]
        read = jax.device_get([dict(values) for _, values in ended])
        for (number, _), values in zip(ended, read, strict=True):
            if text := self._guard.see(number, values):
                self.log_event(number, "spike" if values["taken"] else "skip", text)
            self._count_tokens(number, values)
        for number, values in self._pending:
            if _is_ready(values["tokens"]):  # on some platforms dispatching a step takes as long as the step itself
                self._count_tokens(number, values)
        if self._is_logged(step):
            self._log_step(step, {name: float(x) for name, x in read[-1].items() if name not in NOT_LOGGED})

    def _count_tokens(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self._counted_step:
            learned = float(values["target_tokens"])  # not finite where the batch itself is not
            self._speed.add_step(int(values["tokens"]), int(learned) if math.isfinite(learned) else 0)
            self._counted_step = step

    def _log_step(self, step: int, values: dict[str, float]) -> None:
        self.losses[step] = values["loss"]
        epochs = {f"epochs/{name}": round(epochs, 4) for name, epochs in self._count_epochs(step).items()}
        # A step may have no target tokens of a source; and JSON has only numbers that are finite.
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        skipped = {"skipped": self._guard.skipped}
        self.log({"step": step, **finite, **self._speed.measure(), **devices.measure_memory(), **skipped, **epochs})


def _close_tracker(tracker: trackers.Tracker, failed: type | None, flush_failed: type | None, *_: Any) -> None:
    tracker.close((failed or flush_failed) is not None)


def _is_ready(x: Any) -> bool:
    """Whether this array can be read without waiting. (`jax.Array` does not declare `is_ready`, hence Any.)"""
    return x.is_ready()
