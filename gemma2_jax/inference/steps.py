"""The two steps of generation, on the rows of a batch: reading a part of a prompt, and adding a token.

They are plain functions of a model and a `State`, for programs of the engine (`engine`) and of the samples of a run in
training. Rows are independent: each has its own prompt, position, settings and end. Nothing here knows of requests,
text or files.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.inference.sampling import (
    History,
    RowSettings,
    Scores,
    empty_scores,
    sample_rows,
    score_tokens,
)
from gemma2_jax.inference.settings import GREEDY
from gemma2_jax.mesh import map_shards, replicate
from gemma2_jax.model.gemma2 import Cache, Gemma2

PAD = 0  # the token in places that hold none
MOST_STOPS = 64  # tokens that may end a row
_SCORED = 32  # positions of a prompt whose logits are in memory at one time


@dataclass(frozen=True, kw_only=True)
class State:
    """What the device has of each row. The cache holds the tokens before `position_B`."""

    token_BS: jax.Array  # int32: the tokens by position, prompt and new ones
    prompt_B: jax.Array  # int32: how many of them are the prompt's
    position_B: jax.Array  # int32: the newest token's position; while a prompt is read, that of the next part
    left_B: jax.Array  # int32: how many more tokens the row gets; 0 where it is free, or its prompt is still read
    stop_BE: jax.Array  # int32: tokens that end it, -1 for fewer than MOST_STOPS
    is_scored_B: jax.Array  # bool: whether the log-probabilities of its tokens are asked for
    adapter_B: jax.Array  # int32: the number of its adapter (`adapter_bank`); 0: none
    settings: RowSettings  # how its tokens are chosen
    cache: Cache


@dataclass(frozen=True, kw_only=True)
class Parts[Array]:
    """A part of the prompt of one row in each shard of the batch; a length of 0 is none."""

    row_B: Array  # int32: the number of the row within its shard
    tokens_BT: Array  # int32, padded at the end
    next_B: Array  # int32: the token of the prompt that follows the part
    start_B: Array  # int32: the position of its first token
    length_B: Array  # int32: how many tokens it has
    new_B: Array  # int32: how many new tokens the row gets if this is the last part, else 0
    stop_BE: Array  # int32, as in `State`
    is_scored_B: Array  # bool, as in `State`
    adapter_B: Array  # int32, as in `State`
    is_echoed_B: Array  # bool: whether the log-probabilities of the prompt's own tokens are asked for
    settings: RowSettings


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """New tokens of all rows."""

    tokens_BC: jax.Array  # int32
    counts_B: jax.Array  # int32: how many of them each row has
    scores: Scores  # [B, C]; zeros where they were not asked for


for _kind in (State, Parts, NewTokens):
    jax.tree_util.register_dataclass(_kind, [field.name for field in fields(_kind)], [])


def empty_state(model: Gemma2, *, rows: int, context: int) -> State:
    """A state without prompts, for rows of `context` tokens, prompt and new ones together."""
    settings = RowSettings.of(GREEDY)
    return State(
        token_BS=jnp.full((rows, context), PAD, jnp.int32),
        prompt_B=jnp.zeros(rows, jnp.int32),
        position_B=jnp.zeros(rows, jnp.int32),
        left_B=jnp.zeros(rows, jnp.int32),
        stop_BE=jnp.full((rows, MOST_STOPS), -1, jnp.int32),
        is_scored_B=jnp.zeros(rows, bool),
        adapter_B=jnp.zeros(rows, jnp.int32),
        settings=jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), settings),
        cache=model.empty_cache(rows, context),
    )


def bucket_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that is not below `length`; from 32 on, less than 1.5 times it."""
    power = 1 << max(5, (int(length) - 1).bit_length())
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


def pad_stops(stop: Collection[int]) -> np.ndarray:
    """Tokens that end a row, as `State` has them. Raises ValueError if there are more than MOST_STOPS."""
    if len(stop) > MOST_STOPS:
        raise ValueError(f"there are {len(stop)} stop tokens; give {MOST_STOPS} at most")
    stop_E = np.full(MOST_STOPS, -1, np.int32)
    stop_E[: len(stop)] = sorted(stop)
    return stop_E


