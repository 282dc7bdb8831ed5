"""The server under load by OpenAI's own client: streams side by side, some canceled halfway, some read slowly.

    python -m benchmarks.serving [--streams 200] [--requests 2000] [--minutes 0] [--rate 0] [--slots 64] [--adapters 0]

It starts `python -m gemma2_jax.serve` with the tiny model on this machine's CPU, in a process of its own, and asks it
for chats of random lengths: prompts of 5 to 150 words, answers of 16 to 128 tokens that no end token cuts short. When
a stream ends another is opened, until all requests are made or the minutes are over. One of 10 is canceled after its
third piece. One of 20 asks for the log-probabilities of 20 tokens in each place, some 2 KB a token, and waits half a
second after each piece, so that the server cannot get rid of them.

With --rate, so many requests begin a second, whatever has become of those before: the load of a server that has time to
spare. With --adapters, so many LoRAs of random numbers lie in the server's folder, one is loaded or unloaded every five
seconds, and requests ask for the model or one of those that are there.

Time to first token and between tokens are the client's, which shares the cores with the server; the time between the
tokens of an answer is that from its first piece to its last, divided by the tokens between. The server's memory
(resident, of /proc) is taken after a tenth of the time, and at the end; with --minutes it is printed every ten seconds.
The status is 1 where an answer is not what was asked for, or a slot is not free at the end.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.options import make_parser

MODEL = Path("assets/tiny-gemma2")
WORDS = "what does json dumps do with a list of numbers and how is the module used in python"
NO_END = {"1": -100, "5": -100}  # the tiny model's end tokens
_SAMPLE_SECONDS = 10
_ADAPTER_SECONDS = 5  # between two adapters that are loaded or unloaded
_CLIENT_SECONDS = 1  # after which no request is on its way any more that asks for an adapter to be unloaded


@dataclass
class Tally:
    """What the clients have seen."""

    first: list[float] = field(default_factory=list)  # seconds to the first token of each answer
    between: list[float] = field(default_factory=list)  # mean seconds between the tokens of each answer
    gaps: list[float] = field(default_factory=list)  # seconds between the pieces of a stream
    tokens: int = 0
    begun: int = 0
    answered: int = 0
    canceled: int = 0
    slow: int = 0
    loaded: int = 0
    failures: list[str] = field(default_factory=list)


def main() -> None:
    parser = make_parser("serving", __doc__)
    parser.add_argument("--streams", type=int, default=200, help="that are open at a time")
    parser.add_argument("--requests", type=int, default=2000, help="that are made, unless --minutes says for how long")
    parser.add_argument("--minutes", type=float, default=0, help="that it takes; 0: until the requests are made")
    parser.add_argument("--rate", type=float, default=0, help="requests that begin a second; 0: when others end")
    parser.add_argument("--slots", type=int, default=64, help="texts that the server continues at a time")
    parser.add_argument("--adapters", type=int, default=0, help="that are loaded and unloaded meanwhile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.adapters):
            write_adapter(Path(folder) / f"adapter-{number}", number)
        process, address = start_server(options, folder)
        try:
            failed = asyncio.run(measure(process, address, options))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
    print(f"told to end, the server did with status {status}")
    sys.exit(bool(failed or status))


def write_adapter(folder: Path, seed: int) -> None:
    """A LoRA of PEFT's on the queries of the tiny model, of random numbers."""
    import numpy as np
    from safetensors.numpy import save_file

    model = json.loads((MODEL / "config.json").read_text())
    numbers, arrays = np.random.default_rng(seed), {}
    shapes = {"lora_A": (4, model["hidden_size"]), "lora_B": (model["num_attention_heads"] * model["head_dim"], 4)}
    for layer in range(model["num_hidden_layers"]):
        for name, shape in shapes.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}.weight"
            arrays[path] = 0.1 * numbers.normal(size=shape).astype(np.float32)
    folder.mkdir()
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"base_model_name_or_path": str(MODEL), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def start_server(options: Namespace, folder: str) -> tuple[subprocess.Popen, str]:
    """The server, once it takes requests, and its address."""
    command = [sys.executable, "-m", "gemma2_jax.serve", "--checkpoint", str(MODEL), "--port", "0"]
    command += ["--queue", str(2 * options.streams), "--slots", str(options.slots)]
    if options.adapters:
        command += ["--adapter_folder", folder, "--adapter_places", str(2 * options.adapters), "--adapter_rank", "4"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if found := re.match(r"address +(\S+)", line):
            return process, found[1]
    sys.exit("the server has not started")


async def measure(process: subprocess.Popen, address: str, options: Namespace) -> bool:
    """Makes the requests and prints what came of them; returns whether something is wrong."""
    import openai

    tally, began, models = Tally(), time.perf_counter(), [MODEL.name]
    memory = [(0.0, read_memory(process.pid))]
    client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)

    def is_over() -> bool:
        if options.minutes:
            return time.perf_counter() - began > 60 * options.minutes
        return tally.begun >= options.requests

    async def ask_on() -> None:
        while not is_over():
            tally.begun += 1
            await ask(client, tally, tally.begun, models)

    async def ask_in_time() -> None:
        async with asyncio.TaskGroup() as group:
            while not is_over():
                tally.begun += 1
                group.create_task(ask(client, tally, tally.begun, models))
                await asyncio.sleep(max(began + tally.begun / options.rate - time.perf_counter(), 0))

    async def watch() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_SECONDS if options.minutes else 0.5)
            memory.append((time.perf_counter() - began, read_memory(process.pid)))
            if options.minutes:
                print(f"{memory[-1][0]:6.0f} s  {tally.begun:7,} requests  {memory[-1][1] / 2**20:.0f} MiB", flush=True)

    beside = [watch(), *([change_adapters(address, tally, models, options.adapters)] if options.adapters else [])]
    tasks = [asyncio.create_task(work) for work in beside]
    await asyncio.gather(*([ask_in_time()] if options.rate else [ask_on() for _ in range(options.streams)]))
    seconds = time.perf_counter() - began
    for task in tasks:
        task.cancel()
    await client.close()
    await asyncio.sleep(1)
    memory.append((time.perf_counter() - began, read_memory(process.pid)))
    counts = await asyncio.to_thread(read_metrics, address)
    print_table(tally, seconds, options, memory, counts)
    left = counts["gemma2_slots_busy"] + counts["gemma2_queue_length"]
    return bool(tally.failures or left)


