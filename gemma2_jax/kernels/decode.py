"""Attention of one or a few new tokens to a cache, for Hopper GPUs (Pallas, Mosaic GPU backend).

The work is to read the cache once. A block takes some tiles of one key head of one row; its scores are computed as keys
by queries, such that the few queries are the narrow side of both products (8 wide, where wgmma pads the other side to
64). A soft cap bounds the scores: blocks sum exp(score) as it is, with no running maximum, and their partial sums
combine by addition, in a fixed order.

Letters as in `reference`; R is the queries of a key head, T times N / K of them, padded to a multiple of 8.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.kernels.tiles import GPU, LOG2E, Build, matrix

TILE = 64  # slots: the rows of one wgmma
MOST_ROWS = 64
# Of K and V tiles in flight. With up to 8 rows, two blocks fit in the shared memory of a multiprocessor: one computes
# or begins while the other loads.
RING_BYTES = 96 * 1024
BLOCKS = 2 * 132  # at least so many, where there are tiles enough: what an H100 holds at once


def decode(
    q_BTNH,
    k_BKSH,
    v_BKSH,
    position_B,
    window,
    *,
    scale: float,
    softcap: float | None,
    splits: int | None = None,
    build: Build = GPU,
):
    """`reference.decode`, of bfloat16: soft-capped attention of the last T tokens of each row to a dense or ring cache.

    Only tiles of `TILE` slots with a slot that some query of the row sees are read, and what is in slots that none sees
    has no effect, NaN included. The same inputs give the same bits.

    Args:
      q_BTNH, k_BKSH, v_BKSH: bfloat16; N is a multiple of K, and T * N / K at most `MOST_ROWS`. The token at position
        p is in slot p mod S. An S that is no multiple of 8 costs a copy of the cache.
      position_B: int32, the position of the last query of each row; a row at -1 sees nothing.
      window: int32 scalar, may be traced: a query at i sees positions j with 0 <= i - j < window. A ring needs
        window + T - 1 slots.
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap).
      splits: blocks among which the tiles that a row visits are divided; None for enough to fill an H100.
      build: how the kernel is built.

    Returns:
      [B, T, N, H], bfloat16. A query that sees no slot has zeros.

    Raises:
      ValueError: for what the kernel lacks.

    Split keys as in Flash-Decoding (pytorch.org/blog/flash-decoding); the cap of Gemma 2 (arXiv:2408.00118) is what
    makes the maximum needless.
    """
    _check(q_BTNH, k_BKSH, v_BKSH, position_B, softcap)
    assert softcap is not None
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G, rows = N // K, T * N // K
    tiles = pl.cdiv(S, TILE)
    splits = splits or min(tiles, pl.cdiv(BLOCKS, B * K))
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, rows, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, -rows % 8), (0, 0)))
    # A copy to tiles takes a multiple of 8 slots. Where this pads, it copies the cache.
    k_BKSH, v_BKSH = (jnp.pad(x, ((0, 0), (0, 0), (0, -S % 8), (0, 0))) for x in (k_BKSH, v_BKSH))
    R = q_BKRH.shape[2]
    slots = RING_BYTES // (TILE * H * 2)
    out_BKCHR, total_BKCR = plgpu.kernel(
        partial(_kernel, T=T, G=G, S=S, splits=splits, to_tanh=scale / softcap, to_exp2=softcap * LOG2E),
        out_type=(
            jax.ShapeDtypeStruct((B, K, splits, H, R), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, R), jnp.float32),
        ),
        scratch_types=dict(
            q_RH=matrix((R, H), jnp.bfloat16),
            ring_XSH=matrix((slots, TILE, H), jnp.bfloat16),
            weights_RS=matrix((R, TILE), jnp.bfloat16),
            out_HR=plgpu.SMEM((H, R), jnp.float32),
            total_R=plgpu.SMEM((R,), jnp.float32),
            loaded=plgpu.Barrier(),
            filled_X=plgpu.Barrier(num_barriers=slots),
            freed_X=plgpu.Barrier(num_barriers=slots),
        ),
        grid=(B, K, splits),
        grid_names=("B", "K", "split"),
        num_threads=2,
        thread_name="group",
        kernel_name="gemma2_attention_decode",
        compiler_params=build.compiler,
        interpret=build.interpret,
    )(q_BKRH, k_BKSH, v_BKSH, position_B.astype(jnp.int32), jnp.int32(window).reshape(1))
    total_BKR = total_BKCR[..., :rows].sum(2)
    out_BKHR = out_BKCHR[..., :rows].sum(2) / jnp.where(total_BKR == 0, 1, total_BKR)[:, :, None]
    out_BTKGH = out_BKHR.reshape(B, K, H, T, G).transpose(0, 3, 1, 4, 2)
    return out_BTKGH.reshape(B, T, N, H).astype(jnp.bfloat16)


def _check(q_BTNH, k_BKSH, v_BKSH, position_B, softcap):
    shapes = q_BTNH.shape, k_BKSH.shape, v_BKSH.shape, position_B.shape
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    if shapes[1:] != ((B, K, S, H), (B, K, S, H), (B,)) or N % K or not S:
        raise ValueError(
            f"queries {shapes[0]}, keys {shapes[1]}, values {shapes[2]} and positions {shapes[3]} do not go together: "
            "they are [B, T, N, H], [B, K, S, H] twice and [B], with K a divisor of N: heads come before slots"
        )
    for dtype in (q_BTNH.dtype, k_BKSH.dtype, v_BKSH.dtype):
        if lack := MOSAIC.find_lack(dtype=dtype.name, width=H, softcap=softcap):
            raise ValueError(f"the Mosaic decoding kernel lacks {lack}; use another implementation")
    if not 1 <= T * N // K <= MOST_ROWS:
        raise ValueError(
            f"the Mosaic decoding kernel lacks {T} tokens of {N // K} queries for each key head, {T * N // K} rows: it "
            f"takes 1 to {MOST_ROWS}; give at most {MOST_ROWS * K // N} tokens at a time, or prefill"
        )


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    position_ref,
    window_ref,
    out_ref,
    total_ref,
    *,
    T: int,
    G: int,
    S: int,
    splits: int,
    to_tanh: float,
    to_exp2: float,
    q_RH,
    ring_XSH,
    weights_RS,
    out_HR,
    total_R,
    loaded,
    filled_X,
    freed_X,
):
    """One block: its share of the tiles that row B visits in key head K.

    The second warpgroup loads the tiles, K and V in turn, into a ring; the first computes. It writes the sum of
    exp(score) * V, transposed, and the sum of exp(score).
    """
    b, k, split = lax.axis_index("B"), lax.axis_index("K"), lax.axis_index("split")
    R, H = q_RH.shape
    slots = ring_XSH.shape[0]
    tiles = pl.cdiv(S, TILE)
    position = position_ref[b]
    window = jnp.clip(window_ref[0], 0, S)  # no slot is older than S
    newest = lax.rem(jnp.maximum(position, 0), S)
    # Slots have an age, 0 for the newest. The row sees those younger than this.
    seen = jnp.minimum(jnp.minimum(window + (T - 1), position + 1), S)
    oldest = newest - seen + 1
    first = lax.div(jnp.where(oldest < 0, oldest + S, oldest), TILE)
    count = lax.div(newest, TILE) - first + 1
    count = jnp.minimum(jnp.where(oldest < 0, count + tiles, count), tiles)  # the newest and the oldest may share one
    count = jnp.where(seen <= 0, 0, count)
    begin, end = lax.div(count * split, splits), lax.div(count * (split + 1), splits)

    def start(i):
        """The first slot of the i-th tile that the row visits."""
        tile = first + i
        return jnp.where(tile >= tiles, tile - tiles, tile) * TILE

    @pl.when(lax.axis_index("group") == 1)
    def _load():
        @pl.loop(0, end - begin)
        def _tile(i):
            here = (b, k, pl.ds(start(begin + i), TILE))
            for item, source in enumerate((k_ref, v_ref)):
                slot = lax.rem(2 * i + item, slots)

                @pl.when(2 * i + item >= slots)
                def _wait(slot=slot):
                    plgpu.barrier_wait(freed_X.at[slot])

                plgpu.copy_gmem_to_smem(source.at[here], ring_XSH.at[slot], filled_X.at[slot])

        # Not needed on a GPU: the interpreter wants who waits on a barrier to see it to its end.
        @pl.loop(0, jnp.minimum(2 * (end - begin), slots))
        def _drain(slot):
            plgpu.barrier_wait(freed_X.at[slot])

    @pl.when(lax.axis_index("group") == 0)
    def _compute():
        @pl.when(begin < end)
        def _queries():
            plgpu.copy_gmem_to_smem(q_ref.at[b, k], q_RH, loaded)
            plgpu.barrier_wait(loaded)

        def age(at):
            return jnp.where(at > newest, newest - at + S, newest - at)

        def tile(i, total_SR, out_acc):
            at = start(begin + i)
            k_slot, v_slot = lax.rem(2 * i, slots), lax.rem(2 * i + 1, slots)

            def score(acc):
                plgpu.wgmma(acc, ring_XSH.at[k_slot], q_RH.transpose((1, 0)))
                return acc[...]

            plgpu.barrier_wait(filled_X.at[k_slot])
            scores_SR = pl.run_scoped(score, plgpu.WGMMAAccumulatorRef((TILE, R), jnp.float32))
            plgpu.barrier_arrive(freed_X.at[k_slot])

            at_SR = at + plgpu.broadcasted_iota(jnp.int32, (TILE, R), 0, layout=plgpu.Layout.WGMMA)
            age_SR = age(at_SR)
            if T == 1:
                seen_SR = age_SR < seen
            else:
                query_R = plgpu.broadcasted_iota(jnp.int32, (TILE, R), 1, layout=plgpu.Layout.WGMMA)
                back_SR = (T - 1) - lax.div(query_R, G)  # how much older the query is than the newest
                seen_SR = (age_SR >= back_SR) & (age_SR < window + back_SR) & (age_SR <= position)
            if S % TILE:
                seen_SR &= at_SR < S
            weights_SR = jnp.where(seen_SR, jnp.exp2(jnp.tanh(scores_SR * to_tanh) * to_exp2), 0.0)
            weights_SR = weights_SR.astype(jnp.bfloat16)
            weights_RS.transpose((1, 0))[...] = weights_SR
            plgpu.barrier_wait(filled_X.at[v_slot])

            # Weights of 0 do not silence NaN.
            whole = (at + TILE <= S) & (age(at) < seen) & ((age(at + TILE - 1) < age(at)) | (seen == S))

            @pl.when(jnp.logical_not(whole))
            def _silence():
                for column in range(0, H, 64):
                    v_SH = ring_XSH.at[v_slot, :, pl.ds(column, 64)]
                    at_SH = at + plgpu.broadcasted_iota(jnp.int32, (TILE, 64), 0, layout=plgpu.Layout.WGMMA)
                    v = plgpu.load(v_SH, layout=plgpu.Layout.WGMMA)
                    v_SH[...] = jnp.where((age(at_SH) < seen) & (at_SH < S), v, jnp.bfloat16(0))

            def add(_):
                plgpu.wgmma(out_acc, ring_XSH.at[v_slot].transpose((1, 0)), weights_RS.transpose((1, 0)))
                plgpu.wgmma_wait(0)

            plgpu.commit_smem()
            # A new accumulator comes with a wgmma.fence. Products into an older one want one too: where it is missing,
            # ptxas puts it in and says so (C7519).
            pl.run_scoped(add, plgpu.WGMMAAccumulatorRef((TILE, 8), jnp.float32))
            plgpu.barrier_arrive(freed_X.at[v_slot])
            # What is summed is what multiplied V.
            return total_SR + weights_SR.astype(jnp.float32)

        def attend(out_acc):
            start = plgpu.layout_cast(jnp.zeros((TILE, R), jnp.float32), plgpu.Layout.WGMMA)
            total_SR = lax.fori_loop(0, end - begin, lambda i, total: tile(i, total, out_acc), start)
            return out_acc[...], total_SR

        out, total_SR = pl.run_scoped(attend, plgpu.WGMMAAccumulatorRef((H, R), jnp.float32))
        out_HR[...] = out
        total_R[...] = total_SR.sum(0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_HR, out_ref.at[b, k, split])
        plgpu.copy_smem_to_gmem(total_R, total_ref.at[b, k, split])
        plgpu.wait_smem_to_gmem(0)
