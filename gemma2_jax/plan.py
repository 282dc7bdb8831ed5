"""`python -m gemma2_jax.plan --config NAME --gpus N`: what a training step would hold and send on H100s not at hand.

The command line only: `planning` compiles the real step at its real size for GPUs that are only described, and reads
memory and collectives off the result. Nothing here imports JAX before the arguments are understood.
"""

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from gemma2_jax import command_line
from gemma2_jax.planning import described_cluster
from gemma2_jax.planning.described_cluster import DEVICE_BYTES, GPUS_PER_HOST, USABLE_BYTES
from gemma2_jax.planning.report import Plan, describe_fit, format_gib, summarize_step
from gemma2_jax.planning.traffic import SENT
from gemma2_jax.train import Recipe, parse


@dataclass(frozen=True, kw_only=True)
class Command(Recipe):
    """Says whether a training step fits on so many H100s, without having any.

    The defaults shown are those of the recipe that --config names.

    Fields may also be given as group.field=value.
    """

    gpus: int = GPUS_PER_HOST  # H100s, 8 a host


def main(program: str = "python -m gemma2_jax.plan") -> None:
    """Parses, compiles and prints; exits with a sentence where that cannot be done."""
    command = parse(sys.argv[1:], Command, program)
    described_cluster.prepare_jax()
    from gemma2_jax.planning.compiled_step import compile_step

    console = Console()
    if not console.is_terminal:
        console.width = 120
    try:
        print_plan(console, summarize_step(compile_step(command.run, command.gpus)))
    except (ValueError, ImportError) as error:
        sys.exit(command_line.fold(f"error: {error}"))


def print_plan(console: Console, plan: Plan) -> None:
    """Prints memory, whether it fits, and traffic."""
    train = plan.config.train
    owners = " + ".join(f"{name} {format_gib(size)}" for name, size in plan.memory.items())
    usable = f"{format_gib(USABLE_BYTES)} ({DEVICE_BYTES:,} bytes less 5% for CUDA and NCCL)"
    lines = {
        "devices": f"{plan.gpus} x H100 80GB, compiled for and not run; mesh {plan.mesh}",
        "step": f"{train.global_batch_size} rows x {train.sequence_length} tokens, micro batches of "
        f"{train.micro_batch_size} row(s)",
        "one GPU": f"{owners} = {format_gib(plan.total)} GiB",
        "": f"of {usable}: {describe_fit(plan.total)}",
        "compiled": f"lowered in {plan.lower_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s",
    }
    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        grid.add_row(f"[bold]{name}[/bold]", text)
    console.print(grid, highlight=False)
    if plan.collectives:
        _print_traffic(console, plan)


def _print_traffic(console: Console, plan: Plan) -> None:
    kinds = [kind for kind in SENT if any(collective.kind == kind for collective in plan.collectives)]
    table = Table("GB a GPU sends a step, over")
    for column in (*kinds, "all"):
        table.add_column(column, justify="right")
    for axes, sent in sorted(plan.traffic.items()):
        table.add_row(axes, *(f"{sent[kind] / 1e9:,.3f}" for kind in kinds), f"{sent.total() / 1e9:,.3f}")
    console.print(table, highlight=False)
    for loop in sorted({c.loop for c in plan.collectives if c.loop and c.times is not None}):
        console.print(f"assumed: {plan.layers_per_stage} trips of {loop}", highlight=False, markup=False)
    for c in plan.collectives:
        if c.times is None:
            text = f"not counted: {c.kind} over {c.axes} of {c.where}, {c.sent / 1e6:,.1f} MB a trip of {c.loop}"
            console.print(text, highlight=False, markup=False)


if __name__ == "__main__":
    main()
