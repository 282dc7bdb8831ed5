"""`python -m gemma2_jax.serve --checkpoint PATH`: OpenAI's HTTP API on a checkpoint. The command line only.

It opens the checkpoint (`convert`), and hands it to the engine and its HTTP application (`inference`). Nothing here
imports JAX before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gemma2_jax import command_line
from gemma2_jax.cluster import platforms
from gemma2_jax.inference.source import Source, load_source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.inference.adapters import AdapterRoom
    from gemma2_jax.inference.decoder import Decoder
    from gemma2_jax.inference.engine import Engine

_KEY_VARIABLE = "GEMMA2_API_KEY"
_STEPS = 4  # of one call of the engine: a request that comes waits for two calls, and a stream's tokens come together
_PLACES, _RANK = 8, 16  # for adapters that requests load, where no numbers are given; vLLM's highest rank
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Serves a Gemma 2 checkpoint of any format by OpenAI's HTTP API.

    It has /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    With --adapter_folder, it has vLLM's /v1/load_lora_adapter and
    /v1/unload_lora_adapter too.

    SIGTERM or Ctrl-C ends it once the requests under way are answered.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    adapters: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # NAME=PATH of one more, which requests ask for by name
    adapter_folder: Path | None = None  # requests may load adapters that lie below it; None: they may load none
    adapter_places: int | None = None  # with adapter_folder, for adapters at a time, those of --adapters too; None: 8
    adapter_rank: int | None = None  # with adapter_folder, the highest that an adapter may have; None: 16
    name: str | None = None  # the model's in requests; None: that of the checkpoint's folder, or its Hub id
    host: str = "127.0.0.1"  # address that it listens on; 0.0.0.0 is every one of this machine
    port: int = 8000  # 0: any that is free
    api_key_file: Path | None = None  # its text is the key that requests must have; None: GEMMA2_API_KEY, if it is set
    context: int | None = None  # tokens of a prompt and its text together; None: as many as the model takes
    slots: int | None = None  # texts that are continued at a time; None: as many as fit into memory, 64 at most
    queue: int = 256  # texts that may wait for a slot; more are refused (429)
    deadline: float = 600  # seconds that a request may take, with the time that it waits
    grace: float = 30  # seconds that requests under way have to finish when the server is told to end

    def __post_init__(self) -> None:
        if self.name == "":
            raise ValueError("name is empty; give the model a name, or leave it out")
        for option in ("adapter_places", "adapter_rank"):
            value = getattr(self, option)
            if value is not None and self.adapter_folder is None:
                raise ValueError(f"{option} is for adapters that requests load; give adapter_folder too")
            if value is not None and value < 1:
                raise ValueError(f"{option} is {value}; it must be at least 1")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; it must be from 0 to 65535")
        if self.queue < 0:
            raise ValueError(f"queue is {self.queue}; it must be at least 0")
        if not self.deadline > 0:
            raise ValueError(f"deadline is {self.deadline}; it must be above 0")
        if not self.grace >= 0:
            raise ValueError(f"grace is {self.grace}; it must be at least 0")


def main(program: str = "python -m gemma2_jax.serve") -> None:
    """Parses, loads, serves; exits with a sentence where that cannot be done."""
    command = command_line.parse(Command, sys.argv[1:], program)
    platforms.prepare_process()
    with command_line.exit_with_sentence():
        if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
            raise ValueError(f"a server needs {', '.join(_PACKAGES)}: pip install 'gemma2-jax[serve]'")
        platforms.check_platform()
        _serve(command)


def _serve(command: Command) -> None:
    key, room = read_key(command.api_key_file), _find_room(command)
    checkpoint, tokenizer = open_source(command.source)
    from gemma2_jax.inference.adapters import attach_adapters
    from gemma2_jax.inference.engine import Engine, count_slots
    from gemma2_jax.inference.http.app import make_app
    from gemma2_jax.inference.http.loader import AdapterLoader
    from gemma2_jax.inference.http.models import describe_model
    from gemma2_jax.inference.http.server import open_socket, serve
    from gemma2_jax.inference.service import Service

    with open_socket(command.host, command.port) as opened:  # before the work that takes long
        name = command.name or _name_model(command.source.checkpoint)
        adapters = _open_adapters(command, name, checkpoint)
        models = {name: describe_model(name, checkpoint, tokenizer)}
        for adapter_name, (adapter, its_tokenizer) in adapters.items():
            models[adapter_name] = describe_model(
                adapter_name, adapter, its_tokenizer or tokenizer, adapter=adapter_name
            )
        decoder = load_source(command.source, checkpoint)
        attach_adapters(decoder, checkpoint, {name: adapter for name, (adapter, _) in adapters.items()}, room)
        context = command.context or decoder.config.max_length
        slots = command.slots or count_slots(decoder, context)
        engine = Engine(decoder, slots=slots, context=context, steps=_STEPS)
        began = time.perf_counter()
        engine.warm()
        seconds = time.perf_counter() - began
        service = Service(engine, queue=command.queue, deadline=command.deadline)
        folder = command.adapter_folder
        loader = AdapterLoader(service, decoder, models, base=checkpoint, folder=folder) if folder else None

        def announce() -> None:
            _print_startup(
                [
                    ("model", f"{name}, {checkpoint.format} {checkpoint.path}"),
                    *(("adapter", f"{name}, {adapter.path}") for name, (adapter, _) in adapters.items()),
                    *([("adapters", _describe_room(decoder, folder))] if folder else []),
                    *_describe_engine(engine, decoder, command.queue),
                    ("warm-up", f"{seconds:.1f} s; compiled programs {platforms.describe_cache()}"),
                    ("key", "asked for below /v1" if key else "none: whoever reaches the address may use it"),
                    ("address", _describe_address(opened.getsockname())),
                ]
            )

        app = make_app(service, models, loader=loader, key=key)
        serve(app, service, opened, grace=command.grace, announce=announce)


def _print_startup(lines: list[tuple[str, str]]) -> None:
    width = max(len(subject) for subject, _ in lines) + 2
    print("\n".join(subject.ljust(width) + command_line.escape(text) for subject, text in lines), flush=True)


def _find_room(command: Command) -> "AdapterRoom | None":
    """The room for adapters that requests load. Raises ValueError if their folder is none."""
    if command.adapter_folder is None:
        return None
    if not command.adapter_folder.is_dir():
        raise ValueError(f"adapter_folder is {command.adapter_folder}, which is no folder; make it first")
    from gemma2_jax.inference.adapters import AdapterRoom

    return AdapterRoom(places=command.adapter_places or _PLACES, rank=command.adapter_rank or _RANK)


def _describe_room(decoder: "Decoder", folder: Path) -> str:
    rank = max(shape.rank for shape in decoder.bank_shapes.values())
    size = f"{decoder.bank_bytes / 2**30:.2f} GiB"
    return f"places for {decoder.adapter_places} of rank {rank} at most, {size}; loaded from {folder}"


def _open_adapters(
    command: Command, model_name: str, base: "Checkpoint"
) -> "dict[str, tuple[Checkpoint, PreTrainedTokenizerFast | None]]":
    """The adapters that are named, each with its tokenizer if it has one."""
    from gemma2_jax.convert.formats.companions import load_tokenizer
    from gemma2_jax.convert.opening import open_checkpoint

    opened = {}
    for text in command.adapters:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--adapters is {text!r}; give NAME=PATH")
        if name in opened or name == model_name:
            raise ValueError(f"two models are called {name}; give each a name of its own")
        adapter = open_checkpoint(path, base=base)
        opened[name] = adapter, load_tokenizer(adapter.tokenizer) if adapter.tokenizer else None
    return opened


def read_key(path: Path | None) -> str | None:
    """The key that requests must have: the text of a file, else GEMMA2_API_KEY; None if there is neither.

    Raises ValueError if it is none that a client could send.
    """
    key, place = (os.environ.get(_KEY_VARIABLE), _KEY_VARIABLE) if path is None else (path.read_text(), str(path))
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{place} has no key: a key is one word of ASCII characters")
    return key


def _name_model(checkpoint: str) -> str:
    """The Hub id, or the name of the folder."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint


def _describe_engine(engine: "Engine", decoder: "Decoder", queue: int) -> Iterator[tuple[str, str]]:
    import jax

    weights = jax.tree.leaves(decoder.weights)
    kind = max(weights, key=lambda w: w.nbytes).dtype
    yield "weights", f"{kind}, {sum(w.nbytes for w in weights) / 2**30:.2f} GiB"
    yield "devices", decoder.place
    yield "texts", f"{engine.slots} at a time, {queue} may wait; {engine.context:,} tokens each, prompt and new ones"
    yield "cache", f"{engine.cache_bytes / 2**30:.2f} GiB"


def _describe_address(address: tuple) -> str:
    host, port = address[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


if __name__ == "__main__":
    main()
