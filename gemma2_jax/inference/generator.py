"""Generation: prompts as tokens to their continuations as tokens, in compiled code, streamed.

Two programs do it: one takes the prompts, the other up to `CHUNK` steps, until all rows have stopped. The host calls
for a chunk before it fetches the tokens of the last one, so that the device does not wait for whoever reads them.
Shapes are rounded up, so that few programs serve all lengths. Text, tokenizers and files are not known here;
`generate` is the command line.

A step reads every weight for one token of each row. That is why layers are apart here: cut out of a stack, each
weight would be read and written once more.
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

from gemma2_jax.config import ModelConfig
from gemma2_jax.model.gemma2 import Cache, Gemma2, Weights, rebuild_model, unstack_layers

CHUNK = 16  # steps of one call: how long a reader waits, and how rarely the host has work
PAD = 0  # what a row is filled with once it has stopped

Tokens = list[list[int]]  # of each row


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Another value compiles nothing, setting or unsetting one does."""

    temperature: float = 0.0  # logits are divided by it; 0 takes the most likely token, whatever else is set
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # of those, from the fewest, most likely first, that have this much of the probability
    seed: int = 0  # of the draws; those of a row do not depend on the other rows

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 for the most likely token, or a positive one")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or unset to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or unset")

    @property
    def settings(self) -> dict[str, float]:
        """What is set, by name: the names are compiled in, the values are arguments."""
        if self.temperature == 0:
            return {}
        fields = {"temperature": self.temperature, "seed": self.seed, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in fields.items() if value is not None and (name, value) != ("top_p", 1)}


GREEDY = Sampling()


