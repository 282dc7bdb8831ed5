"""What the attention kernels share: which tiles are visited, how they are loaded, masked and multiplied.

Written for Mosaic GPU on Hopper. A block of threads is three warpgroups: two that compute and one that loads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a warpgroup's matrix product, and of one of its tiles
LOG2E = math.log2(math.e)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # a value for each row of a tile in registers
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of a kernel's tiles: what a block goes over, so many of them in shared memory at a time."""

    size: int  # keys, or of dK/dV queries
    stages: int
    v_stages: int = 0  # of values in dQ, which a step needs for a shorter time than its keys


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Those of each kernel, for one head width."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def padded(self) -> tuple[int, int]:
        """Queries and keys are padded to multiples of these."""
        return math.lcm(2 * ROWS, self.dkv.size), math.lcm(ROWS, self.forward.size, self.dq.size)


# Chosen for no registers spilled, and shared memory within the limit of a block: `python -m benchmarks.kernels`.
TILES = {
    64: Tiles(forward=Tile(size=128, stages=2), dq=Tile(size=128, stages=2, v_stages=2), dkv=Tile(size=64, stages=2)),
    128: Tiles(forward=Tile(size=128, stages=2), dq=Tile(size=64, stages=2, v_stages=2), dkv=Tile(size=64, stages=3)),
    256: Tiles(forward=Tile(size=64, stages=2), dq=Tile(size=64, stages=2, v_stages=1), dkv=Tile(size=64, stages=2)),
}


@dataclass(frozen=True, kw_only=True)
class Build:
    """How kernels are built; the defaults are for GPUs.

    Attributes:
      operand_in: where a matrix product finds a left operand that was computed. The interpreter has shared memory only.
      tanh: that of the GPU, with a relative error of 2^-11 by NVIDIA's documentation, or one made of exp.
      interpret: parameters of the interpreter, or None to compile.
    """

    operand_in: Literal["registers", "shared memory"] = "registers"
    tanh: Literal["approximate", "exact"] = "approximate"
    interpret: Any = None

    def space(self, shape: tuple[int, ...], dtype):
        """Scratch for `operand`."""
        return matrix(shape, dtype) if self.operand_in == "shared memory" else None

    def operand(self, x, space, warpgroup):
        """`x` as the left operand of a matrix product by a warpgroup, which has its part of the space."""
        if space is None:
            return x
        space = space.at[warpgroup]
        space[...] = x
        plgpu.commit_smem()
        return space

    @property
    def compiler(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(approx_math=self.tanh == "approximate")

    def kernel(self, body: Callable, name: str, scratch: Sequence, grid: dict[str, int], outputs):
        """The kernel of that body: a block of threads for each point of the grid, whose first axis changes fastest."""
        return plgpu.kernel(
            body,
            out_type=outputs,
            scratch_types=scratch,
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=3,
            thread_name="warpgroup",
            compiler_params=self.compiler,
            interpret=self.interpret,
            kernel_name=name,
        )


GPU = Build()


def matrix(shape: tuple[int, ...], dtype):
    """Shared memory for matrices [..., rows, columns], laid out as the tensor cores want their operands."""
    columns = 128 // jnp.dtype(dtype).itemsize
    tiled = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]  (it is not abstract)
    return plgpu.SMEM(shape, dtype, transforms=(tiled, plgpu.SwizzleTransform(128)))  # pyright: ignore[reportAbstractUsage]


