"""The tiles that the kernels loop over: the built-in ones, and the legal ones that can be timed on a device.

Which are legal follows from what a block may have on sm_90, and `python -m benchmarks.tiles` compiles each of them.
`Build.select_tiles` (in `tiles`) says which a kernel takes. This can be read without importing the kernels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Literal

type Direction = Literal["forward", "dq", "dkv", "decode"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "dq", "dkv", "decode")

ROWS = 64  # Rows of one matrix product of a warpgroup, and so of one of its tiles.
# What a block of threads may have on sm_90 (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"), and the registers that a thread of a warpgroup that computes takes.
SHARED_BYTES, REGISTERS = 232_448, 240
_OTHER_REGISTERS = 30  # of addresses, counters, row sums and intervals
_ALIGNMENT = 1024  # bytes, of a tile that TMA writes with a swizzle of 128 bytes
_SUM_BYTES = 2048  # that Mosaic takes where a kernel sums over rows or columns
_BARRIER_BYTES = 512  # of all barriers, or more
# A tile is contracted over its size: by at least the 64 numbers of bfloat16 that 128 bytes hold.
_SIZES, _STAGES = (64, 128), (2, 3, 4)
_DECODE_PLACES = (2, 3, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The tiles that a kernel loops over.

    Attributes:
      size: keys of a tile; in dK/dV, queries; in decoding, slots.
      stages: tiles of each ring that shared memory holds at a time; decoding has one ring for keys and values.
      v_stages: stages of the ring of values in dQ, where a step needs its values for a shorter time than its keys.
    """

    size: int
    stages: int
    v_stages: int = 0

    def __str__(self) -> str:
        return f"{self.size} x {self.stages}" + (f"+{self.v_stages}" if self.v_stages else "")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of each kernel, for one head width."""

    forward: Tile
    dq: Tile
    dkv: Tile
    decode: Tile

    @property
    def padded(self) -> tuple[int, int]:
        """The numbers to whose multiples queries and keys are padded."""
        return math.lcm(2 * ROWS, self.dkv.size), math.lcm(ROWS, self.forward.size, self.dq.size)

    def __str__(self) -> str:
        return ", ".join(f"{direction} {getattr(self, direction)}" for direction in DIRECTIONS)


# By head width. With these no register is spilled, and shared memory is within the limit of a block: see
# `python -m benchmarks.kernels`. In decoding up to 8 rows leave room for two blocks in a multiprocessor: one computes
# or begins while the other loads.
TILES = {
    64: Tiles(
        forward=Tile(size=128, stages=2),
        dq=Tile(size=128, stages=2, v_stages=2),
        dkv=Tile(size=64, stages=2),
        decode=Tile(size=64, stages=12),
    ),
    128: Tiles(
        forward=Tile(size=128, stages=2),
        dq=Tile(size=64, stages=2, v_stages=2),
        dkv=Tile(size=64, stages=3),
        decode=Tile(size=64, stages=6),
    ),
    256: Tiles(
        forward=Tile(size=64, stages=2),
        dq=Tile(size=64, stages=2, v_stages=1),
        dkv=Tile(size=64, stages=2),
        decode=Tile(size=64, stages=3),
    ),
}


@cache
def list_legal(width: int, direction: Direction) -> tuple[Tile, ...]:
    """The tiles of a direction that a block on sm_90 has room for; the built-in one is the first."""
    built_in = getattr(TILES[width], direction)
    fitting = (
        tile
        for tile in _list_tiles(direction)
        if count_registers(width, direction, tile) <= REGISTERS and count_shared(width, direction, tile) <= SHARED_BYTES
    )
    return built_in, *(tile for tile in fitting if tile != built_in)


def _list_tiles(direction: Direction) -> Iterator[Tile]:
    """Tiles of all sizes. Two stages are the least with which a tile is loaded while another is multiplied."""
    if direction == "decode":
        yield from (Tile(size=ROWS, stages=places) for places in _DECODE_PLACES)
        return
    for size in _SIZES:
        for stages in _STAGES:
            for v_stages in (1, stages) if direction == "dq" else (0,):
                yield Tile(size=size, stages=stages, v_stages=v_stages)


def count_registers(width: int, direction: Direction, tile: Tile) -> int:
    """The registers that a thread of a computing warpgroup needs at once.

    A warpgroup has 128 threads, which share the float32 accumulator of its sum, [64, width], and as many more tiles
    [64, size] as a step holds at once: the scores and, in bfloat16, the operand made of them; backward also a second
    product beside what it is multiplied with.
    """
    if direction == "decode":  # the accumulator [width, 8] is small
        return _OTHER_REGISTERS + width * 8 // 128 + ROWS * 8 // 128
    scores = {"forward": 1.5, "dq": 2.5, "dkv": 2.5}[direction]
    return _OTHER_REGISTERS + int((width + scores * tile.size) * ROWS / 128)


def count_places(width: int, tile: Tile, queries: int) -> int:
    """How many tiles of a decoding kernel's ring there is room for beside so many queries of a key/value head."""
    places = tile.stages
    while places > 1 and count_shared(width, "decode", Tile(size=ROWS, stages=places), queries) > SHARED_BYTES:
        places -= 1
    return places


def count_shared(width: int, direction: Direction, tile: Tile, queries: int = 8) -> int:
    """Bytes of shared memory of a block, or a few more: its arrays, each aligned, and its barriers.

    `queries` are those of a key/value head in decoding.
    """
    rows, column = 2 * width, 4  # bytes of a row of a bfloat16 matrix, and of a float32
    ring, v_ring = tile.stages * tile.size * rows, tile.v_stages * tile.size * rows
    arrays = {
        "forward": [2 * ROWS * rows, 2 * ROWS * column, ring, ring],
        "dq": [2 * ROWS * rows, 2 * ROWS * rows, ring, v_ring],
        "dkv": [2 * ROWS * rows, ROWS * tile.size * column, *2 * (ring, tile.stages * tile.size * column)],
        # Sums, queries, the ring, totals and weights.
        "decode": [width * queries * column, queries * rows, ring, queries * column, queries * ROWS * 2],
    }[direction]
    summing = _SUM_BYTES if direction in ("forward", "decode") else 0
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in arrays) + summing + _BARRIER_BYTES


def read_tiles(content: Mapping[str, Mapping[str, int]], width: int) -> Tiles:
    """The tiles that `dataclasses.asdict` made a dictionary of. Raises ValueError where one is not legal."""
    tiles = {}
    for direction in DIRECTIONS:
        tiles[direction] = next(
            (tile for tile in list_legal(width, direction) if asdict(tile) == content[direction]), None
        )
        if tiles[direction] is None:
            raise ValueError(f"{direction} has no tiles {content[direction]} at head width {width}")
    return Tiles(**tiles)


def replace_tile(width: int, direction: Direction, tile: Tile) -> Tiles:
    """The built-in tiles of a head width, but for those of one direction."""
    return replace(TILES[width], **{direction: tile})
