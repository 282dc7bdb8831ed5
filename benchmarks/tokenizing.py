"""Tokenizing a corpus into the store that training reads, beside `datasets.map` with the same tokenizer, on this CPU.

The corpus is JSONL with texts of Python's documentation, repeated with a number added so that no two are alike, in
eight files; with `--shape messages`, conversations of two to six messages made of parts of them, which their side
writes by the tokenizer's `apply_chat_template`. That side makes no masks; ours says of every token whether it is
learned. Both sides use a process for each CPU and start with nothing cached; theirs reads the JSON into Arrow
before it maps, and both times are shown. Each run is a process of its own, and the two sides take turns. It needs the
extra `datasets`. Peak memory is that of the largest process.
"""

import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.options import make_parser

TOKENIZER = "assets/tiny-gemma2"
FILES = 8
SIDES = ("gemma2_jax", "datasets.map")


def write_corpus(folder: Path, megabytes: int, shape: str = "text") -> None:
    from gemma2_jax.data import python_docs

    draw = {"text": draw_text, "messages": draw_messages}[shape]
    texts, random_numbers = list(python_docs.python_documents().values()), random.Random(0)
    for number in range(FILES):
        with (folder / f"{number}.jsonl").open("w") as file:
            while file.tell() < megabytes * 1e6 / FILES:
                print(json.dumps({shape: draw(texts, random_numbers)}), file=file)


def draw_text(texts: list[str], random_numbers: random.Random) -> str:
    return f"{random_numbers.choice(texts)} {random_numbers.random()}"


def draw_messages(texts: list[str], random_numbers: random.Random) -> list[dict[str, str]]:
    """A conversation of two to six messages, each of 50 to 800 characters and a number."""
    messages = []
    for number in range(random_numbers.choice((2, 2, 4, 6))):
        text = random_numbers.choice(texts)
        start = random_numbers.randrange(len(text))
        part = text[start : start + random_numbers.randrange(50, 800)].strip()
        content = f"{part} {random_numbers.random()}"
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


def tokenize_here(corpus: Path, folder: Path, shape: str) -> tuple[int, float]:
    """Tokens, and seconds of reading before they are made."""
    from gemma2_jax.config import DataConfig
    from gemma2_jax.data import encoding
    from gemma2_jax.data.store import build_store

    encoding.hide_torch()  # as the commands do
    kind = "text" if shape == "text" else "instructions"
    data = DataConfig(kind=kind, train=str(corpus), eval="python-docs")
    return len(build_store(data, "train", encoding.load_tokenizer(TOKENIZER), folder).tokens), 0.0


def tokenize_there(corpus: Path, folder: Path, shape: str) -> tuple[int, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    processes, began = len(os.sched_getaffinity(0)), time.perf_counter()
    files = [str(path) for path in sorted(corpus.iterdir())]
    documents = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=str(folder), num_proc=processes
    )
    read = time.perf_counter() - began

    def encode(batch: dict) -> dict:
        if shape == "text":
            texts = [f"<bos>{text}<eos>" for text in batch["text"]]
        else:
            texts = [f"{text}<eos>" for text in tokenizer.apply_chat_template(batch["messages"], tokenize=False)]
        encoded = tokenizer(texts, add_special_tokens=False)
        return {"input_ids": encoded["input_ids"], "length": list(map(len, encoded["input_ids"]))}

    tokens = documents.map(encode, batched=True, num_proc=processes, remove_columns=[shape])
    return sum(tokens["length"]), read


def run_side(side: str, corpus: Path, folder: Path, shape: str) -> None:
    began = time.perf_counter()
    tokens, read = {"gemma2_jax": tokenize_here, "datasets.map": tokenize_there}[side](corpus, folder, shape)
    seconds = time.perf_counter() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"tokens": tokens, "seconds": seconds, "read": read, "peak_mb": peak / 1000}))


def time_side(side: str, corpus: Path, shape: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tokenizing", "--side", side, "--shape", shape]
        command += ["--corpus", str(corpus), "--folder", folder]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": folder}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = make_parser("tokenizing", __doc__)
    parser.add_argument("--megabytes", type=int, default=128, help="of JSONL")
    parser.add_argument("--shape", choices=("text", "messages"), default="text", help="texts, or conversations")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--side", choices=SIDES, help="run one side, which is what this benchmark starts")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.corpus, options.folder, options.shape)
        return
    corpus = Path(tempfile.mkdtemp())
    try:
        write_corpus(corpus, options.megabytes, options.shape)
        found: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(time_side(side, corpus, options.shape))
    finally:
        shutil.rmtree(corpus)
    cpus = len(os.sched_getaffinity(0))
    print(f"\n{options.megabytes} MB of JSONL ({options.shape}), {cpus} CPUs, median of {options.rounds}\n")
    print(f"{'':14}{'tokens':>12}{'seconds':>10}{'of reading':>12}{'tokens/s':>12}{'peak MB':>10}")
    for side, runs in found.items():
        seconds, read, peak = (statistics.median(run[name] for run in runs) for name in ("seconds", "read", "peak_mb"))
        tokens = runs[0]["tokens"]
        print(f"{side:14}{tokens:12,}{seconds:10.1f}{read:12.1f}{tokens / seconds:12,.0f}{peak:10,.0f}")
    ratios = [
        there["seconds"] / here["seconds"]
        for here, there in zip(found["gemma2_jax"], found["datasets.map"], strict=True)
    ]
    print(f"\ngemma2_jax is {statistics.median(ratios):.2f} times as fast, by the median of pairs")


if __name__ == "__main__":
    main()
