"""Soft-capped attention for Hopper, differentiable: what `reference.attention` means, by `forward` and `backward`.

Each query sees an interval of keys (`reference.visible_mask`), which says causal, window, packing and context
parallelism in one. Tiles that no query of theirs sees are neither loaded nor multiplied, forward and backward; only
those at the edge of an interval are masked.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.backward import dkv, dq
from gemma2_jax.kernels.forward import forward
from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.kernels.tiles import GPU, LOG2E, TILES, Build


def attention(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, *, scale: float, softcap: float | None, build: Build = GPU):
    """Attention of each query to the keys from `first` to `last`: `reference.attention`, differentiable by q, k and v.

    Results are the same bit by bit each time, forward and backward. Partial results over parts of the keys combine by
    addition, `combine_parts`.

    Args:
      q_BTNH: bfloat16, after RoPE; N is a multiple of K.
      k_BSKH, v_BSKH: bfloat16.
      first_BT, last_BT: int32; neither may descend along a row.
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap).
      build: how the kernels are built.

    Returns:
      [B, T, N, H] bfloat16, and the log-sum-exp of the scores [B, N, T] float32. A query that sees no key has zeros
      and -inf.

    Raises:
      ValueError: for what the kernels lack.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    for dtype in (q_BTNH.dtype, k_BSKH.dtype, v_BSKH.dtype):
        if lack := MOSAIC.find_lack(dtype=dtype.name, width=H, softcap=softcap):
            raise ValueError(f"the Mosaic attention kernel lacks {lack}; use another implementation")
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K or first_BT.shape != (B, T):
        raise ValueError(
            f"queries {q_BTNH.shape}, keys {k_BSKH.shape}, values {v_BSKH.shape} and intervals {first_BT.shape} do not "
            "go together: they are [B, T, N, H], [B, S, K, H] twice and [B, T], with K a divisor of N"
        )
    rows, keys = TILES[H].padded
    pad_T, pad_S = -T % rows, -S % keys
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad_T), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, pad_S), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
    # Queries that are not there come after all keys, and see none.
    first = jnp.pad(first_BT, ((0, 0), (0, pad_T)), constant_values=S + pad_S)
    last = jnp.pad(last_BT, ((0, 0), (0, pad_T)), constant_values=S + pad_S - 1)
    out, lse = _attend((scale, softcap, build), q, k, v, first, last)
    return out[:, :T], lse[:, :, :T]


def combine_parts(outs, lses):
    """Attention to all keys, from that to each part of them: `outs` [B, T, N, H] and `lses` [B, N, T].

    Scores are bounded, so that this is a plain weighted sum, with no maximum to exchange.

    Returns:
      [B, T, N, H] in the dtype of the parts, and its log-sum-exp.
    """
    totals = jnp.exp(jnp.stack(lses))
    total = totals.sum(0)
    shares = jnp.swapaxes(totals / jnp.maximum(total, 1e-30), 2, 3)[..., None]
    whole = reduce(jnp.add, (out * share for out, share in zip(outs, shares, strict=True)))
    return whole.astype(outs[0].dtype), jnp.log(total)


def _value(settings, *arrays):
    return _forward(settings, *arrays)[0]


def _forward(settings, q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT):
    scale, softcap, build = settings
    inputs = q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT
    out, lse = forward(*inputs, scale=scale, softcap=softcap, tile=TILES[q_BTNH.shape[-1]].forward, build=build)
    return (out, lse), (*inputs, out, lse)


def _backward(settings, residuals, cotangents):
    scale, softcap, build = settings
    q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, out_BTNH, lse_BNT = residuals
    d_BTNH, d_lse_BNT = cotangents
    tiles = TILES[q_BTNH.shape[-1]]
    # The log-sum-exp's gradient by a score is the weight P, so that it comes in where delta does.
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", out_BTNH, d_BTNH, preferred_element_type=jnp.float32) - d_lse_BNT
    # To base 2, for exp2; where no key is seen, anything finite.
    lse_BNT = jnp.where(jnp.isfinite(lse_BNT), lse_BNT * LOG2E, 0)
    inputs = q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT
    settings = dict(scale=scale, softcap=softcap, build=build)
    by_q = dq(*inputs, **settings, tile=tiles.dq)
    by_k, by_v = dkv(*inputs, **settings, tile=tiles.dkv)
    return by_q, by_k, by_v, None, None


_attend = jax.custom_vjp(_value, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
