"""Data on this CPU: rows planned for ten million documents, rows a second from the loader, tokens a second of a stream.

    python -m benchmarks.data [--documents 10000000]
    python -m benchmarks.data --conversations 1000000     the memory of commands that tokenize

Each case is a process of its own, so that its peak memory is its own. Documents have lengths drawn from a log-normal
distribution, 400 tokens on average. The loader reads a synthetic store in a temporary folder. A stream reads JSONL with
parts of Python's documentation, as texts or as conversations, and tokenizes them. Both speeds stand beside what a
cluster of 8 H100s takes: at most 2,250 tokens/s a GPU, published for LoRA on Qwen2.5 32B, on one GPU of such a cluster,
with Megatron-like stacks. That is a bound taken from elsewhere, not a measurement of this program.

With --conversations, nothing but memory is measured: `train` tokenizes so many conversations and takes a step,
`data build` tokenizes a text for each, and `data inspect` reads all of them. It is read from /proc all the while:
resident, which counts pages of mapped files, which may be dropped, and anonymous, which may not. What the command's own
process takes stands beside what the largest of its workers takes.
"""

import importlib
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.options import make_parser

GPUS, TOKENS_PER_GPU = 8, 2_250  # of LoRA on 32B, tokens/s; see above
LOADED_DOCUMENTS = 200_000
SEQUENCES = (2048, 4096, 8192)
TOKENIZER = "assets/tiny-gemma2"
STREAMED_DOCUMENTS = 4000  # in the file of a stream, which begins again


def run_in_process(function: Callable, *arguments):
    """The result of a call in a fresh process, and its peak resident MiB above that of the imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, *arguments))


def _measured(function: Callable, *arguments):
    importlib.import_module("gemma2_jax.data.batches")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = function(*arguments)
    return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def draw_offsets(documents: int):
    """Where documents of drawn lengths begin, and where the last ends."""
    import numpy as np

    lengths = np.random.RandomState(0).lognormal(5.5, 1.0, documents).astype(np.int64) + 2
    return np.concatenate([[0], np.cumsum(lengths)])


class AllLearned:
    """In place of the array of tokens that are learned: all but the first of a block. Nothing is read from a disk."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice):
        import numpy as np

        start, stop, _ = part.indices(self.tokens)
        return np.ones(stop - start, bool)


def plan(folder: Path, documents: int, concatenate: bool) -> tuple[float, float, float]:
    """Seconds to plan rows of 4,096 tokens and to keep the plan, seconds to open it again, and how full rows are."""
    from gemma2_jax.data.packing import pack_documents
    from gemma2_jax.data.store import Store

    offsets = draw_offsets(documents)
    everything = AllLearned(int(offsets[-1]))
    store = Store(tokens=everything, learned=everything, offsets=offsets, folder=folder)
    choices = {"length": 4096, "packing": True, "concatenate": concatenate, "seed": 0}
    start = time.perf_counter()
    pack_documents(store, **choices)
    planned = time.perf_counter()
    rows = pack_documents(store, **choices)
    opened = time.perf_counter()
    return planned - start, opened - planned, rows.plan.tokens / (len(rows) * rows.length)


def load(folder: Path, length: int, seconds: float = 10.0) -> float:
    """Rows a second of the loader, in batches of 16."""
    import numpy as np

    from gemma2_jax.data.batches import Batches, Layout
    from gemma2_jax.data.packing import pack_documents
    from gemma2_jax.data.store import Store

    offsets = draw_offsets(LOADED_DOCUMENTS)
    files = {"tokens": np.int32, "learned": np.bool_}
    for name, dtype in files.items():
        np.ones(offsets[-1], dtype).tofile(folder / name)
    maps = {name: np.memmap(folder / name, dtype, "r") for name, dtype in files.items()}
    rows = pack_documents(
        Store(**maps, offsets=offsets, folder=folder), length=length, packing=True, concatenate=False, seed=0
    )
    return _count_rows(Batches(rows, Layout(sequence_length=length, batch_size=16), seed=0), seconds)


def _count_rows(batches: Iterator, seconds: float) -> float:
    """Rows a second of batches of 16."""
    for _ in range(8):
        next(batches)  # what was read ahead does not count
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 16
    return count / elapsed


def stream(folder: Path, kind: str, seconds: float = 10.0) -> float:
    """Tokens a second of a stream, in rows of 4,096."""
    from gemma2_jax.config import DataConfig
    from gemma2_jax.data import python_docs
    from gemma2_jax.data.batches import Layout, load_tokenizer, train_batches

    texts, numbers = list(python_docs.python_documents().values()), random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(STREAMED_DOCUMENTS):
            text = numbers.choice(texts)[: numbers.randrange(500, 4000)]
            half = len(text) // 2
            turns = [{"role": "user", "content": text[:half]}, {"role": "assistant", "content": f"{text[half:]}."}]
            print(json.dumps({"text": text} if kind == "text" else {"messages": turns}), file=file)
    data = DataConfig(kind=kind, train=str(folder / "data.jsonl"), stream=True, eval_fraction=0.0)
    layout = Layout(sequence_length=4096, batch_size=16)
    return 4096 * _count_rows(train_batches(data, load_tokenizer(TOKENIZER), layout, cache=folder), seconds)


