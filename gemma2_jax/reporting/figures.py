"""The pictures of a report, as Plotly's figures: one metric or several over steps, of one run or several.

Where there are several runs, a color is a run; where there is one, a color is a metric.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gemma2_jax.reporting.curves import Series
from gemma2_jax.reporting.runs import Run, describe_seconds

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SMOOTHED_POINTS = 200  # from which on a line of training losses is drawn smoothed, over its faint values
# Okabe and Ito's colors, which the color-blind tell apart (https://jfly.uni-koeln.de/color/).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with its title and what a reader should know of it."""

    title: str
    note: str
    figure: "Figure"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A line of a figure."""

    name: str
    series: Series
    dash: str = "solid"
    means: Series | None = None  # of which a long line is drawn smoothed; None: never
    color: int | None = None  # of COLORS; None: the next


def check_plotly() -> None:
    """Raises ValueError where what draws pictures is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise ValueError("pictures need plotly, which is not installed: pip install 'gemma2-jax[report]'")


def smooth(series: Series) -> Series:
    """Means over a window of a fiftieth of the points, which grows from the first point on."""
    width, total, values = max(len(series.values) // 50, 1), 0.0, []
    for index, value in enumerate(series.values):
        total += value - (series.values[index - width] if index >= width else 0.0)
        values.append(total / min(index + 1, width))
    return Series(steps=series.steps, values=values)


def draw_lines(traces: Sequence[Trace], unit: str, *, is_log: bool = False) -> "Figure":
    """Lines over steps, each in the next color."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for number, trace in enumerate(trace for trace in traces if trace.series):
        color = COLORS[(number if trace.color is None else trace.color) % len(COLORS)]
        means = trace.means if len(trace.series.steps) >= SMOOTHED_POINTS else None
        parts = [(smooth(means), 1.0, True)] if means else []
        parts = [(trace.series, 0.25 if means else 1.0, not means), *parts]
        for series, opacity, is_named in parts:
            figure.add_trace(
                Scatter(
                    x=series.steps,
                    y=series.values,
                    name=trace.name,
                    legendgroup=trace.name,
                    showlegend=is_named,
                    opacity=opacity,
                    mode="lines" if len(series.steps) > 60 else "lines+markers",
                    marker={"size": 4},
                    line={"color": color, "width": 1.8, "dash": trace.dash},
                    hovertemplate=f"%{{y:.6~g}} {unit}",
                    hoverinfo="all" if is_named else "skip",
                )
            )
    figure.update_layout(yaxis={"title": {"text": unit}, "type": "log" if is_log else "linear"})
    return _finish(figure)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a bar, in a color, and hatched where it is time in which nothing is done."""

    name: str
    value: float
    text: str  # shown where a reader points at it
    color: str
    is_hatched: bool = False


def draw_bars(bars: Mapping[str, Sequence[Segment]], unit: str, *, has_legend: bool = True) -> "Figure":
    """Bars from left to right, one below the other, each of its segments. Segments of one name are one color."""
    from plotly.graph_objects import Bar, Figure

    figure = Figure()
    pattern = {"fillmode": "overlay", "fgcolor": "#ffffff", "size": 6}
    names = dict.fromkeys(segment.name for segments in bars.values() for segment in segments)
    for name in names:
        found = {bar: one for bar, segments in bars.items() for one in segments if one.name == name}
        first = next(iter(found.values()))
        marker = {"color": first.color, "pattern": pattern | {"shape": "/" if first.is_hatched else ""}}
        figure.add_trace(
            Bar(
                y=[*found],
                x=[segment.value for segment in found.values()],
                name=name,
                orientation="h",
                marker=marker,
                hovertext=[segment.text for segment in found.values()],
                hoverinfo="text",
            )
        )
    order = {"categoryorder": "array", "categoryarray": [*bars], "autorange": "reversed", "automargin": True}
    figure.update_layout(barmode="stack", xaxis={"title": {"text": unit}}, yaxis=order)
    figure = _finish(figure, over_steps=False).update_layout(height=(130 if has_legend else 80) + 36 * len(bars))
    return figure if has_legend else figure.update_layout(showlegend=False)


def draw_parts(runs: Sequence[Run]) -> "Figure":
    """Where the time of each run went, as a bar: steps, waiting for data, evaluations, checkpoints."""
    bars: dict[str, list[Segment]] = {run.name: [] for run in runs}
    for color, (part, seconds) in zip(COLORS, list_parts(runs).items(), strict=False):
        for run, spent in zip(runs, seconds, strict=True):
            if any(seconds):
                text = f"{part}: {describe_seconds(spent)}"
                bars[run.name].append(Segment(name=part, value=spent, text=text, color=color))
    return draw_bars(bars, "s")


def list_parts(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Seconds of each run by what they were spent on, as its metrics add up."""
    waiting = [run.sum("wait_seconds") for run in runs]
    return {
        "steps": [run.sum("seconds") - wait for run, wait in zip(runs, waiting, strict=True)],
        "waiting for data": waiting,
        "evaluations": [run.sum("eval_seconds") for run in runs],
        "checkpoints": [run.sum("checkpoint_seconds") for run in runs],
        "samples": [run.sum("sample_seconds") for run in runs],
    }


def _finish(figure: "Figure", *, over_steps: bool = True) -> "Figure":
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 16, "t": 8, "b": 44},
        height=320,
        hovermode="x unified" if over_steps else "closest",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "traceorder": "normal"},
        showlegend=len({getattr(trace, "name", "") for trace in figure.data}) > 1,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=COLORS,
    )
    if over_steps:
        figure.update_xaxes(title={"text": "step"})
    return figure


def draw_report(runs: Sequence[Run]) -> list[Picture]:
    """All pictures of a report for which there are numbers."""
    pictures = [*_draw_losses(runs), *_draw_optimization(runs), *_draw_speed(runs), *_draw_data(runs)]
    return [picture for picture in pictures if picture.figure.data]


def _draw_losses(runs: Sequence[Run]) -> Iterator[Picture]:
    several = len(runs) > 1
    traces = []
    for number, run in enumerate(runs):
        of_run, color = (f"{run.name}: ", number) if several else ("", None)
        loss, held_out = run.series("loss"), run.series("eval_loss")
        traces.append(Trace(name=f"{of_run}training", series=loss, means=run.means("loss"), color=color))
        traces.append(Trace(name=f"{of_run}held-out", series=held_out, dash="dot", color=color))
    yield Picture(
        title="Loss",
        note="Mean over the tokens that are learned. Where there are many steps, the line is a moving mean.",
        figure=draw_lines(traces, "nats per token"),
    )
    for prefix, title in (("loss", "Training loss by source"), ("eval_loss", "Held-out loss by source")):
        by_source = _list_groups(runs, prefix, is_smoothed=prefix == "loss")
        yield Picture(title=title, note="", figure=draw_lines(by_source, "nats per token"))


def _draw_optimization(runs: Sequence[Run]) -> Iterator[Picture]:
    yield Picture(title="Learning rate", note="", figure=draw_lines(_list_runs(runs, "lr"), "learning rate"))
    norms = _list_runs(runs, "grad_norm", name="whole")
    groups = _list_groups(runs, "grad_norm") if len(runs) == 1 else []
    yield Picture(
        title="Gradient norm",
        note="Before clipping.",
        figure=draw_lines([*norms, *groups], "norm", is_log=True),
    )
    if any(run.series("skipped") and run.series("skipped").last for run in runs):
        skipped = draw_lines(_list_runs(runs, "skipped"), "steps")
        yield Picture(title="Skipped steps", note="Counted from the start of the run.", figure=skipped)


def _draw_speed(runs: Sequence[Run]) -> Iterator[Picture]:
    speed = _list_runs(runs, "tokens_per_s", name="all but padding")
    if len(runs) == 1:
        speed.append(Trace(name="learned", series=runs[0].series("learned_tokens_per_s")))
    yield Picture(title="Tokens per second", note="In the time of steps alone.", figure=draw_lines(speed, "tokens/s"))
    yield Picture(
        title="Model FLOPs utilization",
        note="FLOPs of the model, without recomputation, of the devices' peak in bfloat16.",
        figure=draw_lines(_list_runs(runs, "mfu"), "of the peak"),
    )
    yield Picture(
        title="Model TFLOP/s a device", note="", figure=draw_lines(_list_runs(runs, "tflops_per_device"), "TFLOP/s")
    )
    yield Picture(
        title="Time by part",
        note="Of the steps that are logged. Compiling and reading weights are not in it.",
        figure=draw_parts(runs),
    )
    memory = []
    for name, label in (("memory_bytes", "in use"), ("memory_peak_bytes", "peak")):
        for trace in _list_runs(runs, name, name=label):
            gib = [value / 2**30 for value in trace.series.values]
            memory.append(replace(trace, series=Series(steps=trace.series.steps, values=gib)))
    yield Picture(title="Memory of a device", note="", figure=draw_lines(memory, "GiB"))


def _draw_data(runs: Sequence[Run]) -> Iterator[Picture]:
    padding = draw_lines(_list_runs(runs, "padding"), "of the positions")
    yield Picture(title="Padding", note="Positions of the rows that hold no token.", figure=padding)
    epochs = draw_lines(_list_groups(runs, "epochs"), "epochs")
    yield Picture(title="Epochs by source", note="How often each source has been gone through.", figure=epochs)


def _list_runs(runs: Sequence[Run], metric: str, *, name: str = "") -> list[Trace]:
    """A metric of each run: called by the run where there are several."""
    if len(runs) == 1:
        return [Trace(name=name or metric, series=runs[0].series(metric))]
    return [Trace(name=f"{run.name}: {name}" if name else run.name, series=run.series(metric)) for run in runs]


def _list_groups(runs: Sequence[Run], prefix: str, *, is_smoothed: bool = False) -> list[Trace]:
    """The metrics NAME of all `prefix/NAME`, of each run."""
    return [
        Trace(
            name=f"{run.name}: {name}" if len(runs) > 1 else name,
            series=run.series(metric),
            means=run.means(metric) if is_smoothed else None,
        )
        for run in runs
        for name, metric in run.list_names(prefix).items()
    ]
