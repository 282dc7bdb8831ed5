"""Greedy generation by the same small models here, with transformers and with llama.cpp, on this CPU in float32.

    python -m benchmarks.generation [--models tiny small medium] [--rows 1 4 8 32]

Every side has the same weights and prompts, and its tokens are compared with ours. A side is a process of its own, one
after another. Prompts have 128 tokens, others in each call, and 128 new ones follow. What is timed is, by the best of
three calls after one that compiles, the time until every row has its first token, and tokens per second from there on.
transformers' continuous batching is `generate_batch`; llama.cpp has float32 weights and cache, and two threads.

"of the bound" is what a step must read, weights and the keys and values of rows that are half full, over the time it
takes, as a share of the rate at which this machine copies memory (bytes read and written by numpy.copyto).
"""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.options import make_parser
from benchmarks.peer import MODELS, our_weights, save_weights, transformers_model
from gemma2_jax.cluster import platforms
from gemma2_jax.model_config import ModelConfig

PROMPT, NEW, CALLS = 128, 128, 3
TOKENIZER = Path("assets/tiny-gemma2")  # a GGUF file must have one; none is used
CASES = {
    "tiny": MODELS["tiny, 3.7M"],
    "small": MODELS["small, 19M"],
    "medium": MODELS["medium, 40M"],
}

type Tokens = list[list[int]]  # new tokens of each row
type Generate = Callable[
    [Tokens], tuple[float, float, Tokens]
]  # from prompts to seconds until the first, seconds, tokens


def make_prompts(model: ModelConfig, rows: int, call: int) -> Tokens:
    """The same prompts on all sides, and others in each call: what the engine has read, it does not read again."""
    return np.random.default_rng(call).integers(3, model.vocab_size, (rows, PROMPT)).tolist()


def start_engine(model: ModelConfig, rows: int, folder: Path) -> Generate:
    """This program's engine."""
    import jax
    from flax import nnx

    from gemma2_jax.config import ComputeConfig
    from gemma2_jax.inference.decoder import Decoder
    from gemma2_jax.inference.engine import Engine, Request
    from gemma2_jax.model.attention.choice import choose_attention
    from gemma2_jax.model.gemma2 import Gemma2

    compute = ComputeConfig(dtype="float32")
    attention, _ = choose_attention(model, compute, jax.devices()[0])

    def create() -> Gemma2:
        return Gemma2(model, attention=attention, dtype=compute.dtype, rngs=nnx.Rngs(0))

    graph = nnx.graphdef(nnx.eval_shape(create))
    engine = Engine(Decoder(graph, our_weights(model, folder / "weights.npz")), slots=rows, context=PROMPT + NEW)

    def generate(prompts: Tokens) -> tuple[float, float, Tokens]:
        requests = [Request(prompt=prompt, max_new_tokens=NEW) for prompt in prompts]
        began, first = time.perf_counter(), 0.0
        for request in requests:
            engine.submit(request)
        while not engine.is_idle:
            engine.advance()
            if not first and all(request.tokens for request in requests):
                first = time.perf_counter() - began
        return first, time.perf_counter() - began, [request.tokens for request in requests]

    return generate


def start_transformers(model: ModelConfig, rows: int, folder: Path) -> Generate:
    """transformers' `generate`."""
    import torch

    whole = transformers_model(model).eval()
    whole.generation_config.eos_token_id = None  # no token ends a row, as ours were not told of one
    mask = torch.ones((rows, PROMPT))

    def generate(prompts: Tokens) -> tuple[float, float, Tokens]:
        times = []
        for new in (1, NEW):
            began = time.perf_counter()
            found = whole.generate(torch.tensor(prompts), attention_mask=mask, do_sample=False, max_new_tokens=new)
            times.append(time.perf_counter() - began)
        return *times, found[:, PROMPT:].tolist()

    return generate


def start_batches(model: ModelConfig, rows: int, folder: Path) -> Generate:
    """transformers' continuous batching, which says nothing of its first tokens."""
    from transformers import GenerationConfig

    whole = transformers_model(model).eval()
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generate(prompts: Tokens) -> tuple[float, float, Tokens]:
        began = time.perf_counter()
        found = whole.generate_batch(prompts, generation_config=settings)
        seconds = time.perf_counter() - began
        ordered = [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.split("_")[1]))]
        return 0.0, seconds, ordered

    return generate


