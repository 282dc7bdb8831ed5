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
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine_code
from benchmarks.machine_code import SHARED_PER_BLOCK, Kernel, Loop
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.planning import described_cluster

if TYPE_CHECKING:
    import numpy as np

    from gemma2_jax.kernels.tiles import Tile

LENGTH = 8192
ROWS = 64  # of a warpgroup's matrix product
DIRECTIONS = {"forward": "forward", "dq": "dQ", "dkv": "dK/dV"}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products that a tile takes

# Each has machine code of its own. Gemma 2 has two query heads to each key/value head; of a wide tensor axis, a device
# has one of each. No Gemma 2 has a width of 64.
CASES = {
    "256": SHAPES["2b"],
    "256, one head": SHAPES["2b, tensor 8"],
    "128": SHAPES["27b"],
    "64": Shape(heads=8, kv_heads=4, width=64, scale=64**-0.5),
}
# Where the documents of a row start, and the window of its layer.
LAYERS = {
    "global": ((0,), LENGTH),
    "local": ((0,), 4096),
    "packed": (tuple(range(0, LENGTH, 1000)), LENGTH),
}


def compiled(shape: Shape, length: int = LENGTH) -> dict[str, Kernel]:
    """The kernels of `gemma2_jax.kernels.attention`, by direction, for one row of so many tokens.

    Raises ImportError without the extra `plan`. `described_cluster.prepare_jax` comes before JAX.
    """
    import jax
    import jax.numpy as jnp

    from gemma2_jax.kernels.attention import attention

    def both_ways(q, k, v, first, last):
        def run(q, k, v):
            return attention(q, k, v, first, last, scale=shape.scale, softcap=shape.softcap)

        results, pull = jax.vjp(run, q, k, v)
        return results, pull(results)

    q, k = _inputs(shape, length, jnp.bfloat16)
    ends = jax.ShapeDtypeStruct((1, length), jnp.int32)
    kernels = machine_code.compiled(both_ways, q, k, k, ends, ends)
    return {kernel.name.removeprefix("gemma2_attention_"): kernel for kernel in kernels}


def compiled_decode(shape: Shape, rows: int = 8, length: int = LENGTH) -> Kernel:
    """That of `gemma2_jax.kernels.decode`, for one token of each row to caches of so many."""
    import jax
    import jax.numpy as jnp

    from gemma2_jax.kernels.decode import decode

    def run(q, k, v, position):
        return decode(q, k, v, position, length, scale=shape.scale, softcap=shape.softcap)

    q = jax.ShapeDtypeStruct((rows, 1, shape.heads, shape.width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, shape.kv_heads, length, shape.width), jnp.bfloat16)
    (kernel,) = machine_code.compiled(run, q, k, k, jax.ShapeDtypeStruct((rows,), jnp.int32))
    return kernel


def compiled_of_jax(shape: Shape, length: int = LENGTH) -> dict[str, Kernel]:
    """Those of jax's own Mosaic attention: forward, "causal" too, and backward, where it cannot be causal."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # It asks the CUDA runtime, which is not there, for its version; 12.9.1 is that of ptxas.
    versions = SimpleNamespace(cuda_runtime_get_version=lambda: 12091)
    attention_mgpu.cuda_versions = versions  # pyright: ignore[reportPrivateImportUsage]

    def attention(q, k, v, causal: bool) -> jax.Array:
        return attention_mgpu.attention(q, k, v, attention_mgpu.TuningConfig(
            block_q=64, block_kv=64 if shape.width > 128 else 128, max_concurrent_steps=2, causal=causal,
            block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
        ))  # fmt: skip

    def both_ways(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, False), q, k, v)
        return out, pull(out)

    q, k = _inputs(shape, length, jnp.float16)  # its backward pass takes nothing else
    found = dict(zip(DIRECTIONS, machine_code.compiled(both_ways, q, k, k), strict=True))
    (causal,) = machine_code.compiled(lambda q, k, v: attention(q, k, v, True), q, k, k)
    return found | {"causal": causal}


def _inputs(shape: Shape, length: int, dtype) -> list[Any]:
    import jax

    return [jax.ShapeDtypeStruct((1, length, n, shape.width), dtype) for n in (shape.heads, shape.kv_heads)]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a warpgroup does for a tile of 64 x `columns` scores, in instructions of one warp for 64 x 64 of them."""

    columns: int
    clean: float
    masked: tuple[float, ...]  # at the edge of the window and at the diagonal, by their place in the binary

    @property
    def ratio(self) -> float | None:
        """Of the longest masked tile to a clean one."""
        return max(self.masked) / self.clean if self.masked else None


