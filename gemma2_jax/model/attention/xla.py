"""Gemma 2 attention in jnp: causal, per-layer window, soft-capped scores, grouped queries, packed segments.

It is used wherever no kernel is faster (`attention.choice`). Blocks of queries attend to blocks of keys, as in
FlashAttention-2 (arXiv:2307.08691): no [T, T] array of scores exists, forward or backward, and blocks beyond the window
or in the future are not visited.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from gemma2_jax.mesh import axis_size

MASKED = -2.0e38  # a finite stand-in for -inf: no NaN where a row of a block has nothing to attend to
# How many queries, and how many keys, are taken at a time. On CPU a block's scores fit in the cache of one core.
BLOCKS = {"cpu": 64, "gpu": 512}
CACHE_BLOCK = 512  # slots of a cache that are taken at a time: what has not been written is not read

Settings = tuple[float, float | None, int]  # scale, softcap and block of `attend`


def attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, *, scale: float, softcap: float | None, block: int = 64):
    """Causal attention of a sequence to itself.

    On a mesh with context shards, positions are in the order of `mesh.balance_context`, and each shard gathers the keys
    and values of all shards.

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys and values after RoPE, in the compute dtype; N is a multiple of K.
      segments_BT: int32; positions attend within their own segment only.
      window: int32 scalar, may be traced: query i sees keys j of its segment with 0 <= i - j < window.
      scale: multiplies q.k before the softcap.
      softcap: scores become softcap * tanh(score / softcap); None leaves them.
      block: how many queries, and how many keys, are taken at a time.

    Returns:
      [B, T, N, H] in the dtype of v. Scores and softmax are float32 (Gemma 2, arXiv:2408.00118, section 2).
    """
    shards = axis_size("context")
    if shards > 1:
        spread = PartitionSpec(None, "context")
        return jax.shard_map(
            partial(_attend_shard, (scale, softcap, block), shards),
            in_specs=(spread, spread, spread, spread, PartitionSpec()),
            out_specs=spread,
            axis_names={"context"},
            check_vma=False,
        )(q_BTNH, k_BTKH, v_BTKH, segments_BT, jnp.int32(window))
    T = q_BTNH.shape[1]
    block = min(block, T)
    padding = -T % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
    order = jnp.arange(q.shape[1] // block)
    settings = scale, softcap, block
    out_BTNH = _blocked_attention(settings, q, k, v, segments_BT, segments_BT, order, jnp.int32(window))
    return out_BTNH[:, :T]


def _attend_shard(settings: Settings, shards: int, q_BTNH, k_BTKH, v_BTKH, segments_BT, window):
    """`attend` of a context shard: its own queries, an early and a late piece of the row, to the keys of all shards."""
    scale, softcap, block = settings
    piece = q_BTNH.shape[1] // 2
    block = max(size for size in range(1, min(block, piece) + 1) if piece % size == 0)
    k, v, all_segments = (gather_context(x, shards) for x in (k_BTKH, v_BTKH, segments_BT))
    shard = jax.lax.axis_index("context")
    blocks_of_piece = jnp.arange(piece // block)
    pieces = shard, 2 * shards - 1 - shard
    order = jnp.concatenate([blocks_of_piece + index * (piece // block) for index in pieces])
    return _blocked_attention((scale, softcap, block), q_BTNH, k, v, segments_BT, all_segments, order, window)


def gather_context(x_BT, shards: int):
    """All positions of an array that context shards hold in the order of `mesh.balance_context`, back in row order."""
    x_BCPT = jax.lax.all_gather(x_BT.reshape(x_BT.shape[0], 2, -1, *x_BT.shape[2:]), "context", axis=1)
    x_BPT = jnp.concatenate([x_BCPT[:, :, 0], x_BCPT[:, ::-1, 1]], axis=1)
    return x_BPT.reshape(x_BT.shape[0], -1, *x_BT.shape[2:])


def _blocked_attention_value(settings, *inputs):
    """`attend` for a multiple of `block` queries; query block i is block order[i] of the sequence."""
    return _blocked_attention_forward(settings, *inputs)[0]


def _blocked_attention_forward(settings, q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, order, window):
    block, K = settings[2], k_BTKH.shape[2]

    def query_block(inputs):
        i, block_index = inputs
        q, segments = _group_heads(_slice_block(q_BTNH, i, block), K), _slice_block(q_segments_BT, i, block)

        def key_block(j, carry):
            top, total, out = carry
            k, k_segments = _slice_block(k_BTKH, j, block), _slice_block(k_segments_BT, j, block)
            scores, _ = _scores(q, k, _mask(block_index, j, segments, k_segments, window), settings)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            v = _slice_block(v_BTKH, j, block)
            added = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + added

        B, T, K_, G, H = q.shape
        start = jnp.full((B, K_, G, T), MASKED), jnp.zeros((B, K_, G, T)), jnp.zeros((B, K_, G, T, H))
        start_block = _first_key_block(block_index, block, window)
        top, total, out = jax.lax.fori_loop(start_block, block_index + 1, key_block, start)
        return (out / total[..., None]).astype(v_BTKH.dtype), top + jnp.log(total)

    out, log_z = jax.lax.map(query_block, (jnp.arange(len(order)), order))
    out_BTNH = checkpoint_name(_ungroup_heads(jnp.einsum("IBKGTH->BITKGH", out)), "attention")
    log_z = checkpoint_name(log_z, "attention")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, order, window, out_BTNH, log_z)


def _blocked_attention_backward(settings, residuals, cotangent_BTNH):
    scale, _, block = settings
    q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, order, window, out_BTNH, log_z = residuals
    K = k_BTKH.shape[2]

    def query_block(carry, inputs):
        i, block_index = inputs
        segments = _slice_block(q_segments_BT, i, block)
        q, out, cotangent = (_group_heads(_slice_block(x, i, block), K) for x in (q_BTNH, out_BTNH, cotangent_BTNH))
        delta = jnp.einsum("BTKGH,BTKGH->BKGT", out, cotangent, preferred_element_type=jnp.float32)

        def key_block(j, carry):
            dq, dk_BTKH, dv_BTKH = carry
            k, v = _slice_block(k_BTKH, j, block), _slice_block(v_BTKH, j, block)
            mask_BTS = _mask(block_index, j, segments, _slice_block(k_segments_BT, j, block), window)
            scores, slope = _scores(q, k, mask_BTS, settings)
            weights = jnp.exp(scores - log_z[i][..., None])
            d_weights = jnp.einsum("BTKGH,BSKH->BKGTS", cotangent, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta[..., None]) * slope * scale).astype(q.dtype)
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            dv_BTKH = _add_block(dv_BTKH, j, product("BKGTS,BTKGH->BSKH", weights.astype(v.dtype), cotangent))
            dk_BTKH = _add_block(dk_BTKH, j, product("BKGTS,BTKGH->BSKH", d_scores, q))
            return dq + product("BKGTS,BSKH->BTKGH", d_scores, k), dk_BTKH, dv_BTKH

        start = jnp.zeros(q.shape, jnp.float32), *carry
        start_block = _first_key_block(block_index, block, window)
        dq, *carry = jax.lax.fori_loop(start_block, block_index + 1, key_block, start)
        return tuple(carry), dq.astype(q.dtype)

    start = jnp.zeros(k_BTKH.shape, jnp.float32), jnp.zeros(v_BTKH.shape, jnp.float32)
    (dk_BTKH, dv_BTKH), dq = jax.lax.scan(query_block, start, (jnp.arange(len(order)), order))
    dq_BTNH = _ungroup_heads(jnp.einsum("IBTKGH->BITKGH", dq))
    return dq_BTNH, dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None, None, None, None


_blocked_attention = jax.custom_vjp(_blocked_attention_value, nondiff_argnums=(0,))
_blocked_attention.defvjp(_blocked_attention_forward, _blocked_attention_backward)


def _scores(q_BTKGH, k_BSKH, mask_BTS, settings):
    """Soft-capped and masked scores of two blocks, and the softcap's slope at them, float32 [B, K, G, T, S]."""
    scale, softcap, _ = settings
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    slope = 1.0
    if softcap is not None:
        squashed = jnp.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1 - jnp.square(squashed)
    return jnp.where(mask_BTS[:, None, None], scores, MASKED), slope