def read_parts(model: Gemma2, state: State, parts: Parts[jax.Array]) -> tuple[State, NewTokens, Scores]:
    """Reads parts of prompts, and where a part is the last adds the row's first token.

    The scores, [B, T], are those of the prompt's own token that follows each token of the parts, where they were asked
    for.
    """
    shards, rows = len(parts.row_B), len(state.position_B)
    place_B = parts.row_B + jnp.arange(shards) * (rows // shards)
    is_whole = shards == rows  # all rows are read at once, as with the samples of a training run
    cache = state.cache if is_whole else _take_rows(state.cache, parts.row_B)
    hidden_BTD, cache = model.extend(parts.tokens_BT, parts.start_B, parts.length_B, cache, parts.adapter_B)
    cache = cache if is_whole else _put_rows(state.cache, cache, parts.row_B)
    is_read_B = parts.length_B > 0

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        shape = is_read_B.shape + (1,) * (new.ndim - 1)
        return old.at[place_B].set(jnp.where(is_read_B.reshape(shape), new, old[place_B]))

    end_B = parts.start_B + parts.length_B
    positions_BT = parts.start_B[:, None] + jnp.arange(parts.tokens_BT.shape[1])
    positions_BT = jnp.where(positions_BT < end_B[:, None], positions_BT, state.token_BS.shape[1])  # beyond: dropped
    token_BS = state.token_BS.at[place_B[:, None], positions_BT].set(parts.tokens_BT, mode="drop")
    history = History(token_BS=token_BS[place_B], prompt_B=end_B, total_B=end_B)
    last_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(parts.length_B, 1)[:, None, None] - 1, axis=1)[:, 0]
    logits_BV = model.logits(last_BD)
    token_B = sample_rows(logits_BV, parts.settings, history)
    is_last_B = parts.new_B > 0
    has_ended_B = jnp.any(token_B[:, None] == parts.stop_BE, axis=1) | ~is_last_B
    state = State(
        token_BS=token_BS.at[place_B, jnp.where(is_last_B, end_B, token_BS.shape[1])].set(token_B, mode="drop"),
        prompt_B=put(state.prompt_B, end_B),
        position_B=put(state.position_B, end_B),
        left_B=put(state.left_B, jnp.where(has_ended_B, 0, parts.new_B - 1)),
        stop_BE=put(state.stop_BE, parts.stop_BE),
        is_scored_B=put(state.is_scored_B, parts.is_scored_B),
        adapter_B=put(state.adapter_B, parts.adapter_B),
        settings=jax.tree.map(put, state.settings, parts.settings),
        cache=cache,
    )
    new = NewTokens(
        tokens_BC=jnp.full((rows, 1), PAD, jnp.int32).at[place_B, 0].set(token_B),
        counts_B=jnp.zeros(rows, jnp.int32).at[place_B].set(is_last_B.astype(jnp.int32)),
        scores=jax.tree.map(
            lambda old, new: old.at[place_B, 0].set(new),
            empty_scores(rows, 1),
            _score_if(parts.is_scored_B & is_last_B, logits_BV, token_B),
        ),
    )
    next_BT = jnp.where(
        jnp.arange(parts.tokens_BT.shape[1]) == parts.length_B[:, None] - 1,
        parts.next_B[:, None],
        jnp.roll(parts.tokens_BT, -1, axis=1),
    )
    return state, new, _score_prompts(model, hidden_BTD, next_BT, parts.is_echoed_B.any())


def add_tokens(model: Gemma2, state: State, steps, most: int) -> tuple[State, NewTokens]:
    """Adds as many tokens to each row as it is to get, `steps` at most, which are no more than `most`.

    A row that gets none takes part in the computation. What that writes into its cache, at its position, is written
    again before it is read: there is the next part of its prompt, or the next prompt begins.
    """
    rows = jnp.arange(len(state.position_B))

    def is_unfinished(carry):
        step, state, _ = carry
        return (step < steps) & jnp.any(state.left_B > 0)

    def add_token(carry):
        step, state, new = carry
        newest_B = jnp.take_along_axis(state.token_BS, state.position_B[:, None], axis=1)[:, 0]
        hidden_BD, cache = model.decode_step(newest_B, state.position_B, state.cache, state.adapter_B)
        is_active_B = state.left_B > 0
        position_B = state.position_B + is_active_B
        logits_BV = model.logits(hidden_BD)
        history = History(token_BS=state.token_BS, prompt_B=state.prompt_B, total_B=position_B)
        token_B = sample_rows(logits_BV, state.settings, history)
        has_ended_B = jnp.any(token_B[:, None] == state.stop_BE, axis=1)
        left_B = jnp.where(has_ended_B, 0, state.left_B - 1)
        place_B = jnp.where(is_active_B, position_B, state.token_BS.shape[1])
        scores = _score_if(state.is_scored_B & is_active_B, logits_BV, token_B)
        new = NewTokens(
            tokens_BC=new.tokens_BC.at[:, step].set(token_B),
            counts_B=new.counts_B + is_active_B,
            scores=jax.tree.map(lambda old, x: old.at[:, step].set(x), new.scores, scores),
        )
        state = replace(
            state,
            token_BS=state.token_BS.at[rows, place_B].set(token_B, mode="drop"),
            position_B=position_B,
            left_B=jnp.where(is_active_B, left_B, state.left_B),
            cache=cache,
        )
        return step + 1, state, new

    empty = NewTokens(
        tokens_BC=jnp.full((len(rows), most), PAD, jnp.int32),
        counts_B=jnp.zeros(len(rows), jnp.int32),
        scores=empty_scores(len(rows), most),
    )
    _, state, new = jax.lax.while_loop(is_unfinished, add_token, (jnp.int32(0), state, empty))
    return state, new


