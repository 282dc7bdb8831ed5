"""What is known of the attention kernels with no GPU at hand: their machine code, and the tiles that they visit.

    python -m benchmarks.kernels

Two tables. The first is read off kernels compiled for an H100 that is not there (`machine_code`), those that
`gemma2_jax.kernels.attention` has for each head width and direction, and beside them jax's own Mosaic attention, which
has no soft cap, no window and no packing. The second is counted in the very arrays that the kernels loop by: scores in
the tiles that a row of 8,192 tokens visits, over those that its queries see. Neither says anything of time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine_code
from benchmarks.machine_code import SHARED_PER_BLOCK, Kernel, Loop
from benchmarks.options import make_parser
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.planning import described_cluster

if TYPE_CHECKING:
    import numpy as np

    from gemma2_jax.kernels.backward import Cotangents
    from gemma2_jax.kernels.tile_sizes import Tile, Tiles
    from gemma2_jax.kernels.tiles import Inputs, Settings

LENGTH = 8192
ROWS = 64  # Rows of a warpgroup's matrix product.
DIRECTIONS = {"forward": "forward", "dq": "dQ", "dkv": "dK/dV"}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # Matrix products that a tile takes.

# Each of these has machine code of its own. Gemma 2 has two query heads to each key/value head; with tensor parallelism
# over more devices than key/value heads, a device has one of each. No Gemma 2 has a width of 64.
CASES = {
    "256": SHAPES["2b"],
    "256, one head": SHAPES["2b, tensor 8"],
    "128": SHAPES["27b"],
    "64": Shape(heads=8, kv_heads=4, width=64, scale=64**-0.5),
}
# For each kind of layer, the positions where the documents of a row start, and the window.
LAYERS = {
    "global": ((0,), LENGTH),
    "local": ((0,), 4096),
    "packed": (tuple(range(0, LENGTH, 1000)), LENGTH),
}


def compile_attention(shape: Shape, length: int = LENGTH) -> dict[str, Kernel]:
    """Compiles the kernels of `gemma2_jax.kernels.attention`, for one row of so many tokens.

    `described_cluster.prepare_jax` must be called before JAX is imported.

    Returns:
      The kernels by direction: "forward", "dq", "dkv".

    Raises:
      ImportError: without the extra `plan`.
    """
    import jax
    import jax.numpy as jnp

    from gemma2_jax.kernels.attention import attention

    def run_both_passes(q, k, v, first, last):
        def run_forward(q, k, v):
            return attention(q, k, v, first, last, scale=shape.scale, softcap=shape.softcap)

        results, pull = jax.vjp(run_forward, q, k, v)
        return results, pull(results)

    q, k = _describe_inputs(shape, length, jnp.bfloat16)
    ends = jax.ShapeDtypeStruct((1, length), jnp.int32)
    kernels = machine_code.compile_kernels(run_both_passes, q, k, k, ends, ends)
    return {kernel.name.removeprefix("gemma2_attention_"): kernel for kernel in kernels}


def compile_decode(shape: Shape, rows: int = 8, length: int = LENGTH, tiles: Tiles | None = None) -> Kernel:
    """Compiles the kernel of `gemma2_jax.kernels.decode`, for one token of each row and caches of so many tokens."""
    import jax
    import jax.numpy as jnp

    from gemma2_jax.kernels.decode import decode
    from gemma2_jax.kernels.tiles import Build

    def run(q, k, v, position):
        build = Build(tiles=tiles)
        return decode(q, k, v, position, length, scale=shape.scale, softcap=shape.softcap, build=build)

    q = jax.ShapeDtypeStruct((rows, 1, shape.heads, shape.width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, shape.kv_heads, length, shape.width), jnp.bfloat16)
    (kernel,) = machine_code.compile_kernels(run, q, k, k, jax.ShapeDtypeStruct((rows,), jnp.int32))
    return kernel


def compile_jax_attention(shape: Shape, length: int = LENGTH) -> dict[str, Kernel]:
    """Compiles jax's own Mosaic attention.

    Returns:
      The kernels by direction, and as "causal" the forward one with a causal mask; backward it cannot be causal.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # jax asks the CUDA runtime, which is not there, for its version; 12.9.1 is the version of ptxas.
    versions = SimpleNamespace(cuda_runtime_get_version=lambda: 12091)
    attention_mgpu.cuda_versions = versions  # pyright: ignore[reportPrivateImportUsage]

    def attention(q, k, v, causal: bool) -> jax.Array:
        return attention_mgpu.attention(q, k, v, attention_mgpu.TuningConfig(
            block_q=64, block_kv=64 if shape.width > 128 else 128, max_concurrent_steps=2, causal=causal,
            block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
        ))  # fmt: skip

    def run_both_passes(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, False), q, k, v)
        return out, pull(out)

    q, k = _describe_inputs(shape, length, jnp.float16)  # The backward pass takes nothing else.
    kernels = dict(zip(DIRECTIONS, machine_code.compile_kernels(run_both_passes, q, k, k), strict=True))
    (causal,) = machine_code.compile_kernels(lambda q, k, v: attention(q, k, v, True), q, k, k)
    return kernels | {"causal": causal}


