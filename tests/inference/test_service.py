"""The service around an engine, which is a stub here, and the server's end: nobody waits for what does not come."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.inference.engine import Request
from gemma2_jax.inference.http import server as servers
from gemma2_jax.inference.http.app import make_app
from gemma2_jax.inference.http.models import describe_model
from gemma2_jax.inference.http.server import make_server, open_socket, serve_until_told
from gemma2_jax.inference.service import Choice, DeadlineError, Job, QueueFullError, Service, UnavailableError

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
A = 36  # a token whose text is one letter


class StubEngine:
    """Adds a token to each of two requests at a time, in so many seconds."""

    slots, context = 2, 1000

    def __init__(self, seconds: float = 0.002):
        self.seconds, self.running, self.most = seconds, [], 0

    def check(self, request: Request) -> None:
        if request.max_new_tokens > self.context:
            raise ValueError("it does not fit")

    def submit(self, request: Request) -> None:
        self.running.append(request)

    @property
    def is_idle(self) -> bool:
        return not self.running

    def advance(self) -> list[Request]:
        time.sleep(self.seconds)
        self.running = [request for request in self.running if not request.is_canceled]
        self.most = max(self.most, len(self.running))
        changed = self.running
        for request in changed:
            if request.prompt[0] == 13:
                raise FloatingPointError("a number is not finite")
            request.tokens.append(A)
            if len(request.tokens) == request.max_new_tokens:
                request.reason = "length"
        self.running = [request for request in changed if not request.reason]
        return changed


TOKENIZER = load_tokenizer(str(ASSETS))
LETTER = TOKENIZER.decode([A])


def make_choices(count: int = 1, tokens: int = 5, prompt: int = 7, stop: tuple[str, ...] = ()) -> list[Choice]:
    return [Choice(Request(prompt=[prompt], max_new_tokens=tokens), TOKENIZER, stop) for _ in range(count)]


@contextlib.contextmanager
def run_service(queue: int = 3, deadline: float = 60, **options):
    service = Service(StubEngine(**options), queue=queue, deadline=deadline)
    service.start()
    yield service
    service.end("the test is over")


async def wait_for_ever(job: Job) -> None:
    while True:
        await job.wait()


async def finish(service: Service, choices: list[Choice]) -> list[str]:
    with service.run(choices) as job:
        while not job.has_ended:
            await job.wait()
    return [choice.completion.text for choice in choices]


def test_jobs_share_the_slots():
    async def run_all(service: Service):
        return await asyncio.gather(*(finish(service, make_choices(tokens=number)) for number in (9, 1, 5, 3)))

    with run_service() as service:
        assert asyncio.run(run_all(service)) == [[LETTER * number] for number in (9, 1, 5, 3)]
        assert service.is_idle and service.engine.most == 2
        assert service.metrics.new_tokens._value.get() == 18
        assert service.metrics.first_token._sum.get() > 0


def test_a_stop_string_frees_the_slot():
    async def run_one(service: Service):
        choices = make_choices(tokens=900, stop=(LETTER * 3,))
        return await finish(service, choices), choices

    with run_service() as service:
        texts, choices = asyncio.run(run_one(service))
        assert texts == [""] and choices[0].progress.reason == "stop"
        assert len(choices[0].request.tokens) < 900
        deadline = time.monotonic() + 10
        while not service.engine.is_idle and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.engine.is_idle


def test_what_a_job_may_not_do():
    async def run_one(service: Service):
        with service.run(make_choices(5, tokens=900)) as job:
            with pytest.raises(QueueFullError, match="5 texts are being made"), service.run(make_choices()):
                pass
            with pytest.raises(DeadlineError, match=r"within 0\.2 seconds"):
                await wait_for_ever(job)
        with pytest.raises(ValueError, match="does not fit"), service.run(make_choices(tokens=2000)):
            pass
        return await finish(service, make_choices())  # there is room again

    with run_service(deadline=0.2) as service:
        assert asyncio.run(run_one(service)) == [LETTER * 5]


def test_a_reader_that_sleeps_holds_up_nobody():
    async def run_both(service: Service):
        with service.run(make_choices(tokens=200)) as job:
            assert await finish(service, make_choices(tokens=100)) == [LETTER * 100]
            while not job.has_ended:
                await job.wait()
            return job.choices[0].completion.text

    with run_service() as service:
        assert asyncio.run(run_both(service)) == LETTER * 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_is_told_to_every_job(capsys):
    async def run_all(service: Service):
        running = asyncio.create_task(finish(service, make_choices(tokens=900)))
        await asyncio.sleep(0.02)
        broken = asyncio.create_task(finish(service, make_choices(prompt=13)))
        done = await asyncio.gather(running, broken, return_exceptions=True)
        with pytest.raises(UnavailableError), service.run(make_choices()):
            pass
        return done

    with run_service() as service:
        errors = asyncio.run(run_all(service))
        assert [str(error) for error in errors] == ["the engine has failed; the server's log says why"] * 2
        assert service.has_failed and not service.is_open


def test_work_between_steps_is_done_by_the_engines_thread():
    """While a text is under way and while there is none; once the service ends, nobody waits for it."""

    async def work_beside(service: Service, names: list[str]):
        running = asyncio.create_task(finish(service, make_choices(tokens=200)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(service.run_between_steps, lambda: names.append(threading.current_thread().name))
        assert not running.done()
        return await running

    names: list[str] = []
    with run_service() as service:
        service.run_between_steps(lambda: names.append(threading.current_thread().name))
        assert asyncio.run(work_beside(service, names)) == [LETTER * 200]
        assert names == ["engine"] * 2
    with pytest.raises(UnavailableError, match="the test is over"):
        service.run_between_steps(lambda: names.append("never"))
    assert len(names) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_fails_ends_the_engine():
    with run_service() as service:
        with pytest.raises(UnavailableError, match="the engine has failed"):
            service.run_between_steps(lambda: 1 / 0)
        assert service.has_failed


class Run:
    """A server that runs in the main thread while a block of another thread asks it, and takes signals."""

    def __init__(self, grace: float, seconds: float):
        self.service = Service(StubEngine(seconds), queue=3, deadline=60)
        self.grace, self.opened = grace, open_socket("127.0.0.1", 0)
        self.failure: BaseException | None = None
        self.has_ended = False

    def ask(self, tokens: int, prompt: int = 7) -> tuple[int, dict]:
        port = self.opened.getsockname()[1]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            body = json.dumps({"model": "tiny", "prompt": [prompt], "max_tokens": tokens})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def start(self, block) -> None:
        """Runs the block beside the server, until the server ends."""

        def run_block():
            try:
                block(self)
            except BaseException as error:
                self.failure = error
                self.service.close("the test has failed")
                if not self.has_ended:
                    os.kill(os.getpid(), signal.SIGTERM)

        model = describe_model("tiny", open_checkpoint(str(ASSETS)), TOKENIZER)
        server = make_server(make_app(self.service, {"tiny": model}))
        thread = threading.Thread(target=run_block)
        asyncio.run(serve_until_told(server, self.service, self.opened, grace=self.grace, announce=thread.start))
        self.has_ended = True
        thread.join()
        if self.failure:
            raise self.failure


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_finishes_what_it_has(number, capsys):
    def block(run: Run):
        answers = []
        asking = threading.Thread(target=lambda: answers.append(run.ask(150)))
        asking.start()
        while run.service.is_idle:
            time.sleep(0.005)
        os.kill(os.getpid(), number)
        while run.service.is_open:
            time.sleep(0.005)
        status, refused = run.ask(1)
        assert status == 503 and refused["error"]["message"] == "the server is shutting down"
        assert not answers, "the first is still under way"
        run.service.engine.seconds = 0
        asking.join()
        assert answers[0][0] == 200 and answers[0][1]["choices"][0]["text"] == LETTER * 150

    run = Run(grace=20, seconds=0.05)
    run.start(block)
    assert run.service.is_idle and not run.service.has_failed
    assert capsys.readouterr().err.startswith(f"{number.name}: requests under way are finished")


def test_after_its_grace_it_ends_what_is_left(monkeypatch):
    ended = []

    def block(run: Run):
        asking = threading.Thread(target=lambda: ended.append(run.ask(900)))
        asking.start()
        while run.service.is_idle:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)
        while run.service.is_open:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)  # once more
        asking.join()

    left = []
    monkeypatch.setattr(servers.os, "_exit", left.append)
    Run(grace=0.2, seconds=0.02).start(block)
    assert left == [130]
    assert ended[0][0] == 503 and ended[0][1]["error"]["message"] == "the server is shutting down"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_ends_with_its_engine():
    statuses = []
    run = Run(grace=20, seconds=0.002)
    run.start(lambda run: statuses.append(run.ask(5, prompt=13)[0]))
    assert statuses == [503] and run.service.has_failed


def test_an_address_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*another --host or --port"):
            open_socket("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"cannot listen on no\.such\.host"):
        open_socket("no.such.host.invalid", 80)
