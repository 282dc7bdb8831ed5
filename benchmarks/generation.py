"""Greedy generation by the same small model here and with transformers' `generate`, on CPU in float32.

Both sides have the same weights and prompts, and their tokens are compared. What is timed is a whole call, prompts
included; the first one, which compiles here, is left out. `cpu` runs it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.options import describe_library
from benchmarks.peer import MODELS, our_weights, transformers_model
from gemma2_jax.model_config import ModelConfig

PROMPT, NEW, CALLS = 64, 128, 3
Tokens = list[list[int]]  # new tokens of each row


def prompts(model: ModelConfig, batch: int, call: int) -> Tokens:
    """The same prompts on both sides, and others in each call: the engine does not read again what it has read."""
    return np.random.default_rng(call).integers(3, model.vocab_size, (batch, PROMPT)).tolist()


def ours(model: ModelConfig, batch: int, weights: Path) -> Callable[[int], Tokens]:
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
    engine = Engine(Decoder(graph, our_weights(model, weights)), slots=batch, context=PROMPT + NEW)

    def generate(call: int) -> Tokens:
        requests = [Request(prompt=prompt, max_new_tokens=NEW) for prompt in prompts(model, batch, call)]
        return [request.tokens for request in engine.run(requests)]

    return generate


def transformers(model: ModelConfig, batch: int, weights: Path) -> Callable[[int], Tokens]:
    import torch

    whole = transformers_model(model).eval()
    whole.generation_config.eos_token_id = None  # no token ends a row, as ours were not told of one
    options = dict(attention_mask=torch.ones((batch, PROMPT)), do_sample=False, max_new_tokens=NEW)
    return lambda call: whole.generate(torch.tensor(prompts(model, batch, call)), **options)[:, PROMPT:].tolist()


def measure(
    start: Callable[..., Callable[[int], Tokens]], model: str, batch: int, weights: Path
) -> tuple[float, Tokens]:
    """New tokens per second by the median of `CALLS` calls, after one that is not timed; and the tokens."""
    once = start(MODELS[model], batch, weights)
    tokens, seconds = once(0), []
    for call in range(1, CALLS + 1):
        began = time.perf_counter()
        once(call)
        seconds.append(time.perf_counter() - began)
    return batch * NEW / statistics.median(seconds), tokens


if __name__ == "__main__":
    describe_library("generation", __doc__)
