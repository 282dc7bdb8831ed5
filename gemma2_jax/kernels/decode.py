"""Attention of one or a few new tokens to a cache, for Hopper GPUs (Pallas, Mosaic GPU backend).

Most of the work is to read the cache once. A block takes some tiles of one key/value head of one row. It computes its
scores as [keys, queries], so that the few queries are the narrow side of both products (wgmma pads that side to 8, and
the other to 64). The softcap bounds the scores: blocks sum exp(score) as it is, with no running maximum, and their
partial sums are added up in a fixed order.

A block is two warpgroups, one that loads and one that computes, with one ring of tiles between them, in which keys and
values take turns. In one trip of the loop, for the tile of slots numbered i:

    loader      ... K(i)  V(i)  K(i+1)  V(i+1) ...   as far ahead as the ring has places
    computing   wait K(i) | S = K Q^T | release K(i) | exp2, mask | wait V(i) | O += V^T P | release V(i)

Nothing overlaps within the computing warpgroup: it waits for each product. The overlap is between the two blocks that a
multiprocessor holds, and between the loader and the rest. Tensor cores and exponentials have little to do here; memory
is the limit.

Letters are as in `reference`. R is the queries of a key/value head, T times N / K of them, padded to a multiple of 8; C
is the blocks among which a row's tiles are split; X is the places of the ring. S is the slots of the cache, and inside
the kernel those of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.kernels.tile_sizes import count_places
from gemma2_jax.kernels.tiles import GPU, LOG2E, ROWS, Build, Ref, accumulator, operand_memory

TILE = ROWS  # Slots of a tile: the rows of one wgmma.
MAX_ROWS = 64  # Queries of a key/value head, R, at most.
MIN_BLOCKS = (
    2 * 132
)  # Blocks that an H100 runs at once. Rows are split until there are as many, if they have the tiles.


def decode(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    position_B: jax.Array,
    window: jax.Array | int,
    *,
    scale: float,
    softcap: float | None,
    splits: int | None = None,
    build: Build = GPU,
) -> jax.Array:
    """Computes soft-capped attention of the last T tokens of each row to a dense or ring cache: `reference.decode`.

    Only tiles of `TILE` slots with a slot that some query of the row sees are read. What lies in slots that no query
    sees has no effect, not even NaN. The same inputs give the same bits.

    Args:
      q_BTNH, k_BKSH, v_BKSH: bfloat16; N is a multiple of K, and T * N / K at most `MAX_ROWS`. The token at position
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
      ValueError: if the kernel lacks a dtype, head width, soft cap or number of queries, or shapes do not go together.

    Keys are split as in Flash-Decoding (pytorch.org/blog/flash-decoding), without its running maximum, which the
    softcap of Gemma 2 (arXiv:2408.00118) makes needless.
    """
    _check(q_BTNH, k_BKSH, v_BKSH, position_B, softcap)
    assert softcap is not None, "the kernel's limits ask for a soft cap"
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G, rows = N // K, T * N // K
    splits = splits or min(pl.cdiv(S, TILE), pl.cdiv(MIN_BLOCKS, B * K))
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, rows, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, -rows % 8), (0, 0)))
    # A copy to tiles takes a multiple of 8 slots. Where this pads, it copies the cache.
    k_BKSH, v_BKSH = (jnp.pad(x, ((0, 0), (0, 0), (0, -S % 8), (0, 0))) for x in (k_BKSH, v_BKSH))
    settings = _Settings(T=T, G=G, S=S, splits=splits, tanh_factor=scale / softcap, exp2_factor=softcap * LOG2E)
    run = _make_kernel(q_BKRH.shape, settings, build)
    out_BKCHR, total_BKCR = run(q_BKRH, k_BKSH, v_BKSH, position_B.astype(jnp.int32), jnp.int32(window).reshape(1))
    total_BKR = total_BKCR[..., :rows].sum(2)
    out_BKHR = out_BKCHR[..., :rows].sum(2) / jnp.where(total_BKR == 0, 1, total_BKR)[:, :, None]
    out_BTKGH = out_BKHR.reshape(B, K, H, T, G).transpose(0, 3, 1, 4, 2)
    return out_BTKGH.reshape(B, T, N, H).astype(jnp.bfloat16)


def _check(q_BTNH, k_BKSH, v_BKSH, position_B, softcap: float | None) -> None:
    """Raises ValueError for what the kernel lacks."""
    shapes = q_BTNH.shape, k_BKSH.shape, v_BKSH.shape, position_B.shape
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    if shapes[1:] != ((B, K, S, H), (B, K, S, H), (B,)) or N % K or not S:
        raise ValueError(
            f"queries {shapes[0]}, keys {shapes[1]}, values {shapes[2]} and positions {shapes[3]} do not go together: "
            "they are [B, T, N, H], [B, K, S, H] twice and [B], with K a divisor of N: heads come before slots"
        )
    for dtype in (q_BTNH.dtype, k_BKSH.dtype, v_BKSH.dtype):
        if lack := MOSAIC.find_lack(dtype=dtype.name, width=H, softcap=softcap):
            raise ValueError(f"the Mosaic decoding kernel {lack}; use another implementation")
    if not 1 <= T * N // K <= MAX_ROWS:
        raise ValueError(
            f"the Mosaic decoding kernel lacks {T} tokens of {N // K} queries for each key head, {T * N // K} rows: it "
            f"takes 1 to {MAX_ROWS}; give at most {MAX_ROWS * K // N} tokens at a time, or prefill"
        )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the kernel is specialized to.

    Attributes:
      T, G, S: tokens of a row, query heads to a key head, and slots of the cache, without padding.
      splits: blocks among which the tiles of a row and key head are divided.
      tanh_factor, exp2_factor: soft-capped scores to base 2 are exp2_factor * tanh(tanh_factor * q.k).
    """

    T: int
    G: int
    S: int
    splits: int
    tanh_factor: float
    exp2_factor: float


