"""Adapters that requests load and unload while a server runs: their texts, those under way, and what is refused."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_serve import ASSETS, CONTEXT, KEY, SLOTS, TEXT, Served, start_server, wait_until
from test_serve_command import write_adapter

from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.inference.adapters import AdapterRoom, attach_adapters, check_adapter
from gemma2_jax.inference.clock import Clock
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.inference.http.loader import AdapterLoader
from gemma2_jax.inference.http.models import describe_model
from gemma2_jax.inference.loaded import load_decoder
from gemma2_jax.inference.service import Service
from gemma2_jax.inference.text import decode_text, encode_prompt
from gemma2_jax.model_config import AdapterConfig

BASE = open_checkpoint(str(ASSETS))
LONG = 100
PROMPTS = ["def main(", "import os\n" * 15]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Adapters, and what is none."""
    folder = tmp_path_factory.mktemp("served") / "adapters"
    folder.mkdir()
    for seed, name in enumerate(("one", "two", "high", "broken")):
        write_adapter(folder / name, seed, rank=8 if name == "high" else 4)
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_adapter(folder / "other", 5, width=100)
    (folder / "empty").mkdir()
    write_adapter(folder.parent / "outside", 6)
    (folder / "link").symlink_to(folder.parent / "outside")
    return folder


@pytest.fixture(scope="module")
def merged_texts(folder) -> dict[str, list[str]]:
    """What the adapters give of two prompts when they are in the weights."""
    tokenizer, texts = load_tokenizer(str(ASSETS)), {}
    for name in ("one", "two"):
        engine = Engine(load_decoder(open_checkpoint(folder / name, base=BASE)), slots=SLOTS, context=CONTEXT)
        prompts = [encode_prompt(prompt, tokenizer, chat=False) for prompt in PROMPTS]
        found = engine.run(Request(prompt=prompt, max_new_tokens=20) for prompt in prompts)
        texts[name] = [decode_text(request.tokens, tokenizer) for request in found]
    return texts


@pytest.fixture(scope="module")
def served(folder, merged_texts) -> Iterator[Served]:
    """A server with the first adapter named at its start, and places for two more."""
    decoder, tokenizer = load_decoder(BASE), load_tokenizer(str(ASSETS))
    adapter = open_checkpoint(folder / "one", base=BASE)
    attach_adapters(decoder, BASE, {"start": adapter}, AdapterRoom(places=3, rank=4))
    engine = Engine(decoder, slots=SLOTS, context=CONTEXT, steps=1)
    engine.warm()
    service = Service(engine, queue=2, deadline=60)
    service.start()
    models = {
        "tiny": describe_model("tiny", BASE, tokenizer),
        "start": describe_model("start", adapter, tokenizer, adapter="start"),
    }
    loader = AdapterLoader(service, decoder, models, base=BASE, folder=folder)
    with start_server(service, models, loader=loader, key=KEY) as server:
        yield server
    service.end("the tests are over")


@pytest.fixture
def slow_engine(served, monkeypatch) -> None:
    """Has a text of 100 tokens take some seconds."""
    advance = served.service.engine.advance

    def advance_later():
        time.sleep(0.02)
        return advance()

    monkeypatch.setattr(served.service.engine, "advance", advance_later)


def load(served: Served, name: str, path: str, **fields) -> tuple[int, str]:
    body = json.dumps({"lora_name": name, "lora_path": path} | fields).encode()
    status, _, answer = served.send("POST", "/v1/load_lora_adapter", body)
    return status, answer.decode()


def unload(served: Served, *names: str) -> None:
    for name in names:
        body = json.dumps({"lora_name": name}).encode()
        status, _, answer = served.send("POST", "/v1/unload_lora_adapter", body)
        assert (status, answer.decode()) == (200, f"Success: LoRA adapter '{name}' removed successfully.")


def names_of(served: Served) -> list[str]:
    return [model.id for model in served.client.models.list()]


def texts_of(served: Served, model: str) -> list[str]:
    return [choice.text for choice in served.complete(PROMPTS, model=model).choices]


def start_stream(served: Served, model: str) -> Iterator[str]:
    """A long text, of which the first piece has come."""
    stream = (chunk.choices[0].text for chunk in served.complete("import", model=model, stream=True, max_tokens=LONG))
    first = next(filter(None, stream))

    def go_on() -> Iterator[str]:
        yield first
        yield from stream

    return go_on()


def test_a_loaded_adapter_is_the_one_named_at_start_and_the_one_merged(served, merged_texts):
    clock = Clock()
    assert load(served, "later", "one") == (200, "Success: LoRA adapter 'later' added successfully.")
    assert names_of(served) == ["tiny", "start", "later"]
    assert texts_of(served, "later") == texts_of(served, "start") == merged_texts["one"] != texts_of(served, "tiny")
    assert clock.compiling == 0
    unload(served, "later")
    assert names_of(served) == ["tiny", "start"]
    status, _, answer = served.send("POST", TEXT, b'{"model": "later", "prompt": "a"}')
    assert status == 404 and json.loads(answer)["error"]["code"] == "model_not_found"


def test_a_text_under_way_is_not_changed(served, slow_engine):
    expected = served.complete("import", model="start", max_tokens=LONG).choices[0].text
    stream = start_stream(served, "start")
    assert load(served, "later", "two")[0] == 200
    assert not served.service.is_idle, "the text was to be under way"
    assert "".join(stream) == expected
    unload(served, "later")