async def change_adapters(address: str, tally: Tally, models: list[str], count: int) -> None:
    """Loads adapters and unloads them, in an order by chance. `models` are those that may be asked for."""
    draw, loaded = random.Random(0), set()
    while True:
        await asyncio.sleep(_ADAPTER_SECONDS)
        name = f"adapter-{draw.randrange(count)}"
        body = {"lora_name": name}
        try:
            if name in loaded:
                models.remove(name)
                await asyncio.sleep(_CLIENT_SECONDS)
                await asyncio.to_thread(post, f"{address}/unload_lora_adapter", body)
                loaded.remove(name)
            else:
                await asyncio.to_thread(post, f"{address}/load_lora_adapter", body | {"lora_path": name})
                loaded.add(name)
                models.append(name)
                tally.loaded += 1
        except urllib.error.HTTPError as error:
            if error.code != 409:  # as long as every place has texts
                tally.failures.append(f"{name}: {error}")


def post(address: str, body: dict[str, str]) -> None:
    """A request whose answer is of no interest. Raises HTTPError unless it succeeds."""
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as response:
        response.read()


async def ask(client, tally: Tally, number: int, models: list[str]) -> None:
    """One request, whose kind and length follow from its number; it asks for one of the models."""
    draw = random.Random(number)
    words = " ".join(draw.choices(WORDS.split(), k=draw.randint(5, 150)))
    tokens, is_slow, is_canceled = draw.randint(16, 128), number % 20 == 7, number % 10 == 3
    began = time.perf_counter()
    try:
        stream = await client.chat.completions.create(
            model=draw.choice(models),
            messages=[{"role": "user", "content": words}],
            max_tokens=tokens,
            seed=number,
            logit_bias=NO_END,
            stream=True,
            stream_options={"include_usage": True},
            **(dict(logprobs=True, top_logprobs=20) if is_slow else {}),
        )
        times, made = [], 0
        async for chunk in stream:
            if chunk.usage:
                made = chunk.usage.completion_tokens
            elif chunk.choices[0].delta.content:
                times.append(time.perf_counter())
                if is_slow:
                    await asyncio.sleep(0.5)
                if is_canceled and len(times) >= 3:
                    await stream.close()
                    tally.canceled += 1
                    return
    except Exception as error:  # of the client, of HTTP below it, or of a socket: each is a failure that is counted
        tally.failures.append(f"{type(error).__name__}: {error}")
        return
    if made != tokens or not times:
        tally.failures.append(f"{made} tokens came where {tokens} were asked for")
        return
    tally.answered += 1
    tally.tokens += made
    if is_slow:
        tally.slow += 1
        return
    tally.first.append(times[0] - began)
    tally.between.append((times[-1] - times[0]) / (made - 1))
    tally.gaps += [after - before for before, after in pairwise(times)]


def read_memory(pid: int) -> int:
    """Bytes of memory that a process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_metrics(address: str) -> dict[str, float]:
    """The server's own counters."""
    with urllib.request.urlopen(address.removesuffix("/v1") + "/metrics") as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def print_table(tally: Tally, seconds: float, options: Namespace, memory: list, counts: dict[str, float]) -> None:
    import numpy as np

    def percentiles(values: list[float]) -> str:
        return ", ".join(f"{np.percentile(values, share) * 1e3:,.0f}" for share in (50, 99))

    early = next(size for when, size in memory if when >= seconds / 10)
    sizes = [f"{size / 2**20:.0f}" for size in (memory[0][1], early, memory[-1][1])]
    done = f"{tally.answered:,}, of which {tally.slow:,} were read slowly; {tally.canceled:,} canceled halfway"
    speed = f"{counts['gemma2_new_tokens_total'] / seconds:,.0f} tokens/s, {tally.begun / seconds:.1f} requests/s"
    left = f"{counts['gemma2_slots_busy']:.0f} slots busy, {counts['gemma2_queue_length']:.0f} waiting"
    load = f"{options.rate:g} begun a second" if options.rate else f"{options.streams} streams at a time"
    rows = {
        "requests": f"{tally.begun:,} in {seconds:,.0f} s, {load}",
        "answered": done,
        "adapters": f"loaded {tally.loaded:,} times, {options.adapters} of them",
        "failed": f"{len(tally.failures):,} {'; '.join(sorted(set(tally.failures))[:3])}",
        "throughput": speed,
        "first token": f"{percentiles(tally.first)} ms (median, 99th percentile)",
        "between tokens": f"{percentiles(tally.between)} ms",
        "between pieces": f"{percentiles(tally.gaps)} ms",
        "memory": f"{sizes[0]} MiB before, {sizes[1]} after a tenth of the time, {sizes[2]} at the end",
        "left behind": left,
    }
    for name, text in rows.items():
        print(f"{name:16}{text}")


if __name__ == "__main__":
    main()
