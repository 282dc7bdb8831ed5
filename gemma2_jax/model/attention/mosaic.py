"""Gemma 2 attention by the Hopper kernels (`kernels`), on whatever mesh there is.

A kernel is not divided by XLA's partitioner, so here each device takes its rows and heads itself. Context shards pass
their keys and values around a ring (arXiv:2310.01889): each attends to what it has while the next part comes. Scores
are bounded, so that partial results simply add up.
"""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp

from gemma2_jax.mesh import map_shards
from gemma2_jax.model.attention.xla import gather_context


def attend(
    q_BTNH, k_BTKH, v_BTKH, segments_BT, window, *, scale: float, softcap: float | None, kernel: Callable | None = None
):
    """`attention_xla.attend` for bfloat16, where a segment is one run of positions; by another `kernel` in tests."""
    if kernel is None:
        from gemma2_jax.kernels.attention import attention as kernel
    T, N = q_BTNH.shape[1:3]
    run = partial(_attend_shard, partial(kernel, scale=scale, softcap=softcap), T, N // k_BTKH.shape[2])
    letters = "BTNH", "BTKH", "BTKH", "BT", ""
    return map_shards(run, letters)(q_BTNH, k_BTKH, v_BTKH, segments_BT, jnp.int32(window))


def _attend_shard(kernel, length: int, groups: int, q_BTNH, k_BTKH, v_BTKH, segments_BT, window):
    """`attend` of one device, of rows of that length."""
    from gemma2_jax.kernels.attention import combine_parts

    T, N = q_BTNH.shape[1:3]
    k_BTKH, v_BTKH = _local_kv_heads(N, groups, (k_BTKH, v_BTKH), axis=2)
    shards = length // T
    if shards == 1:
        return kernel(
            q_BTNH, k_BTKH, v_BTKH, *key_intervals(jnp.arange(T), segment_starts(segments_BT), (0,), T, window)
        )[0]

    piece = T // 2  # of the row, of which a shard has two: see `mesh.balance_context`

    def pieces(shard):
        return shard * piece, (2 * shards - 1 - shard) * piece

    shard = jax.lax.axis_index("context")
    position_T = jnp.concatenate([at + jnp.arange(piece) for at in pieces(shard)])
    start_BT = jnp.take(segment_starts(gather_context(segments_BT, shards)), position_T, axis=1)
    around = [(at, (at + 1) % shards) for at in range(shards)]
    parts = []
    for step in range(shards):
        if step:
            k_BTKH, v_BTKH = jax.lax.ppermute((k_BTKH, v_BTKH), "context", around)
        seen = key_intervals(position_T, start_BT, pieces((shard - step) % shards), piece, window)
        parts.append(kernel(q_BTNH, k_BTKH, v_BTKH, *seen))
    return combine_parts(*zip(*parts, strict=True))[0]


def segment_starts(segments_BT) -> jax.Array:
    """Where the segment of each position starts, int32 [B, T]; a segment is one run of positions."""
    B, T = segments_BT.shape
    new_BT = jnp.concatenate([jnp.ones((B, 1), bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(new_BT, jnp.arange(T, dtype=jnp.int32), 0), axis=1)


def key_intervals(position_T, start_BT, pieces, length: int, window) -> tuple[jax.Array, jax.Array]:
    """The first and the last key that each query sees, int32 [B, T], by the place of keys among those given.

    Args:
      position_T: of the queries in their row.
      start_BT: where their segments start.
      pieces: where in the row each piece of the keys starts, in order.
      length: of a piece.
      window: as in `attend`.
    """

    def before(position):
        """How many of the keys come before a position."""
        return reduce(jnp.add, (jnp.clip(position - at, 0, length) for at in pieces))

    first_BT = before(jnp.maximum(start_BT, position_T - window + 1))
    return first_BT, jnp.broadcast_to(before(position_T + 1) - 1, first_BT.shape)


def attend_cached(
    q_BNH, k_BKSH, v_BKSH, position_B, *, scale: float, softcap: float | None, kernel: Callable | None = None
):
    """`attention_xla.attend_cached` for bfloat16; by another `kernel` in tests."""
    if kernel is None:
        from gemma2_jax.kernels.decode import decode as kernel
    groups = q_BNH.shape[1] // k_BKSH.shape[1]

    def of_shard(q_BNH, k_BKSH, v_BKSH, position_B):
        k_BKSH, v_BKSH = _local_kv_heads(q_BNH.shape[1], groups, (k_BKSH, v_BKSH), axis=1)
        window = k_BKSH.shape[2]  # a cache holds what its layer sees
        return kernel(q_BNH[:, None], k_BKSH, v_BKSH, position_B, window, scale=scale, softcap=softcap)[:, 0]

    return map_shards(of_shard, ("BNH", "BKSH", "BKSH", "B"))(q_BNH, k_BKSH, v_BKSH, position_B)


def _local_kv_heads(queries: int, groups: int, arrays, axis: int):
    """Key/value heads of this device's query heads: of all of them, where they were too few to divide."""
    if groups * arrays[0].shape[axis] == queries:
        return arrays
    head = jax.lax.axis_index("tensor") * queries // groups
    return tuple(jax.lax.dynamic_slice_in_dim(x, head, 1, axis=axis) for x in arrays)
