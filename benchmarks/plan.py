"""Memory of every recipe on compile-only H100s: at Megatron-Bridge's numbers of GPUs, and at the fewest that hold it.

    python -m benchmarks.plan

Megatron-Bridge gives each recipe a tensor-parallel and a pipeline-parallel size; the second becomes FSDP here. The
fewest GPUs are sought among powers of two up to 16 and, for each, among the meshes fsdp x tensor, FSDP first. Nothing
is run: sizes are those that the compiled step asks for.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from gemma2_jax import config as configs, plan
from gemma2_jax.config import Config, MeshConfig

# (tensor, pipeline) by what is trained and size: Megatron-Bridge's recipes for Gemma 2.
LAYOUTS = {
    "pretrain": {"2b": (2, 1), "9b": (8, 1), "27b": (8, 2)},
    "sft": {"2b": (1, 1), "9b": (4, 1), "27b": (8, 2)},
    "lora": {"2b": (1, 1), "9b": (1, 1), "27b": (4, 1)},
    "dora": {"2b": (1, 1), "9b": (1, 1), "27b": (4, 1)},
}
COLUMNS = ("recipe", "mesh", "GPUs", "state, GiB", "temporaries, GiB", "total, GiB", "compiled in", "80 GB")


def compiled(config: Config, mesh: MeshConfig) -> plan.Plan:
    return plan.compile_step(replace(config, mesh=mesh), mesh.data * mesh.fsdp * mesh.tensor)


def meshes(gpus: int) -> Iterator[MeshConfig]:
    tensor = 1
    while tensor <= min(gpus, 8):
        yield MeshConfig(data=1, fsdp=gpus // tensor, tensor=tensor)
        tensor *= 2


def fewest(config: Config) -> plan.Plan | None:
    """The first plan that fits, from one GPU up."""
    for gpus in (1, 2, 4, 8, 16):
        for mesh in meshes(gpus):
            try:
                program = plan.planned(replace(config, mesh=mesh), gpus)
            except ValueError:  # this mesh does not divide the model
                continue
            if sum(plan.held(program).values()) > plan.USABLE_BYTES:
                continue
            found = compiled(config, mesh)
            if found.total <= plan.USABLE_BYTES:
                return found
    return None


def row(name: str, found: plan.Plan) -> tuple[str, ...]:
    mesh = found.program.mesh
    return (
        name,
        plan.axes(mesh),
        str(mesh.size),
        *(f"{size / 2**30:.1f}" for size in (found.arguments, found.temporaries, found.total)),
        f"{found.compile_seconds:.0f} s",
        plan.verdict(found.total),
    )


def show(console: Console, title: str, rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("recipe", "mesh", "80 GB") else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    plan.prepare()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    recipes = {f"{size}_{kind}": layout for kind, sizes in LAYOUTS.items() for size, layout in sizes.items()}
    given, least = [], []
    for name, (tensor, pipeline) in recipes.items():
        given.append(row(name, compiled(configs.load(name), MeshConfig(data=1, fsdp=pipeline, tensor=tensor))))
    show(console, "At Megatron-Bridge's sizes, FSDP in place of pipeline stages", given)
    cases = {name: configs.load(name) for name in recipes}
    for length in (4096, 8192):
        config = cases["27b_lora"]
        cases[f"27b_lora, {length} tokens"] = replace(config, train=replace(config.train, sequence_length=length))
    for name, config in cases.items():
        print(f"looking for the fewest GPUs that hold {name}", file=sys.stderr)
        found = fewest(config)
        least.append(row(name, found) if found else (name, "more than 16", *[""] * (len(COLUMNS) - 2)))
    show(console, "The fewest GPUs that hold it", least)


if __name__ == "__main__":
    main()
