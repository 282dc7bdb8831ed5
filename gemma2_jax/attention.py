"""Gemma 2 attention in jnp: causal, per-layer window, soft-capped scores, grouped queries, packed segments.

This is the definition, and the implementation wherever no kernel is faster. Queries are taken a block at a time, each
block's scores are recomputed in the backward pass, and keys beyond a block's last query are not touched, so no
[T, S] array of scores exists for long sequences.
"""

from functools import partial

import jax
import jax.numpy as jnp

MASKED = -2.0e38  # a finite stand-in for -inf: no NaN where a row of a block has nothing to attend to

# Blocks are unrolled: few enough to compile quickly, at least this many queries each to keep matrices large.
MAX_BLOCKS, MIN_BLOCK = 16, 256


def choose(name: str):
    """The attention implementation of that name, and why it was chosen, as (function, reason)."""
    if name == "auto":
        return attend, "xla (no fused kernel for this platform)"
    if name == "xla":
        return attend, "xla (as asked)"
    raise ValueError(f"compute.attention {name!r} is unknown; there are auto and xla")


def attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, *, scale: float, softcap: float | None):
    """Causal attention of a sequence to itself.

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys and values after RoPE, in the compute dtype; N is a multiple of K.
      segments_BT: int32; positions attend within their own segment only.
      window: int32 scalar, may be traced: query i sees keys j of its segment with 0 <= i - j < window.
      scale: multiplies q.k before the cap.
      softcap: scores become cap * tanh(score / cap); None leaves them.

    Returns:
      [B, T, N, H] in the dtype of v. Scores and softmax are float32 (Gemma 2, arXiv:2408.00118, section 2).
    """
    T = q_BTNH.shape[1]
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    position_T = jnp.arange(T)

    @partial(jax.checkpoint, static_argnums=(0, 1))
    def one_block(start, stop, q_BTNH, k_BTKH, v_BTKH):
        distance_TS = position_T[start:stop, None] - position_T[None, :stop]
        same_BTS = segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
        mask_BTS = (distance_TS >= 0) & (distance_TS < window) & same_BTS
        return masked_softmax(
            q_BTNH[:, start:stop], k_BTKH[:, :stop], v_BTKH[:, :stop], mask_BTS, scale=scale, softcap=softcap
        )

    blocks = [one_block(start, min(start + block, T), q_BTNH, k_BTKH, v_BTKH) for start in range(0, T, block)]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def attend_cached(q_BTNH, k_BSKH, v_BSKH, positions_BT, window, *, scale: float, softcap: float | None):
    """Attention of a few new queries to a cache in which key j of a row stands in slot j.

    Query at position i sees slots j with 0 <= i - j < window. Shapes, dtypes and the rest are as in `attend`.
    """
    distance_BTS = positions_BT[:, :, None] - jnp.arange(k_BSKH.shape[1])
    mask_BTS = (distance_BTS >= 0) & (distance_BTS < window)
    return masked_softmax(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)


def masked_softmax(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale: float, softcap: float | None):
    """Soft-capped attention under an explicit mask (True: attend); the cap comes before the mask."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out.reshape(B, T, N, H)
