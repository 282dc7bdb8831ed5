"""What is said of a plan: its traffic by link, and the tables, of a step that is described and not compiled."""

import json

import pytest
from rich.console import Console
from typed_plan import REDUCED, make_plan

from gemma2_jax import plan
from gemma2_jax.model_config import GEMMA2_2B
from gemma2_jax.planning.dense_step import describe_gemma
from gemma2_jax.planning.gpus import GPUS
from gemma2_jax.planning.report import Traffic
from gemma2_jax.planning.speed import FACTORS

MATRICES = 26 * sum(inputs * outputs for inputs, outputs in describe_gemma(GEMMA2_2B).projections.values())


def test_traffic_by_link():
    """By hand: bfloat16 weights twice a pass within a host, their gradients once, and what goes to the other host."""
    found = {(row.axes, row.kind): row for row in make_plan().list_traffic()}
    gathered, reduced = 4 * 2 * 2 * MATRICES * 7 // 8, 4 * 2 * MATRICES * 7 // 8
    expected = {
        ("data", "all-reduce"): ("network", 50e9, REDUCED),
        ("fsdp", "all-gather"): ("link", 450e9, gathered),
        ("fsdp", "reduce-scatter"): ("link", 450e9, reduced),
    }
    assert {key: (row.link, row.bandwidth, row.sent) for key, row in found.items()} == expected
    slow = found["data", "all-reduce"]
    assert (slow.bound, slow.estimate) == (pytest.approx(0.04), pytest.approx(0.04 / FACTORS["network"].share))
    for name in ("bound", "estimate"):
        times = getattr(make_plan(), name).sent
        assert times["data"] == pytest.approx(getattr(slow, name))
        assert times["fsdp"] == pytest.approx(sum(getattr(found[key], name) for key in found if key[0] == "fsdp"))


def test_tables_and_json_say_which_link():
    console = Console(width=120, record=True)
    one = make_plan()
    plan.print_plan(console, one)
    text = console.export_text()
    sent = 12 * 2 * MATRICES * 7 / 8 / 1e9
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│ ")]
    assert ["data", "network, 50 GB/s", "0.000", "0.000", "2.000", "2.000", "40.0", "48.8"] in rows
    (fsdp,) = (row for row in rows if row[0] == "fsdp")
    assert (fsdp[1], fsdp[5], fsdp[6]) == ("NVLink, 450 GB/s", f"{sent:,.3f}", f"{sent / 450 * 1e3:,.1f}")
    traffic = json.loads(json.dumps(one.as_json()))["traffic"]
    assert [Traffic(**row) for row in traffic] == one.list_traffic()


def test_links_have_the_names_of_their_kind():
    one = make_plan(GPUS["l40s"])
    assert (one.describe_link("fsdp"), one.describe_link("data")) == ("PCIe, 32 GB/s", "PCIe, 32 GB/s")
