"""How long a program takes on the devices."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax


def measure_seconds(
    run: Callable, *inputs: Any, least: float = 0.1, rounds: int = 5, times: int | None = None
) -> float:
    """Measures the device time of a call: that of the fastest round, which is many calls, waited for once at its end.

    While the device computes one call the host enqueues the next, so that this is the device's time where a call takes
    it longer than it takes the host to enqueue one.

    Args:
      run: a function of `inputs`.
      least: the seconds that a round takes, or more.
      rounds: how many there are.
      times: calls of a round; None: as many as take `least`, which may differ between processes.
    """
    jax.block_until_ready(run(*inputs))  # This call compiles.
    began = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    count = times or max(1, math.ceil(least / (time.perf_counter() - began)))

    def time_round() -> float:
        result, began = None, time.perf_counter()
        for _ in range(count):
            result = run(*inputs)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / count

    return min(time_round() for _ in range(rounds))