def copy_rows(state: State, source_B, target_B, length_B) -> State:
    """The state with a copy of the beginning of one row in another, in each shard of the batch, by their numbers there.

    The rest of such a prompt is to be read from `length_B` on; a length of 0 is none, and nothing is copied there.
    """
    shards = len(source_B)
    of_shard = len(state.position_B) // shards
    is_copied_B = length_B > 0
    target_B = jnp.where(is_copied_B, target_B, source_B)
    source_place_B, place_B = (x + jnp.arange(shards) * of_shard for x in (source_B, target_B))
    rows = _take_rows(state.cache, source_B)
    return replace(
        state,
        token_BS=state.token_BS.at[place_B].set(state.token_BS[source_place_B]),
        position_B=state.position_B.at[place_B].set(jnp.where(is_copied_B, length_B, state.position_B[place_B])),
        cache=_put_rows(state.cache, rows, target_B),
    )


def _score_if(is_asked_B: jax.Array, logits_BV: jax.Array, token_B: jax.Array) -> Scores:
    shape = token_B.shape
    return jax.lax.cond(
        is_asked_B.any(), lambda: score_tokens(replicate(logits_BV), token_B), lambda: empty_scores(*shape)
    )


def _score_prompts(model: Gemma2, hidden_BTD: jax.Array, next_BT: jax.Array, is_asked: jax.Array) -> Scores:
    """The scores of the tokens that follow, [B, T], a few positions at a time: their logits would not fit."""
    B, T, D = hidden_BTD.shape
    size = math.gcd(_SCORED, T)

    def score_positions(inputs) -> Scores:
        hidden_BCD, next_BC = inputs
        return score_tokens(replicate(model.logits(hidden_BCD)), next_BC)

    def score() -> Scores:
        hidden = jnp.moveaxis(hidden_BTD.reshape(B, T // size, size, D), 1, 0)
        targets = jnp.moveaxis(next_BT.reshape(B, T // size, size), 1, 0)
        scores = jax.lax.map(score_positions, (hidden, targets))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), scores)

    return jax.lax.cond(is_asked, score, lambda: empty_scores(B, T))


def _take_rows(cache: Cache, row_B: jax.Array) -> Cache:
    """The rows of a cache that are read, one of each shard of the batch."""

    def take(x_BKSH: jax.Array, row_B: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x_BKSH, row, 1) for row in _places(x_BKSH, row_B)])

    mapped = map_shards(take, ("BKSH", "B"))
    # Without the barrier, XLA takes the rows where they are used, after others have been put in their place, and copies
    # the whole cache for it (seen on CPU).
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: mapped(x, row_B), cache))


def _put_rows(cache: Cache, rows: Cache, row_B: jax.Array) -> Cache:
    """The cache with these rows in the places of `_take_rows`."""

    def put(x_BKSH: jax.Array, new_BKSH: jax.Array, row_B: jax.Array) -> jax.Array:
        for number, row in enumerate(_places(x_BKSH, row_B)):
            x_BKSH = jax.lax.dynamic_update_slice_in_dim(x_BKSH, new_BKSH[number : number + 1], row, 0)
        return x_BKSH

    mapped = map_shards(put, ("BKSH", "BKSH", "B"))
    return jax.tree.map(lambda x, new: mapped(x, new, row_B), cache, rows)


def _places(x_BKSH: jax.Array, row_B: jax.Array) -> list[jax.Array]:
    """The rows' numbers in this device's shard of the cache, of which each has an equal part."""
    part = len(x_BKSH) // len(row_B)
    return [number * part + row_B[number] for number in range(len(row_B))]
