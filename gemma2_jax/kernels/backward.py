"""The backward kernels: gradients of attention by the queries, and by the keys and values.

Two kernels make seven matrix products where one could do with five (FlashAttention-2, arXiv:2307.08691, algorithm 2),
and in return nothing is added across blocks: results are the same bit by bit each time, and no float32 copy of dQ
exists. With t = tanh(scale * q.k / cap), P = exp(cap * t - lse) where a query sees a key and else 0, and delta the sum
of dO * O over a row:

    dV = P^T dO    dS = P * (1 - t^2) * (dO V^T - delta)    dQ = scale * dS K    dK = scale * dS^T Q
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels.forward import rows_of
from gemma2_jax.kernels.tiles import (
    BY_COLUMN, BY_ROW, LOG2E, ROWS, Build, Ring, Tile, anew, bounds, interval, load, matrix, over_tiles, product, tall, wide,
    within,
)  # fmt: skip


def dq(
    q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT, *, scale, softcap, tile: Tile, build: Build
):
    """The gradient by the queries, [B, T, N, H]: the two computing warpgroups have what they have in `forward`."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    rows = rows_of(N, K)
    apart = rows // ROWS - 1
    keys = tile.size

    def kernel(q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref, first_ref, last_ref, bounds_ref, dq_ref, *scratch):
        q_smem, d_smem, came, s_smem, k_ring, v_ring = scratch
        k_ring, v_ring = Ring(*k_ring), Ring(*v_ring)
        warpgroup, b = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        i = T // rows - 1 - jax.lax.axis_index("queries")
        head = jax.lax.axis_index("heads") * (2 - apart)
        tiles = [bounds_ref[b, i, at] for at in range(4)]
        start, end = tiles[0], tiles[3]

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            mine = head + warpgroup * (1 - apart)
            here = pl.ds(i * rows + warpgroup * ROWS * apart, ROWS)
            s_space = None if s_smem is None else s_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, mine], q_smem.at[warpgroup], came.at[warpgroup])
            plgpu.copy_gmem_to_smem(d_ref.at[b, here, mine], d_smem.at[warpgroup], came.at[warpgroup])
            lse, delta = (
                plgpu.load(ref.at[b, mine, here], layout=BY_ROW, optimized=False) for ref in (lse_ref, delta_ref)
            )
            plgpu.barrier_wait(came.at[warpgroup])

            def over_keys(dq):
                def some(j, _, edge: bool):
                    number = j - start
                    k = k_ring.wait(number)
                    q, d = (smem.at[anew(warpgroup)] for smem in (q_smem, d_smem))

                    def scores(acc):
                        plgpu.wgmma(acc, q, k.transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        pl.when(number > 0)(lambda: k_ring.done(number - 1))
                        return acc[...]

                    t = jnp.tanh(pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32)) * (scale / softcap))
                    slope = jnp.exp2(t * (softcap * LOG2E) - wide(lse, keys)) * (1 - t * t)
                    if edge:
                        seen = interval(first_ref.at[b, here], last_ref.at[b, here], keys)
                        slope = within(slope, seen, j * keys)
                    dp = product(d, v_ring.wait(number).transpose((1, 0)))
                    v_ring.done(number)
                    ds = (slope * (dp - wide(delta, keys))).astype(jnp.bfloat16)
                    plgpu.wgmma(dq, build.operand(ds, s_space), k)
                    return 0

                over_tiles(tiles, some)
                result = dq[...]
                pl.when(end > start)(lambda: k_ring.done(end - start - 1))
                return result

            q = q_smem.at[warpgroup]
            q[...] = (pl.run_scoped(over_keys, plgpu.ACC((ROWS, H), jnp.float32)) * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[b, here, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            there = lambda number: (b, pl.ds((start + number) * keys, keys), head // (N // K))
            load(
                end - start,
                (k_ring, lambda number: k_ref.at[there(number)]),
                (v_ring, lambda number: v_ref.at[there(number)]),
            )

    dtype = q_BTNH.dtype
    scratch = (
        matrix((2, ROWS, H), dtype),
        matrix((2, ROWS, H), dtype),
        plgpu.Barrier(num_barriers=2, num_arrivals=2),
        build.space((2, ROWS, keys), dtype),
        Ring.scratch(tile.stages, matrix((tile.stages, keys, H), dtype)),
        Ring.scratch(tile.v_stages, matrix((tile.v_stages, keys, H), dtype)),
    )
    grid = {"heads": N // (2 - apart), "queries": T // rows, "row": B}
    run = build.kernel(kernel, "gemma2_attention_dq", scratch, grid, [jax.ShapeDtypeStruct(q_BTNH.shape, dtype)])
    tiles = bounds(first_BT, last_BT, rows, keys)
    return run(q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT, tiles)[0]


def seen_by(first_BT, last_BT, size: int):
    """The first and the last query that sees each of `size` keys, int32 [B, S]; neither input descends along a row."""

    def below(end_T):
        """How many of the queries' ends are at each key or before it."""
        counts = jnp.zeros(size + 1, jnp.int32).at[jnp.clip(end_T, 0, size)].add(1)
        return jnp.cumsum(counts)[:size]

    return jax.vmap(below)(last_BT + 1), jax.vmap(below)(first_BT) - 1


def dkv(
    q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, first_BT, last_BT, *, scale, softcap, tile: Tile, build: Build
):
    """The gradients by the keys and by the values, each [B, S, K, H].

    A block has 64 keys and goes over the queries that see them, of every head in turn. One warpgroup makes the scores
    and sums dV. It hands P * (1 - t^2) to the other, which makes dO V^T meanwhile, and sums dK. So each accumulator is
    whole in one warpgroup, and each left operand of a sum is in the registers where it was made.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    queries = tile.size
    q_first_BS, q_last_BS = seen_by(first_BT, last_BT, S)

    def kernel(q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref, first_ref, last_ref, bounds_ref, *scratch):
        dk_ref, dv_ref, kv_smem, came, slope_smem, slope_came, slope_used, p_smem, s_smem, *rings = scratch
        q_ring, d_ring, lse_ring, delta_ring = (Ring(*ring) for ring in rings)
        warpgroup, b = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        j, kv_head = jax.lax.axis_index("keys"), jax.lax.axis_index("heads")
        tiles = [bounds_ref[b, j, at] for at in range(4)]
        start, end = tiles[0], tiles[3]
        here = pl.ds(j * ROWS, ROWS)

        def scores():
            plgpu.set_max_registers(240, action="increase")
            plgpu.copy_gmem_to_smem(k_ref.at[b, here, kv_head], kv_smem.at[0], came.at[0])
            plgpu.barrier_wait(came.at[0])

            def over_queries(dv):
                def some(step, _, edge: bool):
                    number = step - start * G
                    q = q_ring.wait(number)

                    def scores(acc):
                        plgpu.wgmma(acc, kv_smem.at[anew(warpgroup)], q.transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        pl.when(number > 0)(lambda: d_ring.done(number - 1))
                        return acc[...]

                    t = jnp.tanh(pl.run_scoped(scores, plgpu.ACC((ROWS, queries), jnp.float32)) * (scale / softcap))
                    q_ring.done(number)
                    lse = plgpu.load(lse_ring.wait(number), layout=BY_COLUMN)
                    p = jnp.exp2(t * (softcap * LOG2E) - tall(lse, ROWS))
                    lse_ring.done(number)
                    if edge:
                        p = within(
                            p, interval(first_ref.at[b, here], last_ref.at[b, here], queries), step // G * queries
                        )
                    pl.when(number > 0)(lambda: plgpu.barrier_wait(slope_used))
                    slope_smem[...] = p * (1 - t * t)
                    plgpu.barrier_arrive(slope_came)
                    plgpu.wgmma(dv, build.operand(p.astype(jnp.bfloat16), p_smem), d_ring.wait(number))
                    if edge:
                        plgpu.wgmma_wait(0)  # gives up its operand's registers, of which a mask takes some
                    return 0

                over_tiles(tiles, some, times=G)
                result = dv[...]

                @pl.when(end > start)
                def _():
                    d_ring.done((end - start) * G - 1)
                    plgpu.barrier_wait(slope_used)

                return result

            kv_smem[0] = pl.run_scoped(over_queries, plgpu.ACC((ROWS, H), jnp.float32)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kv_smem.at[0], dv_ref.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def gradients():
            plgpu.set_max_registers(240, action="increase")
            plgpu.copy_gmem_to_smem(v_ref.at[b, here, kv_head], kv_smem.at[1], came.at[1])
            plgpu.barrier_wait(came.at[1])

            def over_queries(dk):
                def some(step, _, edge: bool):
                    number = step - start * G
                    d = d_ring.wait(number)

                    def weights(acc):
                        plgpu.wgmma(acc, kv_smem.at[anew(warpgroup)], d.transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        pl.when(number > 0)(lambda: q_ring.done(number - 1))
                        return acc[...]

                    dp = pl.run_scoped(weights, plgpu.ACC((ROWS, queries), jnp.float32))
                    d_ring.done(number)
                    delta = plgpu.load(delta_ring.wait(number), layout=BY_COLUMN)
                    dp -= tall(delta, ROWS)
                    delta_ring.done(number)
                    plgpu.barrier_wait(slope_came)
                    ds = (plgpu.load(slope_smem, layout=plgpu.Layout.WGMMA) * dp).astype(jnp.bfloat16)
                    plgpu.barrier_arrive(slope_used)
                    plgpu.wgmma(dk, build.operand(ds, s_smem), q_ring.wait(number))
                    return 0

                jax.lax.fori_loop(start * G, end * G, lambda step, _: some(step, _, False), 0)
                result = dk[...]
                pl.when(end > start)(lambda: q_ring.done((end - start) * G - 1))
                return result

            kv_smem[1] = (pl.run_scoped(over_queries, plgpu.ACC((ROWS, H), jnp.float32)) * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kv_smem.at[1], dk_ref.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup == 0)(scores)
        pl.when(warpgroup == 1)(gradients)

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(24, action="decrease")

            def tile_of(number):
                return pl.ds((start + number // G) * queries, queries), kv_head * G + number % G

            def matrices(ref):
                def source(number):
                    rows, head = tile_of(number)
                    return ref.at[b, rows, head]

                return source

            def vectors(ref):
                def source(number):
                    rows, head = tile_of(number)
                    return ref.at[b, head, rows]

                return source

            load(
                (end - start) * G,
                (q_ring, matrices(q_ref)),
                (lse_ring, vectors(lse_ref)),
                (d_ring, matrices(d_ref)),
                (delta_ring, vectors(delta_ref)),
            )

    dtype, stages = q_BTNH.dtype, tile.stages
    big = Ring.scratch(stages, matrix((stages, queries, H), dtype))
    small = (
        plgpu.SMEM((stages, queries), jnp.float32),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    )
    scratch = (
        matrix((2, ROWS, H), dtype),
        plgpu.Barrier(num_barriers=2),
        matrix((ROWS, queries), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(),
        build.space((ROWS, queries), dtype),
        build.space((ROWS, queries), dtype),
        big,
        big,
        small,
        small,
    )
    out = jax.ShapeDtypeStruct(k_BSKH.shape, dtype)
    grid = {"heads": K, "keys": S // ROWS, "row": B}
    run = build.kernel(kernel, "gemma2_attention_dkv", scratch, grid, [out, out])
    tiles = bounds(q_first_BS, q_last_BS, ROWS, queries)
    return run(q_BTNH, k_BSKH, v_BSKH, d_BTNH, lse_BNT, delta_BNT, q_first_BS, q_last_BS, tiles)
