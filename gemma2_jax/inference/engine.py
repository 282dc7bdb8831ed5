"""The engine: many requests at a time on one model, which join and leave at any step (continuous batching).

A model that generates reads all of its weights for each new token, whether for one row or for many. So the engine has a
fixed number of slots, each a row of the cache, and adds tokens to all that are taken in one program. A request that
comes takes a slot that is free, and its prompt is read in parts between those steps, so that no other request waits for
long. One that ends leaves its slot to the next; what its row holds stays there until then, and a prompt that begins as
it does is read from where they differ.

Few programs serve all requests: one that adds tokens, and one for each size of a part. Their shapes are fixed when the
engine is made, so that nothing is compiled after `warm`. The host is one call ahead of the device: it reads the tokens
of a call when the next is under way.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, takewhile
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.sampling import MOST_ALTERNATIVES, RowSettings, Scores
from gemma2_jax.inference.settings import GREEDY, Sampling
from gemma2_jax.inference.steps import (
    PAD,
    NewTokens,
    Parts,
    State,
    add_tokens,
    bucket_length,
    copy_rows,
    empty_state,
    pad_stops,
    read_parts,
)
from gemma2_jax.mesh import constrain, replicate

# Tokens of a prompt that are read at one time, at most. A CPU reads four parts of 128 faster than one of 512, half of
# whose scores are masked.
PARTS = {"cpu": (32, 128), "gpu": (32, 128, 512)}
LIGHT_PART = 128  # tokens that a GPU multiplies with weights in about the time in which it reads those
MOST_STEPS = 16  # of one call, where no request waits for its first token
MOST_SLOTS = 64  # where no number is asked for: a step of more rows takes longer than a reader should wait
SHORTEST_PREFIX = 16  # tokens that a prompt must share with a row before they are copied

type Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of a token, and of the most likely ones in its place; no setting has changed them."""

    value: float
    alternatives: list[tuple[int, float]]  # tokens and log-probabilities, the most likely one before the others


@dataclass(kw_only=True)
class Request:
    """A prompt and how it is continued; and what has come of it so far."""

    prompt: Sequence[int]  # tokens
    max_new_tokens: int  # 0 only if the prompt's own scores are asked for
    sampling: Sampling = GREEDY
    sample: int = 0  # of several continuations of one prompt with one seed, which of them
    stop: frozenset[int] = frozenset()  # tokens that end it, at most `steps.MOST_STOPS`
    alternatives: int | None = None  # the scores of new tokens are asked for, with those of so many others
    echo: bool = False  # the scores of the prompt's own tokens are asked for too
    adapter: str | None = None  # the adapter that continues it, of those that the decoder has
    tokens: list[int] = field(default_factory=list)  # new ones
    scores: list[TokenScore] = field(default_factory=list)  # theirs
    prompt_scores: list[TokenScore] = field(default_factory=list)  # of the prompt's tokens but the first
    reused: int = 0  # tokens of the prompt that were not read, as another row had them
    reason: Reason | None = None  # why it has ended
    is_canceled: bool = False  # it gets no more tokens, and leaves its slot

    @property
    def has_ended(self) -> bool:
        return self.reason is not None or self.is_canceled

    @property
    def sequence(self) -> list[int]:
        """The prompt and the new tokens."""
        return [*self.prompt, *self.tokens]


@dataclass
class _Slot:
    """A row of the cache: the request that has taken it, and what the row holds."""

    request: Request | None = None
    read: int = 0  # tokens of the prompt that are read, or being read
    turn: int = 0  # of the next part of the prompt: the lowest is read first
    adapter: str | None = None  # that wrote what the row holds
    cached: Sequence[int] = ()  # tokens whose keys and values are there, once the request has left
    extent: int = 0  # the last position that may have been written, once the request has left
    release: int = 0  # when it did, as a number that grows

    @property
    def is_reading(self) -> bool:
        return self.request is not None and self.read < len(self.request.prompt)

    @property
    def is_adding(self) -> bool:
        return self.request is not None and not self.is_reading

    def take(self, request: Request, read: int, turn: int) -> None:
        """Gives the slot to a request, of whose prompt so many tokens are there."""
        self.turn = turn
        self.request, self.read, self.cached, self.adapter = request, read, (), request.adapter
        request.reused = read

    def leave(self, at: int) -> None:
        """Frees the slot."""
        assert self.request is not None
        self.cached, self.extent = self.tokens(), self.end()
        self.request, self.release = None, at

    def tokens(self) -> Sequence[int]:
        """The tokens that the row is known to hold."""
        if self.request is None:
            return self.cached
        return self.request.prompt[: self.read] if self.is_reading else self.request.sequence[:-1]

    def end(self) -> int:
        """The last position that may have been written. A row without work is written after its last token."""
        if self.request is None:
            return self.extent
        if self.is_reading:
            return self.read
        if self.request.reason is None:
            return len(self.request.prompt) + self.request.max_new_tokens
        return len(self.request.prompt) + max(len(self.request.tokens) - 1, 0)