def test_a_name_stands_for_other_weights_while_the_first_ones_go_on(served, folder, merged_texts, slow_engine):
    """Both have the same prompt, whose beginning a row of the first holds."""
    expected = served.complete("import", model="start", max_tokens=LONG).choices[0].text
    load(served, "name", "one")
    assert texts_of(served, "name") == merged_texts["one"]
    stream = start_stream(served, "name")
    unload(served, "name")
    assert load(served, "name", str(folder / "two"))[0] == 200
    assert texts_of(served, "name") == merged_texts["two"] != merged_texts["one"]
    assert not served.service.is_idle, "the text was to be under way"
    assert "".join(stream) == expected
    unload(served, "name")
    wait_until(lambda: served.service.is_idle)


def test_no_row_of_the_cache_serves_another_adapter_of_the_name(served, merged_texts):
    texts, cached = [], []
    for path in ("one", "one", "two"):
        if path == "two" or not texts:
            unload(served, *["name"] * bool(texts))
            load(served, "name", path)
        reply = served.complete(PROMPTS[1], model="name")
        texts.append(reply.choices[0].text)
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert texts == [merged_texts[name][1] for name in ("one", "one", "two")]
    assert cached[0] == cached[2] == 0 < cached[1]
    unload(served, "name")


def test_a_place_is_free_when_its_last_text_has_ended(served, slow_engine):
    assert [load(served, name, "two")[0] for name in "ab"] == [200, 200]
    status, answer = load(served, "c", "two")
    assert status == 409
    message = json.loads(answer)["error"]["message"]
    assert message.startswith("the 3 places for adapters are taken, by start, a, b; unload one first, or start")
    stream = start_stream(served, "a")
    unload(served, "a")
    status, answer = load(served, "c", "two")
    assert status == 409 and "or wait for the texts of those that were unloaded" in answer
    assert not served.service.is_idle, "the text was to be under way"
    list(stream)
    wait_until(lambda: served.service.is_idle)
    assert load(served, "c", "two")[0] == 200
    assert names_of(served) == ["tiny", "start", "b", "c"]
    unload(served, "b", "c")


MISTAKES = [
    ({"lora_name": "start"}, 400, "lora_name", "start has already been loaded; unload it first"),
    ({"lora_name": "tiny"}, 400, "lora_name", "tiny has already been loaded"),
    ({"lora_name": ""}, 400, "lora_name", "lora_name is ''"),
    ({"lora_path": "high"}, 400, "lora_path", "has rank 8, and the server has room for rank 4; .*--adapter_rank 8"),
    ({"lora_path": "other"}, 400, "lora_path", "other"),
    ({"lora_path": "broken"}, 400, "lora_path", "broken"),
    ({"lora_path": "empty"}, 400, "lora_path", "is no checkpoint that this program knows: it holds nothing"),
    ({"lora_path": "link"}, 400, "lora_path", "link is outside .*, below which adapters may be loaded; copy it there"),
    ({"lora_path": "../outside"}, 400, "lora_path", r"outside is outside .*or start the server with another --adapter"),
    ({"lora_path": "/etc/passwd"}, 400, "lora_path", "/etc/passwd is outside"),
    ({"lora_path": "google/gemma-2-2b"}, 404, "lora_path", "there is no adapter google/gemma-2-2b below"),
    ({"lora_path": "a\0b"}, 400, "lora_path", "lora_path cannot be looked up: embedded null"),
    ({"lora_path": "a" * 300}, 400, "lora_path", "lora_path cannot be looked up: File name too long"),
    ({"load_inplace": True}, 400, "load_inplace", "it is not supported: unload the adapter first"),
    ({"lora_nam": "x"}, 400, "lora_nam", "there is no field lora_nam.*lora_name"),
]


@pytest.mark.parametrize(("fields", "status", "param", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_what_cannot_be_loaded_is_said(served, fields, status, param, message):
    found, answer = load(served, "new", "two", **fields)
    error = json.loads(answer)["error"]
    assert (found, error["type"], error["param"]) == (status, "invalid_request_error", param)
    with pytest.raises(ValueError, match=message):
        raise ValueError(error["message"])
    assert names_of(served) == ["tiny", "start"]


@pytest.mark.parametrize(("name", "status"), [("tiny", 400), ("nobody", 404)])
def test_what_cannot_be_unloaded_is_said(served, name, status):
    found, _, answer = served.send("POST", "/v1/unload_lora_adapter", json.dumps({"lora_name": name}).encode())
    assert found == status
    assert f"no adapter {name} can be unloaded: " in json.loads(answer)["error"]["message"]
    assert names_of(served) == ["tiny", "start"]


def test_a_key_is_asked_for(served):
    status = served.send("POST", "/v1/load_lora_adapter", b"{}", Authorization="Bearer wrong")[0]
    assert status == 401


def test_what_has_no_place_in_a_bank_is_said(served):
    shapes = served.service.engine._decoder.bank_shapes
    adapter = AdapterConfig(kind="lora", rank=4)
    for changes, message in (
        ({"kind": "none"}, "is no adapter, but a model; serve it by itself"),
        ({"modules_to_save": ("embedding",)}, "changes embedding beside its projections"),
        ({"trainable_tokens": (5,)}, "changes 5 beside its projections"),
        ({"after_norm": True}, r"is added to attn/o after the post-norm .* server's are added before it; .*--adapters"),
        ({"rank_pattern": (("1/mlp/up", 9),)}, "has rank 9, and the server has room for rank 4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_adapter(replace(BASE, adapter=replace(adapter, **changes)), shapes)
    check_adapter(replace(BASE, adapter=replace(adapter, kind="dora")), shapes)
