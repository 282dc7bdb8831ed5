"""The forward kernel: soft-capped attention of tiles of queries to the keys each query sees.

It follows the structure of FlashAttention-3 (arXiv:2407.08608): in a block of threads, two warpgroups compute and a
third loads keys and values by TMA into ring buffers in shared memory. Gemma 2 makes it simpler: a soft-capped score
cannot overflow, so there is no running maximum, and only the tensor cores touch the accumulator of the output, as it is
never rescaled.

What a computing warpgroup does in one trip of its loop, for the tile of keys numbered n:

    tensor cores   ... P(n-1) V(n-1) ...]  [S(n) = Q K(n)^T]                    [P(n) V(n) ...
    other units                                             exp2, mask, sum P(n)
    rings          wait K(n)      release V(n-1) ^          ^ release K(n)      ^ wait V(n)

The product P V is issued and not waited for. It goes on while the next trip begins, and S is queued behind it, so that
the tensor cores do not stop between the two; `wgmma_wait(1)` then says that P V of the trip before is done, and its
values are released. The two computing warpgroups do not wait for each other: while one takes exponentials, the other's
products have the tensor cores.

Beside the letters of `reference`: a tile of scores has R rows, the queries of a warpgroup, and C columns, its keys.
`number` counts the tiles of a block from 0, in the order in which they are loaded; `Ring.slot` turns it into a place in
the ring.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import tiles
from gemma2_jax.kernels.tile_sizes import ROWS, Tile
from gemma2_jax.kernels.tiles import COMPUTING_WARPGROUPS, Inputs, Queries, Ref, Ring, Settings


@dataclass(frozen=True)
class Refs:
    """The arrays of the kernel in global memory: its operands in their order, and then its results."""

    q_BTNH: Ref
    k_BSKH: Ref
    v_BSKH: Ref
    first_BT: Ref  # The first and the last key that each query sees, int32.
    last_BT: Ref
    bounds: Ref  # int32 [B, blocks, 4]: see `tiles.tile_bounds`.
    out_BTNH: Ref
    lse_BNT: Ref


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scratch:
    """The shared memory of a block.

    Attributes:
      q: [2, ROWS, H], the queries of each computing warpgroup, and at the end its output.
      q_arrived: a barrier for each computing warpgroup, which the load of its queries completes.
      p: [2, ROWS, keys], attention probabilities as an operand of wgmma; None where they stay in registers.
      lse: [2, ROWS] float32, the log-sum-exp of the scores of each query.
      k_ring, v_ring: tiles [keys, H].
    """

    q: Ref
    q_arrived: Ref
    p: Ref | None
    lse: Ref
    k_ring: Ring
    v_ring: Ring

    @classmethod
    def types(cls, width: int, dtype, tile: Tile, settings: Settings) -> Self:
        """What to allocate for heads of that width."""
        ring = Ring.types(tile.stages, tiles.operand_memory((tile.stages, tile.size, width), dtype))
        return cls(
            q=tiles.operand_memory((COMPUTING_WARPGROUPS, ROWS, width), dtype),
            q_arrived=plgpu.Barrier(num_barriers=COMPUTING_WARPGROUPS),
            p=settings.build.operand_type((COMPUTING_WARPGROUPS, ROWS, tile.size), dtype),
            lse=plgpu.SMEM((COMPUTING_WARPGROUPS, ROWS), jnp.float32),
            k_ring=ring,
            v_ring=ring,
        )


def run_forward(inputs: Inputs, settings: Settings, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Computes `reference.attention` for whole tiles.

    Returns:
      The output [B, T, N, H] bfloat16, and the log-sum-exp of the scores [B, N, T] float32. A query that sees no key
      has zeros and -inf.
    """
    q_BTNH, k_BSKH = inputs.q_BTNH, inputs.k_BSKH
    B, T, N, H = q_BTNH.shape

    def kernel(*refs_and_scratch) -> None:
        *refs, scratch = refs_and_scratch
        _Block(Refs(*refs), scratch, settings, tile.size).run()

    scratch = Scratch.types(H, q_BTNH.dtype, tile, settings)
    outputs = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    grid = Queries.grid(q_BTNH, k_BSKH)
    run = settings.build.kernel(kernel, "gemma2_attention_forward", scratch, grid, outputs)
    bounds = Queries.tile_bounds(inputs, tile.size)
    return run(q_BTNH, k_BSKH, inputs.v_BSKH, inputs.first_BT, inputs.last_BT, bounds)


