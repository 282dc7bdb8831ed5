"""`python -m gemma2_jax.plan --config NAME --gpus N`: what a training step would hold, do and send on absent GPUs.

The command line only: `planning` compiles the real step at its real size for GPUs that are only described, and reads
memory, FLOPs and collectives off the result. Nothing here imports JAX before the arguments are understood.
"""

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from gemma2_jax import command_line
from gemma2_jax.planning import described_cluster
from gemma2_jax.planning.advice import MOST_GPUS, Advice, advise
from gemma2_jax.planning.gpus import H100, find_gpu
from gemma2_jax.planning.report import (
    Part,
    Plan,
    describe_fit,
    describe_seconds,
    format_gib,
    shorten_operation,
    summarize_step,
)
from gemma2_jax.planning.speed import FACTORS, StepTime
from gemma2_jax.planning.traffic import SENT
from gemma2_jax.reporting import figures
from gemma2_jax.reporting.plan_page import PlanRequest, write_plan
from gemma2_jax.train import Recipe, parse

_BUFFERS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Command(Recipe):
    """Says whether a step fits on GPUs that are not there, and how fast it can be.

    The defaults shown are those of the recipe that --config names.

    Fields may also be given as group.field=value.
    """

    gpus: int = H100.gpus_per_host  # GPUs, 8 a host
    # h100, h100-pcie, h100-nvl, h200, a100-40, a100-80, l40s, b200, or a TOML file with a base and what differs
    device: str = "h100"
    price: float | None = None  # dollars for an hour of one GPU
    json: Path | None = None  # file for all of it as JSON
    html: Path | None = None  # file for a page that shows it, which opens in any browser
    hlo: Path | None = None  # file for the compiled program as text
    search: int = 0  # layouts of the run that are compiled to find the fastest, the likeliest first; 0: the given one

    def __post_init__(self) -> None:
        find_gpu(self.device)
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise ValueError(f"price is {self.price}; give dollars for an hour of one GPU")
        if self.search and self.mesh == "auto":
            raise ValueError("search and mesh auto are both given; a search finds the mesh, so leave out --mesh auto")
        if self.search < 0:
            raise ValueError(f"search is {self.search}; give how many layouts may be compiled, such as 12")
        if self.search and self.hlo is not None:
            raise ValueError("search and hlo are both given; give hlo with the options of what is found")
        for name in ("json", "html", "hlo"):
            path = getattr(self, name)
            if path is not None and path.is_dir():
                raise ValueError(f"{name} is the folder {path}; give a file")
        if self.html is not None:
            figures.check_plotly()


def main(program: str = "python -m gemma2_jax.plan") -> None:
    """Parses, compiles and prints; exits with a sentence where that cannot be done."""
    command = parse(sys.argv[1:], Command, program)
    described_cluster.prepare_jax()

    console = Console()
    if not console.is_terminal:
        console.width = 120
    try:
        plan = _search(console, command) if command.search else _compile(console, command)
        print_plan(console, plan, command.price)
        advice = advise(plan, command_line.notify)
        if not plan.fits:
            print_advice(console, advice, command.price)
        if command.json is not None:
            answer = plan.as_json() | {"advice": [one.as_json() for one in advice]}
            command_line.write_whole(command.json, json.dumps(answer, indent=1) + "\n")
        if command.html is not None:
            made_by = shlex.join([*program.split(), *sys.argv[1:]])
            request = PlanRequest(recipe=command.config, command=made_by, price=command.price)
            write_plan(plan, command.html, request)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(command_line.fold(f"error: {error}"))


def _compile(console: Console, command: Command) -> Plan:
    from gemma2_jax.planning.compiled_step import compile_step

    device, run = find_gpu(command.device), command.run
    if command.mesh == "auto":
        from gemma2_jax.planning import known_layouts

        layout, reason = known_layouts.choose_layout(run, command.gpus, device)
        console.print(f"mesh auto: {layout}: {reason}", highlight=False, markup=False, soft_wrap=True)
        run = layout.apply(run)
    step = compile_step(run, command.gpus, device)
    if command.hlo is not None:
        command_line.write_whole(command.hlo, step.text)
    return summarize_step(step)


def _search(console: Console, command: Command) -> Plan:
    """The plan of the best layout that is found. Raises ValueError where none fits."""
    from gemma2_jax.planning import layouts, search_table

    device = find_gpu(command.device)
    own = layouts.find_own(command.run, command.gpus)
    search = search_table.search_and_print(console, command.run, command.gpus, device, command.search, own)
    if not search.ranked:
        raise ValueError(f"none of the {len(search.tried)} layouts that were compiled fits; use more GPUs")
    return search.ranked[0].plan


def print_plan(console: Console, plan: Plan, price: float | None = None) -> None:
    """Prints memory, whether it fits, work, traffic, and how fast a step can be."""
    train = plan.config.train
    owners = " + ".join(f"{name} {format_gib(size)}" for name, size in plan.memory.items())
    usable = f"{format_gib(plan.device.usable_bytes)} ({plan.device.memory_bytes:,} bytes less 5% for CUDA and NCCL)"
    lines = {
        "devices": f"{plan.gpus} x {plan.device.title}, compiled for and not run; mesh {plan.mesh}",
        "step": f"{train.global_batch_size} rows x {train.sequence_length} tokens, micro batches of "
        f"{train.micro_batch_size} row(s)",
        "one GPU": f"{owners} = {format_gib(plan.total)} GiB",
        "": f"of {usable}: {describe_fit(plan.total, plan.device)}",
        "compiled": f"lowered in {plan.lower_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s",
    }
    _print_lines(console, lines)
    _print_memory(console, plan)
    _print_work(console, plan)
    if plan.collectives:
        _print_traffic(console, plan)
    _print_times(console, plan, price)


