"""The backward kernels: gradients of attention with respect to queries (dQ), and to keys and values (dK/dV).

Two kernels make seven matrix products where one could do with five (FlashAttention-2, arXiv:2307.08691, algorithm 2),
and in return nothing is added across blocks: results are the same bit by bit each time, and no float32 copy of dQ
exists. Let t = tanh(scale * q.k / softcap); P = exp(softcap * t - lse) where a query sees a key, and 0 elsewhere; and
delta the sum of dO * O over a row. Then

    slope = P * (1 - t^2)    dS = slope * (dO V^T - delta)
    dV = P^T dO              dQ = scale * dS K              dK = scale * dS^T Q

In dQ the block has queries and loops over keys, as in the forward kernel, and both computing warpgroups do the same.
In one trip of the loop, for the tile of keys numbered n:

    tensor cores   ... dS(n-1) K(n-1) ...]  [S(n) = Q K(n)^T]       [dP(n) = dO V(n)^T]           [dS(n) K(n) ...
    other units                                              slope                      dS(n)
    rings          wait K(n)       release K(n-1) ^                 ^ wait V(n)         ^ release V(n)

Values are needed for dP alone, and so for a shorter time than keys: at head width 256 their ring has a single place.

In dK/dV the block has 64 keys and loops over tiles of the queries that see them, of each query head in turn. The two
gradients, [64, 256] float32 each, do not both fit in the registers of one warpgroup; if each warpgroup had half of
both, it would need both P and dS. Instead each warpgroup has the whole of one gradient, and computes the left operand
of its sum in registers, where it is needed. Scores are held transposed, [keys, queries]. In step n:

    warpgroup 0 (dV)                             warpgroup 1 (dK)
    ----------------                             ----------------
    S^T = K Q(n)^T                               dP^T = V dO(n)^T - delta
    t, P^T, slope
    wait slope_read (of step n-1)
    write slope to shared memory
    arrive slope_written  -------------------->  wait slope_written
                                                 dS^T = slope * dP^T
                          <--------------------  arrive slope_read
    dV += P^T dO(n) ... (not waited for)         dK += dS^T Q(n) ... (not waited for)

    loader: rings of Q and dO, used by both; of log-sum-exps, used by warpgroup 0; of deltas, used by warpgroup 1.

Each warpgroup issues its sum and goes on to its first product of the next step; when that is done, so is the sum, and
its right operand (dO in warpgroup 0, Q in warpgroup 1) is released.

The log-sum-exps given to both kernels are to base 2: lse / ln 2. Letters and `number` are as in `forward`; as dK/dV
holds scores transposed, R is its keys and C its queries.
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
from gemma2_jax.kernels.tiles import (
    COMPUTING_WARPGROUPS,
    LOADING_WARPGROUP,
    Inputs,
    Queries,
    Ref,
    Ring,
    Settings,
    hide_from_hoisting,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cotangents:
    """What the backward kernels take beside the `Inputs` of the forward one.

    Attributes:
      d_BTNH: bfloat16, the gradient with respect to the output.
      lse_BNT: float32, the log-sum-exp of the scores to base 2; anything finite where a query sees no key.
      delta_BNT: float32, the sum of dO * O over a row, less the gradient with respect to the log-sum-exp.
    """

    d_BTNH: jax.Array
    lse_BNT: jax.Array
    delta_BNT: jax.Array


@dataclass(frozen=True)
class OperandRefs:
    """The operands of a backward kernel in global memory, in their order.

    Attributes:
      first, last: in dQ, the first and the last key that each query sees, int32 [B, T]; in dK/dV, the first and the
        last query that sees each key, int32 [B, S].
      bounds: the `tiles.tile_bounds` of `first` and `last`.
    """

    q_BTNH: Ref
    k_BSKH: Ref
    v_BSKH: Ref
    d_BTNH: Ref
    lse_BNT: Ref
    delta_BNT: Ref
    first: Ref
    last: Ref
    bounds: Ref


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DQScratch:
    """The shared memory of a block of dQ.

    Attributes:
      q, d: [2, ROWS, H], for each computing warpgroup its queries, which dQ overwrites at the end, and the gradient
        with respect to their output.
      arrived: a barrier for each computing warpgroup, which the loads of its `q` and `d` complete.
      ds: [2, ROWS, keys], dS as an operand of wgmma; None where it stays in registers.
      k_ring, v_ring: tiles [keys, H].
    """

    q: Ref
    d: Ref
    arrived: Ref
    ds: Ref | None
    k_ring: Ring
    v_ring: Ring

    @classmethod
    def types(cls, width: int, dtype, tile: Tile, settings: Settings) -> Self:
        """What to allocate for heads of that width."""

        def ring(stages):
            return Ring.types(stages, tiles.operand_memory((stages, tile.size, width), dtype))

        return cls(
            q=tiles.operand_memory((COMPUTING_WARPGROUPS, ROWS, width), dtype),
            d=tiles.operand_memory((COMPUTING_WARPGROUPS, ROWS, width), dtype),
            arrived=plgpu.Barrier(num_barriers=COMPUTING_WARPGROUPS, num_arrivals=2),
            ds=settings.build.operand_type((COMPUTING_WARPGROUPS, ROWS, tile.size), dtype),
            k_ring=ring(tile.stages),
            v_ring=ring(tile.v_stages),
        )


def run_dq(inputs: Inputs, cotangents: Cotangents, settings: Settings, tile: Tile) -> jax.Array:
    """Computes the gradient with respect to the queries, [B, T, N, H] bfloat16."""
    q_BTNH = inputs.q_BTNH

    def kernel(*refs_and_scratch) -> None:
        *operands, dq_BTNH, scratch = refs_and_scratch
        _DQBlock(OperandRefs(*operands), dq_BTNH, scratch, settings, tile.size).run()

    scratch = DQScratch.types(q_BTNH.shape[-1], q_BTNH.dtype, tile, settings)
    output = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
    grid = Queries.grid(q_BTNH, inputs.k_BSKH)
    run = settings.build.kernel(kernel, "gemma2_attention_dq", scratch, grid, output)
    bounds = Queries.tile_bounds(inputs, tile.size)
    return run(*_operands(inputs, cotangents), inputs.first_BT, inputs.last_BT, bounds)


def _operands(inputs: Inputs, cotangents: Cotangents) -> tuple[jax.Array, ...]:
    """The operands that both kernels take first."""
    return (
        *(inputs.q_BTNH, inputs.k_BSKH, inputs.v_BSKH),
        *(cotangents.d_BTNH, cotangents.lse_BNT, cotangents.delta_BNT),
    )


class _DQBlock:
    """One block of threads of dQ: the queries of its two computing warpgroups, and their loop over tiles of keys."""

    def __init__(self, refs: OperandRefs, dq_BTNH: Ref, scratch: DQScratch, settings: Settings, tile_keys: int):
        self.refs, self.dq_BTNH, self.scratch, self.settings, self.tile_keys = (
            refs,
            dq_BTNH,
            scratch,
            settings,
            tile_keys,
        )
        self.queries = Queries(refs.q_BTNH, refs.k_BSKH, refs.bounds)

    def run(self) -> None:
        pl.when(self.queries.warpgroup < COMPUTING_WARPGROUPS)(self.compute)
        self.queries.load_keys(
            self.tile_keys, (self.scratch.k_ring, self.refs.k_BSKH), (self.scratch.v_ring, self.refs.v_BSKH)
        )

    def compute(self) -> None:
        """The work of a computing warpgroup: it loads its queries, loops over their keys, and writes the gradient."""
        queries, refs, scratch = self.queries, self.refs, self.scratch
        tiles.claim_registers()
        arrived = scratch.arrived.at[queries.warpgroup]
        source = queries.batch, queries.rows, queries.head
        plgpu.copy_gmem_to_smem(refs.q_BTNH.at[source], scratch.q.at[queries.warpgroup], arrived)
        plgpu.copy_gmem_to_smem(refs.d_BTNH.at[source], scratch.d.at[queries.warpgroup], arrived)
        lse_R, delta_R = (
            plgpu.load(ref.at[queries.batch, queries.head, queries.rows], layout=tiles.BY_ROW, optimized=False)
            for ref in (refs.lse_BNT, refs.delta_BNT)
        )
        plgpu.barrier_wait(arrived)
        dq_RH = scratch.q.at[queries.warpgroup]
        result_RH = pl.run_scoped(
            partial(self.loop_over_keys, lse_R, delta_R), tiles.accumulator(ROWS, refs.q_BTNH.shape[-1])
        )
        dq_RH[...] = (result_RH * self.settings.scale).astype(dq_RH.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dq_RH, self.dq_BTNH.at[source])
        plgpu.wait_smem_to_gmem(0)

    def loop_over_keys(self, lse_R: jax.Array, delta_R: jax.Array, dq_acc: Ref) -> jax.Array:
        """Returns dS K, [ROWS, H], summed over all keys that are seen."""
        queries, k_ring = self.queries, self.scratch.k_ring

        def visit(tile, carry, needs_mask: bool):
            self.add_tile(lse_R, delta_R, dq_acc, tile, needs_mask)
            return carry

        tiles.visit_tiles(queries.bounds, visit)
        dq_RH = dq_acc[...]
        pl.when(queries.end > queries.start)(lambda: k_ring.release(queries.end - queries.start - 1))
        return dq_RH

    def add_tile(self, lse_R: jax.Array, delta_R: jax.Array, dq_acc: Ref, tile: jax.Array, needs_mask: bool) -> None:
        """Adds dS K of a tile of keys to the accumulator, by a product that is not waited for."""
        queries, refs, scratch = self.queries, self.refs, self.scratch
        number = tile - queries.start
        k_CH = scratch.k_ring.wait(number)
        # The queries stay where they are in each trip: see `hide_from_hoisting`.
        q_RH, d_RH = (memory.at[hide_from_hoisting(queries.warpgroup)] for memory in (scratch.q, scratch.d))
        t_RC = self.settings.softcap_tanh(self.multiply_keys(q_RH, k_CH, number))
        p_RC = jnp.exp2(t_RC * self.settings.exp2_factor - tiles.broadcast_rows(lse_R, self.tile_keys))
        slope_RC = p_RC * (1 - t_RC * t_RC)
        if needs_mask:
            first_R, last_R = (ends.at[queries.batch, queries.rows] for ends in (refs.first, refs.last))
            slope_RC = tiles.mask_interval(slope_RC, first_R, last_R, tile * self.tile_keys)
        dp_RC = tiles.matrix_product(d_RH, scratch.v_ring.wait(number).transpose((1, 0)))
        scratch.v_ring.release(number)
        ds_RC = (slope_RC * (dp_RC - tiles.broadcast_rows(delta_R, self.tile_keys))).astype(jnp.bfloat16)
        plgpu.wgmma(dq_acc, self.settings.build.place_operand(ds_RC, scratch.ds, queries.warpgroup), k_CH)

    def multiply_keys(self, q_RH: Ref, k_CH: Ref, number: jax.Array) -> jax.Array:
        """Returns q.k of a tile of keys, [ROWS, tile_keys], and releases the keys of the tile before it."""

        def multiply(acc):
            plgpu.wgmma(acc, q_RH, k_CH.transpose((1, 0)))
            # The product dS K of the tile before may have been running until here.
            plgpu.wgmma_wait(1)
            pl.when(number > 0)(lambda: self.scratch.k_ring.release(number - 1))
            return acc[...]

        return pl.run_scoped(multiply, tiles.accumulator(ROWS, self.tile_keys))


def query_intervals(first_BT: jax.Array, last_BT: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
    """Computes the first and the last query that sees each key, int32 [B, S].

    Args:
      first_BT, last_BT: int32, the first and the last key that each query sees; neither descends along a row.
      keys: the number of keys, S.
    """

    def count_ended(end_T):
        """Counts for each key how many of the queries' ends are at that key or before it."""
        counts = jnp.zeros(keys + 1, jnp.int32).at[jnp.clip(end_T, 0, keys)].add(1)
        return jnp.cumsum(counts)[:keys]

    return jax.vmap(count_ended)(last_BT + 1), jax.vmap(count_ended)(first_BT) - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DKVScratch:
    """The shared memory of a block of dK/dV.

    Attributes:
      kv: [2, ROWS, H], the block's keys, which end as dV, and its values, which end as dK.
      kv_arrived: a barrier for each of the two.
      slope: [ROWS, queries] float32, P * (1 - t^2) transposed, from warpgroup 0 to warpgroup 1.
      slope_written, slope_read: barriers; warpgroup 0 arrives when it wrote `slope`, warpgroup 1 when it read it.
      operands: [2, ROWS, queries], P^T and dS^T as operands of wgmma; None where they stay in registers.
      q_ring, d_ring: tiles [queries, H], which both computing warpgroups use.
      lse_ring, delta_ring: tiles [queries] float32, the one for warpgroup 0 and the other for warpgroup 1.
    """

    kv: Ref
    kv_arrived: Ref
    slope: Ref
    slope_written: Ref
    slope_read: Ref
    operands: Ref | None
    q_ring: Ring
    lse_ring: Ring
    d_ring: Ring
    delta_ring: Ring

    @classmethod
    def types(cls, width: int, dtype, tile: Tile, settings: Settings) -> Self:
        """What to allocate for heads of that width."""
        stages, queries = tile.stages, tile.size
        matrices = Ring.types(stages, tiles.operand_memory((stages, queries, width), dtype))
        vectors = Ring.types(stages, plgpu.SMEM((stages, queries), jnp.float32), users=1)
        return cls(
            kv=tiles.operand_memory((2, ROWS, width), dtype),
            kv_arrived=plgpu.Barrier(num_barriers=2),
            slope=tiles.operand_memory((ROWS, queries), jnp.float32),
            slope_written=plgpu.Barrier(),
            slope_read=plgpu.Barrier(),
            operands=settings.build.operand_type((COMPUTING_WARPGROUPS, ROWS, queries), dtype),
            q_ring=matrices,
            lse_ring=vectors,
            d_ring=matrices,
            delta_ring=vectors,
        )


