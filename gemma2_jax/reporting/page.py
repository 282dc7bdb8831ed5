"""The report of runs as one HTML page that needs no network: pictures, tables, and Plotly's script itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemma2_jax import command_line, config_text
from gemma2_jax.reporting.figures import Picture, draw_report
from gemma2_jax.reporting.runs import Run, describe_seconds


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number that a reader looks for first."""

    name: str
    value: str


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Writes the page, which appears whole. Raises OSError where it cannot be written."""
    command_line.write_whole(path, render_report(runs))


def render_report(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    pictures = draw_report(runs)
    return render_page(
        "page.html.jinja",
        pictures,
        title=", ".join(run.name for run in runs),
        runs=[(run, list_tiles(run)) for run in runs],
        bucket_width=max(run.bucket_width for run in runs),
        events=[(run, run.metrics.events) for run in runs if run.metrics.events],
        samples=[(run, list_samples(run)) for run in runs if run.samples],
        differences=list_differences(runs),
        configs=[(run, config_text.to_text(run.config)) for run in runs],
        environments=[(run, list_environment(run)) for run in runs if run.starts],
    )


def render_page(template: str, pictures: Sequence[Picture], **fields: Any) -> str:
    """A template of this folder with these pictures and fields, and Plotly's script."""
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return page.get_template(template).render(
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        pictures=pictures,
        figures=_write_figures(pictures),
        plotly=get_plotlyjs(),
        **fields,
    )


def _write_figures(pictures: Sequence[Picture]) -> str:
    """The figures as a JSON array that may stand in a script of HTML."""
    figures = [json.loads(picture.figure.to_json() or "") for picture in pictures]
    return json.dumps(figures).replace("<", "\\u003c")


def list_tiles(run: Run) -> list[Tile]:
    """The numbers at the head of a run."""
    loss, held_out, speed = run.series("loss"), run.series("eval_loss"), run.series("tokens_per_s")
    tiles = [Tile(name="status", value=run.status)]
    if loss:
        tiles.append(Tile(name="training loss", value=f"{loss.last:.4f}"))
    if held_out:
        best = min(range(len(held_out.values)), key=held_out.values.__getitem__)
        tiles.append(Tile(name="held-out loss", value=f"{held_out.last:.4f}"))
        tiles.append(Tile(name="best held-out loss", value=f"{held_out.values[best]:.4f} at {held_out.steps[best]:,}"))
    if speed:
        tiles.append(Tile(name="tokens/s", value=f"{speed.last:,.0f}"))
    if mfu := run.series("mfu"):
        tiles.append(Tile(name="MFU", value=f"{mfu.last:.1%}"))
    spent = run.sum("seconds") + run.sum("eval_seconds") + run.sum("checkpoint_seconds")
    if spent:
        tiles.append(Tile(name="time in the loop", value=describe_seconds(spent)))
    left = run.config.steps - run.step
    if left > 0 and run.step and spent and run.ending != "end":
        tiles.append(Tile(name="time left at this pace", value=describe_seconds(left * spent / run.step)))
    if (skipped := run.series("skipped")) and skipped.last:
        tiles.append(Tile(name="skipped steps", value=f"{skipped.last:,.0f}"))
    return tiles


def list_samples(run: Run) -> list[tuple[str, list[tuple[int, str]]]]:
    """The prompts, and what was generated for each by step: of the first and of the last evaluations."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for line in run.samples:
        for sample in line["samples"]:
            by_prompt.setdefault(sample["prompt"], []).append((line["step"], sample["completion"]))
    return list(by_prompt.items())


def list_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The fields of the configs that are not alike in all runs, with the value of each run."""
    texts = [dict(line.split(" = ", 1) for line in config_text.to_text(run.config).splitlines()) for run in runs]
    rows = [(key, [text.get(key, "") for text in texts]) for key in texts[0]]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "workdir"]


def list_environment(run: Run) -> list[dict[str, str]]:
    """Each start of a run in words: the newest first, and of those before it only what was another."""
    starts = [{key: _describe_fact(value) for key, value in start.items()} for start in run.starts]
    newest, *older = reversed(starts)
    always = ("time", "step")
    changes = [{k: v for k, v in start.items() if k in always or newest.get(k) != v} for start in older]
    return [newest, *changes]


def _describe_fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items())
    return "unknown" if value is None else str(value)
