"""The engine as a service for an asyncio program: one thread drives it, and texts come as they are ready.

The thread hands nothing to a reader that it would have to wait for: what has come of a request stays with it, and its
reader is told that there is more. So a reader that is slow costs the memory of its texts, which the context bounds,
and holds up nobody. Nothing here knows HTTP.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma2_jax.inference.completion import Completion
from gemma2_jax.inference.engine import Engine, Reason, Request
from gemma2_jax.inference.metrics import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class QueueFullError(Exception):
    """As many texts wait as may."""


class UnavailableError(Exception):
    """The service shuts down, or its engine has failed."""


class DeadlineError(Exception):
    """A job has taken longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How much of a text there is."""

    characters: int = 0
    tokens: int = 0  # whose text is among them
    reason: Reason | None = None  # why it has ended


class Choice:
    """One text that is being made."""

    def __init__(self, request: Request, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()):
        self.request = request
        self.completion = Completion(request, tokenizer, stop)
        self.progress = Progress()  # replaced as a whole, so that a reader in another thread sees what fits together
        self.newest = 0.0  # when its newest token came, by `time.monotonic`
        self._offset = 0  # where the text of the next token begins that is not among `progress.tokens`

    def update(self) -> int:
        """Takes what the engine has added, and returns how many tokens that is."""
        pieces, before, tokens = self.completion.pieces, len(self.completion.pieces), self.progress.tokens
        self.completion.take()
        characters, reason = len(self.completion.text), self.completion.reason
        while tokens < len(pieces) and self._offset + len(pieces[tokens]) <= characters:
            self._offset += len(pieces[tokens])
            tokens += 1
        if reason and tokens < len(pieces) and self._offset < characters:  # a stop string begins within the token
            tokens += 1
        self.progress = Progress(characters=characters, tokens=tokens, reason=reason)
        return len(pieces) - before


class Job:
    """The texts that one caller has asked for; an asyncio program waits for more of them."""

    def __init__(self, choices: Sequence[Choice], seconds: float):
        self.choices = choices
        self.began = time.monotonic()
        self.failure: UnavailableError | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._seconds = seconds
        self._changed = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return all(choice.progress.reason for choice in self.choices)

    async def wait(self) -> None:
        """Waits until there is more. Raises DeadlineError, and UnavailableError where no more will come."""
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError as error:
            raise DeadlineError(f"the request was not done within {self._seconds:g} seconds") from error
        self._changed.clear()
        if self.failure and not self.has_ended:
            raise self.failure

    def wake(self) -> None:
        """Says from any thread that there is more."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
            self._loop.call_soon_threadsafe(self._changed.set)


class _Task:
    """Work for the engine's thread, for which another thread waits."""

    def __init__(self, work: Callable[[], object]):
        self.work = work
        self.failure: UnavailableError | None = None
        self.is_done = threading.Event()