@dataclass(frozen=True)
class Refs:
    """The arrays of the kernel in global memory: its operands in their order, and then its results."""

    q_BKRH: Ref
    k_BKSH: Ref
    v_BKSH: Ref
    position_B: Ref
    window: Ref  # int32 [1]
    out_BKCHR: Ref
    total_BKCR: Ref


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scratch:
    """The shared memory of a block.

    Attributes:
      filled_X, freed_X: barriers for each place of the ring: its tile is there, and is needed no more.
      loaded: the barrier of the queries.
      out_HR, total_R: float32, the block's results.
      q_RH: bfloat16, the queries.
      ring_XSH: bfloat16, tiles of keys and of values by turns.
      weights_RS: bfloat16, exp(score) of one tile.
    """

    filled_X: Ref
    freed_X: Ref
    loaded: Ref
    out_HR: Ref
    q_RH: Ref
    ring_XSH: Ref
    total_R: Ref
    weights_RS: Ref

    @classmethod
    def types(cls, R: int, H: int, X: int) -> Self:
        """What to allocate for so many queries of that head width, and so many tiles of the ring."""
        return cls(
            filled_X=plgpu.Barrier(num_barriers=X),
            freed_X=plgpu.Barrier(num_barriers=X),
            loaded=plgpu.Barrier(),
            out_HR=plgpu.SMEM((H, R), jnp.float32),
            q_RH=operand_memory((R, H), jnp.bfloat16),
            ring_XSH=operand_memory((X, TILE, H), jnp.bfloat16),
            total_R=plgpu.SMEM((R,), jnp.float32),
            weights_RS=operand_memory((R, TILE), jnp.bfloat16),
        )


def _make_kernel(shape: tuple[int, ...], settings: _Settings, build: Build) -> Callable:
    """The kernel for queries of that shape [B, K, R, H]; its results are those of each block, float32."""
    B, K, R, H = shape
    places = count_places(H, build.select_tiles(H).decode, R)
    scratch_types: Any = (Scratch.types(R, H, places),)  # Any pytree will do, though Pallas declares fewer.

    def kernel(*refs_and_scratch) -> None:
        *refs, scratch = refs_and_scratch
        _Block(Refs(*refs), scratch, settings).run()

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((B, K, settings.splits, H, R), jnp.float32),
            jax.ShapeDtypeStruct((B, K, settings.splits, R), jnp.float32),
        ),
        scratch_types=scratch_types,
        grid=(B, K, settings.splits),
        grid_names=("B", "K", "split"),
        num_threads=2,
        thread_name="group",
        kernel_name="gemma2_attention_decode",
        compiler_params=build.compiler,
        interpret=build.interpret,
    )


