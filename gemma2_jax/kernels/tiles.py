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

    def operand(self, x, space):
        """`x` as the left operand of a matrix product."""
        if space is None:
            return x
        space[...] = x
        plgpu.commit_smem()
        return space

    def kernel(self, body: Callable, name: str, scratch: Sequence, grid: dict[str, int], outputs: Sequence):
        """The kernel of that body, with a block of threads for each point of the grid, the first axis changing fastest."""
        return plgpu.kernel(
            body,
            out_type=outputs,
            scratch_types=scratch,
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=3,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=self.tanh == "approximate"),
            interpret=self.interpret,
            kernel_name=name,
        )


def matrix(shape: tuple[int, ...], dtype):
    """Shared memory for matrices [..., rows, columns], laid out as the tensor cores want their operands."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def bounds(first, last, rows: int, size: int):
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


def over_tiles(numbers: Sequence, body: Callable, carry=0, times: int = 1):
    """`body(number, carry, edge=...)` for the tiles of `bounds`, each `times` times; `edge`: it needs a mask."""
    start, clean, masked, end = (number * times for number in numbers)
    carry = jax.lax.fori_loop(start, clean, partial(body, edge=True), carry)
    carry = jax.lax.fori_loop(clean, masked, partial(body, edge=False), carry)
    return jax.lax.fori_loop(masked, end, partial(body, edge=True), carry)


@dataclass(frozen=True)
class Ring:
    """Shared memory for a few tiles at a time: [stages, rows, columns], and for each whether it came and was used."""

    tiles: Any
    came: Any
    used: Any

    @staticmethod
    def scratch(stages: int, space, copies: int = 1) -> tuple:
        """What a ring is made of; `copies` fill a place, two warpgroups use it."""
        return (
            space,
            plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        )

    @property
    def stages(self) -> int:
        return self.came.shape[0]

    def place(self, number):
        """Where the tile of that number, counted from 0, is put."""
        return jax.lax.rem(number, self.stages)

    def wait(self, number):
        """The tile of that number, when it has come."""
        plgpu.barrier_wait(self.came.at[self.place(number)])
        return self.tiles.at[anew(self.place(number))]

    def done(self, number):
        """Says that this warpgroup needs the tile no more."""
        plgpu.barrier_arrive(self.used.at[self.place(number)])


def load(count, *rings: tuple[Ring, Callable]) -> None:
    """Loads `count` tiles into each ring, `source(number)` of those given with it, as places become free.

    It ends when all have been used: a barrier must not go while others arrive there.
    """
    most = max(ring.stages for ring, _ in rings)

    @pl.loop(0, count + most)
    def _(number):
        for ring, source in rings:
            place = ring.place(number)
            waits = number >= ring.stages
            if ring.stages < most:
                waits &= number < count + ring.stages
            pl.when(waits)(partial(plgpu.barrier_wait, ring.used.at[place]))

            @pl.when(number < count)
            def _(ring=ring, source=source, place=place):
                plgpu.copy_gmem_to_smem(source(number), ring.tiles.at[place], ring.came.at[place])


def anew(number):
    """The same number, as if it were another each time: what is computed from it, such as the many addresses that a
    matrix product takes, is then computed where it is used, rather than held in registers all along a loop.
    """
    return jax.lax.optimization_barrier(number)


def interval(first_ref, last_ref, columns: int):
    """The intervals of a tile's rows, each as wide as the tile, int32 [rows, columns]."""
    return tuple(wide(plgpu.load(ref, layout=BY_ROW, optimized=False), columns) for ref in (first_ref, last_ref))


def within(x, seen: tuple, start):
    """`x`, [rows, columns], where its column, counted from `start`, is in its row's interval, else 0."""
    first, last = seen
    at = start + plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where((first <= at) & (at <= last), x, 0)


def wide(x, columns: int):
    """A value for each row, [rows], for each column too: [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def tall(x, rows: int):
    """A value for each column, [columns], for each row too: [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def product(a, b):
    """a @ b by this warpgroup, float32, when it is there."""

    def run(out):
        plgpu.wgmma(out, a, b)
        return out[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
