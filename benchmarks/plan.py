"""What recipes hold and send on H100s that are not there: no step is run, all is read off compiled ones.

    python -m benchmarks.plan

Three tables: memory with the recipes' own meshes, which are Megatron-Bridge's; memory on the fewest GPUs that hold a
recipe, sought among powers of two up to 16 and, for each, among the meshes fsdp x tensor, FSDP first; and traffic of
27B over each axis from 8 to 512 GPUs, where every GPU has the same number of rows whatever their number.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.options import make_parser
from gemma2_jax import recipes
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.planning import described_cluster
from gemma2_jax.planning.compiled_step import CompiledStep, compile_step, make_program
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.report import describe_fit
from gemma2_jax.planning.traffic import sum_traffic
from gemma2_jax.training.smaller_steps import argument_bytes

RECIPES = [f"{size}_{kind}" for kind in ("pretrain", "sft", "lora", "dora") for size in ("2b", "9b", "27b")]
# Recipe, rows of a step for each data x fsdp shard, mesh of one data shard, and its GPUs.
GROWING = (
    ("27b_sft", 16, MeshConfig(fsdp=8), 8),
    ("27b_pretrain", 32, MeshConfig(tensor=8), 8),
    ("27b_pretrain", 32, MeshConfig(stage=2, tensor=8), 16),
    ("27b_lora", 128, MeshConfig(tensor=8), 8),
)
TRAFFIC = ("recipe", "GPUs", "mesh", "rows", "data", "stage", "fsdp", "tensor", "several axes")
COLUMNS = ("recipe", "mesh", "GPUs", "state, GiB", "temporaries, GiB", "total, GiB", "compiled in", "80 GB")


def compiled(config: Config, mesh: MeshConfig) -> CompiledStep:
    return compile_step(replace(config, mesh=mesh), math.prod(vars(mesh).values()))


def meshes(gpus: int) -> Iterator[MeshConfig]:
    tensor = 1
    while tensor <= min(gpus, 8):
        yield MeshConfig(data=1, fsdp=gpus // tensor, tensor=tensor)
        tensor *= 2


def fewest(config: Config) -> CompiledStep | None:
    """The first plan that fits, from one GPU up."""
    for gpus in (1, 2, 4, 8, 16):
        for mesh in meshes(gpus):
            try:
                program = make_program(replace(config, mesh=mesh), gpus)
            except ValueError:  # this mesh does not divide the model
                continue
            if sum(argument_bytes(program).values()) > H100.usable_bytes:
                continue
            found = compiled(config, mesh)
            if found.total <= H100.usable_bytes:
                return found
    return None


def row(name: str, found: CompiledStep) -> tuple[str, ...]:
    mesh = found.program.mesh
    return (
        name,
        found.layout,
        str(mesh.size),
        *(f"{size / 2**30:.1f}" for size in (found.arguments, found.temporaries, found.total)),
        f"{found.compile_seconds:.0f} s",
        describe_fit(found.total),
    )


def traffic_row(name: str, rows: int, mesh: MeshConfig) -> tuple[str, ...]:
    """GB over each axis, with `rows` rows of a step for each of its data x fsdp shards."""
    config = recipes.load_recipe(name)
    batch = rows * mesh.data * mesh.fsdp
    found = compiled(replace(config, train=replace(config.train, global_batch_size=batch)), mesh)
    sent = {axis: kinds.total() / 1e9 for axis, kinds in sum_traffic(found.traffic).items()}
    missing = [c for c in found.traffic if c.times is None]
    assert not missing, f"not counted: {missing}"
    single = [sent.pop(axis, 0) for axis in ("data", "stage", "fsdp", "tensor")]
    cells = [f"{size:,.1f}" if size else "" for size in (*single, sum(sent.values()))]
    return name, str(found.program.mesh.size), found.layout, str(batch), *cells


def show(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("recipe", "mesh", "80 GB") else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    for cells in (columns, ("---",) * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    make_parser("plan", __doc__).parse_args()
    described_cluster.prepare_jax()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    given, least = [], []
    cases = {name: recipes.load_recipe(name) for name in RECIPES}
    for name, config in cases.items():
        given.append(row(name, compiled(config, replace(config.mesh, data=1))))
    show(console, "With the recipes' own meshes", COLUMNS, given)
    for length in (4096, 8192):
        config = cases["27b_lora"]
        cases[f"27b_lora, {length} tokens"] = replace(config, train=replace(config.train, sequence_length=length))
    for name, config in cases.items():
        print(f"looking for the fewest GPUs that hold {name}", file=sys.stderr)
        found = fewest(config)
        least.append(row(name, found) if found else (name, "more than 16", *[""] * (len(COLUMNS) - 2)))
    show(console, "The fewest GPUs that hold it", COLUMNS, least)
    sent = [
        traffic_row(name, rows, replace(mesh, data=gpus // unit))
        for name, rows, mesh, unit in GROWING
        for gpus in (8, 16, 64, 512)
        if gpus >= unit
    ]
    show(console, "GB that a GPU sends a step", TRAFFIC, sent)


if __name__ == "__main__":
    main()
