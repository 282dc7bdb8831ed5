"""Greedy generation by the same small model here and with transformers' `generate`, on CPU in float32.

Both sides get the same weights and prompts, and their tokens are compared before they are timed. What is timed is a
whole call, prompts included; the first one, which compiles here, is left out. Attention is eager in transformers: its
Gemma 2 has no other that caps scores.

python -m benchmarks.generation
"""

import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.training import MODELS
from gemma2_jax.config import ModelConfig

PROMPT, NEW, CALLS = 64, 256, 5
BATCHES = (1, 8)
Tokens = list[list[int]]  # new tokens of each row


def prompts(model: ModelConfig, batch: int) -> Tokens:
    """The same prompts for every case."""
    return np.random.default_rng(0).integers(3, model.vocab_size, (batch, PROMPT)).tolist()


def transformers_model(model: ModelConfig):
    """Random weights, which both sides use; small embeddings, so that a token is not followed by itself for ever."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    whole = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            num_hidden_layers=model.layers, hidden_size=model.width, intermediate_size=model.mlp_width,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_width,
            query_pre_attn_scalar=int(model.query_pre_attn_scalar), vocab_size=model.vocab_size,
            sliding_window=model.window, max_position_embeddings=model.max_length, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    torch.nn.init.normal_(whole.model.embed_tokens.weight, std=0.3 * model.width**-0.5)
    return whole


def ours(model: ModelConfig, batch: int) -> Callable[[], Tokens]:
    """A function that generates."""
    import jax
    from flax import nnx

    from gemma2_jax.config import ComputeConfig
    from gemma2_jax.convert.table import from_hf
    from gemma2_jax.decode import Generator
    from gemma2_jax.model import Gemma2

    state = {name: w.detach().numpy() for name, w in transformers_model(model).named_parameters()}
    compute = ComputeConfig(dtype="float32")
    graph = nnx.graphdef(nnx.eval_shape(lambda: Gemma2(model, compute, rngs=nnx.Rngs(0))))
    generator = Generator(graph, jax.device_put(from_hf(state, model)))
    return lambda: generator.generate(prompts(model, batch), max_new_tokens=NEW)


def transformers(model: ModelConfig, batch: int) -> Callable[[], Tokens]:
    """The same with transformers."""
    import torch

    whole, tokens = transformers_model(model), torch.tensor(prompts(model, batch))
    options = dict(attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    return lambda: whole.generate(tokens, **options)[:, PROMPT:].tolist()


def measure(start: Callable[[ModelConfig, int], Callable[[], Tokens]], model: str, batch: int) -> dict:
    """New tokens per second of the median of `CALLS` calls, after one that is not timed."""
    once = start(MODELS[model], batch)
    tokens = once()
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_s": batch * NEW / statistics.median(seconds), "tokens": tokens}


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    os.environ["JAX_PLATFORMS"] = "cpu"
    table = Table(title=f"greedy, {PROMPT} + {NEW} tokens, float32, CPU ({os.cpu_count()} cores)")
    for column in ("model", "rows", "gemma2_jax, tokens/s", "transformers, tokens/s", "ratio", "same tokens"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in MODELS:
        for batch in BATCHES:
            here, there = (measure(start, model, batch) for start in (ours, transformers))
            same = np.mean(np.array(here["tokens"]) == np.array(there["tokens"]))
            rates = here["tokens_per_s"], there["tokens_per_s"]
            ratio = f"{rates[0] / rates[1]:.1f}"
            table.add_row(model, str(batch), *(f"{rate:,.0f}" for rate in rates), ratio, f"{same:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