class _Block:
    """One block: its share of the tiles that a row visits in a key head.

    The age of a slot is how many tokens were written after its own, 0 for the newest. The row sees the slots younger
    than `visible`: a run of slots that ends at the newest, starts in tile `first_tile`, and may go round the end of the
    cache.
    """

    def __init__(self, refs: Refs, scratch: Scratch, settings: _Settings):
        self.refs, self.scratch, self.settings = refs, scratch, settings
        T, S = settings.T, settings.S
        self.row, self.head, self.split = lax.axis_index("B"), lax.axis_index("K"), lax.axis_index("split")
        self.tiles = pl.cdiv(S, TILE)
        self.position = refs.position_B[self.row]
        self.window = jnp.clip(refs.window[0], 0, S)  # No slot is older than S.
        self.newest = lax.rem(jnp.maximum(self.position, 0), S)
        self.visible = jnp.minimum(jnp.minimum(self.window + (T - 1), self.position + 1), S)
        oldest = self.newest - self.visible + 1
        self.first_tile = lax.div(jnp.where(oldest < 0, oldest + S, oldest), TILE)
        count = lax.div(self.newest, TILE) - self.first_tile + 1
        # The newest and the oldest slot may share a tile.
        count = jnp.minimum(jnp.where(oldest < 0, count + self.tiles, count), self.tiles)
        count = jnp.where(self.visible <= 0, 0, count)
        self.begin = lax.div(count * self.split, settings.splits)
        self.end = lax.div(count * (self.split + 1), settings.splits)

    def run(self) -> None:
        pl.when(lax.axis_index("group") == 1)(self.load)
        pl.when(lax.axis_index("group") == 0)(self.compute)

    def first_slot(self, i: jax.Array) -> jax.Array:
        """The first slot of the i-th tile that the row visits."""
        tile = self.first_tile + i
        return jnp.where(tile >= self.tiles, tile - self.tiles, tile) * TILE

    def age(self, slot: jax.Array) -> jax.Array:
        """How many tokens were written after the one in the slot."""
        return jnp.where(slot > self.newest, self.newest - slot + self.settings.S, self.newest - slot)

    def load(self) -> None:
        """The work of the loader: K and V of the block's tiles in turn, into the ring, as places become free."""
        scratch, refs = self.scratch, self.refs
        places = scratch.ring_XSH.shape[0]

        @pl.loop(0, self.end - self.begin)
        def _load_tile(i):
            index = (self.row, self.head, pl.ds(self.first_slot(self.begin + i), TILE))
            for item, source in enumerate((refs.k_BKSH, refs.v_BKSH)):
                place = lax.rem(2 * i + item, places)

                @pl.when(2 * i + item >= places)
                def _wait(place=place):
                    plgpu.barrier_wait(scratch.freed_X.at[place])

                plgpu.copy_gmem_to_smem(source.at[index], scratch.ring_XSH.at[place], scratch.filled_X.at[place])

        # A GPU does not need this. The interpreter wants a warpgroup that waits at a barrier to see all its arrivals.
        @pl.loop(0, jnp.minimum(2 * (self.end - self.begin), places))
        def _drain(place):
            plgpu.barrier_wait(scratch.freed_X.at[place])

    def compute(self) -> None:
        """The work of the computing warpgroup: it writes the sum of exp(score) * V, transposed, and of exp(score)."""
        scratch, refs = self.scratch, self.refs
        R, H = scratch.q_RH.shape

        @pl.when(self.begin < self.end)
        def _load_queries():
            plgpu.copy_gmem_to_smem(refs.q_BKRH.at[self.row, self.head], scratch.q_RH, scratch.loaded)
            plgpu.barrier_wait(scratch.loaded)

        out_HR, total_SR = pl.run_scoped(self.loop_over_tiles, accumulator(H, R))
        scratch.out_HR[...] = out_HR
        scratch.total_R[...] = total_SR.sum(0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out_HR, refs.out_BKCHR.at[self.row, self.head, self.split])
        plgpu.copy_smem_to_gmem(scratch.total_R, refs.total_BKCR.at[self.row, self.head, self.split])
        plgpu.wait_smem_to_gmem(0)

    def loop_over_tiles(self, out_acc: Ref) -> tuple[jax.Array, jax.Array]:
        """Returns the sum of exp(score) * V, [H, R], and exp(score), [TILE, R], added up over the block's tiles."""
        R = self.scratch.q_RH.shape[0]
        zeros_SR = plgpu.layout_cast(jnp.zeros((TILE, R), jnp.float32), plgpu.Layout.WGMMA)
        total_SR = lax.fori_loop(0, self.end - self.begin, partial(self.attend_tile, out_acc), zeros_SR)
        return out_acc[...], total_SR

    def attend_tile(self, out_acc: Ref, i: jax.Array, total_SR: jax.Array) -> jax.Array:
        """Adds exp(score) * V of the block's i-th tile to the accumulator; returns the total with its exp(score)."""
        scratch = self.scratch
        places = scratch.ring_XSH.shape[0]
        slot = self.first_slot(self.begin + i)
        k_place, v_place = lax.rem(2 * i, places), lax.rem(2 * i + 1, places)
        weights_SR = self.compute_weights(slot, k_place).astype(jnp.bfloat16)
        scratch.weights_RS.transpose((1, 0))[...] = weights_SR
        plgpu.barrier_wait(scratch.filled_X.at[v_place])
        self.clear_unseen_values(slot, v_place)

        def add(_):
            v_SH = scratch.ring_XSH.at[v_place]
            plgpu.wgmma(out_acc, v_SH.transpose((1, 0)), scratch.weights_RS.transpose((1, 0)))
            plgpu.wgmma_wait(0)

        plgpu.commit_smem()
        # A new accumulator comes with a wgmma.fence. Products into an older one want one too: where it is missing,
        # ptxas puts it in and says so (C7519).
        pl.run_scoped(add, accumulator(TILE, 8))
        plgpu.barrier_arrive(scratch.freed_X.at[v_place])
        # The total is of the rounded weights, which are what multiplied V.
        return total_SR + weights_SR.astype(jnp.float32)

    def compute_weights(self, slot: jax.Array, k_place: jax.Array) -> jax.Array:
        """Returns exp(score), [TILE, R] float32, of the keys at a place of the ring, and frees it; 0 where unseen."""
        scratch, settings = self.scratch, self.settings
        R = scratch.q_RH.shape[0]

        def multiply(acc):
            plgpu.wgmma(acc, scratch.ring_XSH.at[k_place], scratch.q_RH.transpose((1, 0)))
            return acc[...]

        plgpu.barrier_wait(scratch.filled_X.at[k_place])
        product_SR = pl.run_scoped(multiply, accumulator(TILE, R))
        plgpu.barrier_arrive(scratch.freed_X.at[k_place])
        visible_SR = self.visible_slots(slot, R)
        # The softcap, in the factors of `_Settings`.
        weights_SR = jnp.exp2(jnp.tanh(product_SR * settings.tanh_factor) * settings.exp2_factor)
        return jnp.where(visible_SR, weights_SR, 0.0)

    def visible_slots(self, slot: jax.Array, R: int) -> jax.Array:
        """Whether each query sees each slot of the tile that starts at `slot`, bool [TILE, R]."""
        T, G, S = self.settings.T, self.settings.G, self.settings.S
        slot_SR = slot + plgpu.broadcasted_iota(jnp.int32, (TILE, R), 0, layout=plgpu.Layout.WGMMA)
        age_SR = self.age(slot_SR)
        if T == 1:
            visible_SR = age_SR < self.visible
        else:
            query_R = plgpu.broadcasted_iota(jnp.int32, (TILE, R), 1, layout=plgpu.Layout.WGMMA)
            query_age_SR = (T - 1) - lax.div(query_R, G)
            in_window_SR = (age_SR >= query_age_SR) & (age_SR < self.window + query_age_SR)
            visible_SR = in_window_SR & (age_SR <= self.position)
        if S % TILE:
            visible_SR &= slot_SR < S
        return visible_SR

    def clear_unseen_values(self, slot: jax.Array, v_place: jax.Array) -> None:
        """Sets values to 0 that no query of the row sees: a weight of 0 does not silence NaN."""
        S, scratch = self.settings.S, self.scratch
        H = scratch.q_RH.shape[1]
        # The slots of a tile get younger one by one, unless the newest slot is among them: ages start again after it.
        all_visible = (
            (slot + TILE <= S)
            & (self.age(slot) < self.visible)
            & ((self.age(slot + TILE - 1) < self.age(slot)) | (self.visible == S))
        )

        @pl.when(jnp.logical_not(all_visible))
        def _clear():
            for column in range(0, H, 64):
                v_SH = scratch.ring_XSH.at[v_place, :, pl.ds(column, 64)]
                slot_SH = slot + plgpu.broadcasted_iota(jnp.int32, (TILE, 64), 0, layout=plgpu.Layout.WGMMA)
                values_SH = plgpu.load(v_SH, layout=plgpu.Layout.WGMMA)
                visible_SH = (self.age(slot_SH) < self.visible) & (slot_SH < S)
                v_SH[...] = jnp.where(visible_SH, values_SH, jnp.bfloat16(0))
