"""The engine: many requests at a time on one model, which join and leave at any step (continuous batching).

A model that generates reads all of its weights for each new token, whether for one row or for many. So the engine has a
fixed number of slots, each a row of the cache, and adds tokens to all that are taken in one program. A request that
comes takes a slot that is free, and its prompt is read in parts between those steps, so that no other request waits for
long. One that ends leaves its slot to the next.

Few programs serve all requests: one that adds tokens, and one for each size of a part. Their shapes are fixed when the
engine is made, so that nothing is compiled after `warm`. The host is one call ahead of the device: it reads the tokens
of a call when the next is under way.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax.inference.generator import PAD, Generator
from gemma2_jax.inference.sampling import GREEDY, RowSettings, Sampling, sample_rows
from gemma2_jax.model.gemma2 import Cache

PARTS = (32, 128, 512)  # tokens of a prompt that are read at one time, at most; the smallest that is enough is taken
MOST_STEPS = 16  # of one call, where no request waits for its first token
MOST_STOPS = 8  # tokens that may end a request

type Reason = Literal["stop", "length"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_B", "position_B", "left_B", "stop_BE", "settings", "cache"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class State:
    """What the device has of each slot. The cache holds the tokens before `position_B`."""

    token_B: jax.Array  # int32: the newest token
    position_B: jax.Array  # int32: that token's position; while a prompt is read, that of the next part
    left_B: jax.Array  # int32: how many more tokens the slot gets; 0 where it is free, or its prompt is still read
    stop_BE: jax.Array  # int32: tokens that end it, -1 for fewer than MOST_STOPS
    settings: RowSettings  # how its tokens are drawn
    cache: Cache


@dataclass(kw_only=True)
class Request:
    """A prompt and how it is continued; and what has come of it so far."""

    prompt: Sequence[int]  # tokens
    max_new_tokens: int
    sampling: Sampling = GREEDY
    sample: int = 0  # of several continuations of one prompt with one seed, which of them
    stop: frozenset[int] = frozenset()  # tokens that end it, at most MOST_STOPS
    tokens: list[int] = field(default_factory=list)  # new ones
    reason: Reason | None = None  # why it has ended
    is_canceled: bool = False  # it gets no more tokens, and leaves its slot

    @property
    def has_ended(self) -> bool:
        return self.reason is not None or self.is_canceled


@dataclass
class _Slot:
    """A slot that a request has taken."""

    request: Request
    read: int = 0  # tokens of the prompt that are read, or being read

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.prompt)


class Engine:
    """Continues requests on the weights of a `Generator`.

    `submit` takes a request and returns at once; each call of `advance` does one piece of work, and gives the requests
    that have new tokens or have ended. One thread is to call both.
    """

    def __init__(self, generator: Generator, *, slots: int, context: int):
        """A cache of `slots` rows of `context` tokens, prompt and new ones together."""
        if not 1 <= context <= generator.config.max_length:
            raise ValueError(
                f"context is {context}; it must be at least 1 and at most the model's, {generator.config.max_length}"
            )
        self._graph, self._weights, self._config = generator.graph, generator.weights, generator.config
        self._slots: list[_Slot | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        self._pending: deque[_Call] = deque()
        self.context = context
        self._state = _empty_state(self._graph, self._weights, slots=slots, context=context)

    def submit(self, request: Request) -> None:
        """Takes a request, to be begun when a slot is free.

        Raises ValueError where it does not fit into a slot, or is none for this model.
        """
        self._check(request)
        self._waiting.append(request)

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._waiting or self._pending or any(self._slots))

    def advance(self) -> list[Request]:
        """Dispatches a part of a prompt, or steps of all slots, and takes the results of the call before.

        Returns the requests that have new tokens, or have ended.
        """
        self._assign_slots()
        reading = {number: slot for number, slot in enumerate(self._slots) if slot and slot.is_reading}
        if reading:
            self._read_part(*min(reading.items(), key=lambda item: item[1].read))
        if any(slot and not slot.is_reading for slot in self._slots):
            self._add_tokens(1 if reading or self._waiting else MOST_STEPS)
        ahead = 1 if any(self._slots) else 0
        changed: dict[int, Request] = {}
        while len(self._pending) > ahead:
            changed |= {id(request): request for request in self._take(self._pending.popleft())}
        return list(changed.values())

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Continues all requests, and gives each when it has ended, whose order is theirs."""
        requests = list(requests)
        for request in requests:
            self.submit(request)
        for request in requests:
            while not request.has_ended:
                self.advance()
            yield request

    def warm(self) -> None:
        """Compiles every program, by a request for each size of a part."""
        for size in self._part_sizes():
            request = Request(prompt=[0] * min(size, self.context - 1), max_new_tokens=1)
            list(self.run([request]))
        list(self.run([Request(prompt=[0], max_new_tokens=min(2, self.context - 1))]))

    def _part_sizes(self) -> list[int]:
        return [size for size in PARTS if size == PARTS[0] or size // 4 < self.context]

    def _check(self, request: Request) -> None:
        prompt, new = request.prompt, request.max_new_tokens
        if not len(prompt):
            raise ValueError("the prompt is empty; give it a token, such as <bos>")
        if new < 1:
            raise ValueError(f"max_new_tokens is {new}; it must be at least 1")
        if not 0 <= min(prompt) <= max(prompt) < self._config.vocab_size:
            raise ValueError(
                f"the prompt has tokens from {min(prompt)} to {max(prompt)}, and the model's are 0 to "
                f"{self._config.vocab_size - 1}; use the model's own tokenizer"
            )
        if len(prompt) + new > self.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, with {new} new ones {len(prompt) + new}, and there is room for "
                f"{self.context}; shorten the prompt, or ask for fewer"
            )
        if len(request.stop) > MOST_STOPS:
            raise ValueError(f"there are {len(request.stop)} stop tokens; give {MOST_STOPS} at most")

    def _assign_slots(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot is not None and slot.request.is_canceled:
                self._slots[number] = None
            while self._slots[number] is None and self._waiting:
                request = self._waiting.popleft()
                if not request.is_canceled:
                    self._slots[number] = _Slot(request)

    def _read_part(self, number: int, slot: _Slot) -> None:
        request, start = slot.request, slot.read
        rest = len(request.prompt) - start
        size = next((size for size in self._part_sizes() if size >= rest), self._part_sizes()[-1])
        part = np.asarray(request.prompt[start : start + size], np.int32)
        slot.read += len(part)
        stop = np.full(MOST_STOPS, -1, np.int32)
        stop[: len(request.stop)] = sorted(request.stop)
        self._state, new = _read_part(
            self._graph,
            self._weights,
            self._state,
            np.int32(number),
            np.pad(part, (0, size - len(part)), constant_values=PAD),
            np.array([start, len(part), 0 if slot.is_reading else request.max_new_tokens], np.int32),
            stop,
            RowSettings.of(request.sampling, request.sample),
        )
        if not slot.is_reading:
            self._pending.append(_Call(slots={number: slot}, new=new))

    def _add_tokens(self, steps: int) -> None:
        slots = {number: slot for number, slot in enumerate(self._slots) if slot and not slot.is_reading}
        self._state, new = _add_tokens(self._graph, self._weights, self._state, np.int32(steps))
        self._pending.append(_Call(slots=slots, new=new))

    def _take(self, call: "_Call") -> Iterator[Request]:
        """Waits for the tokens of a call, and gives them to the requests whose slots they are of."""
        tokens_BC, counts_B = jax.device_get(call.new)
        for number, slot in call.slots.items():
            request, new = slot.request, tokens_BC[number, : counts_B[number]].tolist()
            if request.has_ended or not new:
                continue
            request.tokens += new
            if new[-1] in request.stop:
                request.reason = "stop"
            elif len(request.tokens) == request.max_new_tokens:
                request.reason = "length"
            if request.reason and self._slots[number] is slot:
                self._slots[number] = None
            yield request


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call of a program whose tokens have not been read."""

    slots: dict[int, _Slot]  # that it adds tokens to, by number
    new: tuple[jax.Array, jax.Array]  # tokens, int32 [B, C], and how many of them each slot has, [B]


def _empty_state(graph, weights, *, slots: int, context: int) -> State:
    model = nnx.eval_shape(lambda: nnx.merge(graph, weights))
    config = model.config

    def make_cache(slots_of_layer: int) -> tuple[jax.Array, jax.Array]:
        shape = slots, config.kv_heads, slots_of_layer, config.head_width
        return jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)

    return State(
        token_B=jnp.zeros(slots, jnp.int32),
        position_B=jnp.zeros(slots, jnp.int32),
        left_B=jnp.zeros(slots, jnp.int32),
        stop_BE=jnp.full((slots, MOST_STOPS), -1, jnp.int32),
        settings=jax.tree.map(lambda x: jnp.broadcast_to(x, slots), RowSettings.of(GREEDY, 0)),
        cache=[make_cache(length) for length in config.layer_windows(context)],
    )


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def _read_part(graph, weights, state: State, number, tokens_T, place, stop_E, settings: RowSettings):
    """Reads a part of the prompt of a slot, and with the last part adds its first token.

    `place` is where the part begins, how many tokens it has, and how many new tokens the slot gets if it is the last
    part, else 0. Returns the state, and what `Engine._take` reads.
    """
    model = nnx.merge(graph, weights)
    start, length, new = place
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1), state.cache)
    hidden_1TD, row = model.extend(tokens_T[None], start[None], length[None], row)
    cache = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, number, 0), state.cache, row)
    last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, length - 1, axis=1, keepdims=False)
    end = start + length
    token = sample_rows(model.logits(last_1D), end[None], jax.tree.map(lambda x: x[None], settings))[0]
    has_ended = jnp.isin(token, stop_E) | (new == 0)
    state = State(
        token_B=state.token_B.at[number].set(token),
        position_B=state.position_B.at[number].set(end),
        left_B=state.left_B.at[number].set(jnp.where(has_ended, 0, new - 1)),
        stop_BE=state.stop_BE.at[number].set(stop_E),
        settings=jax.tree.map(lambda x, y: x.at[number].set(y), state.settings, settings),
        cache=cache,
    )
    return state, (state.token_B[:, None], jnp.zeros_like(state.left_B).at[number].set(1))


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def _add_tokens(graph, weights, state: State, steps):
    """Adds as many tokens to each slot as it is to get, `steps` at most; returns the state, and what `_take` reads.

    A slot that gets none takes part in the computation. What that writes into its cache, at its position, is written
    again before it is read: there is the next part of its prompt, or the next prompt begins.
    """
    model = nnx.merge(graph, weights)

    def is_unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & jnp.any(state.left_B > 0)

    def add_token(carry):
        step, state, tokens_BC, counts_B = carry
        hidden_BD, cache = model.decode_step(state.token_B, state.position_B, state.cache)
        is_active_B = state.left_B > 0
        position_B = state.position_B + is_active_B
        token_B = sample_rows(model.logits(hidden_BD), position_B, state.settings)
        token_B = jnp.where(is_active_B, token_B, state.token_B)
        has_ended_B = jnp.any(token_B[:, None] == state.stop_BE, axis=1)
        left_B = jnp.where(is_active_B & ~has_ended_B, state.left_B - 1, 0)
        left_B = jnp.where(is_active_B, left_B, state.left_B)
        new = replace(state, token_B=token_B, position_B=position_B, left_B=left_B, cache=cache)
        return step + 1, new, tokens_BC.at[:, step].set(token_B), counts_B + is_active_B

    B = state.token_B.shape[0]
    start = jnp.int32(0), state, jnp.full((B, MOST_STEPS), PAD), jnp.zeros(B, jnp.int32)
    _, state, tokens_BC, counts_B = jax.lax.while_loop(is_unfinished, add_token, start)
    return state, (tokens_BC, counts_B)
