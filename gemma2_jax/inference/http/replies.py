"""An answer on its way to the client: whole, or as a stream of server-sent events; a client that goes cancels it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gemma2_jax.inference.http.answers import Answer
from gemma2_jax.inference.http.errors import explain_end
from gemma2_jax.inference.metrics import Outcome
from gemma2_jax.inference.service import DeadlineError, Job, Progress, QueueFullError, Service, UnavailableError

_ENDS = (QueueFullError, UnavailableError, DeadlineError)
_CLIENT_GONE = 499  # nginx's status for an answer that nobody waits for


class Reply:
    """One request's answer, and the job that makes its texts."""

    def __init__(self, service: Service, answer: Answer):
        self._service, self._answer = service, answer
        self._outcome: Outcome = "canceled"  # unless it ends in another way

    async def write_whole(self, request: Request) -> Response:
        """The answer when all texts have ended. Raises ApiError where they do not."""
        try:
            with self._service.run(self._answer.choices) as job:
                is_done = await _first_done(_wait_for_end(job), _wait_for_disconnect(request))
        except _ENDS as error:
            raise explain_end(error) from error
        self._count("answered" if is_done else "canceled")
        return JSONResponse(self._answer.write()) if is_done else Response(status_code=_CLIENT_GONE)

    def open_stream(self, *, has_usage: bool) -> Response:
        """The stream of the texts. Raises ApiError where the service does not take the job."""
        context = self._service.run(self._answer.choices)
        try:
            job = context.__enter__()
        except _ENDS as error:
            raise explain_end(error) from error

        def end() -> None:
            context.__exit__(None, None, None)
            self._count(self._outcome)

        return _EventStream(self._write_events(job, has_usage=has_usage), end)

    async def _write_events(self, job: Job, *, has_usage: bool) -> AsyncIterator[bytes]:
        shown = [Progress()] * len(job.choices)
        yield b"".join(map(_event, self._answer.open_chunks()))
        try:
            while not all(progress.reason for progress in shown):
                await job.wait()
                now = [choice.progress for choice in job.choices]
                chunks = [
                    self._answer.write_chunk(index, since, progress)
                    for index, (since, progress) in enumerate(zip(shown, now, strict=True))
                    if since != progress
                ]
                shown = now
                yield b"".join(map(_event, chunks))
        except _ENDS as error:
            explained = explain_end(error)
            self._outcome = explained.outcome
            yield _event(explained.content)
            return
        if has_usage:
            yield _event(self._answer.write_usage())
        self._outcome = "answered"
        yield b"data: [DONE]\n\n"

    def _count(self, outcome: Outcome) -> None:
        self._service.metrics.requests.labels(outcome).inc()


class _EventStream(StreamingResponse):
    """A stream that says when it has ended, whether or not its client has read it."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._end = end

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _first_done(work, other) -> bool:
    """Whether the work is done before the other, which is canceled; raises what the work raises."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()  # which does nothing to one that is done
    if tasks[0] in done:
        tasks[0].result()
    return tasks[0] in done


async def _wait_for_end(job: Job) -> None:
    while not job.has_ended:
        await job.wait()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