@partial(jax.tree_util.register_dataclass, data_fields=["token_B", "position_B", "stopped_B", "cache"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class State:
    """Where each row is. The cache holds what stands before `position_B`."""

    token_B: jax.Array  # int32: the newest token
    position_B: jax.Array  # int32: where it stands
    stopped_B: jax.Array  # bool: whether it, or one before it, ends the row
    cache: Cache


class Generator:
    """A model laid out for generation: an array per layer, in the dtype it is computed in.

    `weights` is emptied on the way, so that one stacked array at a time is held twice. Adapters stay adapters; a step
    is faster with them merged (`lora.merge_adapters`).
    """

    def __init__(self, graph: nnx.GraphDef, weights: Weights):
        whole = nnx.eval_shape(lambda weights: unstack_layers(rebuild_model(graph, weights)), dict(weights))
        self.config: ModelConfig = whole.config
        self.graph = nnx.graphdef(whole)
        self.weights = _unstack_weights(weights, whole.dtype)

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
        Raises ValueError for a prompt that is empty, that the vocabulary does not have, or that would outgrow the
        model's context.
        """
        self._check(prompts, max_new_tokens)
        return self._stream(prompts, max_new_tokens, sampling.settings, np.array(sorted(stop), np.int32))

    def _stream(self, prompts, left: int, settings, stop) -> Iterator[Tokens]:
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BT = np.full((len(prompts), bucket_length(max(lengths_B))), PAD, np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        slots = bucket_length(max(lengths_B) + left)
        state, new = _prefill(self.graph, self.weights, tokens_BT, lengths_B, stop, settings, slots=slots)
        left -= 1
        tokens, finished = _fetch_tokens(new)  # the reader's first token comes before a second program is compiled
        yield tokens
        ahead = None
        while left > 0 and not finished:
            state, new = _decode(self.graph, self.weights, state, min(left, CHUNK), stop, settings)
            left -= CHUNK
            if ahead is not None:
                tokens, finished = _fetch_tokens(ahead)
                yield tokens
            ahead = new
        if ahead is not None and not finished:
            yield _fetch_tokens(ahead)[0]

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
    """The least of 32, 48, 64, 96, 128, 192, ... that is no less: at most half as much again."""
    power = 1 << max(5, (int(length) - 1).bit_length())
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


def filter_logits(logits_BV: jax.Array, settings: dict) -> jax.Array:
    """Logits over the temperature, at -inf where top_k and then top_p leave a token out; ties stay together."""
    logits_BV = logits_BV / settings["temperature"]
    if settings.keys().isdisjoint(("top_k", "top_p")):
        return logits_BV
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if "top_k" in settings:
        rank_V = jnp.arange(logits_BV.shape[-1])
        descending_BV = jnp.where(rank_V < settings["top_k"], descending_BV, -jnp.inf)
    if "top_p" in settings:
        probability_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        descending_BV = jnp.where(before_BV < settings["top_p"], descending_BV, -jnp.inf)
    least_B1 = jnp.min(descending_BV, axis=-1, keepdims=True, where=descending_BV > -jnp.inf, initial=jnp.inf)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def sample_tokens(logits_BV: jax.Array, position_B: jax.Array, settings: dict) -> jax.Array:
    """The token, int32 [B], to stand at `position_B`: the most likely one, or a draw that row and position decide."""
    if not settings:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(row, position, logits_V):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings["seed"]), row), position)
        return jax.random.categorical(key, logits_V)

    rows_B = jnp.arange(logits_BV.shape[0])
    return jax.vmap(draw)(rows_B, position_B, filter_logits(logits_BV, settings)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graph", "slots"))
def _prefill(graph, weights, tokens_BT, lengths_B, stop, settings, *, slots: int):
    """The state after the first new token of each row, and what `_fetch_tokens` takes."""
    model: Gemma2 = nnx.merge(graph, weights)
    hidden_BTD, cache = model.prefill(tokens_BT, lengths_B, slots)
    last_BD = jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    token_B = sample_tokens(model.logits(last_BD), lengths_B, settings)
    stopped_B = jnp.isin(token_B, stop)
    state = State(token_B=token_B, position_B=lengths_B, stopped_B=stopped_B, cache=cache)
    return state, (token_B[:, None], jnp.ones_like(lengths_B), stopped_B.all())


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def _decode(graph, weights, state: State, steps, stop, settings):
    """The state `steps` later, at most `CHUNK`, or when the last row stopped; and what `_fetch_tokens` takes."""
    model: Gemma2 = nnx.merge(graph, weights)

    def going_on(carry):
        step, state, _, _ = carry
        return (step < steps) & ~state.stopped_B.all()

    def one_step(carry):
        step, state, tokens_BC, counts_B = carry
        hidden_BD, cache = model.decode_step(state.token_B, state.position_B, state.cache)
        position_B = state.position_B + 1
        token_B = sample_tokens(model.logits(hidden_BD), position_B, settings)
        token_B = jnp.where(state.stopped_B, PAD, token_B)
        stopped_B = state.stopped_B | jnp.isin(token_B, stop)
        after = State(token_B=token_B, position_B=position_B, stopped_B=stopped_B, cache=cache)
        return step + 1, after, tokens_BC.at[:, step].set(token_B), counts_B + ~state.stopped_B

    B = state.token_B.shape[0]
    start = jnp.int32(0), state, jnp.full((B, CHUNK), PAD), jnp.zeros(B, jnp.int32)
    _, state, tokens_BC, counts_B = jax.lax.while_loop(going_on, one_step, start)
    return state, (tokens_BC, counts_B, state.stopped_B.all())


def _fetch_tokens(new) -> tuple[Tokens, bool]:
    """Each row's new tokens, and whether all rows have stopped: waits for the device."""
    tokens_BC, counts_B, finished = jax.device_get(new)
    return [row[:count].tolist() for row, count in zip(tokens_BC, counts_B, strict=True)], bool(finished)


@partial(jax.jit, static_argnums=1)
def _cast_layers(w_L: jax.Array, dtype) -> list[jax.Array]:
    return [w.astype(dtype) for w in w_L]


def _unstack_weights(weights: Weights, dtype) -> dict:
    """The arrays of `unstack`ed model, nested; `weights` is emptied."""
    found = {}
    for path in list(weights):
        w = weights.pop(path)
        # The model computes with norms and adapters in their own dtype.
        kept = w.dtype if "norm/" in path or "/adapter/" in path else dtype
        names = path.split("/")
        if names[0] == "blocks":
            found |= {("blocks", number, *names[1:]): w for number, w in enumerate(_cast_layers(w, kept))}
        else:
            found[tuple(names)] = w.astype(kept)
    return unflatten_dict(found)
