"""Measures how fast tokens are generated, without the time that goes into compiling."""

import time

import jax.monitoring


class Clock:
    """A clock in seconds that stands still while JAX compiles."""

    def __init__(self):
        self.compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def __call__(self) -> float:
        return time.perf_counter() - self.compiling

    def _listen(self, event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compiling += duration_secs


def describe_speed(tokens: int, seconds: float) -> str:
    """The number of tokens and the tokens per second, in words."""
    return f"{tokens:,} tokens" + (f" at {tokens / seconds:,.0f} tokens/s" if tokens else "")
