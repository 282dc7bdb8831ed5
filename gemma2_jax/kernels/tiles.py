"""What the attention kernels share: which tiles are visited, how they are loaded, masked and multiplied.

The kernels are written for Mosaic GPU on Hopper. A block of threads of the forward and backward kernels is three
warpgroups, of 128 threads each: two compute, and the third loads tiles by TMA (the Tensor Memory Accelerator, which
copies from global to shared memory while the threads go on). The loader and the computing warpgroups meet only at
barriers in shared memory, two for each place of a `Ring`:

    loader (warpgroup 2)                   a computing warpgroup (0 or 1)
    --------------------                   ------------------------------
    wait released[place]  <--------------  arrive released[place]    (`Ring.release`: the tile was read)
    copy tile to place
      ... TMA arrives at arrived[place] -> wait arrived[place]       (`Ring.wait`: the tile is there)
                                           multiply it (wgmma, asynchronous)

A matrix product (wgmma) is asynchronous too: it is issued, and `plgpu.wgmma_wait(n)` waits until at most `n` of those
issued are not done. A tile may be released only when the product that reads it is known to be done, so that the
kernels release a tile one product later than they use it: the tensor cores always have a product at hand.

Every kernel declares its shared memory in one way: a dataclass `Scratch`, registered as a pytree, whose `types` gives
what to allocate and which the kernel gets back, as its last argument, with references in place of the types. Shared
memory is laid out in the order of the fields.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels.tile_sizes import ROWS, TILES, Tiles

# A reference to an array, or to barriers, in global or shared memory or in registers, as Pallas hands it to a kernel;
# in a `Scratch` before it is allocated, the type that is asked for. Pallas has no public type for them.
type Ref = Any

COMPUTING_WARPGROUPS = 2
LOADING_WARPGROUP = 2  # The number of the third warpgroup; those that compute have the numbers 0 and 1.
LOG2E = math.log2(math.e)
# The layouts in registers of one value for each row, and for each column, of a tile.
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True, kw_only=True)
class Build:
    """How kernels are built; the defaults are for GPUs.

    Attributes:
      operand_in: where a matrix product finds a left operand that was computed. The interpreter has shared memory only.
      tanh: "approximate" is the GPU's instruction, with a relative error of 2^-11 by NVIDIA's documentation; "exact" is
        computed from exp.
      interpret: parameters of the interpreter, or None to compile.
      tiles: what the kernels loop over; None for the built-in ones of the head width.
    """

    operand_in: Literal["registers", "shared memory"] = "registers"
    tanh: Literal["approximate", "exact"] = "approximate"
    interpret: Any = None
    tiles: Tiles | None = None

    def select_tiles(self, width: int) -> Tiles:
        """What the kernels loop over, for heads of that width."""
        return self.tiles or TILES[width]

    def operand_type(self, shape: tuple[int, ...], dtype) -> Ref | None:
        """The scratch that `place_operand` needs: None where operands stay in registers."""
        return operand_memory(shape, dtype) if self.operand_in == "shared memory" else None

    def place_operand(self, x: jax.Array, memory: Ref | None, warpgroup: jax.Array) -> Any:
        """Returns `x`, or a copy of it in the warpgroup's part of the memory, as a left operand of a matrix product."""
        if memory is None:
            return x
        operand: Ref = memory.at[warpgroup]
        operand[...] = x
        plgpu.commit_smem()
        return operand

    @property
    def compiler(self) -> plgpu.CompilerParams:
        """The parameters of the compiler: None would mean different ones in different versions of JAX."""
        return plgpu.CompilerParams(approx_math=self.tanh == "approximate")

    def kernel(self, body: Callable, name: str, scratch: Any, grid: dict[str, int], outputs: Any) -> Callable:
        """Makes a kernel that runs `body` in a block of three warpgroups for each point of the grid.

        Args:
          body: takes a `Ref` for each operand and each result, in global memory, and then the scratch.
          name: of the kernel, in profiles and in machine code.
          scratch: the `types` of the kernel's `Scratch`.
          grid: the size of each axis by its name; the first changes fastest.
          outputs: a `jax.ShapeDtypeStruct`, or a tuple of them.
        """
        return plgpu.kernel(
            body,
            out_type=outputs,
            scratch_types=(scratch,),
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=COMPUTING_WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=self.compiler,
            interpret=self.interpret,
            kernel_name=name,
        )


