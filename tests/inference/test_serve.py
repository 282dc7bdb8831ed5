"""OpenAI's HTTP API: its own client gets what the engine and the model give, and mistakes are said in its shape."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.inference.http.app import make_app
from gemma2_jax.inference.http.models import ServedModel, Words, describe_model
from gemma2_jax.inference.http.server import make_server, open_socket
from gemma2_jax.inference.loaded import load_decoder, load_model
from gemma2_jax.inference.service import Service
from gemma2_jax.inference.text import decode_text, encode_prompt

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
KEY = "secret"
HEADER_SECONDS = 0.5
SLOTS, QUEUE, CONTEXT = 3, 2, 128
PROMPTS = ["def main(", "import os\n\n"]
QUESTION = [{"role": "user", "content": "What does json.dumps do?"}]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server under way, in this process."""

    port: int
    service: Service
    model: ServedModel
    client: openai.OpenAI

    def complete(self, prompt, **fields):
        fields = {"model": "tiny", "temperature": 0, "max_tokens": 20} | fields
        return self.client.completions.create(prompt=prompt, **fields)

    def chat(self, messages=QUESTION, **fields):
        fields = {"model": "tiny", "temperature": 0, "max_tokens": 20} | fields
        return self.client.chat.completions.create(messages=messages, **fields)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def send(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict, bytes]:
        """One request without the client: its status, headers and body."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

    def count(self, outcome: str) -> float:
        return self.service.metrics.requests.labels(outcome)._value.get()


@contextlib.contextmanager
def start_server(service: Service, models: dict[str, ServedModel], **options) -> Iterator[Served]:
    opened = open_socket("127.0.0.1", 0)
    server = make_server(make_app(service, models, **options), header_seconds=HEADER_SECONDS)
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    wait_until(lambda: server.started)
    port = opened.getsockname()[1]
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
            yield Served(port=port, service=service, model=models["tiny"], client=client)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tiny_engine() -> Engine:
    return Engine(load_decoder(open_checkpoint(str(ASSETS))), slots=SLOTS, context=CONTEXT)


@pytest.fixture(scope="module")
def direct_texts(tiny_engine) -> list[str]:
    """What the engine makes of two prompts and a question without a server, as `generate` does."""
    checkpoint, tokenizer = open_checkpoint(str(ASSETS)), load_tokenizer(str(ASSETS))
    prompts = [(prompt, False) for prompt in PROMPTS] + [(QUESTION[0]["content"], True)]
    requests = [
        Request(
            prompt=encode_prompt(prompt, tokenizer, chat=chat),
            max_new_tokens=20,
            stop=frozenset(stop_tokens(checkpoint, tokenizer, chat=chat)),
        )
        for prompt, chat in prompts
    ]
    return [decode_text(request.tokens, tokenizer) for request in tiny_engine.run(requests)]


@pytest.fixture(scope="module")
def served(tiny_engine, direct_texts) -> Iterator[Served]:
    service = Service(tiny_engine, queue=QUEUE, deadline=60)
    service.start()
    model = describe_model("tiny", open_checkpoint(str(ASSETS)), load_tokenizer(str(ASSETS)))
    with start_server(service, {"tiny": model}, key=KEY, body_limit=20_000, body_seconds=0.5) as server:
        yield server
    service.end("the tests are over")


@pytest.fixture
def held_engine(served, monkeypatch) -> Iterator[threading.Event]:
    """Has the engine stand still until the event is set."""
    moving, advance = threading.Event(), served.service.engine.advance

    def advance_later():
        moving.wait()
        return advance()

    monkeypatch.setattr(served.service.engine, "advance", advance_later)
    yield moving
    moving.set()
    wait_until(lambda: served.service.is_idle)


def test_greedy_texts_are_those_of_the_engine(served, direct_texts):
    tokens = [encode_prompt(prompt, served.model.tokenizer, chat=False) for prompt in PROMPTS]
    for prompt in (PROMPTS, tokens):
        assert [choice.text for choice in served.complete(prompt).choices] == direct_texts[:2]
    assert served.complete(PROMPTS[1]).choices[0].text == served.complete(tokens[1]).choices[0].text == direct_texts[1]
    assert served.chat().choices[0].message.content == direct_texts[2]


def test_echoed_scores_are_those_of_the_model(served):
    reply = served.complete("What is é", echo=True, logprobs=3, max_tokens=4)
    choice = reply.choices[0]
    tokens = encode_prompt("What is é", served.model.tokenizer, chat=False)
    text = served.complete("What is é", max_tokens=4).choices[0].text
    assert choice.text == "What is é" + text
    words = Words(served.model.tokenizer)
    names = {words.name_of(token): token for token in range(4096)}
    sequence = [names[name] for name in choice.logprobs.tokens]
    assert sequence[: len(tokens)] == tokens and len(sequence) == len(tokens) + 4
    logits = load_model(open_checkpoint(str(ASSETS)))([sequence])
    expected = np.asarray(jax.nn.log_softmax(logits[0]))
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    for place, token in enumerate(sequence[1:]):
        # Logits reach 20, and the cache's sums are in another order.
        assert choice.logprobs.token_logprobs[place + 1] == pytest.approx(expected[place, token], abs=1e-4)
        top = np.sort(expected[place])[-3:]
        found = sorted(choice.logprobs.top_logprobs[place + 1].values())
        np.testing.assert_allclose(found[-3:], top, atol=1e-4)
    for name, begin, end in zip(
        choice.logprobs.tokens, choice.logprobs.text_offset, [*choice.logprobs.text_offset[1:], None], strict=True
    ):
        assert name == "<bos>" or name.startswith("bytes:") or choice.text[begin:end] == name
    assert reply.usage.prompt_tokens == len(tokens) and reply.usage.completion_tokens == 4
    scored = served.complete(tokens, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert scored.text == "What is é" and scored.finish_reason == "length"
    assert scored.logprobs.token_logprobs == pytest.approx(choice.logprobs.token_logprobs[: len(tokens)], abs=1e-4)


STREAMED = [
    {},
    {"stop": ["json", "coder."]},
    {"n": 2, "temperature": 0.8, "seed": 5},
    {"extra_body": {"stop_token_ids": [4, 13, 10]}},
]


@pytest.mark.parametrize("fields", STREAMED, ids=str)
def test_chat_streams_what_it_answers_whole(served, fields):
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 30} | fields
    whole = served.chat(**fields)
    chunks = list(served.chat(stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[-1].usage.model_dump() | {"prompt_tokens_details": None} == whole.usage.model_dump() | {
        "prompt_tokens_details": None
    }
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == choice.finish_reason
        assert parts[0].delta.role == "assistant"
        scores = [score for part in parts if part.logprobs for score in part.logprobs.content]
        assert [score.token for score in scores] == [score.token for score in choice.logprobs.content]
        shown = b"".join(bytes(score.bytes) for score in scores).decode()
        assert shown.startswith(choice.message.content)


def test_completions_stream_what_they_answer_whole(served):
    fields = {"echo": True, "logprobs": 1, "stop": "(", "max_tokens": 40}
    whole = served.complete(["def main", "import json"], **fields)
    chunks = list(served.complete(["def main", "import json"], stream=True, **fields))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "text_offset", "token_logprobs"):
            together = [x for part in parts for x in getattr(part.logprobs, name)]
            assert together == pytest.approx(getattr(choice.logprobs, name)), name


def test_a_text_ends_before_a_stop_string(served):
    whole = served.chat(max_tokens=30).choices[0].message.content
    stop = whole[10:14]
    choice = served.chat(max_tokens=30, stop=["not there", stop], logprobs=True).choices[0]
    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    shown = "".join(score.token for score in choice.logprobs.content)
    assert shown.startswith(choice.message.content) and stop not in shown
    assert served.chat(max_tokens=30).choices[0].finish_reason == "length"


def test_samples_differ_and_a_seed_repeats_them(served):
    drawn = [
        [choice.text for choice in served.complete("import", n=3, temperature=1.2, seed=seed).choices]
        for seed in (7, 7, 8, 7 - 2**31)
    ]
    assert len(set(drawn[0])) == 3
    assert drawn[0] == drawn[1] == drawn[3] != drawn[2]
    assert (
        served.complete("import", temperature=None).choices[0].text
        != served.complete("import", temperature=None).choices[0].text
    )
    banned = served.complete("import", n=2, logit_bias={str(token): -100 for token in range(200)})
    assert len({choice.text for choice in banned.choices}) == 1
    assert (
        served.complete("import", extra_body={"top_k": 1}, temperature=1.5).choices[0].text
        == served.complete("import").choices[0].text
    )


def test_system_prompts_and_parts_are_as_in_training(served):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "json?"}]
    split = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    whole = [{"role": "user", "content": "Be short.\n\nWhat is\njson?"}]
    first, second = served.chat(split), served.chat(whole)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    answered = [*QUESTION, served.chat().choices[0].message, {"role": "user", "content": "Why?"}]
    assert served.chat(answered, max_tokens=3).usage.completion_tokens == 3


def test_a_prompt_that_was_read_before_is_said_to_be_cached(served):
    prompt = [7] * 40
    served.complete([[8] * 9, prompt], max_tokens=1)
    assert served.complete(prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens >= 16


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MISTAKES = [
    (TEXT, {"prompt": "a", "temprature": 0}, "temprature", "there is no field temprature; did you mean temperature?"),
    (TEXT, {"prompt": []}, "prompt", r"prompt is \[\]; give a string, a list of strings, a list of token numbers"),
    (TEXT, {"prompt": ["a", 1]}, "prompt", "give a string, a list of strings"),
    (TEXT, {"prompt": [5000]}, "prompt", "the prompt has tokens from 5000 to 5000, and the model's are 0 to 4095"),
    (TEXT, {}, "prompt", "prompt must be given"),
    (TEXT, {"prompt": "a", "max_tokens": "5"}, "max_tokens", "max_tokens is '5'; input should be a valid integer"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens is 0, which needs echo"),
    (TEXT, {"prompt": "a", "max_tokens": 500}, "prompt", "with 500 new ones 502, and the context has 128"),
    (TEXT, {"prompt": "a", "temperature": -1}, "temperature", "temperature is -1.0; use 0 for the most likely token"),
    (TEXT, {"prompt": "a", "top_p": 0}, "top_p", "top_p is 0.0; it must be above 0"),
    (TEXT, {"prompt": "a", "n": 2, "best_of": 3}, "best_of", "best_of is 3; it may only be n, 2"),
    (TEXT, {"prompt": "a", "n": 6}, "n", "6 texts are asked for; ask for 5 at most"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "suffix is 'b'; it is not supported"),
    (TEXT, {"prompt": "a", "stop": list("abcde")}, "stop", "give 4 strings at most"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token numbers as its keys"),
    (TEXT, {"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", "logit_bias has token 9999"),
    (TEXT, {"prompt": "a", "stream_options": {}}, "stream_options", "stream_options needs stream: true"),
    (TEXT, {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no field stream_opt"),
    (CHAT, {"messages": []}, "messages", r"messages is \[\]; give at least 1"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "messages.0.role is 'tool'"),
    (CHAT, {"messages": [*QUESTION, *QUESTION]}, "messages", "does not take these messages: .*alternate"),
    (CHAT, {"messages": QUESTION, "tools": [{}]}, "tools", r"tools is \[\{\}\]; it is not supported: .*no tools"),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"messages": QUESTION, "audio": {}}, "audio", "the model writes text alone"),
    (CHAT, {"messages": QUESTION, "top_logprobs": 1}, "top_logprobs", "top_logprobs needs logprobs: true"),
    (CHAT, {"messages": QUESTION, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        None,
        "messages.0.content",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param", "message"), MISTAKES)
def test_what_is_wrong_is_said(served, path, fields, param, message):
    before = served.count("refused")
    status, _, body = served.send("POST", path, json.dumps({"model": "tiny", **fields}).encode())
    error = json.loads(body)["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    with pytest.raises(ValueError, match=message):
        raise ValueError(error["message"])
    assert served.count("refused") == before + 1


BODIES = [
    (b"{", 400, "the body is not JSON"),
    (b"\xff\xfe", 400, "body"),
    (b"[1]", 400, "the body is no JSON object"),
    (b'{"model": "tiny", "prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", 400, ""),
    (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    (b'{"model": "tiny", "prompt": "a", "n": 1' + b"0" * 5000 + b"}", 400, ""),
    (b'{"model": "other", "prompt": "a"}', 404, "there is no model other; there are tiny"),
    (b'{"model": "\\ud800", "prompt": "a"}', 404, "there is no model \\ud800; there are tiny"),
    (b'{"prompt": "' + b"a" * 20_000 + b'"}', 413, "the body is too large; it may have 20,000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_none(served, body, status, message):
    found, _, answer = served.send("POST", TEXT, body)
    assert found == status, answer
    assert message in json.loads(answer)["error"]["message"]


def test_bodies_in_chunks_are_limited_too(served):
    with contextlib.closing(served.connect()) as connection:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", TEXT, iter([b"a" * 15_000] * 2), headers, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_a_body_that_does_not_come_is_not_waited_for(served):
    with contextlib.closing(served.connect()) as connection:
        connection.putrequest("POST", TEXT)
        for name, value in {"Authorization": f"Bearer {KEY}", "Content-Length": "9"}.items():
            connection.putheader(name, value)
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408


HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize("begun", [b"", HEALTH, HEALTH + b"\r\n" + HEALTH], ids=["nothing", "half", "second"])
def test_headers_that_do_not_come_are_not_waited_for(served, begun):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(begun)
        for _ in range(60):  # bytes, each of which comes well before the limit
            time.sleep(0.05)
            try:
                if begun:
                    connection.sendall(b"X")
                connection.setblocking(False)
                if not connection.recv(4096):
                    return
            except BlockingIOError:
                connection.setblocking(True)
            except ConnectionError:
                return
        pytest.fail("the connection is still open")


def test_a_request_that_takes_longer_than_its_headers_may_is_answered(served, held_engine):
    with contextlib.closing(served.connect()) as connection:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", body, headers)
        time.sleep(2 * HEADER_SECONDS)
        held_engine.set()
        assert connection.getresponse().status == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", "Bearer sécret"])
def test_a_key_is_asked_for(served, header):
    status, headers, body = served.send("GET", "/v1/models", Authorization=header.encode("latin-1"))
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert KEY not in body.decode()
    assert served.send("GET", "/health", Authorization="")[0] == 200


def test_models_and_addresses(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "gemma2_jax"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    status, _, body = served.send("GET", "/v1/nothing")
    assert status == 404
    assert json.loads(body)["error"]["message"].startswith(
        "there is no address /v1/nothing; there are /health, /metrics, "
    )
    status, _, body = served.send("GET", TEXT)
    assert status == 405
    assert json.loads(body)["error"]["message"] == "/v1/completions does not take GET; it takes POST"


def test_metrics_count_requests_and_tokens(served):
    answered, tokens = served.count("answered"), served.service.metrics.new_tokens._value.get()
    served.complete("import", max_tokens=7)
    assert served.count("answered") == answered + 1
    assert served.service.metrics.new_tokens._value.get() == tokens + 7
    text = served.send("GET", "/metrics")[2].decode()
    for name in ("queue_length 0.0", "slots_busy 0.0", f"slots {SLOTS:.1f}", "first_token_seconds_count"):
        assert f"\ngemma2_{name}" in text


def test_a_full_queue_refuses_more(served, held_engine):
    streams = [served.complete("import", stream=True) for _ in range(SLOTS + QUEUE)]
    try:
        status, headers, body = served.send("POST", TEXT, b'{"model": "tiny", "prompt": "a"}')
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            served.complete("import")
        text = served.send("GET", "/metrics")[2].decode()
        load = [float(x) for x in re.findall(r"^gemma2_(?:queue_length|slots_busy) (.*)$", text, re.MULTILINE)]
        assert len(load) == 2 and sum(load) == SLOTS + QUEUE
    finally:
        held_engine.set()
        texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
    assert len(set(texts)) == 1 and texts[0]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(served, held_engine, stream):
    before = served.count("canceled")
    body = json.dumps({"model": "tiny", "prompt": "import", "max_tokens": 100, "n": 4, "stream": stream}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection = served.connect()
    connection.request("POST", TEXT, body, headers)
    wait_until(lambda: len(served.service._running) == SLOTS)
    requests = [choice.request for _, choice in served.service._running.values()]
    connection.close()
    wait_until(lambda: served.count("canceled") == before + 1)
    assert not served.service._waiting
    held_engine.set()
    wait_until(lambda: served.service.is_idle and served.service.engine.is_idle)
    assert all(request.is_canceled and len(request.tokens) < 100 for request in requests)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_is_ended(served, held_engine, stream, monkeypatch):
    monkeypatch.setattr(served.service, "_deadline", 0.1)
    before = served.count("late")
    if stream:
        with pytest.raises(openai.APIError, match=r"not done within 0\.1 seconds"):
            list(served.complete("import", stream=True))
    else:
        with pytest.raises(openai.InternalServerError) as caught:
            served.complete("import")
        assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"
    wait_until(lambda: served.count("late") == before + 1)  # a stream is counted after its last piece is sent


def test_a_mistake_of_ours_is_an_error_with_its_shape(served, monkeypatch, caplog):
    monkeypatch.setattr("gemma2_jax.inference.http.answers.Answer.write", lambda self: 1 / 0)
    status, _, body = served.send("POST", TEXT, b'{"model": "tiny", "prompt": "a"}')
    assert status == 500 and json.loads(body)["error"]["type"] == "server_error"
    wait_until(lambda: "ZeroDivisionError" in caplog.text)


def test_tokens_have_texts_and_bytes(served):
    words, tokenizer = Words(served.model.tokenizer), served.model.tokenizer
    tokens = tokenizer.backend_tokenizer.encode("a é 山", add_special_tokens=False).ids
    assert b"".join(map(words.bytes_of, tokens)).decode() == decode_text(tokens, tokenizer) == "a é 山"
    part = words.bytes_of(tokens[-1])
    assert len(part) < 3 and "山".encode().endswith(part)
    assert words.name_of(tokens[-1]) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
    assert words.text_of(tokens[-1]) == "\N{REPLACEMENT CHARACTER}"


def test_bytes_of_gemmas_own_vocabulary():
    """In which a character that has no token is bytes, each a token such as <0xE5>."""
    vocabulary = {"<unk>": 0, "\N{LOWER ONE EIGHTH BLOCK}a": 1, "<0xE5>": 2}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = Sequence([Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), ByteFallback(), Fuse()])
    words = Words(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [words.bytes_of(token) for token in range(3)] == [b"<unk>", b" a", b"\xe5"]