def print_advice(console: Console, advice: Sequence[Advice], price: float | None = None) -> None:
    """Prints with which options a step that does not fit would, or that nothing was found."""
    fitting = [one for one in advice if one.plan.fits]
    if not fitting:
        tried = "; ".join(f"with {' '.join(one.options)} it needs {format_gib(one.plan.total)} GiB" for one in advice)
        text = f"No change was found with which it fits, on up to {MOST_GPUS} GPUs{f': {tried}' if tried else ''}."
        console.print(text, highlight=False, markup=False)
        return
    table = Table("it fits with these options, each compiled")
    for column in ("GPUs", "GiB", "estimate", "GPU-hours", *([] if price is None else ["cost"])):
        table.add_column(column, justify="right")
    for one in fitting:
        hours = one.plan.gpu_hours(one.plan.estimate)
        cells = (str(one.plan.gpus), format_gib(one.plan.total), describe_seconds(one.plan.estimate.total))
        cost = () if price is None else (f"${hours * price:,.2f}",)
        table.add_row(" ".join(one.options), *cells, f"{hours:,.2f}", *cost)
    console.print(table, highlight=False)


def _print_lines(console: Console, lines: dict[str, str]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        grid.add_row(f"[bold]{name}[/bold]", text)
    console.print(grid, highlight=False)


def _print_work(console: Console, plan: Plan) -> None:
    """A table of the parts of a step: FLOPs by pass, and seconds by the bound and the estimate."""
    table = Table("one GPU, a step")
    passes = plan.passes
    for column in (*(f"TFLOP {name}" for name in passes), "bound, ms", "estimate, ms"):
        table.add_column(column, justify="right")
    parts = plan.list_parts()
    flops = {name: sum(part.flops[name] for part in parts) for name in passes}
    bound, estimate = (sum(getattr(part, name) for part in parts) for name in ("bound", "estimate"))
    for part in (*parts, Part(name="all", flops=flops, bound=bound, estimate=estimate)):
        if part.name == "all":
            table.add_section()
        cells = [f"{part.flops[name] / 1e12:,.2f}" if part.flops[name] else "" for name in passes]
        table.add_row(part.name, *cells, *(f"{time * 1e3:,.1f}" for time in (part.bound, part.estimate)))
    console.print(table, highlight=False)


def _print_times(console: Console, plan: Plan, price: float | None) -> None:
    exposed = {axes: seconds for axes, seconds in plan.estimate.exposed.items() if seconds}
    waits = [f"waiting for {axes} {describe_seconds(seconds)}" for axes, seconds in exposed.items()]
    shares = ", ".join(f"{name} {factor.share:g}" for name, factor in FACTORS.items())
    lines = {
        "no faster than": _describe_time(plan, plan.bound, price),
        "estimate": _describe_time(plan, plan.estimate, price),
        "": "; ".join([f"computing {describe_seconds(plan.estimate.computing)}", *waits]),
        "neither": f"was measured: the bound has the rates of data sheets, the estimate these shares of them: {shares}",
    }
    _print_lines(console, lines)


def _describe_time(plan: Plan, time: StepTime, price: float | None) -> str:
    hours = plan.gpu_hours(time)
    cost = "" if price is None else f", ${hours * price:,.2f}"
    return (
        f"{describe_seconds(time.total)} a step: {plan.token_rate(time):,.0f} tokens/s a GPU, MFU "
        f"{plan.flops_utilization(time):.1%}; {plan.config.steps:,} steps take {hours / plan.gpus:,.2f} h, "
        f"{hours:,.2f} GPU-hours{cost}"
    )


def _print_memory(console: Console, plan: Plan) -> None:
    """A table of memory by owner, and the largest temporaries where a step needs most."""
    if isinstance(plan.peak, str):
        console.print(f"temporaries are not divided by owner: {plan.peak}", highlight=False, markup=False)
        return
    table = Table("memory of one GPU", Column("GiB", justify="right"))
    for name, size in plan.list_owners().items():
        table.add_row(name, format_gib(size))
    table.add_section()
    table.add_row("all", format_gib(plan.total))
    console.print(table, highlight=False)
    grid = Table.grid(padding=(0, 2))
    for buffer in plan.peak.buffers[:_BUFFERS_SHOWN]:
        operation = shorten_operation(buffer.operation)
        grid.add_row(format_gib(buffer.size), *(escape(text) for text in (buffer.owner, buffer.shape, operation)))
    console.print(f"The most is needed in: {plan.peak.where}. The largest temporaries there, in GiB:", highlight=False)
    console.print(grid, highlight=False)


def _print_traffic(console: Console, plan: Plan) -> None:
    kinds = [kind for kind in SENT if any(collective.kind == kind for collective in plan.collectives)]
    table = Table("GB a GPU sends a step along", "over")
    for column in (*kinds, "all", "bound, ms", "estimate, ms"):
        table.add_column(column, justify="right")
    for axes, parts in itertools.groupby(plan.list_traffic(), key=lambda row: row.axes):
        by_kind = {row.kind: row for row in parts}
        sent = [by_kind[kind].sent if kind in by_kind else 0 for kind in kinds]
        seconds = [sum(getattr(row, name) for row in by_kind.values()) for name in ("bound", "estimate")]
        gigabytes = (f"{size / 1e9:,.3f}" for size in (*sent, sum(sent)))
        table.add_row(axes, plan.describe_link(axes), *gigabytes, *(f"{time * 1e3:,.1f}" for time in seconds))
    console.print(table, highlight=False)
    for note in plan.list_notes():
        console.print(note, highlight=False, markup=False)


if __name__ == "__main__":
    main()
