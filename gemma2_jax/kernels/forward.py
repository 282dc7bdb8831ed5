"""The forward kernel: soft-capped attention of tiles of queries to the keys each query sees, for Hopper.

FlashAttention-3's shape (arXiv:2407.08608): in a block of threads, two warpgroups compute and a third loads keys and
values by TMA into a ring. What Gemma 2 changes: a capped score cannot overflow, so there is no running maximum, and the
accumulator of the output is touched by nothing but the tensor cores.

The two computing warpgroups have the same 64 queries of two heads with one key/value head, which is loaded once for
both; or, where heads are not in pairs, 128 queries of one head.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels.tiles import ROWS, Build, Tile, ring, spread

LOG2E = math.log2(math.e)


def forward(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, bounds_BI4, *, scale, softcap, tile: Tile, build: Build):
    """Attention as in `reference.attention`, for whole tiles.

    Args:
      q_BTNH, k_BSKH, v_BSKH: bfloat16; T and S are whole numbers of tiles.
      first_BT, last_BT: int32; `reference.visible`.
      bounds_BI4: int32, from `tiles.bounds`, for each tile of queries.

    Returns:
      [B, T, N, H] bfloat16 and the log-sum-exp [B, N, T] float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    pairs = N // K % 2 == 0
    rows = ROWS if pairs else 2 * ROWS
    keys, stages = tile.keys, tile.stages

    def kernel(q_ref, k_ref, v_ref, first_ref, last_ref, bounds_ref, out_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, p_smem, lse_smem, q_here, k_here, v_here, k_used, v_used = scratch
        wg = jax.lax.axis_index("warpgroup")
        b = jax.lax.axis_index("row")
        # The longest first: late tiles of queries see the most keys.
        i = T // rows - 1 - jax.lax.axis_index("queries")
        head = jax.lax.axis_index("heads") * (2 if pairs else 1)
        kv_head = head // (N // K)
        start, clean, masked, end = (bounds_ref[b, i, at] for at in range(4))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            mine = head + wg if pairs else head
            at = i * rows if pairs else i * rows + wg * ROWS
            q, p, lse = q_smem.at[wg], p_smem.at[wg] if p_smem is not None else None, lse_smem.at[wg]
            here = pl.ds(at, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, mine], q, q_here.at[wg])
            plgpu.barrier_wait(q_here.at[wg])

            def over_keys(out):
                def some_keys(j, total, edge: bool):
                    slot = jax.lax.rem(j - start, stages)
                    plgpu.barrier_wait(k_here.at[slot])

                    def scores(acc):
                        plgpu.wgmma(acc, q, k_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        pl.when(j > start)(partial(plgpu.barrier_arrive, v_used.at[jax.lax.rem(j - start + stages - 1, stages)]))
                        return acc[...]

                    s = pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32))
                    plgpu.barrier_arrive(k_used.at[slot])
                    weights = jnp.exp2(jnp.tanh(s * (scale / softcap)) * (softcap * LOG2E))
                    if edge:
                        first, last = (
                            spread(plgpu.load(ref.at[b, here], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False), keys)
                            for ref in (first_ref, last_ref)
                        )
                        key = j * keys + plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=plgpu.Layout.WGMMA)
                        weights = jnp.where((first <= key) & (key <= last), weights, 0)
                    total += jnp.sum(weights, axis=1)
                    operand = build.operand(weights.astype(jnp.bfloat16), p)
                    plgpu.barrier_wait(v_here.at[slot])
                    plgpu.wgmma(out, operand, v_smem.at[slot])
                    return total

                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
                total = jax.lax.fori_loop(start, clean, partial(some_keys, edge=True), total)
                total = jax.lax.fori_loop(clean, masked, partial(some_keys, edge=False), total)
                total = jax.lax.fori_loop(masked, end, partial(some_keys, edge=True), total)
                result = out[...]
                pl.when(end > start)(partial(plgpu.barrier_arrive, v_used.at[jax.lax.rem(end - start + stages - 1, stages)]))
                return result, total

            out, total = pl.run_scoped(over_keys, plgpu.ACC((ROWS, H), jnp.float32))
            lse[...] = jnp.log(total)
            out = out * spread(1 / jnp.maximum(total, 1e-30), H)  # a query that sees nothing has zeros
            q[...] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[b, here, mine])
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, mine, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            # On to where every tile has been used: a block must not end before what it waits for.
            @pl.loop(start, end + stages)
            def _(j):
                slot = jax.lax.rem(j - start, stages)
                there = b, pl.ds(j * keys, keys), kv_head
                for ref, smem, came, used in ((k_ref, k_smem, k_here, k_used), (v_ref, v_smem, v_here, v_used)):
                    pl.when(j - start >= stages)(partial(plgpu.barrier_wait, used.at[slot]))
                    pl.when(j < end)(partial(plgpu.copy_gmem_to_smem, ref.at[there], smem.at[slot], came.at[slot]))

    tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    dtype = q_BTNH.dtype
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((2, ROWS, H), dtype, transforms=tiled),
            plgpu.SMEM((stages, keys, H), dtype, transforms=tiled),
            plgpu.SMEM((stages, keys, H), dtype, transforms=tiled),
            plgpu.SMEM((2, ROWS, keys), dtype, transforms=tiled) if build.shared else None,
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_arrivals=2, num_barriers=stages),) * 2,
        ),
        grid=(N // 2 if pairs else N, T // rows, B),
        grid_names=("heads", "queries", "row"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=build.compiler,
        interpret=build.interpret,
        kernel_name="gemma2_attention_forward",
    )(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, bounds_BI4)