GPU = Build()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the forward and backward kernels of one attention have in common; it is hashable.

    Attributes:
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap).
      build: how the kernels are built.
    """

    scale: float
    softcap: float
    build: Build

    def softcap_tanh(self, products: jax.Array) -> jax.Array:
        """Returns tanh(scale * q.k / softcap) for products q.k: the softcap of attention scores, but for its factor."""
        return jnp.tanh(products * (self.scale / self.softcap))

    @property
    def exp2_factor(self) -> float:
        """The factor that turns `softcap_tanh` into scores to base 2, as exp2 takes them."""
        return self.softcap * LOG2E


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What attention is computed from, padded to whole tiles.

    Attributes:
      q_BTNH, k_BSKH, v_BSKH: bfloat16.
      first_BT, last_BT: int32, the first and the last key that each query sees; neither descends along a row.
    """

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    first_BT: jax.Array
    last_BT: jax.Array


def operand_memory(shape: tuple[int, ...], dtype) -> Ref:
    """The type of shared memory for matrices [..., rows, columns], laid out as the tensor cores want their operands."""
    columns = 128 // jnp.dtype(dtype).itemsize
    tiled = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]  (it is not abstract)
    return plgpu.SMEM(shape, dtype, transforms=(tiled, plgpu.SwizzleTransform(128)))  # pyright: ignore[reportAbstractUsage]