def work(kernel: Kernel, products: int, width: int) -> list[Work]:
    """That of each warpgroup whose loops differ: those that compute exponentials, then those that do not.

    Args:
      products: matrix products that a tile takes; warpgroups whose loops differ share them.
      width: of a head.
    """
    kinds = [[tile for tile in kernel.tiles if bool(tile.opcodes.of("MUFU.EX2")) == exp] for exp in (True, False)]
    kinds = [tiles for tiles in kinds if tiles]
    found = []
    for tiles in kinds:
        columns = {multiplied(tile) // (products // len(kinds) * width * ROWS) for tile in tiles}
        assert len(columns) == 1, f"loops of {kernel.name} over tiles of different sizes: {columns}"
        each = [tile.instructions * ROWS / max(columns) for tile in tiles]
        clean = min(each)
        each.remove(clean)
        found.append(Work(columns=max(columns), clean=clean, masked=tuple(each)))
    return found


def multiplied(loop: Loop) -> int:
    """Multiplications of a warpgroup in a trip, by the tensor cores."""
    total = 0
    for opcode, count in loop.opcodes.items():
        if size := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
            total += int(size[1]) * int(size[2]) * int(size[3]) * count
    return total


def intervals(documents: tuple[int, ...], window: int, length: int = LENGTH) -> tuple[Any, Any]:
    """The first and the last key that each query of a row sees, int32 [1, T], as a model has them."""
    import jax.numpy as jnp

    from gemma2_jax.model.attention import mosaic as attention_mosaic

    at = jnp.arange(length, dtype=jnp.int32)
    segments = jnp.searchsorted(jnp.array(documents), at, side="right")[None]
    return attention_mosaic.key_intervals(at, attention_mosaic.segment_starts(segments), (0,), length, window)


def tile_of(shape: Shape, direction: str) -> Tile:
    from gemma2_jax.kernels.tiles import TILES

    return getattr(TILES[shape.width], direction)


def bounds(shape: Shape, direction: str, first, last) -> np.ndarray:
    """The bounds [B, blocks, 4] (`tiles.tile_bounds`) that a kernel loops by. Nothing is run."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gemma2_jax.kernels import backward, forward, tiles

    @dataclass(frozen=True, kw_only=True)
    class Kept(tiles.Build):
        given: list = field(default_factory=list, compare=False)

        def kernel(self, body, name, scratch, grid, outputs) -> Callable:
            def run(*arrays):
                self.given.append(arrays[-1])
                return outputs

            return run

    q, k = (jax.ShapeDtypeStruct((*first.shape, *x.shape[2:]), x.dtype) for x in _inputs(shape, 1, jnp.bfloat16))
    build = Kept()
    settings: dict[str, Any] = dict(
        scale=shape.scale, softcap=shape.softcap, tile=tile_of(shape, direction), build=build
    )
    if direction == "forward":
        forward.forward(q, k, k, first, last, **settings)
    else:
        getattr(backward, direction)(q, k, k, q, None, None, first, last, **settings)
    (found,) = build.given
    return np.asarray(found)


@dataclass(frozen=True, kw_only=True)
class Visits:
    """Tiles of `rows` x `columns` that a block of threads visits, for one row of tokens and one key/value head."""

    rows: int  # queries of a block, or of dK/dV keys
    columns: int
    tiles: int
    masked: int
    exact: int  # scores that are needed

    @property
    def ratio(self) -> float:
        """Scores visited over those that are needed: 1 is the least there can be."""
        return self.tiles * self.rows * self.columns / self.exact


def visits(shape: Shape, direction: str, first, last) -> Visits:
    import numpy as np

    start, clean, masked, end = np.moveaxis(bounds(shape, direction, first, last), -1, 0)
    tiles = int((end - start).sum())
    return Visits(
        rows=first.shape[1] // start.shape[1],
        columns=tile_of(shape, direction).size,
        tiles=tiles,
        masked=tiles - int((masked - clean).sum()),
        exact=int(np.maximum(np.asarray(last) - np.asarray(first) + 1, 0).sum()),
    )


def code_row(width: str, name: str, does: str, kernel: Kernel, found: list[Work]) -> tuple[str, ...]:
    """Warpgroups whose loops differ are joined by +, masked tiles at either edge by a comma."""
    spilled = [kernel.spill_stores, kernel.spill_loads]
    edges = zip(*(each.masked for each in found if each.masked), strict=True)
    whole = [f"{each.clean:.0f}" for each in found if not each.masked]
    ratios = [each.ratio for each in found if each.ratio]
    return (
        width,
        name,
        does,
        " + ".join(f"{ROWS} x {columns}" for columns in dict.fromkeys(each.columns for each in found)),
        f"{kernel.registers}: {', '.join(map(str, kernel.set_registers))}",
        " + ".join(f"{size:,}" for size in spilled) if any(spilled) else "0",
        f"{kernel.shared:,}",
        str(kernel.blocks_per_sm),
        str(kernel.opcodes.of("HGMMA")),
        str(kernel.opcodes.of("HMMA")),
        ", ".join((re.findall(r"\bC\d+\b", warning) or ["spills"])[0] for warning in kernel.warnings) or "none",
        " + ".join(f"{each.clean:.0f}" for each in found),
        ", ".join(" + ".join([*(f"{size:.0f}" for size in edge), *whole]) for edge in edges),
        f"{max(ratios):.2f}" if ratios else "",
    )


def code_rows() -> Iterator[tuple[str, ...]]:
    for name, shape in CASES.items():
        print(f"compiling for heads of width {name}", file=sys.stderr)
        ours = compiled(shape)
        for direction, written in DIRECTIONS.items():
            kernel = ours[direction]
            found = work(kernel, PRODUCTS[direction], shape.width)
            yield code_row(name, written, "all", kernel, found)
        yield code_row(name, "decode", "a token, cap, ring", compiled_decode(shape), [])
        if shape.heads == shape.kv_heads:  # to it, heads are all the same
            continue
        theirs = compiled_of_jax(shape)
        for direction, kernel in theirs.items():
            causal = direction == "causal"
            direction = "forward" if causal else direction
            found = work(kernel, PRODUCTS[direction], shape.width)
            does = "causal; no cap, window or packing" if causal else "no cap, causal mask, window or packing"
            yield code_row(name, f"jax's {DIRECTIONS[direction]}", does, kernel, found)


def visits_rows() -> Iterator[tuple[str, ...]]:
    seen = {layer: intervals(*described) for layer, described in LAYERS.items()}
    for name, shape in CASES.items():
        for direction, written in DIRECTIONS.items():
            found = [visits(shape, direction, *ends) for ends in seen.values()]
            cells = [(f"{each.ratio:.4f}", f"{each.masked / each.tiles:.1%}") for each in found]
            yield name, written, f"{found[0].rows} x {found[0].columns}", *(cell for pair in cells for cell in pair)


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


def show(console: Console, title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]], note: str) -> None:
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at < 3 else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    console.print(note + "\n", highlight=False, markup=False)


def main() -> None:
    described_cluster.prepare_jax()
    console = Console()
    if not console.is_terminal:
        console.width = 240
    try:
        show(console, "Machine code of the attention kernels", CODE, code_rows(), CODE_NOTE)
    except ImportError as error:
        sys.exit(f"error: {error}")
    show(console, f"Tiles visited at {LENGTH:,} tokens", VISITS, visits_rows(), VISITS_NOTE)


if __name__ == "__main__":
    main()