class Service:
    """Takes jobs from the threads of asyncio programs, and has one thread of its own advance the engine."""

    def __init__(self, engine: Engine, *, queue: int, deadline: float):
        """At most `queue` texts wait for a slot; a job may take `deadline` seconds."""
        self.engine = engine
        self.metrics = Metrics()
        self.metrics.slots.set(engine.slots)
        self.metrics.watch_load(lambda: len(self._waiting), lambda: len(self._running))
        self._queue, self._deadline = queue, deadline
        self._waiting: deque[tuple[Job, Choice]] = deque()
        self._running: dict[int, tuple[Job, Choice]] = {}  # by the identity of the engine's request
        self._tasks: list[_Task] = []
        self._refusal = ""  # why no more is taken
        self._is_ending = False
        self.has_failed = False  # an error has ended the thread
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def most_texts(self) -> int:
        """How many texts there is room for, in slots and in the queue."""
        return self.engine.slots + self._queue

    @property
    def is_idle(self) -> bool:
        """Whether every text has ended."""
        return not (self._waiting or self._running)

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        return not self._refusal

    @contextlib.contextmanager
    def run(self, choices: Sequence[Choice]) -> Iterator[Job]:
        """The job of making these texts; what is not done at the block's end is canceled, and leaves its slots.

        Raises QueueFullError, UnavailableError, and ValueError for what the engine does not take.
        """
        for choice in choices:
            self.engine.check(choice.request)
        job = Job(choices, self._deadline)
        with self._lock:
            if self._refusal:
                raise UnavailableError(self._refusal)
            if len(self._waiting) + len(self._running) + len(choices) > self.most_texts:
                raise QueueFullError(f"{self.most_texts} texts are being made or wait already; try again later")
            self._waiting.extend((job, choice) for choice in choices)
            self._lock.notify()
        try:
            yield job
        finally:
            self._cancel(job)

    def run_between_steps(self, work: Callable[[], object]) -> None:
        """Has the engine's thread do some work between two of its steps, and waits until it is done.

        Raises UnavailableError where it is not; an error of the work ends the engine.
        """
        task = _Task(work)
        with self._lock:
            if self._refusal:
                raise UnavailableError(self._refusal)
            self._tasks.append(task)
            self._lock.notify()
        task.is_done.wait()
        if task.failure:
            raise task.failure

    def is_in_use(self, adapter: str) -> bool:
        """Whether a text with this adapter is being made or waits."""
        with self._lock:
            return any(choice.request.adapter == adapter for _, choice in [*self._waiting, *self._running.values()])

    def close(self, reason: str) -> None:
        """Takes no more jobs; those that there are go on."""
        with self._lock:
            self._refusal = self._refusal or reason

    def end(self, reason: str) -> None:
        """Takes no more jobs, cancels those that there are, and ends the thread."""
        self.close(reason)
        with self._lock:
            self._is_ending = True
            self._fail_all()
            self._lock.notify()
        self._thread.join()

    def _cancel(self, job: Job) -> None:
        with self._lock:
            for choice in job.choices:
                choice.request.is_canceled = choice.request.is_canceled or choice.request.reason is None
            if any(other is job for other, _ in self._waiting):
                self._waiting = deque(entry for entry in self._waiting if entry[0] is not job)

    def _run(self) -> None:
        """The engine's thread. Whatever error ends it is printed by Python, and every job is told."""
        try:
            while self._find_work():
                self._do_tasks()
                self._report(self.engine.advance())
        finally:
            self.close("the engine has failed; the server's log says why")
            with self._lock:
                self.has_failed = not self._is_ending
                self._fail_all()
                self._running.clear()

    def _find_work(self) -> bool:
        """Gives the engine what it has slots for; waits while there is nothing, and returns False at the end."""
        with self._lock:
            while True:
                canceled = [key for key, (_, choice) in self._running.items() if choice.request.is_canceled]
                for key in canceled:
                    del self._running[key]
                while self._waiting and len(self._running) < self.engine.slots:
                    job, choice = self._waiting.popleft()
                    self.engine.submit(choice.request)
                    self._running[id(choice.request)] = job, choice
                    self.metrics.prompt_tokens.inc(len(choice.request.prompt))
                if self._running or self._tasks or not self.engine.is_idle:
                    return True
                if self._is_ending:
                    return False
                self._lock.wait()

    def _do_tasks(self) -> None:
        with self._lock:
            tasks = [*self._tasks]
        for task in tasks:
            task.work()
            task.is_done.set()
        with self._lock:
            del self._tasks[: len(tasks)]

    def _report(self, changed: Sequence[Request]) -> None:
        """Tells the readers of what the engine has added."""
        now, woken = time.monotonic(), set()
        for request in changed:
            if id(request) not in self._running:  # canceled meanwhile
                continue
            job, choice = self._running[id(request)]
            self._measure(job, choice, choice.update(), now)
            woken.add(job)
            if choice.progress.reason:
                with self._lock:
                    del self._running[id(request)]
        for job in woken:
            job.wake()

    def _measure(self, job: Job, choice: Choice, new: int, now: float) -> None:
        self.metrics.new_tokens.inc(new)
        if not new:
            return
        if not choice.newest:
            self.metrics.first_token.observe(now - job.began)
        else:
            for _ in range(new):
                self.metrics.between_tokens.observe((now - choice.newest) / new)
        choice.newest = now

    def _fail_all(self) -> None:
        for job, choice in [*self._waiting, *self._running.values()]:
            choice.request.is_canceled = True
            job.failure = UnavailableError(self._refusal)
            job.wake()
        for task in self._tasks:
            task.failure = UnavailableError(self._refusal)
            task.is_done.set()
        self._waiting.clear()
        self._tasks.clear()