def write_conversations(path: Path, conversations: int) -> None:
    """Writes conversations of a question and its answer as JSONL, about 600 bytes each, with the same as a text."""
    from gemma2_jax.data.python_docs import python_documents

    drawn, texts = random.Random(0), list(python_documents().values())
    with path.open("w") as file:
        for number in range(conversations):
            text = drawn.choice(texts)
            at = drawn.randrange(len(text))
            question, answer = text[at : at + drawn.randrange(40, 200)], text[at : at + drawn.randrange(40, 300)]
            user = {"role": "user", "content": f"{question} {number}"}
            messages = [user, {"role": "assistant", "content": f"{answer}."}]
            print(json.dumps({"messages": messages, "text": f"{question} {number} {answer}"}), file=file)


def watch_memory(command: list[str]) -> dict[str, dict[str, float]]:
    """Peak MB of a command and of the largest of its children, by the lines of /proc/PID/status. Raises if it fails."""
    peaks = {who: {"VmHWM": 0.0, "RssAnon": 0.0} for who in ("command", "worker")}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None:
            try:
                threads = Path(f"/proc/{process.pid}/task").glob("*/children")
                children = [child for thread in threads for child in thread.read_text().split()]
            except OSError:  # it has ended
                break
            for who, number in [("command", process.pid), *(("worker", child) for child in children)]:
                for name, size in _read_status(number).items():
                    peaks[who][name] = max(peaks[who][name], size)
            time.sleep(0.05)
        if process.wait():
            output.seek(0)
            raise RuntimeError(f"{command} failed: {output.read()[-2000:]}")
    return peaks


def _read_status(number: int | str) -> dict[str, float]:
    """Peak resident MB of a process and the anonymous MB that it has now; nothing where it has ended."""
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 / 1e6 for name, value in pairs if name in ("VmHWM", "RssAnon")}


def print_memory(conversations: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"MB at most, of {conversations:,} conversations on {os.cpu_count()} CPU cores")
    for column in ("", "command, resident", "anonymous", "a worker, resident", "anonymous", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "conversations.jsonl"
        write_conversations(source, conversations)
        tokenizer = ["--data.tokenizer", TOKENIZER]
        train = ["train", "--config", "tiny_sft", "--workdir", str(folder / "run"), "--steps", "1"]
        commands = {
            "train": [*train, "--data.train", str(source), "--data.cache", str(folder / "cache")],
            "data build": ["data", "build", str(source), str(folder / "built"), *tokenizer],
            "data inspect": ["data", "inspect", str(source), "--documents", "0", *tokenizer],
        }
        for label, arguments in commands.items():
            start = time.perf_counter()
            peaks = watch_memory([sys.executable, "-m", "gemma2_jax", *arguments])
            sizes = [f"{peaks[who][kind]:,.0f}" for who in peaks for kind in ("VmHWM", "RssAnon")]
            table.add_row(label, *sizes, f"{time.perf_counter() - start:.0f}")
    Console().print(table)


def main() -> None:
    parser = make_parser("data", __doc__)
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents to plan rows for")
    parser.add_argument("--conversations", type=int, help="measure the memory of commands on so many, and nothing else")
    options = parser.parse_args()
    if options.conversations:
        print_memory(options.conversations)
        return
    documents = options.documents
    from rich.console import Console
    from rich.table import Table

    console = Console()
    plans = Table(title=f"Rows of 4,096 planned for {documents:,} documents on {os.cpu_count()} CPU cores")
    for column in ("documents are", "planned and kept, s", "opened again, s", "peak, MiB", "rows are full"):
        plans.add_column(column, justify="left" if column == "documents are" else "right")
    for name, concatenate in (("whole, packed", False), ("end to end, cut", True)):
        with tempfile.TemporaryDirectory() as folder:
            (planned, opened, full), memory = run_in_process(plan, Path(folder), documents, concatenate)
        plans.add_row(name, f"{planned:.1f}", f"{opened:.4f}", f"{memory:,.0f}", f"{full:.2%}")
    console.print(plans)
    loader = Table(
        title=f"Loader: {GPUS} GPUs x {TOKENS_PER_GPU:,} tokens/s = {GPUS * TOKENS_PER_GPU:,} tokens/s taken"
    )
    for column in ("row", "rows/s", "tokens/s", "rows/s taken", "times as fast"):
        loader.add_column(column, justify="right")
    for length in SEQUENCES:
        with tempfile.TemporaryDirectory() as folder:
            speed, _ = run_in_process(load, Path(folder), length)
        taken = GPUS * TOKENS_PER_GPU / length
        loader.add_row(
            f"{length:,}", f"{speed:,.0f}", f"{speed * length:,.0f}", f"{taken:.1f}", f"{speed / taken:,.0f}"
        )
    console.print(loader)
    streams = Table(title="A stream, which one process reads")
    for column in ("documents are", "tokens/s", "peak, MiB", "times as fast as is taken"):
        streams.add_column(column, justify="left" if column == "documents are" else "right")
    for kind in ("text", "instructions"):
        with tempfile.TemporaryDirectory() as folder:
            speed, memory = run_in_process(stream, Path(folder), kind)
        streams.add_row(kind, f"{speed:,.0f}", f"{memory:,.0f}", f"{speed / (GPUS * TOKENS_PER_GPU):,.0f}")
    console.print(streams)


if __name__ == "__main__":
    main()
