"""Every legal tile of the attention kernels, compiled for an H100 that is not there: registers, spills, shared memory.

    python -m benchmarks.tiles [--width 256] [--direction dq]

`gemma2_jax.kernels.tile_sizes` has the rules by which tiles are legal. Here ptxas says what it makes of each. Nothing
is timed: `python -m gemma2_jax.check --tune` does that, on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import kernels, machine_code
from benchmarks.options import make_parser
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.kernels.tile_sizes import (
    DIRECTIONS,
    TILES,
    Direction,
    Tile,
    count_registers,
    count_shared,
    list_legal,
)
from gemma2_jax.planning import described_cluster

if TYPE_CHECKING:
    from benchmarks.machine_code import Kernel

LENGTH = 512
COLUMNS = (
    "width",
    "kernel",
    "tile",
    "registers by the rule",
    "spilled",
    "shared by the rule",
    "shared",
    "blocks",
    "warnings",
)


def make_shape(width: int) -> Shape:
    """The smallest attention of Gemma 2 with heads of that width: two query heads of one key/value head."""
    return replace(SHAPES["2b"], heads=2, kv_heads=1, width=width, scale=width**-0.5)


def compile_tile(width: int, direction: Direction, tile: Tile) -> Kernel:
    """Compiles the kernel of a direction with that tile; see `machine_code.compile_kernels`."""
    shape = make_shape(width)
    if direction == "decode":
        return kernels.compile_decode(shape, tiles=replace(TILES[width], decode=tile))
    from gemma2_jax.kernels.tiles import GPU, Settings

    settings = Settings(scale=shape.scale, softcap=shape.softcap, build=GPU)
    (kernel,) = machine_code.compile_kernels(
        lambda inputs, cotangents: kernels.run_kernel(direction, inputs, cotangents, settings, tile),
        *kernels.describe_operands(shape, LENGTH),
    )
    return kernel


def main() -> None:
    parser = make_parser("tiles", __doc__)
    parser.add_argument("--width", type=int, choices=list(TILES), help="of heads; all unless it is given")
    parser.add_argument("--direction", choices=DIRECTIONS, help="the kernel; all unless it is given")
    options = parser.parse_args()
    described_cluster.prepare_jax()
    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table(box=box.MARKDOWN)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for width in [options.width] if options.width else TILES:
        for direction in [options.direction] if options.direction else DIRECTIONS:
            for tile in list_legal(width, direction):
                print(f"compiling width {width}, {direction}, {tile}", file=sys.stderr)
                kernel = compile_tile(width, direction, tile)
                table.add_row(
                    *(str(width), direction, str(tile), str(count_registers(width, direction, tile))),
                    f"{kernel.spill_stores + kernel.spill_loads:,}",
                    *(f"{size:,}" for size in (count_shared(width, direction, tile), kernel.shared)),
                    str(kernel.blocks_per_sm),
                    ", ".join(kernel.warnings) or "none",
                )
    console.print(table)


if __name__ == "__main__":
    main()