def accumulator(rows: int, columns: int):
    """Registers for a warpgroup's matrix product, float32, of zeros."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def tile_bounds(first, last, rows: int, size: int):
    """Which tiles a run of rows visits, and which of these need no mask.

    Args:
      first, last: int32 [B, T], the interval that each row sees; none, where the last is before the first.
      rows: a run; it divides T.
      size: of a tile.

    Returns:
      int32 [B, T / rows, 4], ascending: from the first number to the last are the tiles that any row sees, from the
      second to the third those that all rows see whole.
    """
    first, last = (x.reshape(x.shape[0], -1, rows) for x in (first, last))
    none = first > last
    end = jnp.where(none, -1, last).max(-1) // size + 1
    start = jnp.minimum(jnp.where(none, jnp.iinfo(jnp.int32).max, first).min(-1) // size, end)
    clean = jnp.clip(-(-first.max(-1) // size), start, end)
    masked = jnp.clip((last.min(-1) + 1) // size, clean, end)
    return jnp.stack([start, clean, masked, end], axis=-1).astype(jnp.int32)


def visit_tiles(bounds: Sequence, body: Callable, carry=0):
    """`body(number, carry, edge=...)` for the tiles of `tile_bounds`; `edge` says that they need a mask."""
    start, clean, masked, end = bounds
    carry = jax.lax.fori_loop(start, clean, partial(body, edge=True), carry)
    carry = jax.lax.fori_loop(clean, masked, partial(body, edge=False), carry)
    return jax.lax.fori_loop(masked, end, partial(body, edge=True), carry)


@dataclass(frozen=True)
class Ring:
    """Shared memory for a few tiles at a time: [stages, rows, columns], and for each whether it came and was used."""

    tiles: Any
    arrived: Any
    released: Any

    @staticmethod
    def scratch(stages: int, space, users: int = 2) -> tuple:
        """What a ring is made of, whose tiles so many warpgroups use."""
        return space, plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_barriers=stages, num_arrivals=users)

    @property
    def stages(self) -> int:
        return self.arrived.shape[0]

    def slot(self, number):
        """Where the tile of that number, counted from 0, is put."""
        return jax.lax.rem(number, self.stages)

    def wait(self, number):
        """The tile of that number, when it has come."""
        plgpu.barrier_wait(self.arrived.at[self.slot(number)])
        return self.tiles.at[hide_from_hoisting(self.slot(number))]

    def release(self, number):
        """Says that this warpgroup needs the tile no more."""
        plgpu.barrier_arrive(self.released.at[self.slot(number)])


def claim_registers() -> None:
    """Takes the registers for a warpgroup that computes: two of 240 and one of 24 are what a multiprocessor has."""
    plgpu.set_max_registers(240, action="increase")


def load_tiles(count, *rings: tuple[Ring, Callable]) -> None:
    """Loads `count` tiles into each ring, `source(number)` of those given with it, as places become free.

    It ends when all have been used: a barrier must not go while others arrive there. The warpgroup that does this
    leaves its registers to those that compute (`claim_registers`).
    """
    plgpu.set_max_registers(24, action="decrease")
    most = max(ring.stages for ring, _ in rings)

    @pl.loop(0, count + most)
    def _(number):
        for ring, source in rings:
            place = ring.slot(number)
            waits = number >= ring.stages
            if ring.stages < most:
                waits &= number < count + ring.stages
            pl.when(waits)(partial(plgpu.barrier_wait, ring.released.at[place]))

            @pl.when(number < count)
            def _(ring=ring, source=source, place=place):
                plgpu.copy_gmem_to_smem(source(number), ring.tiles.at[place], ring.arrived.at[place])


def hide_from_hoisting(number):
    """The same number, as if it were another each time: what is computed from it, such as the many addresses that a
    matrix product takes, is then computed where it is used, rather than held in registers all along a loop.
    """
    return jax.lax.optimization_barrier(number)


class Queries:
    """The part of a block that goes over the keys of some queries, read inside its kernel.

    The two computing warpgroups have the same 64 queries of two heads with one key/value head, which is loaded once for
    both; or, where such heads are not in pairs, 128 queries of one head.
    """

    def __init__(self, q_ref, k_ref, bounds_ref):
        T, N, K = q_ref.shape[1], q_ref.shape[2], k_ref.shape[2]
        rows, pairs = Queries.block_rows(N, K), Queries.has_head_pairs(N, K)
        self.warpgroup, self.b = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("row")
        # The longest first: late queries see the most keys.
        run = T // rows - 1 - jax.lax.axis_index("queries")
        head = jax.lax.axis_index("heads") * (2 if pairs else 1)
        self.head = head + self.warpgroup if pairs else head
        self.rows = pl.ds(run * rows + (0 if pairs else self.warpgroup * ROWS), ROWS)
        self.kv_head = head // (N // K)
        self.tiles = tuple(bounds_ref[self.b, run, at] for at in range(4))
        self.start, self.end = self.tiles[0], self.tiles[3]

    @staticmethod
    def has_head_pairs(heads: int, kv_heads: int) -> bool:
        return heads // kv_heads % 2 == 0

    @staticmethod
    def block_rows(heads: int, kv_heads: int) -> int:
        """Queries that a block has."""
        return ROWS if Queries.has_head_pairs(heads, kv_heads) else 2 * ROWS

    @staticmethod
    def grid(q_BTNH, k_BSKH) -> dict[str, int]:
        B, T, N, _ = q_BTNH.shape
        K = k_BSKH.shape[2]
        return {
            "heads": N // (2 if Queries.has_head_pairs(N, K) else 1),
            "queries": T // Queries.block_rows(N, K),
            "row": B,
        }

    def load(self, size: int, *rings: tuple[Ring, Any]) -> None:
        """The third warpgroup loads the tiles of `size` keys, of what each ring is given with, [B, S, K, H]."""

        def source(ref, number):
            return ref.at[self.b, pl.ds((self.start + number) * size, size), self.kv_head]

        @pl.when(self.warpgroup == 2)
        def _():
            load_tiles(self.end - self.start, *((ring, partial(source, ref)) for ring, ref in rings))


def mask_interval(x, first_ref, last_ref, start):
    """`x`, [rows, columns], where its column, counted from `start`, is in the interval of its row, and else 0."""
    first, last = (
        broadcast_rows(plgpu.load(ref, layout=BY_ROW, optimized=False), x.shape[1]) for ref in (first_ref, last_ref)
    )
    at = start + plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where((first <= at) & (at <= last), x, 0)


def broadcast_rows(x, columns: int):
    """A value for each row, [rows], for each column too: [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def broadcast_columns(x, rows: int):
    """A value for each column, [columns], for each row too: [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def matrix_product(a, b):
    """a @ b by this warpgroup, float32, when it is there."""

    def run(out):
        plgpu.wgmma(out, a, b)
        return out[...]

    return pl.run_scoped(run, accumulator(a.shape[0], b.shape[1]))
