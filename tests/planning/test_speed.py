"""Bounds and estimates of schedules that are typed out, at rates that are easy to reckon with."""

from dataclasses import replace

import pytest

from benchmarks.published_steps import BAND, PUBLISHED
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.schedule import Loop, Product, Send, Wait, Work, sum_flops
from gemma2_jax.planning.speed import (
    FACTORS,
    Rates,
    bound_time,
    data_sheet_rates,
    estimate_time,
    find_link,
    pad_product,
    time_step,
)

INSTRUCTION = 2 * 16 * 8 * 8  # FLOPs
RATES = Rates(products=10.0 * INSTRUCTION, attention=5.0, memory=2.0, links={"fsdp": 4.0, "data": 1.0})
SMALL_CACHE = replace(RATES, cache_bytes=6.0)


def product(instructions: int, memory: float = 0.0) -> Work:
    """A product of so many of the tensor cores' smallest instructions."""
    products = (Product(rows=16, columns=8, depth=8 * instructions),) if instructions else ()
    return Work(part="mlp/down", pass_name="forward", products=products, memory=memory)


def gather(sent: float, name: str = "g", axes: str = "fsdp", *, is_async: bool = True) -> Send:
    return Send(name=name, kind="all-gather", axes=axes, sent=sent, is_async=is_async)


def test_work_takes_as_long_as_its_flops_or_its_bytes():
    assert RATES.time_work(product(30)) == 3
    assert RATES.time_work(product(30, memory=10)) == 5
    assert SMALL_CACHE.time_work(product(0, memory=10)) == 2, "6 of the 10 bytes may be in the cache"
    assert SMALL_CACHE.time_work(product(0, memory=5)) == 0
    both = replace(product(20), attention=20)
    assert RATES.time_work(both) == 6


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        (dict(rows=2048, columns=3584, depth=14336), dict(rows=2048, columns=3584, depth=14336)),
        (dict(rows=17, columns=9, depth=9), dict(rows=24, columns=16, depth=16)),  # 16 columns by 24 rows, turned
        (dict(rows=9, columns=17, depth=9), dict(rows=16, columns=24, depth=16)),
        (dict(rows=4, columns=4096, depth=4096), dict(rows=8, columns=4096, depth=4096)),  # turned, and doubled
        (dict(batch=3, rows=16, columns=8, depth=4), dict(batch=3, rows=16, columns=8, depth=8)),
    ],
)
def test_tensor_cores_do_whole_instructions(sizes, padded):
    assert pad_product(Product(**sizes)) == Product(**padded).flops
    assert RATES.time_product(Product(**sizes)) == pytest.approx(Product(**padded).flops / RATES.products)


def test_products_of_few_rows():
    """On H100 133.8 TFLOP/s of the other units are taken to help with what tensor cores do in vain, and never else."""
    rates = data_sheet_rates(H100, {}, ())
    assert rates.vectors == pytest.approx(133.8e12, rel=1e-3)  # NVIDIA H100 architecture white paper, table 2
    one = Product(rows=1, columns=4096, depth=4096)
    assert rates.time_product(one) == pytest.approx(2 * 4096**2 / (989.5e12 / 8 + 133.8e12), rel=1e-3)
    assert rates.time_product(replace(one, rows=8)) == 2 * 8 * 4096**2 / 989.5e12


def test_a_bound_is_all_work_or_all_traffic():
    items = (Loop(3, (gather(8), product(30), Wait("g"))), gather(2, axes="data", is_async=False))
    found = bound_time(items, RATES)
    assert found.work == {"mlp/down, forward": 9}
    assert found.sent == {"fsdp": 6, "data": 2}
    assert found.total == 9
    assert bound_time((*items, gather(30)), RATES).total == 13.5
    assert bound_time((), RATES).total == 0


@pytest.mark.parametrize(
    ("items", "total", "exposed"),
    [
        ((gather(8), product(30), Wait("g")), 3, 0),  # hidden
        ((gather(20), product(30), Wait("g")), 5, 2),  # 5 s beside 3 s of work
        ((gather(8, is_async=False), product(30)), 5, 2),  # waited for at once
        ((gather(8), gather(8, "h"), product(30), Wait("g"), Wait("h")), 4, 1),  # one after another over one link
        ((gather(8), gather(2, "h", "data"), product(10), Wait("g"), Wait("h")), 2, 1),  # two links at a time
        ((Loop(5, (gather(20), product(30), Wait("g"))),), 25, 10),
        ((Loop(2, (Loop(3, (gather(8), Wait("g"))), product(10))),), 14, 12),
    ],
)
def test_an_estimate_hides_what_it_can(items, total, exposed):
    found = estimate_time(items, RATES)
    assert (found.total, sum(found.exposed.values())) == (total, exposed)
    assert found.computing == total - exposed
    assert bound_time(items, RATES).total <= total


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("tensor", ("link", 450e9)),  # 4 neighbors of one host
        ("data", ("network", 50e9)),  # one GPU of each host
        ("fsdp", ("link", 450e9)),  # 2 of one host
        ("data+fsdp", ("network", 100e9)),  # rings of both GPUs that each host has in the group
        ("data+fsdp+tensor", ("network", 400e9)),
    ],
)
def test_links(axes, expected):
    mesh = {"data": 2, "fsdp": 2, "tensor": 4}
    assert find_link(H100, mesh, axes) == expected
    fast = replace(H100, network_bandwidth=100e9)
    assert find_link(fast, mesh, "data+fsdp+tensor") == ("link", 450e9), "eight adapters are faster than NVLink"


def test_times_on_a_gpu():
    """A product of 989.5 TFLOP takes a second by the data sheet; 45 GB take a tenth of one over NVLink."""
    items = (product(round(H100.tflops * 1e12 / INSTRUCTION)), gather(45e9, is_async=False))
    bound, estimate = time_step(items, H100, {"fsdp": 8})
    assert (bound.total, bound.sent) == (1, {"fsdp": pytest.approx(0.1)})
    assert estimate.total == pytest.approx(1 / FACTORS["products"].share + 0.1 / FACTORS["link"].share)
    assert estimate.exposed == {"fsdp": pytest.approx(0.1 / FACTORS["link"].share)}


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
def test_published_steps(one):
    """No step that was timed beats the bound, and the estimates are as near as docs/planning.md says."""
    (bound, estimate), (_, recomputing) = one.time("none"), one.time("block")
    assert bound.total < one.seconds
    assert BAND[0] < estimate.total / one.seconds < recomputing.total / one.seconds < BAND[1]
    split = replace(one.step, tensor=4, fsdp=1)
    whole, parts = (sum_flops(step.describe()).total() * step.tensor for step in (one.step, split))
    assert parts == pytest.approx(whole)
