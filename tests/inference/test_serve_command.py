"""The command that serves: what it says at its start, its key and names, and what it refuses."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma2_jax import serve
from gemma2_jax.inference.engine import Engine
from gemma2_jax.inference.http import server
from gemma2_jax.inference.http.planning import plan_completion
from gemma2_jax.inference.http.schema import CompletionBody

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
LOADING = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


def write_adapter(folder: Path, seed: int, rank: int = 4, width: int = 192) -> Path:
    """A LoRA of PEFT's on the queries of the tiny model, whose width is 192."""
    random, arrays = np.random.default_rng(seed), {}
    for layer in range(6):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for name, shape in {"lora_A": (rank, width), "lora_B": (256, rank)}.items():
            arrays[f"{prefix}.{name}.weight"] = random.normal(size=shape).astype(np.float32)
    folder.mkdir()
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"base_model_name_or_path": str(ASSETS), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run_serve(monkeypatch):
    """Runs the command up to where it would serve, and gives the application."""
    apps = []

    def keep_app(app, service, opened, *, grace, announce):
        announce()
        opened.close()
        apps.append((app, service, grace))

    monkeypatch.setattr(server, "serve", keep_app)
    monkeypatch.setattr(Engine, "warm", lambda self: None)
    monkeypatch.delenv("GEMMA2_API_KEY", raising=False)

    def run(*arguments: str):
        port = () if "--port" in arguments else ("--port", "0")
        monkeypatch.setattr(sys, "argv", ["serve", "--checkpoint", str(ASSETS), *port, *arguments])
        serve.main()
        return apps[-1]

    return run


def test_the_start_says_what_is_served(run_serve, capsys, tmp_path, monkeypatch):
    first, second = (write_adapter(tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    key = tmp_path / "key"
    key.write_text("very-secret\n")
    monkeypatch.setenv("GEMMA2_API_KEY", "not this one")
    app, service, grace = run_serve(
        *("--adapters", f"one={first}", "--adapters", f"two={second}", "--slots", "3", "--context", "64"),
        *("--queue", "7", "--grace", "9", "--api_key_file", str(key), "--name", "tiny"),
    )
    out = capsys.readouterr().out
    lines = {subject: text.strip() for subject, _, text in (line.partition(" ") for line in out.splitlines())}
    assert lines["model"] == f"tiny, huggingface {ASSETS}"
    assert lines["adapter"] == f"two, {second}"
    assert lines["texts"] == "3 at a time, 7 may wait; 64 tokens each, prompt and new ones"
    assert lines["key"] == "asked for below /v1" and "secret" not in out
    assert lines["address"].startswith("http://127.0.0.1:") and lines["address"].endswith("/v1")
    assert len({len(line) - len(line.partition(" ")[2].lstrip()) for line in out.splitlines()}) == 1, "aligned"
    assert service.most_texts == 10 and grace == 9
    routes = next(r.endpoint.__self__ for r in app.routes if getattr(r, "path", "") == "/v1/completions")
    body = CompletionBody(model="one", prompt="a")
    adapters = {name: plan_completion(body, model, 64)[0].request.adapter for name, model in routes._models.items()}
    assert adapters == {"tiny": None, "one": "one", "two": "two"}


def test_adapters_are_loaded_below_a_folder(run_serve, capsys, tmp_path):
    write_adapter(tmp_path / "a", 0)
    app, _, _ = run_serve(
        *("--adapter_folder", str(tmp_path), "--adapter_places", "2", "--adapter_rank", "3", "--slots", "1"),
        *("--context", "32", "--adapters", f"one={tmp_path / 'a'}"),
    )
    assert re.search(
        rf"^adapters +places for 2 of rank 4 at most, 0\.00 GiB; loaded from {tmp_path}$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert {getattr(route, "path", "") for route in app.routes} >= LOADING
    app, _, _ = run_serve("--slots", "1", "--context", "32")
    assert LOADING.isdisjoint(getattr(route, "path", "") for route in app.routes), "it was not asked for"


def test_weights_are_served_in_int8(run_serve, capsys):
    run_serve("--int8", "--slots", "1", "--context", "32")
    assert re.search(r"^weights +int8, ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "99999"), "port is 99999; it must be from 0 to 65535"),
        (("--adapters", "one"), "--adapters is 'one'; give NAME=PATH"),
        (("--adapters", f"tiny-gemma2={ASSETS}"), "two models are called tiny-gemma2"),
        (("--adapter_places", "2"), "adapter_places is for adapters that requests load; give adapter_folder too"),
        (("--adapter_folder", str(ASSETS), "--adapter_rank", "0"), "adapter_rank is 0; it must be at least 1"),
        (("--adapter_folder", "/no/such"), "adapter_folder is /no/such, which is no folder; make it first"),
        (("--deadline", "0"), "deadline is 0.0; it must be above 0"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
        (("--context", "4096"), "context is 4096; it must be at least 1 and at most the model's, 512"),
    ],
)
def test_what_cannot_be_served_is_said(run_serve, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        run_serve(*arguments)
    assert message in f"{ended.value.code} {capsys.readouterr().err}"


def test_what_is_not_installed_is_said(run_serve, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(SystemExit, match=r"uvicorn.*: pip install 'gemma2-jax\[serve\]'"):
        run_serve()


@pytest.mark.parametrize("text", ["", " \n", "two words", "sécret"])
def test_a_key_that_nobody_could_send_is_refused(text, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(text)
    with pytest.raises(ValueError, match="key has no key: a key is one word") as caught:
        serve.read_key(tmp_path / "key")
    assert not text.strip() or text not in str(caught.value)
    monkeypatch.setenv("GEMMA2_API_KEY", text)
    with pytest.raises(ValueError, match="GEMMA2_API_KEY has no key"):
        serve.read_key(None)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("GEMMA2_API_KEY", raising=False)
    assert serve.read_key(None) is None
    monkeypatch.setenv("GEMMA2_API_KEY", "first")
    assert serve.read_key(None) == "first"
    (tmp_path / "key").write_text("second\n")
    assert serve.read_key(tmp_path / "key") == "second"