class _Block:
    """One block of threads: the queries of its two computing warpgroups, and their loop over tiles of keys."""

    def __init__(self, refs: Refs, scratch: Scratch, settings: Settings, tile_keys: int):
        self.refs, self.scratch, self.settings, self.tile_keys = refs, scratch, settings, tile_keys
        self.queries = Queries(refs.q_BTNH, refs.k_BSKH, refs.bounds)

    def run(self) -> None:
        pl.when(self.queries.warpgroup < COMPUTING_WARPGROUPS)(self.compute)
        self.queries.load_keys(
            self.tile_keys, (self.scratch.k_ring, self.refs.k_BSKH), (self.scratch.v_ring, self.refs.v_BSKH)
        )

    def compute(self) -> None:
        """The work of a computing warpgroup: it loads its queries, attends to their keys, and writes the results."""
        queries, refs = self.queries, self.refs
        tiles.claim_registers()
        q_RH, lse_R, arrived = (
            per_warpgroup.at[queries.warpgroup]
            for per_warpgroup in (self.scratch.q, self.scratch.lse, self.scratch.q_arrived)
        )
        plgpu.copy_gmem_to_smem(refs.q_BTNH.at[queries.batch, queries.rows, queries.head], q_RH, arrived)
        plgpu.barrier_wait(arrived)
        H = q_RH.shape[1]
        out_RH, total_R = pl.run_scoped(partial(self.loop_over_keys, q_RH), tiles.accumulator(ROWS, H))
        lse_R[...] = jnp.log(total_R)
        # A query that sees nothing has a total of 0 and an output of 0.
        normalized_RH = out_RH * tiles.broadcast_rows(1 / jnp.maximum(total_R, 1e-30), H)
        q_RH[...] = normalized_RH.astype(q_RH.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_RH, refs.out_BTNH.at[queries.batch, queries.rows, queries.head])
        plgpu.copy_smem_to_gmem(lse_R, refs.lse_BNT.at[queries.batch, queries.head, queries.rows])
        plgpu.wait_smem_to_gmem(0)

    def loop_over_keys(self, q_RH: Ref, out_acc: Ref) -> tuple[jax.Array, jax.Array]:
        """Returns the sums of exp(score) * V, [ROWS, H], and of exp(score), [ROWS], over all keys that are seen."""
        queries = self.queries
        total_R = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), tiles.BY_ROW)
        total_R = tiles.visit_tiles(queries.bounds, partial(self.attend_tile, q_RH, out_acc), total_R)
        out_RH = out_acc[...]
        pl.when(queries.end > queries.start)(lambda: self.scratch.v_ring.release(queries.end - queries.start - 1))
        return out_RH, total_R

    def attend_tile(self, q_RH: Ref, out_acc: Ref, tile: jax.Array, total_R: jax.Array, needs_mask: bool) -> jax.Array:
        """Adds a tile's exp(score) * V to the accumulator, and returns `total_R` plus the tile's exp(score).

        The product is issued and not waited for. `needs_mask` says that some query does not see the whole tile.
        """
        queries, refs, scratch = self.queries, self.refs, self.scratch
        number = tile - queries.start
        scores_RC = self.multiply_keys(q_RH, number)
        scratch.k_ring.release(number)
        p_RC = jnp.exp2(self.settings.softcap_tanh(scores_RC) * self.settings.exp2_factor)
        if needs_mask:
            first_R, last_R = (ends.at[queries.batch, queries.rows] for ends in (refs.first_BT, refs.last_BT))
            p_RC = tiles.mask_interval(p_RC, first_R, last_R, tile * self.tile_keys)
        total_R += jnp.sum(p_RC, axis=1)
        operand = self.settings.build.place_operand(p_RC.astype(jnp.bfloat16), scratch.p, queries.warpgroup)
        plgpu.wgmma(out_acc, operand, scratch.v_ring.wait(number))
        return total_R

    def multiply_keys(self, q_RH: Ref, number: jax.Array) -> jax.Array:
        """Returns q.k of a tile of keys, [ROWS, tile_keys], and releases the values of the tile before it."""
        k_CH = self.scratch.k_ring.wait(number)

        def multiply(acc):
            plgpu.wgmma(acc, q_RH, k_CH.transpose((1, 0)))
            # The product P V of the tile before may have been running until here: the tensor cores do not stop.
            plgpu.wgmma_wait(1)
            pl.when(number > 0)(lambda: self.scratch.v_ring.release(number - 1))
            return acc[...]

        return pl.run_scoped(multiply, tiles.accumulator(ROWS, self.tile_keys))
