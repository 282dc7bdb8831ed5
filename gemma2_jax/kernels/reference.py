"""What the kernels compute, in plain jnp and float32. Every implementation is tested against it.

It holds all scores at once and is not meant to be fast. The keys that a query sees are an interval (`visible_mask`).
That one description covers the causal mask, a window, packed segments, and queries that are part of a longer sequence.
Letters: B batch, T query position, S key position, N query heads, K key/value heads, H head width.
"""

import jax
import jax.numpy as jnp


def visible_mask(q_position_BT, k_position_BS, q_start_BT, window) -> tuple[jax.Array, jax.Array]:
    """Computes the first and the last key that each query sees, int32 [B, T].

    Where a query sees none, the last is before the first.

    Args:
      q_position_BT, k_position_BS: int32, the positions of queries and keys in the sequence, ascending in each row.
      q_start_BT: int32, the position where the segment of each query starts: a query sees nothing before it.
      window: int32 scalar, may be traced: a query at i sees keys at j with 0 <= i - j < window.
    """
    earliest_BT = jnp.maximum(q_start_BT, q_position_BT - window + 1)
    first_BT = jax.vmap(lambda k, q: jnp.searchsorted(k, q, side="left"))(k_position_BS, earliest_BT)
    after_BT = jax.vmap(lambda k, q: jnp.searchsorted(k, q, side="right"))(k_position_BS, q_position_BT)
    return first_BT.astype(jnp.int32), after_BT.astype(jnp.int32) - 1


def attention(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, *, scale: float, softcap: float | None):
    """Computes soft-capped attention of each query to the keys from `first` to `last`.

    Query head n uses key/value head n // (N // K). Scores are softcap * tanh(scale * q.k / softcap), or scale * q.k
    without a softcap, and the mask comes after it (Gemma 2, arXiv:2408.00118, section 2).

    Args:
      q_BTNH, k_BSKH, v_BSKH: of any float dtype; they are computed with in float32. N is a multiple of K.
      first_BT, last_BT: int32, as `visible_mask` gives them.

    Returns:
      [B, T, N, H] and the log-sum-exp of the scores [B, N, T], both float32. A query that sees no key has zeros and
      -inf.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores_BNTS = apply_softcap(jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest") * scale, softcap)
    key_S = jnp.arange(k.shape[1])
    visible_BTS = (first_BT[:, :, None] <= key_S) & (key_S <= last_BT[:, :, None])
    visible_BNTS = visible_BTS[:, None]
    top_BNT1 = jax.lax.stop_gradient(jnp.max(scores_BNTS, axis=-1, keepdims=True, where=visible_BNTS, initial=-1e30))
    weights_BNTS = jnp.where(visible_BNTS, jnp.exp(jnp.where(visible_BNTS, scores_BNTS - top_BNT1, 0)), 0)
    total_BNT = weights_BNTS.sum(-1)
    any_visible_BNT = total_BNT > 0
    total_BNT = jnp.where(any_visible_BNT, total_BNT, 1)  # So that no gradient is NaN where a query sees no key.
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS / total_BNT[..., None], v, precision="highest")
    return out_BTNH, jnp.where(any_visible_BNT, top_BNT1[..., 0] + jnp.log(total_BNT), -jnp.inf)


def decode(q_BTNH, k_BKSH, v_BKSH, position_B, window, *, scale: float, softcap: float | None):
    """Computes soft-capped attention of the last T tokens of each row to a cache that holds them and all they see.

    The token at position p is in slot p mod S; the other slots may hold anything. The positions of the T queries end
    with `position_B`.

    Args:
      q_BTNH: the queries of the last T tokens, which are one or a few.
      k_BKSH, v_BKSH: the cache, which has a slot for every token of a row or is a ring. Heads come before slots, so
        that a head's slots lie together.
      position_B: int32, the position of each row's last token.
      window: int32 scalar: as in `visible_mask`. A ring needs window + T - 1 slots.

    Returns:
      [B, T, N, H], float32.
    """
    T, S = q_BTNH.shape[1], k_BKSH.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BKSH, v_BKSH))
    groups = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    query_position_BT = position_B[:, None] - (T - 1) + jnp.arange(T)
    # The position of the token in each slot; negative where there is none yet.
    slot_position_BS = position_B[:, None] - (position_B[:, None] - jnp.arange(S)) % S
    distance_BTS = query_position_BT[:, :, None] - slot_position_BS[:, None]
    visible_BTS = (distance_BTS >= 0) & (distance_BTS < window) & (slot_position_BS[:, None] >= 0)
    scores_BNTS = apply_softcap(jnp.einsum("BTNH,BNSH->BNTS", q, k, precision="highest") * scale, softcap)
    weights_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)
    v = jnp.where(jnp.any(visible_BTS, axis=1)[:, None, :, None], v, 0)
    return jnp.einsum("BNTS,BNSH->BTNH", weights_BNTS, v, precision="highest")


def apply_softcap(scores, softcap: float | None):
    """Returns softcap * tanh(scores / softcap), or the scores unchanged if it is None (arXiv:2408.00118, section 2)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
