"""Log-probabilities of given tokens, by whole passes over batches of rows, without a cache.

The engine reads one prompt at a time, as its prompts are to be continued. What is only scored has no such order: rows
of like length share a pass, and logits are computed in the places alone that are asked for. Rows that differ in their
last token, such as the answers A to D to one question, are one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.steps import PAD, bucket_length

BATCH_TOKENS = 8192  # of a pass, on each data shard
_MOST_ENDINGS = 16  # last tokens of one row
_LOGITS = 512  # positions of a data shard whose logits are in memory at one time


@dataclass(frozen=True)
class Continuation:
    """Tokens, of which the last `count` are scored; at least one comes before them."""

    tokens: Sequence[int]
    count: int


@dataclass(frozen=True)
class Score:
    """What the model says of a continuation."""

    log_probability: float  # of the tokens together, in nats
    is_greedy: bool  # whether each of them is the most likely one in its place


@dataclass(frozen=True)
class _Row:
    """What is read once: tokens, and the continuations that are these but for their last token."""

    tokens: tuple[int, ...]
    members: list[tuple[int, Continuation]]  # with their numbers

    @property
    def count(self) -> int:
        return max(member.count for _, member in self.members)


def score_continuations(
    decoder: Decoder, continuations: Sequence[Continuation], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, Score]]:
    """The number of each continuation and its score; those of the longest rows come before others.

    `batch_tokens` are those of a pass on each data shard, with padding; a row of more is a pass of its own. Raises
    ValueError where a continuation does not fit into the model's context.
    """
    rows = _group_rows(decoder, continuations)
    endings = max((len(row.members) for row in rows), default=0)
    endings = 1 << max(0, endings - 1).bit_length()
    pending: tuple[list[_Row], tuple[jax.Array, jax.Array]] | None = None
    while rows:
        length = min(bucket_length(len(rows[0].tokens)), decoder.config.max_length)
        size = max(1, batch_tokens // length)
        size = min(size, 1 << (-(-len(rows) // decoder.batch_shards) - 1).bit_length()) * decoder.batch_shards
        batch, rows = rows[:size], rows[size:]
        with jax.set_mesh(decoder.mesh):
            results = _score_rows(decoder.graph, decoder.weights, *_stack_rows(batch, size, length, endings))
        if pending:  # the device is at the next batch
            yield from _read_scores(*pending)
        pending = batch, results
    if pending:
        yield from _read_scores(*pending)


def _group_rows(decoder: Decoder, continuations: Sequence[Continuation]) -> list[_Row]:
    """The rows that have all continuations, the longest first."""
    most, rows = decoder.config.max_length, dict[tuple[int, ...], list[_Row]]()
    for number, member in enumerate(continuations):
        tokens = tuple(member.tokens[:-1])
        if not 1 <= member.count <= len(tokens) <= most:
            raise ValueError(
                f"{member.count} of {len(member.tokens)} tokens are to be scored; ask for 1 or more, with a token "
                f"before them, and at most {most + 1} in all"
            )
        same = rows.setdefault(tokens, [])
        if not same or len(same[-1].members) == _MOST_ENDINGS:
            same.append(_Row(tokens, []))
        same[-1].members.append((number, member))
    return sorted((row for same in rows.values() for row in same), key=lambda row: -len(row.tokens))


def _stack_rows(batch: list[_Row], size: int, length: int, endings: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `_score_rows`: so many rows, the missing ones of padding alone."""
    scored = min(length, bucket_length(max(row.count for row in batch)))
    tokens_BT = np.full((size, length), PAD, np.int32)
    length_B = np.ones(size, np.int32)
    next_BCK = np.full((size, scored, endings), PAD, np.int32)
    for number, row in enumerate(batch):
        tokens_BT[number, : len(row.tokens)] = row.tokens
        length_B[number] = len(row.tokens)
        for ending, (_, member) in enumerate(row.members):
            next_BCK[number, scored - member.count :, ending] = member.tokens[-member.count :]
    return tokens_BT, length_B, next_BCK


def _read_scores(batch: list[_Row], results: tuple[jax.Array, jax.Array]) -> Iterator[tuple[int, Score]]:
    values_BCK, is_best_BCK = map(np.asarray, jax.device_get(results))
    for number, row in enumerate(batch):
        for ending, (place, member) in enumerate(row.members):
            values, is_best = (x[number, -member.count :, ending] for x in (values_BCK, is_best_BCK))
            yield place, Score(float(values.sum(dtype=np.float64)), bool(is_best.all()))


@partial(jax.jit, static_argnums=0)
def _score_rows(graph, weights, tokens_BT, length_B, next_BCK) -> tuple[jax.Array, jax.Array]:
    """Of each token that may follow the last C of a row: its log-probability, and whether it is the most likely.

    Args:
      tokens_BT: int32, padded at the end.
      length_B: int32: how many of them a row has.
      next_BCK: int32: K tokens for each place; the last place of all rows is that after their last token.

    Returns float32 and bool, [B, C, K].
    """
    model = nnx.merge(graph, weights)
    (B, T), C = tokens_BT.shape, next_BCK.shape[1]
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden_BTD = model.hidden_states(tokens_BT, positions_BT, jnp.zeros((B, T), jnp.int32))
    places_BC = jnp.maximum(length_B[:, None] - C + jnp.arange(C), 0)
    hidden_BCD = jnp.take_along_axis(hidden_BTD, places_BC[..., None], axis=1)

    def score_places(inputs):
        hidden_BCD, next_BCK = inputs
        logits_BCV = model.logits(hidden_BCD)
        best_BC = jnp.argmax(logits_BCV, axis=-1)
        chosen_BCK = jnp.take_along_axis(logits_BCV, next_BCK, axis=-1)
        return chosen_BCK - jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True), best_BC[..., None] == next_BCK

    size = max(size for size in range(1, C + 1) if C % size == 0 and (size == 1 or size * B <= _LOGITS))
    split = [jnp.moveaxis(x.reshape(B, C // size, size, -1), 1, 0) for x in (hidden_BCD, next_BCK)]
    results = jax.lax.map(score_places, tuple(split))
    values_BCK, is_best_BCK = (jnp.moveaxis(x, 0, 1).reshape(next_BCK.shape) for x in results)
    return values_BCK, is_best_BCK