def _mask(i, j, q_segments_BT, k_segments_BS, window):
    """[B, T, S]: which keys of block j the queries of block i see. Causality, window and segments are decided here."""
    T, S = q_segments_BT.shape[1], k_segments_BS.shape[1]
    distance_TS = (i * T + jnp.arange(T))[:, None] - (j * S + jnp.arange(S))
    return (distance_TS >= 0) & (distance_TS < window) & (q_segments_BT[:, :, None] == k_segments_BS[:, None])


def _first_key_block(i, block: int, window):
    """The first key block that any query of block i sees."""
    return jnp.maximum(i * block - window + 1, 0) // block


def _slice_block(x_BT, i, block: int):
    return jax.lax.dynamic_slice_in_dim(x_BT, i * block, block, axis=1)


def _add_block(x_BT, j, block_BT):
    block = block_BT.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(x_BT, _slice_block(x_BT, j, block) + block_BT, j * block, axis=1)


def _group_heads(x_BTNH, K: int):
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H)


def _ungroup_heads(x_BITKGH):
    B, blocks, T, K, G, H = x_BITKGH.shape
    return x_BITKGH.reshape(B, blocks * T, K * G, H)


def attend_cached(q_BNH, k_BKSH, v_BKSH, position_B, window=None, *, scale: float, softcap: float | None):
    """Attention of one query in each row, at `position_B`, to a cache of the last S tokens, itself the newest.

    The token at position p is in slot p mod S. Heads come before slots, so that a step reads the cache as it lies in
    memory. The result is [B, N, H]; dtypes, scale and softcap are as in `attend`, and so is `window`, of which a cache
    that is no longer than it has no need.
    """
    S = k_BKSH.shape[2]

    def see_slots(slots_S):
        age_BS = (position_B[:, None] - slots_S) % S
        mask_BS = age_BS <= position_B[:, None]  # older slots have not been written yet
        return (mask_BS if window is None else mask_BS & (age_BS < window))[:, None]

    q_BTKGH = _group_heads(q_BNH[:, None], k_BKSH.shape[1])
    written = jnp.minimum(jnp.max(position_B) + 1, S)
    out = _attend_slots(q_BTKGH, k_BKSH, v_BKSH, see_slots, written, None, scale=scale, softcap=softcap)
    return out.reshape(q_BNH.shape)