def accumulator(rows: int, columns: int) -> Ref:
    """The type of registers for a warpgroup's matrix product, float32, which start as zeros."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def tile_bounds(first_BT: jax.Array, last_BT: jax.Array, rows: int, size: int) -> jax.Array:
    """Computes which tiles each run of rows visits, and which of these need no mask.

    Args:
      first_BT, last_BT: int32, the interval that each row sees; it is empty where the last is before the first.
      rows: the length of a run; it divides T.
      size: the length of a tile.

    Returns:
      int32 [B, T / rows, 4]: for each run four tile numbers `start <= clean <= masked <= end`. Tiles start ... end - 1
      are visited: the others are seen by no row of the run. Of those, tiles clean ... masked - 1 need no mask: every
      row of the run sees the whole of them.
    """
    first, last = (x.reshape(x.shape[0], -1, rows) for x in (first_BT, last_BT))
    empty = first > last
    end = jnp.where(empty, -1, last).max(-1) // size + 1
    start = jnp.minimum(jnp.where(empty, jnp.iinfo(jnp.int32).max, first).min(-1) // size, end)
    clean = jnp.clip(-(-first.max(-1) // size), start, end)
    masked = jnp.clip((last.min(-1) + 1) // size, clean, end)
    return jnp.stack([start, clean, masked, end], axis=-1).astype(jnp.int32)


def visit_tiles(bounds: Sequence, body: Callable, carry: Any = 0) -> Any:
    """Runs `body(tile, carry, needs_mask=...)` for each tile of `tile_bounds`, and returns the last carry.

    These are three loops, since tiles of three kinds follow each other: at the edge of the window, without a mask, and
    at the diagonal. A tile with a mask takes up to 1.7 times the instructions of one without.
    """
    start, clean, masked, end = bounds
    carry = jax.lax.fori_loop(start, clean, partial(body, needs_mask=True), carry)
    carry = jax.lax.fori_loop(clean, masked, partial(body, needs_mask=False), carry)
    return jax.lax.fori_loop(masked, end, partial(body, needs_mask=True), carry)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """A ring buffer in shared memory: places for a few tiles, which the loader fills in turn.

    Attributes:
      tiles: the places, [stages, rows, columns] or [stages, rows].
      arrived: a barrier for each place, which TMA completes when the tile is there.
      released: a barrier for each place, which the warpgroups that use the tile complete when they need it no more.
    """

    tiles: Ref
    arrived: Ref
    released: Ref

    @classmethod
    def types(cls, stages: int, tiles: Ref, users: int = COMPUTING_WARPGROUPS) -> Self:
        """What to allocate for a ring of `stages` places, each of whose tiles `users` warpgroups use."""
        return cls(tiles, plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_barriers=stages, num_arrivals=users))

    @property
    def stages(self) -> int:
        return self.arrived.shape[0]

    def slot(self, number: jax.Array) -> jax.Array:
        """The place of the tile of that number, int32; tiles are numbered from 0 in the order of loading."""
        return jax.lax.rem(number, self.stages)

    def wait(self, number: jax.Array) -> Ref:
        """Waits for the tile of that number, and returns it."""
        plgpu.barrier_wait(self.arrived.at[self.slot(number)])
        return self.tiles.at[hide_from_hoisting(self.slot(number))]

    def release(self, number: jax.Array) -> None:
        """Says that this warpgroup needs the tile of that number no more."""
        plgpu.barrier_arrive(self.released.at[self.slot(number)])


def claim_registers() -> None:
    """Takes the registers that a computing warpgroup needs: a multiprocessor has enough for 2 x 240 and 24 a thread."""
    plgpu.set_max_registers(240, action="increase")


def load_tiles(count: jax.Array, *rings: tuple[Ring, Callable]) -> None:
    """Loads `count` tiles into each ring, as its places become free; this is all that the loading warpgroup does.

        trip     0        1        2        3        ...  count-1            count ...      (a ring of two stages)
        waits    -        -        tile 0   tile 1        tile count-3       tile count-2 ...
        loads    tile 0   tile 1   tile 2   tile 3        tile count-1       -

    The trips after `count` load nothing. They wait until every tile was released, since the block's shared memory must
    exist until the last warpgroup has arrived at the barriers in it. A ring with fewer stages than the longest ends its
    waits earlier. The loader leaves its registers to the warpgroups that compute (`claim_registers`).

    Args:
      count: int32 scalar.
      rings: each with a function of a tile's number, counted from 0, that returns a `Ref` to it in global memory.
    """
    plgpu.set_max_registers(24, action="decrease")
    max_stages = max(ring.stages for ring, _ in rings)

    @pl.loop(0, count + max_stages)
    def _load_trip(number):
        for ring, source in rings:
            slot = ring.slot(number)
            reused = number >= ring.stages
            if ring.stages < max_stages:
                reused &= number < count + ring.stages
            pl.when(reused)(partial(plgpu.barrier_wait, ring.released.at[slot]))

            @pl.when(number < count)
            def _load(ring=ring, source=source, slot=slot):
                plgpu.copy_gmem_to_smem(source(number), ring.tiles.at[slot], ring.arrived.at[slot])


def hide_from_hoisting(number: jax.Array) -> jax.Array:
    """Returns the same number, in a way that makes the compiler treat it as a new one in each trip of a loop.

    A wgmma finds an operand in shared memory by descriptors, 64-bit words computed from its address, one for each 16
    steps of the inner dimension. Where the address is the same in every trip, as for queries that stay while keys pass
    by, the compiler hoists the descriptors out of the loop and holds them all in registers. With an accumulator of 64 x
    256 there is no room: dQ at head width 256 spills. An index that went through an optimization barrier cannot be
    hoisted, so that descriptors are computed where they are used, which takes a few integer instructions beside a
    matrix product.

    It is needed wherever a loop multiplies from shared memory whose place is known before the loop: the queries and
    gradients of dQ, the keys and values of dK/dV, and the places of every `Ring`, which are few enough to be unrolled.
    The forward kernel has registers enough to keep the descriptors of its queries.
    """
    return jax.lax.optimization_barrier(number)


class Queries:
    """The queries of a block that loops over keys: what each warpgroup reads off the grid, inside its kernel.

    The two computing warpgroups have the same 64 queries of two heads that share a key/value head, which is loaded once
    for both:

        warpgroup 0: queries i ... i+63 of head 2h    \\
                                                       } one ring of keys and one of values, of key/value head h
        warpgroup 1: queries i ... i+63 of head 2h+1  /

    Where the query heads of a key/value head are not in pairs, they have 128 queries of one head between them.

    Attributes:
      warpgroup: int32 scalar, 0 or 1 for those that compute and 2 for the loader.
      batch: the row of the batch, int32 scalar.
      head, kv_head: the warpgroup's query head and the block's key/value head, int32 scalars.
      rows: the slice of T that is the warpgroup's.
      bounds: the block's four `tile_bounds`, int32 scalars; `start` and `end` are the first and last of them.
    """

    def __init__(self, q_BTNH: Ref, k_BSKH: Ref, bounds: Ref):
        T, N, K = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
        rows, pairs = Queries.block_rows(N, K), Queries.has_head_pairs(N, K)
        self.warpgroup, self.batch = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        # The longest blocks come first, so that the short ones fill up the end: late queries see the most keys.
        run = T // rows - 1 - jax.lax.axis_index("queries")
        head = jax.lax.axis_index("heads") * (2 if pairs else 1)
        self.head = head + self.warpgroup if pairs else head
        self.rows = pl.ds(run * rows + (0 if pairs else self.warpgroup * ROWS), ROWS)
        self.kv_head = head // (N // K)
        self.bounds = tuple(bounds[self.batch, run, number] for number in range(4))
        self.start, self.end = self.bounds[0], self.bounds[3]

    @staticmethod
    def has_head_pairs(heads: int, kv_heads: int) -> bool:
        """Whether the query heads of a key/value head can be taken two at a time."""
        return heads // kv_heads % 2 == 0

    @staticmethod
    def block_rows(heads: int, kv_heads: int) -> int:
        """How many query positions a block has."""
        return ROWS if Queries.has_head_pairs(heads, kv_heads) else 2 * ROWS

    @staticmethod
    def grid(q_BTNH: jax.Array, k_BSKH: jax.Array) -> dict[str, int]:
        """The grid of a kernel whose blocks have queries, for `Build.kernel`."""
        B, T, N, _ = q_BTNH.shape
        K = k_BSKH.shape[2]
        return {
            "heads": N // (2 if Queries.has_head_pairs(N, K) else 1),
            "queries": T // Queries.block_rows(N, K),
            "row": B,
        }

    @staticmethod
    def tile_bounds(inputs: Inputs, size: int) -> jax.Array:
        """The `tile_bounds` of every block, for tiles of so many keys."""
        N, K = inputs.q_BTNH.shape[2], inputs.k_BSKH.shape[2]
        return tile_bounds(inputs.first_BT, inputs.last_BT, Queries.block_rows(N, K), size)

    def load_keys(self, size: int, *rings: tuple[Ring, Ref]) -> None:
        """Has the loader load tiles of `size` keys into each ring, from the array [B, S, K, H] given with that ring."""

        def find_tile(array_BSKH, number):
            return array_BSKH.at[self.batch, pl.ds((self.start + number) * size, size), self.kv_head]

        @pl.when(self.warpgroup == LOADING_WARPGROUP)
        def _load():
            load_tiles(self.end - self.start, *((ring, partial(find_tile, array)) for ring, array in rings))


def mask_interval(x: jax.Array, first: Ref, last: Ref, start: jax.Array) -> jax.Array:
    """Sets to 0 what is outside the interval of its row.

    Args:
      x: [rows, columns], in the layout of a matrix product.
      first, last: int32 [rows] in global memory, the interval of columns that each row keeps.
      start: int32 scalar, the number of the first column of `x`.
    """
    first_RC, last_RC = (
        broadcast_rows(plgpu.load(ref, layout=BY_ROW, optimized=False), x.shape[1]) for ref in (first, last)
    )
    column_RC = start + plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where((first_RC <= column_RC) & (column_RC <= last_RC), x, 0)


def broadcast_rows(x: jax.Array, columns: int) -> jax.Array:
    """Repeats a value for each row, [rows], in every column: [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def broadcast_columns(x: jax.Array, rows: int) -> jax.Array:
    """Repeats a value for each column, [columns], in every row: [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def matrix_product(a: Ref, b: Ref) -> jax.Array:
    """Computes a @ b in this warpgroup, float32, and waits for it."""

    def multiply(out_acc):
        plgpu.wgmma(out_acc, a, b)
        return out_acc[...]

    return pl.run_scoped(multiply, accumulator(a.shape[0], b.shape[1]))
