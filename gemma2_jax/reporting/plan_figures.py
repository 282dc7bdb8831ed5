"""The pictures of a plan: memory, the time of a step, its FLOPs and its traffic, as bars."""

from collections.abc import Sequence

from gemma2_jax.planning.report import REST, Plan, Traffic, format_gib
from gemma2_jax.planning.schedule import PASSES
from gemma2_jax.planning.traffic import SENT
from gemma2_jax.reporting.figures import COLORS, Picture, Segment, draw_bars

_GIB = 2**30
_COLORS, _REST_COLOR = (*COLORS[:7], "#F0E442"), COLORS[7]
_AXES_COLORS = (
    "#882255",
    "#44AA99",
    "#332288",
    "#DDCC77",
    "#999933",
)  # of communication (Paul Tol's, personal.sron.nl/~pault)
_LINE = {"color": "#808080", "width": 2, "dash": "dash"}


def list_memory(plan: Plan) -> list[Segment]:
    """Memory of one GPU by owner."""
    owners = plan.list_owners()
    return [
        Segment(name=name, value=size / _GIB, text=f"{name}: {format_gib(size)} GiB", color=_pick_color(name, number))
        for number, (name, size) in enumerate(owners.items())
    ]


def list_work(plan: Plan, time: str) -> list[Segment]:
    """What one GPU computes, by the part of the model, in the "bound" or the "estimate"."""
    seconds = {part.name: getattr(part, time) for part in plan.list_parts()}
    return [
        _time_segment(name, spent, _pick_color(name, number)) for number, (name, spent) in enumerate(seconds.items())
    ]


def list_waits(plan: Plan) -> list[Segment]:
    """What nothing hides of the estimate's communication, by the axes along which it goes."""
    return [
        _time_segment(
            f"waiting for {axes} ({plan.describe_link(axes)})", seconds, _axes_color(plan, axes), is_hatched=True
        )
        for axes, seconds in sorted(plan.estimate.exposed.items())
        if seconds
    ]


def draw_plan(plan: Plan) -> list[Picture]:
    """All pictures of a plan."""
    traffic = plan.list_traffic()
    return [
        _draw_memory(plan),
        _draw_time(plan),
        _draw_flops(plan),
        *([_draw_traffic(plan, traffic)] if traffic else []),
    ]


def _pick_color(name: str, number: int) -> str:
    return _REST_COLOR if name == REST else _COLORS[number % len(_COLORS)]


def _axes_color(plan: Plan, axes: str) -> str:
    return _AXES_COLORS[sorted(plan.bound.sent).index(axes) % len(_AXES_COLORS)]


def _time_segment(name: str, seconds: float, color: str, *, is_hatched: bool = False) -> Segment:
    milliseconds = seconds * 1e3
    text = f"{name}: {milliseconds:,.1f} ms"
    return Segment(name=name, value=milliseconds, text=text, color=color, is_hatched=is_hatched)


def _draw_memory(plan: Plan) -> Picture:
    usable = plan.device.usable_bytes
    figure = draw_bars({"": list_memory(plan)}, "GiB", has_legend=False)
    figure.add_vline(
        x=usable / _GIB, line=_LINE, annotation_text=f"usable {format_gib(usable)}", annotation_xanchor="right"
    )
    figure.update_layout(
        margin={"t": 28, "l": 12},
        xaxis={"range": [0, 1.04 * max(usable, plan.total) / _GIB]},
    )
    note = f"Of the {plan.device.memory_bytes / _GIB:.2f} GiB of one GPU, XLA may take 95%."
    return Picture(title="Memory of one GPU", note=note, figure=figure)


def _draw_time(plan: Plan) -> Picture:
    bars: dict[str, Sequence[Segment]] = {"estimate": [*list_work(plan, "estimate"), *list_waits(plan)]}
    bars["bound: computing"] = list_work(plan, "bound")
    for axes, seconds in sorted(plan.bound.sent.items()):
        name = f"sent along {axes} ({plan.describe_link(axes)})"
        bars[f"bound: {axes}"] = [_time_segment(name, seconds, _axes_color(plan, axes))]
    note = (
        "The estimate goes through the step in its order, and waits for what it needs; here its parts are added up. "
        "The bound is the longest of its bars, as each goes on beside the others."
    )
    figure = draw_bars(bars, "ms a step", has_legend=False)
    return Picture(title="Time of a step", note=note, figure=figure)


def _draw_flops(plan: Plan) -> Picture:
    colors: dict[str, str] = dict(zip(PASSES, COLORS, strict=False))
    bars = {}
    for part in plan.list_parts():
        if any(part.flops.values()):
            bars[part.name] = [
                Segment(name=name, value=count / 1e12, text=f"{name}: {count / 1e12:,.2f} TFLOP", color=colors[name])
                for name, count in part.flops.items()
                if count
            ]
    note = "Matrix products, with those that are computed again."
    return Picture(title="FLOPs of one GPU in a step", note=note, figure=draw_bars(bars, "TFLOP"))


def _draw_traffic(plan: Plan, traffic: Sequence[Traffic]) -> Picture:
    colors = dict(zip(SENT, COLORS, strict=False))
    bars: dict[str, list[Segment]] = {}
    for row in traffic:
        size = row.sent / 1e9
        segment = Segment(name=row.kind, value=size, text=f"{row.kind}: {size:,.3f} GB", color=colors[row.kind])
        bars.setdefault(row.axes, []).append(segment)
    note = "By the axes of the mesh along which it goes."
    return Picture(title="What one GPU sends in a step", note=note, figure=draw_bars(bars, "GB"))