def _describe_inputs(shape: Shape, length: int, dtype) -> list[Any]:
    """The shapes of queries, and of keys or values, of one row."""
    import jax

    return [jax.ShapeDtypeStruct((1, length, n, shape.width), dtype) for n in (shape.heads, shape.kv_heads)]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a warpgroup does for a tile of 64 x `columns` scores, in instructions of one warp for 64 x 64 of them.

    Attributes:
      columns: of the tile.
      clean: instructions for a tile without a mask.
      masked: instructions for a tile at the edge of the window and for one at the diagonal, in the order of the binary.
    """

    columns: int
    clean: float
    masked: tuple[float, ...]

    @property
    def ratio(self) -> float | None:
        """The ratio of the longest masked tile to a clean one; None where no tile is masked."""
        return max(self.masked) / self.clean if self.masked else None


def measure_work(kernel: Kernel, products: int, width: int) -> list[Work]:
    """Measures the work of each warpgroup whose loops differ: first of one that computes exponentials.

    Args:
      products: matrix products that a tile takes; warpgroups whose loops differ share them.
      width: head width.
    """
    kinds = [[loop for loop in kernel.tiles if bool(loop.opcodes.total("MUFU.EX2")) == exp] for exp in (True, False)]
    kinds = [loops for loops in kinds if loops]
    works = []
    for loops in kinds:
        columns = {count_multiplications(loop) // (products // len(kinds) * width * ROWS) for loop in loops}
        assert len(columns) == 1, f"loops of {kernel.name} over tiles of different sizes: {columns}"
        lengths = [loop.instructions * ROWS / max(columns) for loop in loops]
        clean = min(lengths)
        lengths.remove(clean)
        works.append(Work(columns=max(columns), clean=clean, masked=tuple(lengths)))
    return works


def count_multiplications(loop: Loop) -> int:
    """Counts the multiplications of a warpgroup by the tensor cores, in one trip of a loop."""
    total = 0
    for opcode, count in loop.opcodes.items():
        if size := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
            total += int(size[1]) * int(size[2]) * int(size[3]) * count
    return total


def layer_intervals(documents: tuple[int, ...], window: int, length: int = LENGTH) -> tuple[Any, Any]:
    """Computes the first and the last key that each query of a row sees, int32 [1, T], as a model does.

    Args:
      documents: the positions where the documents of the row start.
      window: of the layer, in tokens.
    """
    import jax.numpy as jnp

    from gemma2_jax.model.attention import mosaic as attention_mosaic

    position_T = jnp.arange(length, dtype=jnp.int32)
    segments = jnp.searchsorted(jnp.array(documents), position_T, side="right")[None]
    starts = attention_mosaic.segment_starts(segments)
    return attention_mosaic.key_intervals(position_T, starts, (0,), length, window)


def select_tile(shape: Shape, direction: str) -> Tile:
    """The tile that the kernel of a direction has for that shape."""
    from gemma2_jax.kernels.tile_sizes import TILES

    return getattr(TILES[shape.width], direction)


def run_kernel(direction: str, inputs: Inputs, cotangents: Cotangents, settings: Settings, tile: Tile) -> Any:
    """Runs the kernel of a direction; the forward one takes no cotangents."""
    from gemma2_jax.kernels.backward import run_dkv, run_dq
    from gemma2_jax.kernels.forward import run_forward

    if direction == "forward":
        return run_forward(inputs, settings, tile)
    return {"dq": run_dq, "dkv": run_dkv}[direction](inputs, cotangents, settings, tile)


def describe_operands(shape: Shape, length: int) -> tuple[Inputs, Cotangents]:
    """The shapes and dtypes of what the kernels take, for one row of so many tokens."""
    import jax
    import jax.numpy as jnp

    from gemma2_jax.kernels.backward import Cotangents
    from gemma2_jax.kernels.tiles import Inputs

    # To the kernels, a description stands for an array as long as they are not run.
    q, k = cast(list[jax.Array], _describe_inputs(shape, length, jnp.bfloat16))
    ends = cast(jax.Array, jax.ShapeDtypeStruct((1, length), jnp.int32))
    sums = cast(jax.Array, jax.ShapeDtypeStruct((1, shape.heads, length), jnp.float32))
    inputs = Inputs(q_BTNH=q, k_BSKH=k, v_BSKH=k, first_BT=ends, last_BT=ends)
    return inputs, Cotangents(d_BTNH=q, lse_BNT=sums, delta_BNT=sums)


def read_bounds(shape: Shape, direction: str, first, last) -> np.ndarray:
    """Returns the bounds [B, blocks, 4] (`tiles.tile_bounds`) that a kernel loops by. No kernel is run."""
    import numpy as np

    from gemma2_jax.kernels import tiles

    @dataclass(frozen=True, kw_only=True)
    class RecordingBuild(tiles.Build):
        """Makes kernels that note their last operand, which is the bounds."""

        recorded: list = field(default_factory=list, compare=False)

        def kernel(self, body, name, scratch, grid, outputs) -> Callable:
            def record(*operands):
                self.recorded.append(operands[-1])
                return outputs

            return record

    build = RecordingBuild()
    settings = tiles.Settings(scale=shape.scale, softcap=shape.softcap, build=build)
    inputs, cotangents = describe_operands(shape, first.shape[1])
    inputs = replace(inputs, first_BT=first, last_BT=last)
    run_kernel(direction, inputs, cotangents, settings, select_tile(shape, direction))
    (bounds,) = build.recorded
    return np.asarray(bounds)


@dataclass(frozen=True, kw_only=True)
class Visits:
    """The tiles that blocks of threads visit, for one row of tokens and one key/value head.

    Attributes:
      rows: queries of a block; in dK/dV, keys.
      columns: keys of a tile; in dK/dV, queries.
      tiles: how many are visited.
      masked: how many of these take a mask.
      exact: scores that are needed.
    """

    rows: int
    columns: int
    tiles: int
    masked: int
    exact: int

    @property
    def ratio(self) -> float:
        """Scores in the tiles visited, over the scores that are needed; the least possible is 1."""
        return self.tiles * self.rows * self.columns / self.exact


def count_visits(shape: Shape, direction: str, first, last) -> Visits:
    """Counts the tiles that a kernel visits, where queries see the keys from `first` to `last`, int32 [1, T]."""
    import numpy as np

    start, clean, masked, end = np.moveaxis(read_bounds(shape, direction, first, last), -1, 0)
    tiles = int((end - start).sum())
    return Visits(
        rows=first.shape[1] // start.shape[1],
        columns=select_tile(shape, direction).size,
        tiles=tiles,
        masked=tiles - int((masked - clean).sum()),
        exact=int(np.maximum(np.asarray(last) - np.asarray(first) + 1, 0).sum()),
    )


def format_kernel(kernel: Kernel, works: list[Work]) -> tuple[str, ...]:
    """The cells of a kernel from its tile on: + joins warpgroups whose loops differ, and a comma masked tiles."""
    spilled = [kernel.spill_stores, kernel.spill_loads]
    edges = zip(*(work.masked for work in works if work.masked), strict=True)
    unmasked = [f"{work.clean:.0f}" for work in works if not work.masked]
    ratios = [work.ratio for work in works if work.ratio]
    return (
        " + ".join(f"{ROWS} x {columns}" for columns in dict.fromkeys(work.columns for work in works)),
        f"{kernel.registers}: {', '.join(map(str, kernel.set_registers))}",
        " + ".join(f"{size:,}" for size in spilled) if any(spilled) else "0",
        f"{kernel.shared:,}",
        str(kernel.blocks_per_sm),
        str(kernel.opcodes.total("HGMMA")),
        str(kernel.opcodes.total("HMMA")),
        ", ".join((re.findall(r"\bC\d+\b", warning) or ["spills"])[0] for warning in kernel.warnings) or "none",
        " + ".join(f"{work.clean:.0f}" for work in works),
        ", ".join(" + ".join([*(f"{size:.0f}" for size in edge), *unmasked]) for edge in edges),
        f"{max(ratios):.2f}" if ratios else "",
    )


def list_kernels() -> Iterator[tuple[str, ...]]:
    """The rows of the table of machine code."""
    for name, shape in CASES.items():
        print(f"compiling for heads of width {name}", file=sys.stderr)
        kernels = compile_attention(shape)
        for direction, title in DIRECTIONS.items():
            works = measure_work(kernels[direction], PRODUCTS[direction], shape.width)
            yield name, title, "all", *format_kernel(kernels[direction], works)
        yield name, "decode", "a token, cap, ring", *format_kernel(compile_decode(shape), [])
        if shape.heads == shape.kv_heads:  # To jax's kernels, all numbers of heads are the same.
            continue
        for key, kernel in compile_jax_attention(shape).items():
            causal = key == "causal"
            direction = "forward" if causal else key
            works = measure_work(kernel, PRODUCTS[direction], shape.width)
            does = "causal; no cap, window or packing" if causal else "no cap, causal mask, window or packing"
            yield name, f"jax's {DIRECTIONS[direction]}", does, *format_kernel(kernel, works)


def list_visits() -> Iterator[tuple[str, ...]]:
    """The rows of the table of tiles."""
    intervals = [layer_intervals(*layer) for layer in LAYERS.values()]
    for name, shape in CASES.items():
        for direction, title in DIRECTIONS.items():
            visits = [count_visits(shape, direction, *interval) for interval in intervals]
            cells = [(f"{visit.ratio:.4f}", f"{visit.masked / visit.tiles:.1%}") for visit in visits]
            yield name, title, f"{visits[0].rows} x {visits[0].columns}", *(cell for pair in cells for cell in pair)


CODE = (
    "width", "kernel", "does", "tile", "registers", "spilled", "shared", "blocks", "HGMMA", "HMMA", "warnings",
    "clean tile", "masked tiles", "ratio",
)  # fmt: skip
CODE_NOTE = f"""\
Compiled for sm_90a, not run on a GPU. "all": soft cap, causal mask, window and packing; jax's own Mosaic attention, in
float16, does less, as said. Tile: scores that a warpgroup makes in a trip of its loop. Registers of a thread at launch:
those that warpgroups then set. Spilled: bytes stored + loaded. Shared: bytes, of {SHARED_PER_BLOCK:,}. Blocks: on a
multiprocessor at a time. Warnings of ptxas. Clean and masked tiles: instructions of a warp for 64 x 64 scores, masked
at the edge of the window, at the diagonal; in dK/dV, one warpgroup makes the scores and dV + the other, which needs no
mask, dP and dK. Ratio: of the longest masked tile to a clean one, of the same warpgroup."""
VISITS = ("width", "kernel", "tile", *(cell for layer in LAYERS for cell in (layer, "masked")))
VISITS_NOTE = f"""\
Scores in tiles that are visited over those that queries see, in a row of {LENGTH:,} tokens, and how many of the tiles
are masked; in global layers, in local layers (a window of 4,096), and with documents of 1,000 tokens packed into the
row. Tile: queries x keys of a block, of dK/dV keys x queries. Counted in the arrays that the kernels loop by, not on a
GPU."""


def print_table(
    console: Console, title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]], note: str
) -> None:
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 3 else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    console.print(note + "\n", highlight=False, markup=False)


def main() -> None:
    make_parser("kernels", __doc__).parse_args()
    described_cluster.prepare_jax()
    console = Console()
    if not console.is_terminal:
        console.width = 240
    try:
        print_table(console, "Machine code of the attention kernels", CODE, list_kernels(), CODE_NOTE)
    except ImportError as error:
        sys.exit(f"error: {error}")
    print_table(console, f"Tiles visited at {LENGTH:,} tokens", VISITS, list_visits(), VISITS_NOTE)


if __name__ == "__main__":
    main()