class Engine:
    """Continues requests on the weights of a `Decoder`.

    `submit` takes a request and returns at once; each call of `advance` does one piece of work, and gives the requests
    that have new tokens or have ended. One thread is to call both. On several processes, all make the same calls.
    """

    def __init__(self, decoder: Decoder, *, slots: int, context: int, steps: int = MOST_STEPS):
        """A cache of `slots` rows of `context` tokens, prompt and new ones together.

        `steps` of one call at most: with fewer than MOST_STEPS, tokens come in smaller groups.
        """
        if not 1 <= context <= decoder.config.max_length:
            raise ValueError(
                f"context is {context}; it must be at least 1 and at most the model's, {decoder.config.max_length}"
            )
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        self._decoder = decoder
        slots += -slots % decoder.batch_shards
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: deque[Request] = deque()
        self._pending: deque[_Call] = deque()
        self._clock = count(1)
        self._turn = 0  # of the part that was read last
        self._steps = min(steps, MOST_STEPS)
        smallest, *larger = PARTS.get(decoder.mesh.devices.flat[0].platform, PARTS["gpu"])
        self._part_sizes = [smallest, *(size for size in larger if size // 4 < context)]
        self._window = min(decoder.config.layer_windows(context))
        self.context = context
        with jax.set_mesh(decoder.mesh):
            self._state = _make_state(decoder.graph, decoder.weights, slots, context)

    def submit(self, request: Request) -> None:
        """Takes a request, to be begun when a slot is free.

        Raises ValueError where it does not fit into a slot, or is none for this model.
        """
        self.check(request)
        self._waiting.append(request)

    @property
    def slots(self) -> int:
        """How many requests are continued at a time."""
        return len(self._slots)

    @property
    def cache_bytes(self) -> int:
        """The memory of keys and values, on all devices."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state.cache))

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._waiting or self._pending or any(slot.request for slot in self._slots))

    def advance(self) -> list[Request]:
        """Dispatches parts of prompts, steps of all slots, or both, and takes the results of the calls before.

        Returns the requests that have new tokens, or have ended.
        """
        with jax.set_mesh(self._decoder.mesh):
            self._assign_slots()
            is_reading = any(slot.is_reading for slot in self._slots)
            if is_reading:
                self._read_parts()
            if any(slot.is_adding for slot in self._slots):
                self._add_tokens(1 if is_reading or self._waiting else self._steps)
        ahead = 1 if any(slot.request for slot in self._slots) else 0
        changed: dict[int, Request] = {}
        while len(self._pending) > ahead:
            changed |= {id(request): request for request in self._take(self._pending.popleft())}
        return list(changed.values())

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Continues all requests, and gives each when it has ended, in their order."""
        requests = list(requests)
        for request in requests:
            self.submit(request)
        for request in requests:
            while not request.has_ended:
                self.advance()
            yield request

    def warm(self) -> None:
        """Compiles every program, by a request for each size of a part."""
        for size in self._part_sizes:  # an echo is never taken from another row
            prompt = [PAD] * min(size, self.context - 1)
            for _ in self.run([Request(prompt=prompt, max_new_tokens=min(2, self.context - len(prompt)), echo=True)]):
                pass
        with jax.set_mesh(self._decoder.mesh):
            self._copy_row(0, 0, 0)
        for slot in self._slots:
            slot.cached = ()

    def _count_next(self, request: Request, read: int) -> int:
        """How many tokens the next part of a prompt has."""
        return min(len(request.prompt) - read, self._part_sizes[-1])

    def _choose_size(self, rest: int) -> int:
        """The size of the next part where so many tokens are left: the smallest with room for all.

        But two parts are read faster than a large one that is mostly empty.
        """
        sizes = self._part_sizes
        size = next((size for size in sizes if size >= rest), sizes[-1])
        if size <= max(2 * rest, LIGHT_PART):
            return size
        return max(size for size in sizes if size <= rest)

    def check(self, request: Request) -> None:
        """Raises ValueError where a request does not fit into a slot, or is none for this model."""
        prompt, new, vocabulary = request.prompt, request.max_new_tokens, self._decoder.config.vocab_size
        if not len(prompt):
            raise ValueError("the prompt is empty; give it a token, such as <bos>")
        if new < (0 if request.echo else 1):
            raise ValueError(f"max_new_tokens is {new}; it must be at least 1")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"the prompt has tokens from {min(prompt)} to {max(prompt)}, and the model's are 0 to "
                f"{vocabulary - 1}; use the model's own tokenizer"
            )
        if len(prompt) + new > self.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, with {new} new ones {len(prompt) + new}, and there is room for "
                f"{self.context}; shorten the prompt, or ask for fewer"
            )
        pad_stops(request.stop)
        if not 0 <= (request.alternatives or 0) <= MOST_ALTERNATIVES:
            raise ValueError(
                f"the scores of {request.alternatives} tokens are asked for in each place; ask for 0 to "
                f"{MOST_ALTERNATIVES}"
            )
        if request.adapter is not None and request.adapter not in self._decoder.adapters:
            known = ", ".join(self._decoder.adapters) or "none"
            raise ValueError(f"there is no adapter {request.adapter!r}; there are {known}")
        if unknown := [token for token, _ in request.sampling.logit_bias if token >= vocabulary]:
            raise ValueError(f"logit_bias has token {unknown[0]}, and the model's are 0 to {vocabulary - 1}")

    def _assign_slots(self) -> None:
        """Gives slots that are free to the requests that wait."""
        for slot in self._slots:
            if slot.request is not None and slot.request.is_canceled:
                slot.leave(next(self._clock))
        while self._waiting and any(slot.request is None for slot in self._slots):
            if not self._waiting[0].is_canceled and not self._assign_slot(self._waiting[0]):
                return
            self._waiting.popleft()

    def _assign_slot(self, request: Request) -> bool:
        """Gives a request a slot, and the beginning of its prompt where a row has it; or waits for such a row.

        It is the slot that has been free for longest, of the batch shard with that row. A row that holds nothing but a
        beginning of the prompt is taken as it is.
        """
        of_shard = len(self._slots) // self._decoder.batch_shards
        free = [number for number, slot in enumerate(self._slots) if slot.request is None]
        near = [n for n in range(len(self._slots)) if any(n // of_shard == other // of_shard for other in free)]
        shared = {number: self._count_shared(request, self._slots[number]) for number in near}
        source = max(near, key=lambda number: (shared[number], number in free))
        read = shared[source] if shared[source] >= SHORTEST_PREFIX and not request.echo else 0
        if not request.echo and any(self._will_share(request, self._slots[number]) > read for number in near):
            return False
        targets = [number for number in free if not read or number // of_shard == source // of_shard]
        target = min(targets, key=lambda number: self._slots[number].release)
        if read and source in free and read == len(self._slots[source].cached):
            target = source
        if read:
            self._copy_row(source, target, read)
        self._slots[target].take(request, read, self._turn + self._count_next(request, read))
        return True

    def _count_shared(self, request: Request, slot: _Slot) -> int:
        """How many tokens of the prompt, but the last, the slot's row holds where a row with them would.

        A local layer keeps the last tokens of its window alone: once the row has gone on further than that, what comes
        after a beginning has taken the place of some of its tokens.
        """
        if slot.adapter != request.adapter:
            return 0
        shared = _count_equal(request.prompt[:-1], slot.tokens())
        end = slot.end()
        return shared if end < self._window or shared == end else 0

    def _will_share(self, request: Request, slot: _Slot) -> int:
        """How many tokens of the prompt, but the last, a row will hold when the prompt there has been read."""
        if not slot.is_reading or slot.adapter != request.adapter:
            return 0
        other = slot.request
        assert other is not None
        if len(other.prompt) + other.max_new_tokens >= self._window:
            return 0
        shared = _count_equal(request.prompt[:-1], other.prompt)
        return shared if shared >= SHORTEST_PREFIX else 0

    def _copy_row(self, source: int, target: int, length: int) -> None:
        shards, of_shard = self._decoder.batch_shards, len(self._slots) // self._decoder.batch_shards
        rows = np.zeros((3, shards), np.int32)  # elsewhere a row is copied to itself
        rows[:, source // of_shard] = source % of_shard, target % of_shard, length
        self._state = _copy_rows(self._state, *rows)

    def _read_parts(self) -> None:
        """Dispatches a part of one prompt in each batch shard.

        They take turns as in self-clocked fair queueing: a part's turn comes as many tokens after that of the part
        before as it has. So a short prompt does not wait for all of a long one, nor a long one for all that come later.
        """
        of_shard = len(self._slots) // self._decoder.batch_shards
        chosen: list[_Slot | None] = []
        for begin in range(0, len(self._slots), of_shard):
            reading = [slot for slot in self._slots[begin : begin + of_shard] if slot.is_reading]
            chosen.append(min(reading, key=lambda slot: slot.turn) if reading else None)
        self._turn = max(slot.turn for slot in chosen if slot)
        rest = max(len(slot.request.prompt) - slot.read for slot in chosen if slot and slot.request)
        size = self._choose_size(rest)
        call = _Call()
        parts = []
        for shard, slot in enumerate(chosen):
            number = self._slots.index(slot) if slot else 0
            adapter = self._decoder.adapter_number(slot.adapter) if slot else 0
            parts.append(_make_part(slot, number % of_shard, size, adapter))
            if slot and slot.request:
                is_last = slot.read + size >= len(slot.request.prompt)
                if slot.request.echo:
                    call.echoes[shard] = slot.request, min(size, len(slot.request.prompt) - slot.read) - is_last
                slot.read = min(slot.read + size, len(slot.request.prompt))
                slot.turn += self._count_next(slot.request, slot.read)
                if is_last:
                    call.requests[number] = slot.request
        stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
        self._state, call.new, call.prompt_scores = _read_parts(
            self._decoder.graph, self._decoder.weights, self._state, stacked
        )
        if call.requests or call.echoes:
            self._pending.append(call)

    def _add_tokens(self, steps: int) -> None:
        adding = {number: slot.request for number, slot in enumerate(self._slots) if slot.is_adding}
        call = _Call(requests={number: request for number, request in adding.items() if request})
        is_taken_B = np.isin(np.arange(len(self._slots)), [*adding])
        self._state, call.new = add_tokens_program(
            self._decoder.graph, self._decoder.weights, self._state, is_taken_B, np.int32(steps)
        )
        self._pending.append(call)

    def _take(self, call: "_Call") -> Iterator[Request]:
        """Waits for the results of a call, and gives them to its requests."""
        assert call.new is not None
        for shard, (request, length) in call.echoes.items():
            scores = jax.device_get(call.prompt_scores)
            request.prompt_scores += _list_scores(scores, shard, length, request.alternatives or 0)
        tokens_BC, counts_B = jax.device_get((call.new.tokens_BC, call.new.counts_B))
        asked = any(request.alternatives is not None for request in call.requests.values())
        scores = jax.device_get(call.new.scores) if asked else None
        for number, request in call.requests.items():
            new = tokens_BC[number, : counts_B[number]].tolist()
            if request.has_ended or not (new or request.max_new_tokens == 0):
                continue
            request.tokens += new
            if scores is not None and request.alternatives is not None:
                request.scores += _list_scores(scores, number, len(new), request.alternatives)
            if new and new[-1] in request.stop:
                request.reason = "stop"
            elif len(request.tokens) == request.max_new_tokens:
                request.reason = "length"
            slot = self._slots[number]
            if request.reason and slot.request is request:
                slot.leave(next(self._clock))
            yield request


def make_engine(decoder: Decoder, requests: Sequence[Request]) -> Engine:
    """An engine for these requests: a slot for each, or as many as fit, with room for the longest."""
    if not requests:
        raise ValueError("there are no prompts; give at least one")
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    context = min(bucket_length(longest), decoder.config.max_length)
    return Engine(decoder, slots=min(len(requests), count_slots(decoder, context)), context=context)


def count_slots(decoder: Decoder, context: int) -> int:
    """How many slots of so many tokens fit into four fifths of the memory that is free, at most MOST_SLOTS.

    The rest is for what a step computes. On a GPU, memory that XLA has reserved counts as free until it is in use.
    """
    make = partial(empty_state, rows=1, context=context)
    row = jax.eval_shape(lambda weights: make(nnx.merge(decoder.graph, weights)), decoder.weights)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(row))
    shards = decoder.mesh.size
    size /= min(shards, decoder.config.kv_heads * decoder.batch_shards)  # of a slot, on each device
    free = min(map(_free_memory, decoder.mesh.local_devices))
    fitting = int(0.8 * free / size)
    if fitting < 1:
        raise ValueError(
            f"a slot of {context} tokens takes {size / 2**30:.2f} GiB of each device, and {free / 2**30:.2f} GiB are "
            "free; ask for fewer tokens, or use more devices"
        )
    return min(fitting, MOST_SLOTS)


def _free_memory(device) -> int:
    """Bytes of memory that a device has left; of a CPU, those of the machine."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(kw_only=True)
class _Call:
    """A call of a program whose results have not been read."""

    requests: dict[int, Request] = field(default_factory=dict)  # that it adds tokens to, by the number of their slot
    echoes: dict[int, tuple[Request, int]] = field(default_factory=dict)  # of each batch shard, and how many scores
    new: NewTokens | None = None
    prompt_scores: Scores | None = None


def _make_part(slot: _Slot | None, row: int, size: int, adapter: int) -> Parts[np.ndarray | np.generic]:
    """The next part of a slot's prompt, `size` tokens at most, as arrays without the dim B; or one of no tokens."""
    request, read = (slot.request, slot.read) if slot and slot.request else (None, 0)
    part = np.full(size + 1, PAD, np.int32)
    length = is_last = 0
    if request:
        tokens = request.prompt[read : read + size + 1]  # with the one that follows
        part[: len(tokens)] = tokens
        length = min(len(tokens), size)
        is_last = read + length == len(request.prompt)
    return Parts(
        row_B=np.int32(row),
        tokens_BT=part[:size],
        next_B=part[length],
        start_B=np.int32(read),
        length_B=np.int32(length),
        new_B=np.int32(request.max_new_tokens if request and is_last else 0),
        stop_BE=pad_stops(request.stop if request else ()),
        is_scored_B=np.bool(request is not None and request.alternatives is not None),
        is_echoed_B=np.bool(request is not None and request.echo),
        adapter_B=np.int32(adapter),
        settings=RowSettings.of(request.sampling, request.sample) if request else RowSettings.of(GREEDY),
    )


def _list_scores(scores: Scores, row: int, length: int, alternatives: int) -> list[TokenScore]:
    """The scores of the beginning of a row."""
    values, tokens = scores.values[row, :length, :alternatives], scores.tokens[row, :length, :alternatives]
    return [
        TokenScore(float(chosen), list(zip(ids.tolist(), numbers.tolist(), strict=True)))
        for chosen, ids, numbers in zip(scores.chosen[row, :length], tokens, values, strict=True)
    ]


def _count_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@partial(jax.jit, static_argnums=(0, 2, 3))
def _make_state(graph, weights, rows: int, context: int) -> State:
    return _place(empty_state(nnx.merge(graph, weights), rows=rows, context=context))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_parts(graph, weights, state: State, parts: Parts[jax.Array]) -> tuple[State, NewTokens, Scores]:
    state, *results = read_parts(nnx.merge(graph, weights), state, parts)
    return _place(state), *jax.tree.map(replicate, results)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def add_tokens_program(graph, weights, state: State, is_taken_B, steps) -> tuple[State, NewTokens]:
    """`add_tokens` for rows that are taken alone: the state does not know of a request that was canceled."""
    state = replace(state, left_B=jnp.where(is_taken_B, state.left_B, 0))
    state, new = add_tokens(nnx.merge(graph, weights), state, steps, MOST_STEPS)
    return _place(state), jax.tree.map(replicate, new)


@partial(jax.jit, donate_argnums=0)
def _copy_rows(state: State, source_B, target_B, length_B) -> State:
    return _place(copy_rows(state, source_B, target_B, length_B))


def _place(state: State) -> State:
    """The state with its caches spread over the mesh, and all else whole on each device."""
    small = jax.tree.map(replicate, replace(state, cache=[]))
    return replace(small, cache=jax.tree.map(lambda x: constrain(x, "BKSH"), state.cache))