def attend_extended(
    q_BTNH, k_BTKH, v_BTKH, cached_k_BKSH, cached_v_BKSH, start_B, window, *, scale: float, softcap: float | None
):
    """Attention of the next tokens of each row, from `start_B` on, to themselves and to a cache of the last S before.

    The token at position p is in slot p mod S of the cache. The result is [B, T, N, H]; dtypes, scale, softcap and
    window are as in `attend`. Scores are [B, N, T, T] in memory, so T is to be a part of a long prompt.
    """
    T, S = q_BTNH.shape[1], cached_k_BKSH.shape[2]
    last_B1 = start_B[:, None] - 1
    position_BT = start_B[:, None] + jnp.arange(T)

    def see_slots(slots_S):
        cached_position_BS = last_B1 - (last_B1 - slots_S) % S  # negative where none has been written yet
        distance_BTS = position_BT[:, :, None] - cached_position_BS[:, None]
        return (distance_BTS < window) & (cached_position_BS[:, None] >= 0)

    distance_TT = jnp.arange(T)[:, None] - jnp.arange(T)
    mask_TT = (distance_TT >= 0) & (distance_TT < window)
    q_BTKGH = _group_heads(q_BTNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = (jnp.einsum("BTKH->BKTH", x) for x in (k_BTKH, v_BTKH))
    sums = _add_keys(None, q_BTKGH, k_BKTH, v_BKTH, mask_TT[None], scale=scale, softcap=softcap)
    written, cache = jnp.minimum(jnp.max(start_B), S), (cached_k_BKSH, cached_v_BKSH)
    out = _attend_slots(q_BTKGH, *cache, see_slots, written, sums, scale=scale, softcap=softcap)
    return out.reshape(q_BTNH.shape)


def _attend_slots(q_BTKGH, k_BKSH, v_BKSH, see_slots, written, sums, *, scale: float, softcap: float | None):
    """Attention to the slots of a cache before `written`, some at a time, and to what `sums` has added up before.

    `see_slots` says of an array of slots which of them each query sees, [B, T, S]. The result is [B, T, K, G, H].
    """
    S = k_BKSH.shape[2]
    size = min(S, CACHE_BLOCK)

    def add_block(number, sums):
        start = jnp.minimum(number * size, S - size)
        slots_S = start + jnp.arange(size)
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (k_BKSH, v_BKSH))
        mask_BTS = see_slots(slots_S) & (slots_S >= number * size)  # the last block begins within the one before
        return _add_keys(sums, q_BTKGH, k, v, mask_BTS, scale=scale, softcap=softcap)

    if size == S:
        sums = _add_keys(sums, q_BTKGH, k_BKSH, v_BKSH, see_slots(jnp.arange(S)), scale=scale, softcap=softcap)
    else:
        B, T, K, G, H = q_BTKGH.shape
        nothing = jnp.full((B, K, G, T), MASKED), jnp.zeros((B, K, G, T)), jnp.zeros((B, K, G, T, H))
        sums = jax.lax.fori_loop(0, (written + size - 1) // size, add_block, sums or nothing)
    _, total, out = sums
    return jnp.einsum("BKGTH->BTKGH", out / total[..., None]).astype(v_BKSH.dtype)


def _add_keys(sums, q_BTKGH, k_BKSH, v_BKSH, mask_BTS, *, scale: float, softcap: float | None):
    """The largest score, and the sums of weights and of weighted values, with these keys added; None: there were none.

    Scores that are masked weigh nothing, even where a query sees none of these keys: what it has seen, or will see, is
    larger by far, and takes their place.
    """
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    top = scores.max(-1)
    top = top if sums is None else jnp.maximum(sums[0], top)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    if sums is None:
        return top, total, out
    shrink = jnp.exp(sums[0] - top)
    return top, sums[1] * shrink + total, sums[2] * shrink[..., None] + out
