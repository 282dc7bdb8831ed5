"""The forward kernel: soft-capped attention of tiles of queries to the keys each query sees.

FlashAttention-3's shape (arXiv:2407.08608): in a block of threads, two warpgroups compute and a third loads keys and
values by TMA into rings. What Gemma 2 changes: a capped score cannot overflow, so there is no running maximum, and the
accumulator of the output is touched by nothing but the tensor cores.

The two computing warpgroups have the same 64 queries of two heads with one key/value head, which is loaded once for
both; or, where such heads are not in pairs, 128 queries of one head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels.tiles import (
    BY_ROW, LOG2E, ROWS, Build, Ring, Tile, bounds, interval, load, matrix, over_tiles, wide, within,
)  # fmt: skip


def rows_of(heads: int, kv_heads: int) -> int:
    """Queries that a block has."""
    return ROWS if heads // kv_heads % 2 == 0 else 2 * ROWS


def forward(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, *, scale: float, softcap: float, tile: Tile, build: Build):
    """`reference.attention` for whole tiles: [B, T, N, H] bfloat16, and the log-sum-exp [B, N, T] float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    rows = rows_of(N, K)
    apart = rows // ROWS - 1  # whether the warpgroups have different queries, else heads
    keys = tile.size

    def kernel(q_ref, k_ref, v_ref, first_ref, last_ref, bounds_ref, out_ref, lse_ref, *scratch):
        q_smem, q_came, p_smem, lse_smem, k_ring, v_ring = scratch
        k_ring, v_ring = Ring(*k_ring), Ring(*v_ring)
        warpgroup, b = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        # The longest first: late queries see the most keys.
        i = T // rows - 1 - jax.lax.axis_index("queries")
        head = jax.lax.axis_index("heads") * (2 - apart)
        tiles = [bounds_ref[b, i, at] for at in range(4)]
        start, end = tiles[0], tiles[3]

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            mine = head + warpgroup * (1 - apart)
            here = pl.ds(i * rows + warpgroup * ROWS * apart, ROWS)
            q, lse = q_smem.at[warpgroup], lse_smem.at[warpgroup]
            p = None if p_smem is None else p_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, mine], q, q_came.at[warpgroup])
            plgpu.barrier_wait(q_came.at[warpgroup])

            def over_keys(out):
                def some(j, total, edge: bool):
                    number = j - start
                    k = k_ring.wait(number)

                    def scores(acc):
                        plgpu.wgmma(acc, q, k.transpose((1, 0)))
                        plgpu.wgmma_wait(1)  # the tensor cores go on from the tile before to this one
                        pl.when(number > 0)(lambda: v_ring.done(number - 1))
                        return acc[...]

                    s = pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32))
                    k_ring.done(number)
                    weights = jnp.exp2(jnp.tanh(s * (scale / softcap)) * (softcap * LOG2E))
                    if edge:
                        seen = interval(first_ref.at[b, here], last_ref.at[b, here], keys)
                        weights = within(weights, seen, j * keys)
                    total += jnp.sum(weights, axis=1)
                    left = build.operand(weights.astype(jnp.bfloat16), p)
                    plgpu.wgmma(out, left, v_ring.wait(number))
                    return total

                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
                total = over_tiles(tiles, some, total)
                result = out[...]
                pl.when(end > start)(lambda: v_ring.done(end - start - 1))
                return result, total

            out, total = pl.run_scoped(over_keys, plgpu.ACC((ROWS, H), jnp.float32))
            lse[...] = jnp.log(total)
            q[...] = (out * wide(1 / jnp.maximum(total, 1e-30), H)).astype(q.dtype)  # zeros where nothing is seen
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[b, here, mine])
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, mine, here])
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
    ring = Ring.scratch(tile.stages, matrix((tile.stages, keys, H), dtype))
    scratch = (
        matrix((2, ROWS, H), dtype),
        plgpu.Barrier(num_barriers=2),
        build.space((2, ROWS, keys), dtype),
        plgpu.SMEM((2, ROWS), jnp.float32),
        ring,
        ring,
    )
    outputs = jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    grid = {"heads": N // (2 - apart), "queries": T // rows, "row": B}
    run = build.kernel(kernel, "gemma2_attention_forward", scratch, grid, outputs)
    return run(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, bounds(first_BT, last_BT, rows, keys))