def start_llama(model: ModelConfig, rows: int, folder: Path) -> Generate:
    """llama.cpp with a sequence for each row, in one batch a step."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    whole = llama_cpp.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = rows * (PROMPT + NEW), rows
    settings.n_batch = settings.n_ubatch = rows * PROMPT
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(whole, settings)
    batch = llama_cpp.llama_batch_init(rows * PROMPT, 0, 1)

    def decode(tokens: Tokens, start: int) -> list[int]:
        """The most likely token after each row, whose new tokens begin at position `start`."""
        batch.n_tokens, last = 0, []
        for row, new in enumerate(tokens):
            for number, token in enumerate(new):
                place = batch.n_tokens
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, start + number, 1
                batch.seq_id[place][0], batch.logits[place] = row, number == len(new) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (model.vocab_size,)) for i in last]
        return [int(row.argmax()) for row in logits]

    def generate(prompts: Tokens) -> tuple[float, float, Tokens]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began = time.perf_counter()
        found = [[token] for token in decode(prompts, 0)]
        first = time.perf_counter() - began
        for position in range(PROMPT, PROMPT + NEW - 1):
            for row, token in zip(found, decode([row[-1:] for row in found], position), strict=True):
                row.append(token)
        return first, time.perf_counter() - began, found

    return generate


SIDES = {
    "gemma2_jax": start_engine,
    "transformers": start_transformers,
    "generate_batch": start_batches,
    "llama.cpp": start_llama,
}


def measure(side: str, model: ModelConfig, rows: int, folder: Path) -> tuple[float, float, Tokens, float]:
    """Seconds until the first token, tokens per second after it, the tokens of the first call, and peak MiB."""
    platforms.prepare_process(cpu=True, cache=False)
    generate = SIDES[side](model, rows, folder)
    tokens = generate(make_prompts(model, rows, 0))[2]
    calls = [generate(make_prompts(model, rows, call))[:2] for call in range(1, CALLS + 1)]
    first = min(first for first, _ in calls)
    seconds = min(whole - first for first, whole in calls)
    new = NEW - 1 if first else NEW
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return first, rows * new / seconds, tokens, peak


def run_in_process(function: Callable, *arguments):
    """The result of a call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_model(model: ModelConfig, folder: Path) -> None:
    """The same weights for every side."""
    import gemma2_jax as g2

    save_weights(model, folder / "weights.npz")
    transformers_model(model).save_pretrained(folder / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / "hf")
    g2.convert(folder / "hf", folder / "model.gguf", to="gguf")


def measure_copy() -> float:
    """Bytes per second that this machine reads and writes when it copies memory."""
    source = np.ones(1 << 27, np.float32)
    target, best = np.empty_like(source), 0.0
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def step_bytes(model: ModelConfig, rows: int) -> int:
    """What a step must read: weights, and keys and values of rows that are half full of new tokens."""
    cached = sum(model.layer_windows(PROMPT + NEW // 2)) * 2 * model.kv_heads * model.head_width
    return 4 * (model.parameter_count() + rows * cached)


def main() -> None:
    parser = make_parser("generation", __doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 32])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    rate = run_in_process(measure_copy)
    title = f"float32 on {os.cpu_count()} CPU cores, which copy {rate / 1e9:.1f} GB/s; {PROMPT} + {NEW} tokens"
    table = Table(title=title, title_justify="left")
    columns = (
        "model",
        "rows",
        "side",
        "first token, ms",
        "prompt tokens/s",
        "new tokens/s",
        "of the bound",
        "MiB",
        "same",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "side") else "right")
    for name in options.models:
        model = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            run_in_process(write_model, model, Path(folder))
            for rows in options.rows:
                ours = None
                for side in options.sides:
                    first, speed, tokens, peak = run_in_process(measure, side, model, rows, Path(folder))
                    ours = tokens if ours is None else ours
                    share = speed / rows * step_bytes(model, rows) / rate
                    same = np.mean(np.array(ours) == np.array(tokens))
                    begin = (f"{1e3 * first:,.0f}", f"{rows * PROMPT / first:,.0f}") if first else ("", "")
                    numbers = f"{speed:,.0f}", f"{share:.0%}", f"{peak:,.0f}", f"{same:.1%}"
                    row = f"{name}, {model.parameter_count() / 1e6:.1f}M", str(rows), side, *begin, *numbers
                    print(*row, sep=" | ", file=sys.stderr)
                    table.add_row(*row, end_section=side == options.sides[-1])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
