"""The report of runs: what is read from their folders, what is drawn of it, and the page."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from small_runs import ROOT

from gemma2_jax import config_text, recipes, report
from gemma2_jax.reporting import figures, page, runs
from gemma2_jax.reporting.curves import BUCKETS, Curve, Series

START = {
    "time": "2026-01-02T03:04:05+00:00",
    "step": 0,
    "versions": {"jax": "0.11.2"},
    "driver": None,
    "host": "node-7",
}


def write_run(folder, *, steps=4, lines=None, **changes):
    """A run's folder with the metrics of four steps, or these."""
    folder.mkdir()
    config = replace(recipes.load_recipe("tiny_lora"), workdir=str(folder), steps=steps, **changes)
    (folder / "config.txt").write_text(config_text.to_text(config))
    (folder / "environment.json").write_text(json.dumps([START, {**START, "step": 2, "host": "node-8"}]))
    now = time.time()
    if lines is None:
        lines = [{"step": 0, "eval_loss": 4.0, "eval_seconds": 2.0, "time": now}]
        lines += [
            {
                "step": step, "loss": 5.0 - step, "loss/chat": 4.0 - step, "lr": 0.1, "tokens_per_s": 10,
                "seconds": 3.0, "wait_seconds": 1.0, "padding": 0.1, "skipped": 0, "time": now,
            }
            for step in (1, 2, 3, 4)
        ]  # fmt: skip
        lines += [
            {"step": 4, "eval_loss": 3.0, "eval_seconds": 2.5, "time": now},
            {"step": 4, "checkpoint_seconds": 0.5, "time": now},
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_series_and_parts_are_those_of_the_lines(tmp_path):
    run = runs.read_run(write_run(tmp_path / "a"))
    assert run.series("loss") == Series(steps=[1, 2, 3, 4], values=[4.0, 3.0, 2.0, 1.0])
    assert run.list_names("loss") == {"chat": "loss/chat"}
    assert run.series("loss/chat") == run.means("loss/chat") == Series(steps=[1, 2, 3, 4], values=[3.0, 2.0, 1.0, 0.0])
    assert not run.series("mfu")
    assert figures.list_parts([run]) == {
        "steps": [8.0], "waiting for data": [4.0], "evaluations": [4.5], "checkpoints": [0.5], "samples": [0],
    }  # fmt: skip
    tiles = {tile.name: tile.value for tile in page.list_tiles(run)}
    assert tiles["status"] == "finished, 4 steps"
    assert tiles["best held-out loss"] == "3.0000 at 4"
    assert tiles["time in the loop"] == "17 s"
    assert page.list_environment(run)[0]["host"] == "node-8"
    assert page.list_environment(run)[1] == {"time": START["time"], "step": "0", "host": "node-7"}


def test_a_run_in_progress_is_read(tmp_path):
    """The last line is cut off, and step 2 was taken again after a resume."""
    now = time.time()
    lines = [{"step": step, "loss": loss, "time": now} for step, loss in ((1, 9.0), (2, 8.0), (2, 7.0))]
    run = runs.read_run(write_run(tmp_path / "a", steps=9, lines=lines))
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run = runs.read_run(run.folder)
    assert run.series("loss") == Series(steps=[1, 2], values=[9.0, 7.0])
    assert run.status == "step 2 of 9, under way"
    for line in lines:
        line["time"] = now - 7300
    silent = runs.read_run(write_run(tmp_path / "b", steps=9, lines=lines))
    assert silent.status == "step 2 of 9, has written nothing for 2 h 1 min"
    lines.append({"step": 2, "event": "stop", "text": "told to stop", "time": now})
    assert runs.read_run(write_run(tmp_path / "c", steps=9, lines=lines)).status == "step 2 of 9, stopped"
    (tmp_path / "c/metrics.jsonl").unlink()
    empty = runs.read_run(tmp_path / "c")
    assert empty.status == "9 steps, no metrics"
    assert "There are no metrics yet" in page.render_report([empty])


def test_a_run_that_ended_early_has_no_time_left(tmp_path):
    """As by train.patience; one that was stopped goes on by the same command, for so long."""
    lines = [{"step": 2, "loss": 8.0, "seconds": 4.0, "time": time.time()}]
    for event, word, left in (("stop", "stopped", {"14 s"}), ("end", "ended", set())):
        lines.append({"step": 2, "event": event, "text": "it has ended", "time": time.time()})
        run = runs.read_run(write_run(tmp_path / event, steps=9, lines=lines))
        assert run.status == f"step 2 of 9, {word}"
        assert {tile.value for tile in page.list_tiles(run) if tile.name == "time left at this pace"} == left
    lines.append({"step": 3, "loss": 8.0, "time": time.time()})  # with more patience
    assert runs.read_run(write_run(tmp_path / "more", steps=9, lines=lines)).status == "step 3 of 9, under way"


def write_line(folder: Path, line: str) -> None:
    """Has the metrics be this line and another."""
    (folder / "metrics.jsonl").write_text(f'{line}\n{{"step": 2}}\n')


def replace_metrics(folder: Path) -> Path:
    """Removes the metrics, and returns where something else may be put."""
    (folder / "metrics.jsonl").unlink()
    return folder / "metrics.jsonl"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.txt").unlink(), "is not a run's working directory, as it has no config.txt"),
        (
            lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n'),
            "metrics.jsonl:2 is",
        ),
        (lambda folder: (folder / "metrics.jsonl").write_text('[1]\n{"step": 2}\n'), "it is no object with a step"),
        (lambda folder: write_line(folder, '{"step": 1, "time": null}'), r"jsonl:1 is .* \(its time is no number\)"),
        (lambda folder: write_line(folder, '{"step": 1, "time": 1e999}'), "its time is no number"),
        (lambda folder: write_line(folder, '{"step": 1, "event": "skip"}'), "its event has no text"),
        (lambda folder: write_line(folder, '{"step": 1, "samples": [{"prompt": "Hi"}]}'), "its samples are no prompts"),
        (lambda folder: write_line(folder, '{"step": 1, "samples": 5}'), "its samples are no prompts"),
        (lambda folder: write_line(folder, f'{{"step": {2**31}}}'), "it is no object with a step"),
        (lambda folder: os.mkfifo(replace_metrics(folder)), "metrics.jsonl is not a file"),
        (lambda folder: replace_metrics(folder).mkdir(), "metrics.jsonl is not a file"),
        (lambda folder: write_line(folder, "[" * 100_000), "jsonl:1 is not a line of metrics .*recursion"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, damage, message):
    folder = write_run(tmp_path / "a")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        runs.read_run(folder)


def test_values_of_other_programs_are_left_out(tmp_path):
    """Numbers that JSON should not have, half a letter, and an environment that is not of a run."""
    lines = [
        {"step": 1, "loss": 2.0, "seconds": math.inf, "lr": 10**400, "time": 1.0},
        {"step": 2, "loss": "low", "seconds": 3.0},
        {"step": 2, "event": "skip", "text": "half \ud800"},
    ]
    folder = write_run(tmp_path / "a", lines=lines)
    (folder / "environment.json").write_text('[{"time": 5}, 7]')
    run = runs.read_run(folder)
    assert (run.series("loss").values, run.series("seconds").values, run.starts) == ([2.0], [3.0], [])
    assert not run.series("lr") and not run.series("text")
    page.write_report([run], tmp_path / "report.html")
    assert "half ?" in (tmp_path / "report.html").read_text()
    (folder / "environment.json").write_text("[" * 100_000)
    assert runs.read_run(folder).starts == []


def make_curve(steps, values, batch=1000):
    curve = Curve()
    for start in range(0, len(steps), batch):
        part = slice(start, start + batch)
        curve.add(np.array(steps[part], np.int64), np.array(values[part], np.float64))
    return curve


def test_a_curve_of_many_steps_is_small_and_keeps_its_peaks():
    values = [1.0] * 100_000
    values[12_345], values[87_654], values[55_555] = 7.0, -7.0, math.nan
    curve = make_curve(range(100_000), values)
    assert curve.width == 64 and BUCKETS == 2000  # 100,000 / 64 buckets are 1,563
    drawn = dict(zip(curve.series.steps, curve.series.values, strict=True))
    assert curve.series.steps == sorted(drawn) and len(drawn) <= 2 * BUCKETS + 1
    assert (drawn[12_345], drawn[87_654], curve.series.steps[-1], curve.series.last) == (7.0, -7.0, 99_999, 1.0)
    assert curve.sum == 99_997
    assert dict(zip(curve.means.steps, curve.means.values, strict=True))[12_351] == pytest.approx((63 + 7) / 64)
    smoothed = figures.smooth(Series(steps=list(range(100)), values=[1.0, 3.0] * 50))
    assert smoothed.values[:4] == [1.0, 2.0, 2.0, 2.0]  # of two points


@pytest.mark.parametrize(("first", "again"), [(100, 50), (8000, 3999)])
def test_steps_that_are_taken_again_count_once(first, again):
    """Exactly where each step has its own place, and else but for what was before them in the same bucket."""
    curve = make_curve([*range(first), *range(first - again, first)], [1.0] * first + [2.0] * again, batch=30)
    assert 0 <= first + again - curve.sum < curve.width
    assert min(curve.series.values[curve.series.steps.index(first - 1) - 20 :]) == 2.0


def test_a_page_says_that_its_curves_are_drawn_by_stretches(tmp_path, monkeypatch):
    lines = [{"step": step, "loss": 9.0 if step == 3333 else 1.0} for step in range(1, 5001)]
    lines += [{"step": 5000, "event": "skip", "text": f"skip {number}"} for number in range(300)]
    monkeypatch.setattr(runs, "_BATCH_LINES", 100)
    text = page.render_report([runs.read_run(write_run(tmp_path / "a", steps=5000, lines=lines))])
    assert "drawn by stretches of at most 4 steps" in text
    assert "The last 200 of 300" in text and "skip 99" not in text and "skip 100" in text
    drawn = json.loads(re.search(r"const figures = (.*);\n", text)[1])[0]["data"][0]
    assert drawn["y"][drawn["x"].index(3333)] == 9.0
    assert "drawn by stretches" not in page.render_report([runs.read_run(write_run(tmp_path / "b"))])


class Links(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_network_and_runs_nothing_foreign(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    lines = [
        {"step": 1, "loss": 2.0, f"loss/{hostile}": 1.0, "time": 1.0},
        {"step": 1, "event": "skip", "text": hostile},
        {"step": 1, "samples": [{"prompt": hostile, "completion": f"<b>{hostile}"}]},
    ]
    one, other = write_run(tmp_path / "a", lines=lines), write_run(tmp_path / "b", steps=7)
    text = page.render_report([runs.read_run(one), runs.read_run(other)])
    links = Links()
    links.feed(text)
    assert links.found == []
    assert "<script>alert" not in text
    assert text.count("&lt;/script&gt;") == 6
    assert re.search(r"<td>steps</td><td>4</td><td>7</td>", text)
    assert "Training loss by source" in text
    drawn = json.loads(re.search(r"const figures = (.*);\n", text)[1])
    assert drawn[0]["data"][0]["name"] == "a: training"


def test_the_command_writes_the_page_without_jax(tmp_path, monkeypatch):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    code = f"import sys; sys.argv = ['report', {str(one)!r}, {str(other)!r}]\n"
    code += "from gemma2_jax import report; report.main(); assert not {'jax', 'transformers'} & {*sys.modules}"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{one}/report.html (")
    assert [path.name for path in one.glob("report.html*")] == ["report.html"]
    for arguments, message in (([str(tmp_path / "c")], "there is no folder"), ([], "a run is needed")):
        command = [sys.executable, "-m", "gemma2_jax.report", *arguments]
        failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert failed.returncode != 0
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
    monkeypatch.setattr(sys, "argv", ["report", str(one), "--output", str(other)])
    with pytest.raises(SystemExit, match=f"{other} is a folder, and the page is a file; give its name, as --output"):
        report.main()