def run_dkv(inputs: Inputs, cotangents: Cotangents, settings: Settings, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients with respect to keys and values, each [B, S, K, H] bfloat16."""
    k_BSKH = inputs.k_BSKH
    B, S, K, H = k_BSKH.shape
    first_BS, last_BS = query_intervals(inputs.first_BT, inputs.last_BT, S)

    def kernel(*refs_and_scratch) -> None:
        *operands, dk_BSKH, dv_BSKH, scratch = refs_and_scratch
        _DKVBlock(OperandRefs(*operands), (dk_BSKH, dv_BSKH), scratch, settings, tile.size).run()

    scratch = DKVScratch.types(H, k_BSKH.dtype, tile, settings)
    output = jax.ShapeDtypeStruct(k_BSKH.shape, k_BSKH.dtype)
    # The longest blocks come first: early keys are seen by the most queries.
    grid = {"heads": K, "keys": S // ROWS, "row": B}
    run = settings.build.kernel(kernel, "gemma2_attention_dkv", scratch, grid, (output, output))
    bounds = tiles.tile_bounds(first_BS, last_BS, ROWS, tile.size)
    return run(*_operands(inputs, cotangents), first_BS, last_BS, bounds)


class _DKVBlock:
    """One block of threads of dK/dV: its 64 keys, and their loop over tiles of queries.

    A step is one tile of queries of one query head. Of the G query heads that share the block's key/value head, step s
    takes head s % G, and its tile s // G.
    """

    def __init__(
        self, refs: OperandRefs, dkv: tuple[Ref, Ref], scratch: DKVScratch, settings: Settings, tile_queries: int
    ):
        self.refs, self.scratch, self.settings, self.tile_queries = refs, scratch, settings, tile_queries
        self.dk_BSKH, self.dv_BSKH = dkv
        self.groups = refs.q_BTNH.shape[2] // refs.k_BSKH.shape[2]
        self.warpgroup, self.batch = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        run, self.kv_head = jax.lax.axis_index("keys"), jax.lax.axis_index("heads")
        self.keys = pl.ds(run * ROWS, ROWS)
        self.bounds = tuple(refs.bounds[self.batch, run, number] * self.groups for number in range(4))
        self.start, self.end = self.bounds[0], self.bounds[3]

    def run(self) -> None:
        scratch, refs = self.scratch, self.refs
        keys, values = ((scratch.kv.at[number], scratch.kv_arrived.at[number]) for number in range(2))
        pl.when(self.warpgroup == 0)(lambda: self.compute(keys, refs.k_BSKH, self.dv_BSKH, self.loop_for_dv, 1))
        pl.when(self.warpgroup == 1)(
            lambda: self.compute(values, refs.v_BSKH, self.dk_BSKH, self.loop_for_dk, self.settings.scale)
        )
        pl.when(self.warpgroup == LOADING_WARPGROUP)(self.load)

    def compute(self, place: tuple[Ref, Ref], source: Ref, target: Ref, loop, factor: float) -> None:
        """The work of a computing warpgroup: it loads its keys or values, loops over queries, and writes a gradient.

        Args:
          place: where its keys or values lie in shared memory, and the barrier of their load.
          source, target: [B, S, K, H] in global memory, those keys or values and the gradient.
          loop: a function of an accumulator [ROWS, H], which returns the gradient.
          factor: what the gradient is multiplied by.
        """
        tiles.claim_registers()
        memory, arrived = place
        plgpu.copy_gmem_to_smem(source.at[self.batch, self.keys, self.kv_head], memory, arrived)
        plgpu.barrier_wait(arrived)
        result = pl.run_scoped(loop, tiles.accumulator(ROWS, source.shape[-1]))
        memory[...] = (result * factor).astype(source.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, target.at[self.batch, self.keys, self.kv_head])
        plgpu.wait_smem_to_gmem(0)

    def multiply_transposed(self, right_CH: Ref, number: jax.Array, ring: Ring) -> jax.Array:
        """Returns K or V times `right` transposed, [ROWS, tile_queries], and releases the tile before it in the ring.

        That tile is the right operand of the warpgroup's sum in the step before. `wgmma_wait(1)` leaves one product
        unfinished at most, the one issued here, so that sum is done.
        """

        def multiply(acc):
            # The keys and values stay where they are in each trip: see `hide_from_hoisting`.
            plgpu.wgmma(acc, self.scratch.kv.at[hide_from_hoisting(self.warpgroup)], right_CH.transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(number > 0)(lambda: ring.release(number - 1))
            return acc[...]

        return pl.run_scoped(multiply, tiles.accumulator(ROWS, self.tile_queries))

    def loop_for_dv(self, dv_acc: Ref) -> jax.Array:
        """The loop of warpgroup 0: returns P^T dO, [ROWS, H], summed over all queries that see the keys."""

        def visit(step, carry, needs_mask: bool):
            self.add_dv(dv_acc, step, needs_mask)
            return carry

        tiles.visit_tiles(self.bounds, visit)
        dv_RH = dv_acc[...]

        @pl.when(self.end > self.start)
        def _finish():
            self.scratch.d_ring.release(self.end - self.start - 1)
            # The barrier must exist until the other warpgroup has arrived at it for the last time.
            plgpu.barrier_wait(self.scratch.slope_read)

        return dv_RH

    def add_dv(self, dv_acc: Ref, step: jax.Array, needs_mask: bool) -> None:
        """Hands a step's slope to warpgroup 1, and adds P^T dO by a product that is not waited for."""
        scratch, refs = self.scratch, self.refs
        number = step - self.start
        t_RC = self.settings.softcap_tanh(self.multiply_transposed(scratch.q_ring.wait(number), number, scratch.d_ring))
        scratch.q_ring.release(number)
        lse_C = plgpu.load(scratch.lse_ring.wait(number), layout=tiles.BY_COLUMN)
        p_RC = jnp.exp2(t_RC * self.settings.exp2_factor - tiles.broadcast_columns(lse_C, ROWS))
        scratch.lse_ring.release(number)
        if needs_mask:
            first_R, last_R = (ends.at[self.batch, self.keys] for ends in (refs.first, refs.last))
            p_RC = tiles.mask_interval(p_RC, first_R, last_R, step // self.groups * self.tile_queries)
        pl.when(number > 0)(lambda: plgpu.barrier_wait(scratch.slope_read))
        scratch.slope[...] = p_RC * (1 - t_RC * t_RC)
        plgpu.barrier_arrive(scratch.slope_written)
        operand = self.settings.build.place_operand(p_RC.astype(jnp.bfloat16), scratch.operands, self.warpgroup)
        plgpu.wgmma(dv_acc, operand, scratch.d_ring.wait(number))
        if needs_mask:
            # The next mask needs the registers of this product's operand.
            plgpu.wgmma_wait(0)

    def loop_for_dk(self, dk_acc: Ref) -> jax.Array:
        """The loop of warpgroup 1: returns dS^T Q, [ROWS, H], summed over all queries that see the keys.

        It needs no mask, and so is one loop: the slope is 0 where a query does not see a key.
        """
        scratch = self.scratch

        @pl.loop(self.start, self.end)
        def _add_dk(step):
            number = step - self.start
            dp_RC = self.multiply_transposed(scratch.d_ring.wait(number), number, scratch.q_ring)
            scratch.d_ring.release(number)
            delta_C = plgpu.load(scratch.delta_ring.wait(number), layout=tiles.BY_COLUMN)
            dp_RC -= tiles.broadcast_columns(delta_C, ROWS)
            scratch.delta_ring.release(number)
            plgpu.barrier_wait(scratch.slope_written)
            ds_RC = (plgpu.load(scratch.slope, layout=plgpu.Layout.WGMMA) * dp_RC).astype(jnp.bfloat16)
            plgpu.barrier_arrive(scratch.slope_read)
            operand = self.settings.build.place_operand(ds_RC, scratch.operands, self.warpgroup)
            plgpu.wgmma(dk_acc, operand, scratch.q_ring.wait(number))

        dk_RH = dk_acc[...]
        pl.when(self.end > self.start)(lambda: scratch.q_ring.release(self.end - self.start - 1))
        return dk_RH

    def load(self) -> None:
        """The work of the loader: for each step Q and dO, and the log-sum-exp and delta of each query."""

        def find_step(number):
            step = self.start + number
            head = self.kv_head * self.groups + step % self.groups
            return pl.ds(step // self.groups * self.tile_queries, self.tile_queries), head

        def find_matrix(array_BTNH, number):
            rows, head = find_step(number)
            return array_BTNH.at[self.batch, rows, head]

        def find_vector(array_BNT, number):
            rows, head = find_step(number)
            return array_BNT.at[self.batch, head, rows]

        scratch, refs = self.scratch, self.refs
        tiles.load_tiles(
            self.end - self.start,
            (scratch.q_ring, partial(find_matrix, refs.q_BTNH)),
            (scratch.lse_ring, partial(find_vector, refs.lse_BNT)),
            (scratch.d_ring, partial(find_matrix, refs.d_BTNH)),
            (scratch.delta_ring, partial(find_vector, refs.delta_BNT)),
        )
