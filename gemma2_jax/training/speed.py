"""How fast a run trains: tokens, FLOPs and waiting by the time of its steps."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from gemma2_jax.cluster import devices
from gemma2_jax.config import Config


@dataclass
class Window:
    """The steps since the last measurement."""

    steps: int = 0
    tokens: int = 0  # all but padding
    learned_tokens: int = 0  # whose prediction is learned
    seconds: float = 0.0  # in which steps were under way, waiting for data included
    wait_seconds: float = 0.0  # of them, in which the devices had no batch


class Speed:
    """Measures windows of steps, counting only the time in which steps were under way.

    The clock runs between `start` and `stop`. The speed of a window is that of the steps that ended in it.
    """

    def __init__(self, config: Config):
        self._config = config
        self._window = Window()
        self._started = math.nan
        self._measured: dict[str, float] = {}

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._window.seconds += time.perf_counter() - self._started

    @contextmanager
    def wait(self, is_idle: Callable[[], bool]) -> Iterator[None]:
        """Takes the time of the block, which gets the next batch, as waiting if the devices are idle at its end.

        If they are not, the batch came before it could be used.
        """
        started = time.perf_counter()
        yield
        if is_idle():
            self._window.wait_seconds += time.perf_counter() - started

    def add_step(self, tokens: int, learned_tokens: int) -> None:
        """Counts a step that has ended, with the tokens of its batch."""
        self._window.steps += 1
        self._window.tokens += tokens
        self._window.learned_tokens += learned_tokens

    def measure(self) -> dict[str, float]:
        """The numbers of the window, which ends here, by their names in metrics.jsonl.

        They are those of the window before if no step has ended since, whose time is then left to the next.
        """
        if not self._window.steps:
            return self._measured
        self.stop()
        window, self._window = self._window, Window()
        self._measured = self._compute(window)
        self.start()
        return self._measured

    def _compute(self, window: Window) -> dict[str, float]:
        train, seconds = self._config.train, max(window.seconds, 1e-9)
        positions = window.steps * train.global_batch_size * train.sequence_length
        speed = window.tokens / seconds
        flops = speed * self._config.training_flops / jax.device_count()
        peak = devices.peak_flops(jax.devices()[0].device_kind)
        return {
            "tokens_per_s": round(speed, 1),
            "learned_tokens_per_s": round(window.learned_tokens / seconds, 1),
            "tokens_per_s_per_device": round(speed / jax.device_count(), 1),
            "padding": round(1 - window.tokens / positions, 4),
            "tflops_per_device": round(flops / 1e12, 4),
            **({"mfu": round(flops / peak, 4)} if peak else {}),
            "seconds": round(window.seconds, 4),
            "wait_seconds": round(window.wait_seconds, 4),
        }
