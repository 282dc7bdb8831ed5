"""What a server counts and measures, in Prometheus' format. Needs the extra `serve`."""

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

# Of a request: it was answered; it was wrong; the queue had no room; its client has gone; it took too long; it met a
# mistake of ours; the server shut down.
type Outcome = Literal["answered", "refused", "busy", "canceled", "late", "failed", "closing"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "busy", "canceled", "late", "failed", "closing")
_FIRST_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_BETWEEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The counters of one server."""

    def __init__(self):
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("gemma2_requests", "Requests by outcome.", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)  # so that each is there from the beginning
        self.prompt_tokens = Counter("gemma2_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.new_tokens = Counter("gemma2_new_tokens", "Tokens that were generated.", registry=registry)
        self.first_token = Histogram(
            "gemma2_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=_FIRST_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "gemma2_between_tokens_seconds",
            "Seconds between two tokens of a text. Tokens that come together share the time since the ones before.",
            buckets=_BETWEEN_SECONDS,
            registry=registry,
        )
        self.slots = Gauge("gemma2_slots", "Texts that are continued at a time, at most.", registry=registry)

    def watch_load(self, count_waiting: Callable[[], int], count_running: Callable[[], int]) -> None:
        """Has the lengths of the queue and of what is running looked up whenever somebody reads the metrics."""
        waiting = Gauge("gemma2_queue_length", "Texts that wait for a slot.", registry=self._registry)
        waiting.set_function(count_waiting)
        running = Gauge("gemma2_slots_busy", "Texts that are being continued.", registry=self._registry)
        running.set_function(count_running)

    def write(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)
