"""The forward kernel: soft-capped attention of tiles of queries to the keys each query sees.

FlashAttention-3's shape (arXiv:2407.08608): in a block of threads, two warpgroups compute and a third loads keys and
values by TMA into rings. What Gemma 2 changes: a capped score cannot overflow, so there is no running maximum, and the
accumulator of the output is touched by nothing but the tensor cores.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import tiles
from gemma2_jax.kernels.tiles import LOG2E, ROWS, Build, Queries, Ring, Tile


def forward(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, *, scale: float, softcap: float, tile: Tile, build: Build):
    """`reference.attention` for whole tiles: [B, T, N, H] bfloat16, and the log-sum-exp [B, N, T] float32."""
    B, T, N, H = q_BTNH.shape
    keys = tile.size

    def kernel(q_ref, k_ref, v_ref, first_ref, last_ref, bounds_ref, out_ref, lse_ref, *scratch):
        q_smem, q_came, p_smem, lse_smem, *rings = scratch
        k_ring, v_ring = (Ring(*ring) for ring in rings)
        block = Queries(q_ref, k_ref, bounds_ref)
        b, head, here = block.b, block.head, block.rows

        @pl.when(block.warpgroup < 2)
        def _compute():
            tiles.claim_registers()
            q, lse, came = (of_both.at[block.warpgroup] for of_both in (q_smem, lse_smem, q_came))
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, head], q, came)
            plgpu.barrier_wait(came)

            def over_keys(out):
                def some(j, total, edge: bool):
                    number = j - block.start
                    k = k_ring.wait(number)

                    def scores(acc):
                        plgpu.wgmma(acc, q, k.transpose((1, 0)))
                        plgpu.wgmma_wait(1)  # for the product below, of the tile before: the tensor cores do not stop
                        pl.when(number > 0)(lambda: v_ring.release(number - 1))
                        return acc[...]

                    s = pl.run_scoped(scores, tiles.accumulator(ROWS, keys))
                    k_ring.release(number)
                    p = jnp.exp2(jnp.tanh(s * (scale / softcap)) * (softcap * LOG2E))
                    if edge:
                        p = tiles.mask_interval(p, first_ref.at[b, here], last_ref.at[b, here], j * keys)
                    total += jnp.sum(p, axis=1)
                    left = build.operand(p.astype(jnp.bfloat16), p_smem, block.warpgroup)
                    plgpu.wgmma(out, left, v_ring.wait(number))
                    return total

                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), tiles.BY_ROW)
                total = tiles.visit_tiles(block.tiles, some, total)
                result = out[...]
                pl.when(block.end > block.start)(lambda: v_ring.release(block.end - block.start - 1))
                return result, total

            out, total = pl.run_scoped(over_keys, tiles.accumulator(ROWS, H))
            lse[...] = jnp.log(total)
            q[...] = (out * tiles.broadcast_rows(1 / jnp.maximum(total, 1e-30), H)).astype(
                q.dtype
            )  # 0 where nothing is seen
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[b, here, head])
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, head, here])
            plgpu.wait_smem_to_gmem(0)

        block.load(keys, (k_ring, k_ref), (v_ring, v_ref))

    dtype = q_BTNH.dtype
    ring = Ring.scratch(tile.stages, tiles.matrix((tile.stages, keys, H), dtype))
    scratch = (
        tiles.matrix((2, ROWS, H), dtype),
        plgpu.Barrier(num_barriers=2),
        build.space((2, ROWS, keys), dtype),
        plgpu.SMEM((2, ROWS), jnp.float32),
        ring,
        ring,
    )
    outputs = jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    run = build.kernel(kernel, "gemma2_attention_forward", scratch, Queries.grid(q_BTNH, k_BSKH), outputs)
    bounds = tiles.tile_bounds(first_BT, last_BT, Queries.block_rows(N, k_BSKH.shape[2]), keys)
    return run(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, bounds)
