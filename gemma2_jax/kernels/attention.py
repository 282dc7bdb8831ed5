"""Soft-capped attention for Hopper, differentiable: what `reference.attention` means, by `forward` and `backward`.

Each query sees an interval of keys (`reference.visible_mask`). That one description covers the causal mask, the window,
packing and context parallelism. A tile of keys that no query of a block sees is neither loaded nor multiplied, forward
or backward; a mask is computed only for tiles that some query of the block does not see whole.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.backward import Cotangents, run_dkv, run_dq
from gemma2_jax.kernels.forward import run_forward
from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.kernels.tile_sizes import Tiles
from gemma2_jax.kernels.tiles import GPU, LOG2E, Build, Inputs, Settings


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    first_BT: jax.Array,
    last_BT: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    build: Build = GPU,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of each query to the keys from `first` to `last`, differentiable with respect to q, k and v.

    It means what `reference.attention` does. Results are the same bit by bit each time, forward and backward. Results
    over parts of the keys can be combined into one by `combine_parts`.

    Args:
      q_BTNH: bfloat16, after RoPE; N is a multiple of K.
      k_BSKH, v_BSKH: bfloat16.
      first_BT, last_BT: int32; neither may descend along a row.
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap) (Gemma 2, arXiv:2408.00118, section 2).
      build: how the kernels are built.

    Returns:
      [B, T, N, H] bfloat16, and the log-sum-exp of the scores [B, N, T] float32. A query that sees no key has zeros
      and -inf.

    Raises:
      ValueError: if the kernels lack a dtype, head width or soft cap (`limits.MOSAIC`), or shapes do not go together.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    for dtype in (q_BTNH.dtype, k_BSKH.dtype, v_BSKH.dtype):
        if lack := MOSAIC.find_lack(dtype=dtype.name, width=H, softcap=softcap):
            raise ValueError(f"the Mosaic attention kernel {lack}; use another implementation")
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K or first_BT.shape != (B, T):
        raise ValueError(
            f"queries {q_BTNH.shape}, keys {k_BSKH.shape}, values {v_BSKH.shape} and intervals {first_BT.shape} do not "
            "go together: they are [B, T, N, H], [B, S, K, H] twice and [B, T], with K a divisor of N"
        )
    assert softcap is not None, "the kernels' limits ask for a soft cap"
    inputs = pad_inputs(q_BTNH, k_BSKH, v_BSKH, (first_BT, last_BT), build.select_tiles(H))
    out_BTNH, lse_BNT = _attend(Settings(scale=scale, softcap=softcap, build=build), inputs)
    return out_BTNH[:, :T], lse_BNT[:, :, :T]


def pad_inputs(q_BTNH, k_BSKH, v_BSKH, ends: tuple[jax.Array, jax.Array], tiles: Tiles) -> Inputs:
    """Pads queries and keys to whole tiles; `ends` are the first and the last key that each query sees."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    rows, keys = tiles.padded
    pad_T, pad_S = -T % rows, -S % keys
    return Inputs(
        q_BTNH=jnp.pad(q_BTNH, ((0, 0), (0, pad_T), (0, 0), (0, 0))),
        k_BSKH=jnp.pad(k_BSKH, ((0, 0), (0, pad_S), (0, 0), (0, 0))),
        v_BSKH=jnp.pad(v_BSKH, ((0, 0), (0, pad_S), (0, 0), (0, 0))),
        # The queries that pad a row come after all keys, and see none.
        first_BT=jnp.pad(ends[0], ((0, 0), (0, pad_T)), constant_values=S + pad_S),
        last_BT=jnp.pad(ends[1], ((0, 0), (0, pad_T)), constant_values=S + pad_S - 1),
    )


def combine_parts(outs, lses) -> tuple[jax.Array, jax.Array]:
    """Combines attention to each part of the keys into attention to all of them.

    Soft-capped scores are bounded, so this is a plain weighted sum, with no maximum to exchange.

    Args:
      outs: [B, T, N, H] of each part.
      lses: the log-sum-exp [B, N, T] of each part, float32.

    Returns:
      [B, T, N, H] in the dtype of the parts, and its log-sum-exp [B, N, T] float32.
    """
    totals = jnp.exp(jnp.stack(lses))
    total_BNT = totals.sum(0)
    shares = jnp.swapaxes(totals / jnp.maximum(total_BNT, 1e-30), 2, 3)[..., None]
    sum_BTNH = reduce(jnp.add, (out * share for out, share in zip(outs, shares, strict=True)))
    return sum_BTNH.astype(outs[0].dtype), jnp.log(total_BNT)


def _attend_forward(settings: Settings, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log-sum-exp, as `attention` does, for whole tiles."""
    return run_forward(inputs, settings, settings.build.select_tiles(inputs.q_BTNH.shape[-1]).forward)


def _attend_saving(settings: Settings, inputs: Inputs):
    """Returns the results, and what the backward pass needs of them; `jax.checkpoint` may keep them by name."""
    out_BTNH, lse_BNT = _attend_forward(settings, inputs)
    results = checkpoint_name(out_BTNH, "attention"), checkpoint_name(lse_BNT, "attention")
    return results, (inputs, *results)


def make_cotangents(out_BTNH, lse_BNT, d_BTNH, d_lse_BNT) -> Cotangents:
    """What the backward kernels take of the results of the forward one, and of the gradients with respect to them."""
    return Cotangents(
        d_BTNH=d_BTNH,
        # The log-sum-exp is to base 2, for exp2; where a query sees no key, any finite number will do.
        lse_BNT=jnp.where(jnp.isfinite(lse_BNT), lse_BNT * LOG2E, 0),
        # The derivative of the log-sum-exp with respect to a score is P, so its gradient enters dS where delta does.
        delta_BNT=jnp.einsum("BTNH,BTNH->BNT", out_BTNH, d_BTNH, preferred_element_type=jnp.float32) - d_lse_BNT,
    )


def _attend_backward(settings: Settings, residuals, gradients) -> tuple[Inputs]:
    """Returns the gradients with respect to the inputs, given those with respect to the results."""
    inputs, out_BTNH, lse_BNT = residuals
    tiles = settings.build.select_tiles(inputs.q_BTNH.shape[-1])
    cotangents = make_cotangents(out_BTNH, lse_BNT, *gradients)
    dq_BTNH = run_dq(inputs, cotangents, settings, tiles.dq)
    dk_BSKH, dv_BSKH = run_dkv(inputs, cotangents, settings, tiles.dkv)
    no_gradient: Any = None  # The intervals have no gradient.
    return (Inputs(q_BTNH=dq_BTNH, k_BSKH=dk_BSKH, v_BSKH=dv_BSKH, first_BT=no_gradient, last_BT=no_gradient),)


_attend = jax.custom_vjp(_attend_forward, nondiff_argnums=(0,))
_attend.defvjp(_attend_saving, _attend_backward)
