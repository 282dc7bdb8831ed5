"""A plan as one HTML page that needs no network: the numbers of `python -m gemma2_jax.plan`, drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2_jax import command_line, config_text
from gemma2_jax.planning.memory import Peak
from gemma2_jax.planning.report import (
    Plan,
    describe_fit,
    describe_seconds,
    format_gib,
    shorten_operation,
)
from gemma2_jax.planning.speed import FACTORS, StepTime
from gemma2_jax.reporting.figures import Segment
from gemma2_jax.reporting.page import Tile, render_page
from gemma2_jax.reporting.plan_figures import draw_plan, list_memory, list_waits, list_work

_BUFFERS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: what it is about, the color that it has in the picture, and its numbers."""

    name: str
    numbers: Sequence[str]
    color: str = ""
    is_sum: bool = False


@dataclass(frozen=True, kw_only=True)
class NumberTable:
    """The numbers of a picture."""

    columns: Sequence[str]  # without that of the names
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Of what a plan was asked for, that which it does not say itself."""

    recipe: str
    command: str  # that made the plan
    price: float | None = None  # dollars for an hour of one GPU; None says nothing of cost


def write_plan(plan: Plan, path: Path, request: PlanRequest) -> None:
    """Writes the page, which appears whole. Raises OSError where it cannot be written."""
    command_line.write_whole(path, render_plan(plan, request))


def render_plan(plan: Plan, request: PlanRequest) -> str:
    """The page as HTML."""
    train = plan.config.train
    pictures = draw_plan(plan)
    tables = (_list_memory(plan), _list_times(plan), _list_flops(plan), _list_traffic(plan))
    return render_page(
        "plan.html.jinja",
        pictures,
        title=f"{request.recipe} on {plan.gpus} x {plan.device.title}, mesh {plan.mesh}",
        step=f"{train.global_batch_size:,} rows x {train.sequence_length:,} tokens a step, micro batches of "
        f"{train.micro_batch_size:,} row(s)",
        tiles=list_tiles(plan, request.price),
        is_fitting=plan.fits,
        cards=[*zip(pictures, tables, strict=False)],  # one GPU has no traffic
        peak=plan.peak if isinstance(plan.peak, Peak) else None,
        peak_reason=plan.peak,
        buffers=_list_buffers(plan),
        factors=FACTORS,
        notes=plan.list_notes(),
        command=request.command,
        config=config_text.to_text(plan.config),
    )


def list_tiles(plan: Plan, price: float | None) -> list[Tile]:
    """The numbers that a reader looks for first."""
    tiles = [
        Tile(name="memory of one GPU", value=f"{format_gib(plan.total)} of {format_gib(plan.device.usable_bytes)} GiB"),
        Tile(name="fit", value=describe_fit(plan.total, plan.device)),
    ]
    for name, time in (("no faster than", plan.bound), ("estimate", plan.estimate)):
        tiles += [
            Tile(name=name, value=f"{describe_seconds(time.total)} a step"),
            Tile(name=f"{name}: tokens/s a GPU", value=f"{plan.token_rate(time):,.0f}"),
            Tile(name=f"{name}: MFU", value=f"{plan.flops_utilization(time):.1%}"),
            Tile(name=f"{name}: {plan.config.steps:,} steps", value=_describe_hours(plan, time, price)),
        ]
    return tiles


def _describe_hours(plan: Plan, time: StepTime, price: float | None) -> str:
    hours = plan.gpu_hours(time)
    return f"{hours:,.2f} GPU-hours" + ("" if price is None else f", ${hours * price:,.2f}")


def _list_memory(plan: Plan) -> NumberTable:
    sizes = plan.list_owners()
    rows = [_row(one, format_gib(sizes[one.name]), f"{sizes[one.name] / plan.total:.1%}") for one in list_memory(plan)]
    return NumberTable(columns=("GiB", "share"), rows=(*rows, _sum(format_gib(plan.total), "")))


def _list_times(plan: Plan) -> NumberTable:
    bound = {segment.name: segment.value for segment in list_work(plan, "bound")}
    work, waits = list_work(plan, "estimate"), list_waits(plan)
    rows = [_row(one, f"{one.value:,.1f}", f"{bound[one.name]:,.1f}") for one in work]
    rows += [_row(one, f"{one.value:,.1f}", "") for one in waits]
    total = _sum(f"{plan.estimate.total * 1e3:,.1f}", f"{sum(bound.values()):,.1f}")
    return NumberTable(columns=("estimate, ms", "bound, ms"), rows=(*rows, total))


def _list_flops(plan: Plan) -> NumberTable:
    parts, passes = [part for part in plan.list_parts() if any(part.flops.values())], plan.passes
    rows = [Row(name=part.name, numbers=[_describe_tera(part.flops[name]) for name in passes]) for part in parts]
    total = _sum(*(_describe_tera(sum(part.flops[name] for part in parts)) for name in passes))
    return NumberTable(columns=[f"{name}, TFLOP" for name in passes], rows=(*rows, total))


def _describe_tera(count: int) -> str:
    return f"{count / 1e12:,.2f}" if count else ""


def _list_traffic(plan: Plan) -> NumberTable:
    rows = [
        Row(
            name=f"{row.axes}, {row.kind}",
            numbers=(
                plan.describe_link(row.axes),
                f"{row.sent / 1e9:,.3f}",
                f"{row.bound * 1e3:,.1f}",
                f"{row.estimate * 1e3:,.1f}",
            ),
        )
        for row in plan.list_traffic()
    ]
    return NumberTable(columns=("over", "GB", "bound, ms", "estimate, ms"), rows=rows)


def _list_buffers(plan: Plan) -> list[tuple[str, ...]]:
    buffers = plan.peak.buffers[:_BUFFERS_SHOWN] if isinstance(plan.peak, Peak) else ()
    return [(format_gib(one.size), one.owner, one.shape, shorten_operation(one.operation)) for one in buffers]


def _row(segment: Segment, *numbers: str) -> Row:
    hatched = f"repeating-linear-gradient(135deg, {segment.color} 0 3px, #fff 3px 5px)"
    return Row(name=segment.name, numbers=numbers, color=hatched if segment.is_hatched else segment.color)


def _sum(*numbers: str) -> Row:
    return Row(name="all", numbers=numbers, is_sum=True)
