"""Generation: continues prompts of tokens with new tokens, in compiled code, and streams them.

Two compiled programs do the work: one processes the prompts, the other takes up to `CHUNK` steps, or fewer if all rows
stop. The host dispatches a chunk before it fetches the tokens of the chunk before, so that the device does not wait for
the reader. Shapes are rounded up, so that few programs serve all lengths. Nothing here knows of text, tokenizers or
files.

A step reads every weight for one token of each row. That is why every layer has its own arrays here: cutting a weight
out of a stack would read and write it once more.
"""

from collections.abc import Iterator, Sequence, Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from gemma2_jax.inference.sampling import GREEDY, Sampling, sample_tokens
from gemma2_jax.model.gemma2 import Cache, Gemma2, Weights, rebuild_model, unstack_layers
from gemma2_jax.model_config import ModelConfig, is_adapter_path

CHUNK = 16  # steps of one call: with a longer chunk the host has less to do, and a reader waits longer
PAD = 0  # token that fills a row once it has stopped

Tokens = list[list[int]]  # of each row


@partial(jax.tree_util.register_dataclass, data_fields=["token_B", "position_B", "stopped_B", "cache"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class State:
    """How far each row has come. The cache holds the tokens before `position_B`."""

    token_B: jax.Array  # int32: the newest token
    position_B: jax.Array  # int32: the newest token's position
    stopped_B: jax.Array  # bool: whether the newest token, or one before it, ends the row
    cache: Cache


class Generator:
    """A model laid out for generation: one array per layer, in the dtype it is computed in.

    The constructor empties `weights`, so that at most one stacked array at a time is in memory twice. Adapters are not
    merged; a step is faster if the caller merges them (`lora.merge_adapters`).
    """

    def __init__(self, graph: nnx.GraphDef, weights: Weights):
        model = nnx.eval_shape(lambda weights: unstack_layers(rebuild_model(graph, weights)), dict(weights))
        self.config: ModelConfig = model.config
        self.graph = nnx.graphdef(model)
        self.weights = _unstack_weights(weights, model.dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: AbstractSet[int] = frozenset(),
    ) -> Tokens:
        """The whole continuation of every prompt; see `stream`."""
        chunks = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        return [list(chain(*parts)) for parts in zip(*chunks, strict=True)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: AbstractSet[int] = frozenset(),
    ) -> Iterator[Tokens]:
        """New tokens of every prompt, as they come: the first of each at once, then up to `CHUNK` at a time.

        A row ends after `max_new_tokens`, or with the first token of `stop`, and has no more tokens in later chunks.
        Raises ValueError for a prompt that is empty, has tokens outside the vocabulary, or would outgrow the model's
        context.
        """
        self._check(prompts, max_new_tokens)
        return self._stream(prompts, max_new_tokens, sampling.settings, np.array(sorted(stop), np.int32))

    def _stream(self, prompts, max_new_tokens: int, settings, stop) -> Iterator[Tokens]:
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BT = np.full((len(prompts), bucket_length(max(lengths_B))), PAD, np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        slots = bucket_length(max(lengths_B) + max_new_tokens)
        state, new = _prefill(self.graph, self.weights, tokens_BT, lengths_B, stop, settings, slots=slots)
        remaining = max_new_tokens - 1
        tokens, finished = _fetch_tokens(new)  # so that the first token arrives before the second program is compiled
        yield tokens
        pending = None  # a chunk's tokens are fetched once the next chunk is dispatched
        while remaining > 0 and not finished:
            state, new = _decode(self.graph, self.weights, state, min(remaining, CHUNK), stop, settings)
            remaining -= CHUNK
            if pending is not None:
                tokens, finished = _fetch_tokens(pending)
                yield tokens
            pending = new
        if pending is not None and not finished:
            yield _fetch_tokens(pending)[0]

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not prompts:
            raise ValueError("there are no prompts; give at least one")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise ValueError(f"prompt {number} is empty; give it a token, such as <bos>")
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(
                    f"prompt {number} has tokens from {min(prompt)} to {max(prompt)}, and the model's are 0 to "
                    f"{self.config.vocab_size - 1}; use the model's own tokenizer"
                )
            if len(prompt) + max_new_tokens > self.config.max_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, with {max_new_tokens} new ones "
                    f"{len(prompt) + max_new_tokens}, and the model's context is {self.config.max_length}; shorten the "
                    "prompt, or ask for fewer"
                )


def bucket_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that is not below `length`; from 32 on, less than 1.5 times it."""
    power = 1 << max(5, (int(length) - 1).bit_length())
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


@partial(jax.jit, static_argnames=("graph", "slots"))
def _prefill(graph, weights, tokens_BT, lengths_B, stop, settings, *, slots: int):
    """`read_prompts`, and of what it gives that which `_fetch_tokens` takes."""
    state = read_prompts(nnx.merge(graph, weights), tokens_BT, lengths_B, stop, settings, slots)
    return state, (state.token_B[:, None], jnp.ones_like(lengths_B), state.stopped_B.all())


def read_prompts(model: Gemma2, tokens_BT, lengths_B, stop, settings, slots: int) -> State:
    """The state after the first new token of each row; the cache has room for `slots` tokens."""
    hidden_BTD, cache = model.prefill(tokens_BT, lengths_B, slots)
    last_BD = jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    token_B = sample_tokens(model.logits(last_BD), lengths_B, settings)
    return State(token_B=token_B, position_B=lengths_B, stopped_B=jnp.isin(token_B, stop), cache=cache)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def _decode(graph, weights, state: State, steps, stop, settings):
    """The state after `steps` steps, `CHUNK` at most, or once all rows stopped; and what `_fetch_tokens` takes."""
    state, tokens_BC, counts_B = add_tokens(nnx.merge(graph, weights), state, steps, CHUNK, stop, settings)
    return state, (tokens_BC, counts_B, state.stopped_B.all())


def add_tokens(model: Gemma2, state: State, steps, most: int, stop, settings) -> tuple[State, jax.Array, jax.Array]:
    """The state after `steps` steps, `most` at most, or once all rows stopped; the new tokens, int32 [B, most], and how
    many of them each row has, int32 [B].
    """

    def is_unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~state.stopped_B.all()

    def decode_token(carry):
        step, state, tokens_BC, counts_B = carry
        hidden_BD, cache = model.decode_step(state.token_B, state.position_B, state.cache)
        position_B = state.position_B + 1
        token_B = sample_tokens(model.logits(hidden_BD), position_B, settings)
        token_B = jnp.where(state.stopped_B, PAD, token_B)
        stopped_B = state.stopped_B | jnp.isin(token_B, stop)
        new_state = State(token_B=token_B, position_B=position_B, stopped_B=stopped_B, cache=cache)
        return step + 1, new_state, tokens_BC.at[:, step].set(token_B), counts_B + ~state.stopped_B

    B = state.token_B.shape[0]
    start = jnp.int32(0), state, jnp.full((B, most), PAD), jnp.zeros(B, jnp.int32)
    _, state, tokens_BC, counts_B = jax.lax.while_loop(is_unfinished, decode_token, start)
    return state, tokens_BC, counts_B


def _fetch_tokens(new) -> tuple[Tokens, bool]:
    """Each row's new tokens, and whether all rows have stopped: waits for the device."""
    tokens_BC, counts_B, finished = jax.device_get(new)
    return [row[:count].tolist() for row, count in zip(tokens_BC, counts_B, strict=True)], bool(finished)


def keeps_dtype(path: str) -> bool:
    """Whether the model computes with a weight in the dtype that it is stored in, as with norms and adapters."""
    return "norm/" in path or is_adapter_path(path)


@partial(jax.jit, static_argnums=1)
def _cast_layers(w_L: jax.Array, dtype) -> list[jax.Array]:
    return [w.astype(dtype) for w in w_L]


def _unstack_weights(weights: Weights, dtype) -> dict:
    """The arrays of a model after `unstack_layers`, nested; `weights` is emptied."""
    unstacked = {}
    for path in list(weights):
        w = weights.pop(path)
        new_dtype = w.dtype if keeps_dtype(path) else dtype
        names = path.split("/")
        if names[0] == "blocks":
            layers = _cast_layers(w, new_dtype)
            unstacked |= {("blocks", number, *names[1:]): layer for number, layer in enumerate(layers)}
        else:
            unstacked[tuple(names)] = w.astype(new_dtype)
    return unflatten_dict(unstacked)
