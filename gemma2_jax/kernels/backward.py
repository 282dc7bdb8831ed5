"""The backward kernels: gradients of attention by the queries, and by the keys and values.

Two kernels make seven matrix products where one could do with five (FlashAttention-2, arXiv:2307.08691, algorithm 2),
and in return nothing is added across blocks: results are the same bit by bit each time, and no float32 copy of dQ
exists. With t = tanh(scale * q.k / cap), P = exp(cap * t - lse) where a query sees a key and else 0, and delta the sum
of dO * O over a row:

    dV = P^T dO    dS = P * (1 - t^2) * (dO V^T - delta)    dQ = scale * dS K    dK = scale * dS^T Q

The log-sum-exps given here are to base 2: lse / ln 2.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import tiles
from gemma2_jax.kernels.tiles import LOG2E, ROWS, Build, Queries, Ring, Tile, hide_from_hoisting


def dq(
    q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT, *, scale, softcap, tile: Tile, build: Build
):
    """The gradient by the queries, [B, T, N, H]."""
    N, H = q_BTNH.shape[2:]
    keys = tile.size

    def kernel(q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref, first_ref, last_ref, bounds_ref, dq_ref, *scratch):
        q_smem, d_smem, both_came, ds_smem, *rings = scratch
        k_ring, v_ring = (Ring(*ring) for ring in rings)
        block = Queries(q_ref, k_ref, bounds_ref)
        b, head, here = block.b, block.head, block.rows

        @pl.when(block.warpgroup < 2)
        def _compute():
            tiles.claim_registers()
            came = both_came.at[block.warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, head], q_smem.at[block.warpgroup], came)
            plgpu.copy_gmem_to_smem(d_ref.at[b, here, head], d_smem.at[block.warpgroup], came)
            lse, delta = (
                plgpu.load(ref.at[b, head, here], layout=tiles.BY_ROW, optimized=False) for ref in (lse_ref, delta_ref)
            )
            plgpu.barrier_wait(came)

            def over_keys(dq):
                def some(j, carry, edge: bool):
                    number = j - block.start
                    k = k_ring.wait(number)
                    q, d = (smem.at[hide_from_hoisting(block.warpgroup)] for smem in (q_smem, d_smem))

                    def scores(acc):
                        plgpu.wgmma(acc, q, k.transpose((1, 0)))
                        plgpu.wgmma_wait(1)  # for the last product below, of the tile before
                        pl.when(number > 0)(lambda: k_ring.release(number - 1))
                        return acc[...]

                    t = jnp.tanh(pl.run_scoped(scores, tiles.accumulator(ROWS, keys)) * (scale / softcap))
                    slope = jnp.exp2(t * (softcap * LOG2E) - tiles.broadcast_rows(lse, keys)) * (1 - t * t)
                    if edge:
                        slope = tiles.mask_interval(slope, first_ref.at[b, here], last_ref.at[b, here], j * keys)
                    dp = tiles.matrix_product(d, v_ring.wait(number).transpose((1, 0)))
                    v_ring.release(number)
                    ds = (slope * (dp - tiles.broadcast_rows(delta, keys))).astype(jnp.bfloat16)
                    plgpu.wgmma(dq, build.operand(ds, ds_smem, block.warpgroup), k)
                    return carry

                tiles.visit_tiles(block.tiles, some)
                result = dq[...]
                pl.when(block.end > block.start)(lambda: k_ring.release(block.end - block.start - 1))
                return result

            q = q_smem.at[block.warpgroup]
            q[...] = (pl.run_scoped(over_keys, tiles.accumulator(ROWS, H)) * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[b, here, head])
            plgpu.wait_smem_to_gmem(0)

        block.load(keys, (k_ring, k_ref), (v_ring, v_ref))

    dtype = q_BTNH.dtype
    scratch = (
        tiles.matrix((2, ROWS, H), dtype),
        tiles.matrix((2, ROWS, H), dtype),
        plgpu.Barrier(num_barriers=2, num_arrivals=2),
        build.space((2, ROWS, keys), dtype),
        *(Ring.scratch(stages, tiles.matrix((stages, keys, H), dtype)) for stages in (tile.stages, tile.v_stages)),
    )
    output = jax.ShapeDtypeStruct(q_BTNH.shape, dtype)
    run = build.kernel(kernel, "gemma2_attention_dq", scratch, Queries.grid(q_BTNH, k_BSKH), output)
    bounds = tiles.tile_bounds(first_BT, last_BT, Queries.block_rows(N, k_BSKH.shape[2]), keys)
    return run(q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT, bounds)


def seen_by(first_BT, last_BT, size: int):
    """The first and the last query that sees each of `size` keys, int32 [B, S]; neither input descends along a row."""

    def until(end_T):
        """How many of these are at each key or before it."""
        counts = jnp.zeros(size + 1, jnp.int32).at[jnp.clip(end_T, 0, size)].add(1)
        return jnp.cumsum(counts)[:size]

    return jax.vmap(until)(last_BT + 1), jax.vmap(until)(first_BT) - 1


def dkv(
    q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT, *, scale, softcap, tile: Tile, build: Build
):
    """The gradients by the keys and by the values, each [B, S, K, H].

    A block has 64 keys and goes over the queries that see them, of every head in turn. One warpgroup makes the scores
    and sums dV. It hands P * (1 - t^2) to the other, which makes dO V^T meanwhile, and sums dK. So each accumulator is
    whole in one warpgroup, and each left operand of a sum is in the registers where it was made.
    """
    B, S, K, H = k_BSKH.shape
    G = q_BTNH.shape[2] // K
    queries = tile.size
    q_first_BS, q_last_BS = seen_by(first_BT, last_BT, S)

    def kernel(q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref, first_ref, last_ref, bounds_ref, *scratch):
        dk_ref, dv_ref, kv_smem, kv_came, slope_smem, slope_came, slope_used, left_smem, *rings = scratch
        q_ring, lse_ring, d_ring, delta_ring = (Ring(*ring) for ring in rings)
        warpgroup, b = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        run, kv_head = jax.lax.axis_index("keys"), jax.lax.axis_index("heads")
        here = pl.ds(run * ROWS, ROWS)
        bounds = tuple(bounds_ref[b, run, at] * G for at in range(4))
        start, end = bounds[0], bounds[3]

        def accumulate(mine: int, kv_ref, out_ref, over_queries, factor: float):
            """A warpgroup's work, with keys or values of its own, until their gradient is written."""
            tiles.claim_registers()
            smem, came = kv_smem.at[mine], kv_came.at[mine]
            plgpu.copy_gmem_to_smem(kv_ref.at[b, here, kv_head], smem, came)
            plgpu.barrier_wait(came)
            result = pl.run_scoped(over_queries, tiles.accumulator(ROWS, H))
            smem[...] = (result * factor).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, out_ref.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def product(right, number, ring):
            """K or V times `right` transposed; the product before it, of the step before, is done with `ring`."""

            def run(acc):
                plgpu.wgmma(acc, kv_smem.at[hide_from_hoisting(warpgroup)], right.transpose((1, 0)))
                plgpu.wgmma_wait(1)
                pl.when(number > 0)(lambda: ring.release(number - 1))
                return acc[...]

            return pl.run_scoped(run, tiles.accumulator(ROWS, queries))

        def sum_dv(dv):
            def some(step, carry, edge: bool):
                number = step - start
                t = jnp.tanh(product(q_ring.wait(number), number, d_ring) * (scale / softcap))
                q_ring.release(number)
                lse = plgpu.load(lse_ring.wait(number), layout=tiles.BY_COLUMN)
                p = jnp.exp2(t * (softcap * LOG2E) - tiles.broadcast_columns(lse, ROWS))
                lse_ring.release(number)
                if edge:
                    p = tiles.mask_interval(p, first_ref.at[b, here], last_ref.at[b, here], step // G * queries)
                pl.when(number > 0)(lambda: plgpu.barrier_wait(slope_used))
                slope_smem[...] = p * (1 - t * t)
                plgpu.barrier_arrive(slope_came)
                left = build.operand(p.astype(jnp.bfloat16), left_smem, warpgroup)
                plgpu.wgmma(dv, left, d_ring.wait(number))
                if edge:
                    plgpu.wgmma_wait(0)  # the registers of its operand are needed for the next mask
                return carry

            tiles.visit_tiles(bounds, some)
            result = dv[...]

            @pl.when(end > start)
            def _():
                d_ring.release(end - start - 1)
                plgpu.barrier_wait(slope_used)

            return result

        def sum_dk(dk):
            @pl.loop(start, end)
            def _(step):
                number = step - start
                dp = product(d_ring.wait(number), number, q_ring)
                d_ring.release(number)
                dp -= tiles.broadcast_columns(plgpu.load(delta_ring.wait(number), layout=tiles.BY_COLUMN), ROWS)
                delta_ring.release(number)
                plgpu.barrier_wait(slope_came)
                ds = (plgpu.load(slope_smem, layout=plgpu.Layout.WGMMA) * dp).astype(jnp.bfloat16)
                plgpu.barrier_arrive(slope_used)
                plgpu.wgmma(dk, build.operand(ds, left_smem, warpgroup), q_ring.wait(number))

            result = dk[...]
            pl.when(end > start)(lambda: q_ring.release(end - start - 1))
            return result

        pl.when(warpgroup == 0)(lambda: accumulate(0, k_ref, dv_ref, sum_dv, 1))
        pl.when(warpgroup == 1)(lambda: accumulate(1, v_ref, dk_ref, sum_dk, scale))

        @pl.when(warpgroup == 2)
        def _load():
            def at(number):
                step = start + number
                return pl.ds(step // G * queries, queries), kv_head * G + step % G

            def matrices(ref):
                def source(number):
                    rows, head = at(number)
                    return ref.at[b, rows, head]

                return source

            def vectors(ref):
                def source(number):
                    rows, head = at(number)
                    return ref.at[b, head, rows]

                return source

            tiles.load_tiles(
                end - start,
                (q_ring, matrices(q_ref)),
                (lse_ring, vectors(lse_ref)),
                (d_ring, matrices(d_ref)),
                (delta_ring, vectors(delta_ref)),
            )

    dtype, stages = q_BTNH.dtype, tile.stages
    both = Ring.scratch(stages, tiles.matrix((stages, queries, H), dtype))
    one = Ring.scratch(stages, plgpu.SMEM((stages, queries), jnp.float32), users=1)
    scratch = (
        tiles.matrix((2, ROWS, H), dtype),
        plgpu.Barrier(num_barriers=2),
        tiles.matrix((ROWS, queries), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(),
        build.space((2, ROWS, queries), dtype),
        both,
        one,
        both,
        one,
    )
    output = jax.ShapeDtypeStruct(k_BSKH.shape, dtype)
    grid = {"heads": K, "keys": S // ROWS, "row": B}  # the longest first: early keys are seen by the most queries
    run = build.kernel(kernel, "gemma2_attention_dkv", scratch, grid, (output, output))
    bounds = tiles.tile_bounds(q_first_BS, q_last_BS, ROWS, queries)
    return run(q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, q_first_BS, q_last_BS, bounds)
