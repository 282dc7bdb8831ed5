"""The page of a plan: it has the plan's numbers, is whole HTML, and needs no network."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typed_plan import make_plan

from gemma2_jax.planning.gpus import GPUS
from gemma2_jax.planning.speed import FACTORS
from gemma2_jax.reporting.plan_page import PlanRequest, render_plan, write_plan

COMMAND = "python -m gemma2_jax.plan --config 2b_sft --gpus 16 --html 'a <b> page.html'"
REQUEST = PlanRequest(recipe="2b_sft", command=COMMAND, price=2.5)
EMPTY = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Texts of a page, tags that were not closed in their order, and what it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str | None] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if "script" in self.open or "style" in self.open:
            return
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read_figures(text: str) -> list[dict]:
    found = re.search(r"const figures = (.*);\n", text)
    assert found
    return json.loads(found[1])


def test_the_page_has_the_numbers_of_the_plan():
    plan = make_plan()
    text = render_plan(plan, REQUEST)
    page = Page(text)
    assert not page.open and not page.fetched
    assert text.count("<h1>2b_sft on 16 x H100 80GB, mesh data 2 x fsdp 8</h1>") == 1
    assert "Nothing on this page was measured." in page.words and COMMAND in page.words
    assert "9.00 of 75.15 GiB" in page.words and "fits, 66.2 GiB to spare" in page.words
    for time in (plan.bound, plan.estimate):
        assert f"{time.total * 1e3:,.1f} ms a step" in page.words and f"{plan.token_rate(time):,.0f}" in page.words
        assert f"{plan.gpu_hours(time):,.2f} GPU-hours, ${plan.gpu_hours(time) * 2.5:,.2f}" in page.words
    assert ["optimizer", "4.00", "44.4%"] in page.rows and ["all", "9.00", ""] in page.rows
    assert ["1.00", "gradients", "f32[26,288,9216]", "backward/layers/<dot>"] in page.rows
    assert ["data, all-reduce", "network, 50 GB/s", "2.000", "40.0", "48.8"] in page.rows
    (waiting,) = (row for row in page.rows if row[0] == "waiting for data (network, 50 GB/s)")
    assert waiting[1] == "48.8"
    (down,) = (row for row in page.rows if row[0] == "mlp/down" and len(row) == 4)
    assert down[1] == f"{plan.flops['mlp/down']['forward'] / 1e12:,.2f}"
    for name, factor in FACTORS.items():
        assert [name, str(factor.share), factor.source] in page.rows


def test_the_pictures_are_of_the_same_numbers():
    plan = make_plan()
    memory, time, flops, traffic = read_figures(render_plan(plan, REQUEST))
    assert sum(bar["x"][0] for bar in memory["data"]) == pytest.approx(plan.total / 2**30)
    assert memory["layout"]["shapes"][0]["x0"] == pytest.approx(plan.device.usable_bytes / 2**30)
    totals: dict[str, float] = {}
    for bar in time["data"]:
        for row, value in zip(bar["y"], bar["x"], strict=True):
            totals[row] = totals.get(row, 0) + value / 1e3
    bound = {"bound: computing": plan.bound.computing, "bound: data": 0.04, "bound: fsdp": plan.bound.sent["fsdp"]}
    assert totals == pytest.approx({"estimate": plan.estimate.total, **bound})
    assert max(bound.values()) == plan.bound.total
    drawn = sum(sum(bar["x"]) for bar in flops["data"])
    assert drawn == pytest.approx(sum(sum(counts.values()) for counts in plan.flops.values()) / 1e12)
    sent = sum(sum(bar["x"]) for bar in traffic["data"])
    assert sent == pytest.approx(sum(kinds.total() for kinds in plan.traffic.values()) / 1e9)


def test_pages_of_other_plans():
    """One GPU sends nothing, XLA's dump may not be read, and a step may not fit."""
    plan = make_plan(GPUS["a100-40"])
    plan = replace(plan, collectives=(), peak="<it> cannot be read", total=40 * 2**30)
    text = render_plan(plan, replace(REQUEST, price=None))
    assert len(read_figures(text)) == 3
    assert "does not fit, by 2.5 GiB" in text and 'class="tile alarm"' in text
    assert "&lt;it&gt; cannot be read" in text and "$" not in Page(text).words


def test_the_page_appears_whole(tmp_path, monkeypatch):
    write_plan(make_plan(), tmp_path / "new" / "plan.html", REQUEST)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.html"]
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError):
        write_plan(make_plan(), tmp_path / "other.html", REQUEST)
    assert not (tmp_path / "other.html").exists()
