"""Gemma 2 attention by the Hopper kernels (`kernels`), on whatever mesh there is.

XLA does not partition a kernel, so here each device takes its own rows and heads. Context shards pass their keys and
values around a ring (arXiv:2310.01889): each attends to the part that it has while the next part arrives. Soft-capped
scores are bounded, so that partial results simply add up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp

from gemma2_jax.mesh import map_shards
from gemma2_jax.model.attention.xla import gather_context


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    window,
    *,
    scale: float,
    softcap: float | None,
    kernel: Callable | None = None,
) -> jax.Array:
    """Computes attention of each row to itself, as `xla.attend` does, for bfloat16 and contiguous segments.

    Args:
      q_BTNH, k_BTKH, v_BTKH: bfloat16, after RoPE.
      segments_BT: int32; the positions of a segment follow each other.
      window: int32 scalar, may be traced: a query at i sees keys at j with 0 <= i - j < window.
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap).
      kernel: takes the place of `kernels.attention.attention` in tests.

    Returns:
      [B, T, N, H], bfloat16.

    Raises:
      ValueError: if the kernels lack a dtype, head width or soft cap.
    """
    if kernel is None:
        from gemma2_jax.kernels.attention import attention as kernel
    shard = _Shard(
        kernel=partial(kernel, scale=scale, softcap=softcap),
        length=q_BTNH.shape[1],
        groups=q_BTNH.shape[2] // k_BTKH.shape[2],
    )
    letters = "BTNH", "BTKH", "BTKH", "BT", ""
    return map_shards(shard.attend, letters)(q_BTNH, k_BTKH, v_BTKH, segments_BT, jnp.int32(window))


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """The work of one device.

    Attributes:
      kernel: a function of q, k, v and the interval of keys of each query, which returns the output and log-sum-exp.
      length: T of whole rows.
      groups: query heads per key/value head in the whole model.
    """

    kernel: Callable
    length: int
    groups: int

    def attend(self, q_BTNH, k_BTKH, v_BTKH, segments_BT, window) -> jax.Array:
        """Computes the device's part of `attend`."""
        T, N = q_BTNH.shape[1:3]
        k_BTKH, v_BTKH = _local_kv_heads(N, self.groups, (k_BTKH, v_BTKH), axis=2)
        if self.length == T:
            intervals = key_intervals(jnp.arange(T), segment_starts(segments_BT), (0,), T, window)
            return self.kernel(q_BTNH, k_BTKH, v_BTKH, *intervals)[0]
        return self._attend_ring(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)

    def _attend_ring(self, q_BTNH, k_BTKH, v_BTKH, segments_BT, window) -> jax.Array:
        """Attends to the keys and values of each context shard in turn, which go around a ring."""
        from gemma2_jax.kernels.attention import combine_parts

        T = q_BTNH.shape[1]
        shards = self.length // T
        piece = T // 2  # A shard has two pieces of the row: see `mesh.balance_context`.

        def piece_starts(shard):
            return shard * piece, (2 * shards - 1 - shard) * piece

        shard = jax.lax.axis_index("context")
        position_T = jnp.concatenate([start + jnp.arange(piece) for start in piece_starts(shard)])
        start_BT = jnp.take(segment_starts(gather_context(segments_BT, shards)), position_T, axis=1)
        rotation = [(source, (source + 1) % shards) for source in range(shards)]
        parts = []
        for step in range(shards):
            if step:
                k_BTKH, v_BTKH = jax.lax.ppermute((k_BTKH, v_BTKH), "context", rotation)
            key_pieces = piece_starts((shard - step) % shards)
            intervals = key_intervals(position_T, start_BT, key_pieces, piece, window)
            parts.append(self.kernel(q_BTNH, k_BTKH, v_BTKH, *intervals))
        return combine_parts(*zip(*parts, strict=True))[0]


def segment_starts(segments_BT) -> jax.Array:
    """Finds the position where the segment of each position starts, int32 [B, T]; a segment is one run of positions."""
    B, T = segments_BT.shape
    new_BT = jnp.concatenate([jnp.ones((B, 1), bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(new_BT, jnp.arange(T, dtype=jnp.int32), 0), axis=1)


def key_intervals(position_T, start_BT, pieces, length: int, window) -> tuple[jax.Array, jax.Array]:
    """Computes the first and the last key that each query sees, int32 [B, T], as indices into the keys given.

    Where a query sees none of them, the last is before the first.

    Args:
      position_T: int32, the positions of the queries in their row.
      start_BT: int32, where the segments of the queries start.
      pieces: where in the row each piece of the keys starts, in order.
      length: the length of a piece.
      window: as in `attend`.
    """

    def count_keys_before(position):
        """Counts the keys that come before a position of the row."""
        return reduce(jnp.add, (jnp.clip(position - piece, 0, length) for piece in pieces))

    first_BT = count_keys_before(jnp.maximum(start_BT, position_T - window + 1))
    return first_BT, jnp.broadcast_to(count_keys_before(position_T + 1) - 1, first_BT.shape)


def attend_cached(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    position_B: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    kernel: Callable | None = None,
) -> jax.Array:
    """Computes attention of one token of each row to a cache, as `xla.attend_cached` does, for bfloat16.

    Args:
      q_BNH: bfloat16, after RoPE.
      k_BKSH, v_BKSH: bfloat16, the cache: the token at position p is in slot p mod S.
      position_B: int32, the position of each row's token.
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap).
      kernel: takes the place of `kernels.decode.decode` in tests.

    Returns:
      [B, N, H], bfloat16.

    Raises:
      ValueError: if the kernel lacks a dtype, head width or soft cap.
    """
    if kernel is None:
        from gemma2_jax.kernels.decode import decode as kernel
    groups = q_BNH.shape[1] // k_BKSH.shape[1]

    def attend_shard(q_BNH, k_BKSH, v_BKSH, position_B):
        k_BKSH, v_BKSH = _local_kv_heads(q_BNH.shape[1], groups, (k_BKSH, v_BKSH), axis=1)
        window = k_BKSH.shape[2]  # A cache holds what its layer sees.
        return kernel(q_BNH[:, None], k_BKSH, v_BKSH, position_B, window, scale=scale, softcap=softcap)[:, 0]

    return map_shards(attend_shard, ("BNH", "BKSH", "BKSH", "B"))(q_BNH, k_BKSH, v_BKSH, position_B)


def _local_kv_heads(queries: int, groups: int, arrays, axis: int):
    """Selects the key/value head of this device's query heads, if there were too few heads to divide over devices."""
    if groups * arrays[0].shape[axis] == queries:
        return arrays
    head = jax.lax.axis_index("tensor") * queries // groups
    return tuple(jax.lax.dynamic_slice_in_dim(x, head, 1, axis=axis) for x in arrays)
