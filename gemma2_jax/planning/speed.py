"""How fast a step can be: a bound that no run beats and, apart, an estimate with its factors. Neither is measured.

The bound has each GPU compute at its data sheet's rates, and communicate all the while: a step takes at least as long
as its work, kernel by kernel the longer of its FLOPs and its bytes, and at least as long as each link's traffic. FLOPs
are those of whole instructions of the tensor cores. What could be in the cache counts no bytes. Idle ticks of a
pipeline are in the work, as a stage computes in them too.

The estimate goes through the schedule in its order: work at the shares of the data sheet's rates that others have
measured, and collectives beside it from where they begin to where what they bring is needed; only what is not ready by
then takes time. What launching kernels takes is not in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gemma2_jax.planning.schedule import Loop, Send, Wait, Work, list_work

if TYPE_CHECKING:
    from gemma2_jax.planning.gpus import Gpu
    from gemma2_jax.planning.schedule import Item, Product


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The share of a data sheet's rate that is reached, and who says so."""

    share: float
    source: str


# Of all H100 SXM; no kernel of this package has been timed on a GPU.
FACTORS = {
    "products": Factor(
        share=0.70,
        source="the best shape reaches 0.80 (stas00/ml-engineering, compute/accelerator, MAMF of H100 SXM: 792 of 989 "
        "TFLOP/s); 0.70 is taken for a model's shapes",
    ),
    "attention": Factor(
        share=0.33,
        source="FlashAttention-2 on H100, head width 128, causal, 8k: 333 forward and 297 TFLOP/s backward of 989 "
        "(FlashAttention-3, arXiv:2407.08608, figures 5 and 6)",
    ),
    "memory": Factor(
        share=0.84,
        source="2.8 of 3.35 TB/s when matrices are read in order (mikamirai.com/blog/gpu-memory-bandwidth)",
    ),
    "link": Factor(share=0.82, source="370 of 450 GB/s over NVLink (NVIDIA/nccl-tests, issue 212)"),
    "network": Factor(share=0.82, source="taken to be as that of links"),
}

# How many times the estimate a step is to be expected to take: see docs/planning.md, "How good are they?".
EXPECTED_RATIO = (0.9, 1.8)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on one GPU."""

    total: float
    work: dict[str, float]  # by part and pass, such as "mlp/down, backward"
    sent: dict[str, float]  # by mesh axes: how long its collectives take, hidden or not
    exposed: dict[str, float] = field(default_factory=dict)  # by mesh axes: what nothing hides

    @property
    def computing(self) -> float:
        """Seconds of work."""
        return sum(self.work.values())


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOP/s and bytes/s."""

    products: float
    attention: float
    memory: float
    links: Mapping[str, float]  # by mesh axes
    vectors: float = 0.0  # of products that are computed beside the tensor cores
    cache_bytes: float = 0.0  # so much of what a kernel reads and writes is taken to be in the cache

    def time_product(self, product: Product) -> float:
        """Seconds of a matrix product: of all that the tensor cores' instructions do for it, which are whole ones.

        Where that is much more than the product, other units may help: so these are taken to compute beside them.
        """
        flops = product.flops
        return flops / min(self.products, self.products * flops / pad_product(product) + self.vectors)

    def time_work(self, work: Work) -> float:
        """Seconds of one kernel: its products or its bytes, whichever takes longer."""
        memory = max(0.0, work.memory - self.cache_bytes)
        products = sum(self.time_product(product) for product in work.products)
        return max(products + work.attention / self.attention, memory / self.memory)


def pad_product(product: Product) -> float:
    """FLOPs of the tensor cores' smallest instructions that cover a product, either way round.

    They take bfloat16 as `mma.m16n8k8` (NVIDIA, PTX ISA, "Matrix Shape"), on all GPUs since Ampere. Hopper's wgmma has
    64 rows, but need not be used. Nothing coarser is forced: how large the tiles of a kernel are, and that its last
    wave leaves multiprocessors idle, is the kernel's choice, which may also divide the depth among multiprocessors
    (Stream-K, arXiv:2301.03598).
    """
    rows, columns, depth = product.rows, product.columns, product.depth
    area = min(_round_up(rows, 16) * _round_up(columns, 8), _round_up(rows, 8) * _round_up(columns, 16))
    return 2.0 * product.batch * area * _round_up(depth, 8)


def _round_up(size: float, step: int) -> float:
    return size + -size % step


def time_step(items: Sequence[Item], gpu: Gpu, mesh: Mapping[str, int]) -> tuple[StepTime, StepTime]:
    """The bound and the estimate of a step's schedule on a mesh of such GPUs."""
    axes = sorted(_list_axes(items))
    bound = bound_time(items, data_sheet_rates(gpu, mesh, axes))
    return bound, estimate_time(items, expected_rates(gpu, mesh, axes))


def _list_axes(items: Sequence[Item]) -> set[str]:
    inside = {axes for item in items if isinstance(item, Loop) for axes in _list_axes(item.items)}
    return inside | {item.axes for item in items if isinstance(item, Send)}


def data_sheet_rates(gpu: Gpu, mesh: Mapping[str, int], axes: Sequence[str]) -> Rates:
    """The rates of a GPU's data sheet, and those of the links that groups along mesh axes use."""
    links = {name: find_link(gpu, mesh, name)[1] for name in axes}
    flops = gpu.tflops * 1e12
    return Rates(
        products=flops,
        attention=flops,
        memory=gpu.memory_bandwidth,
        links=links,
        vectors=gpu.vector_flops,
        cache_bytes=gpu.cache_bytes,
    )


def expected_rates(gpu: Gpu, mesh: Mapping[str, int], axes: Sequence[str]) -> Rates:
    """The shares of those rates that `FACTORS` has."""
    links = {}
    for name in axes:
        kind, bandwidth = find_link(gpu, mesh, name)
        links[name] = FACTORS[kind].share * bandwidth
    return Rates(
        products=FACTORS["products"].share * gpu.tflops * 1e12,
        attention=FACTORS["attention"].share * gpu.tflops * 1e12,
        memory=FACTORS["memory"].share * gpu.memory_bandwidth,
        links=links,
        vectors=FACTORS["products"].share * gpu.vector_flops,
    )


def find_link(gpu: Gpu, mesh: Mapping[str, int], axes: str) -> tuple[str, float]:
    """The slowest link of groups along these axes, "link" or "network", and bytes/s that a GPU can send over it.

    A ring through several hosts enters and leaves each of them once, and as many rings as it has GPUs there share the
    host's networks: so a group with g GPUs in each host sends at g times one GPU's network, and at most at the link's
    rate.
    """
    place = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    varying = [number for number, name in enumerate(mesh) if name in axes.split("+")]
    groups = np.moveaxis(place, varying, range(-len(varying), 0)).reshape(
        -1, math.prod(place.shape[i] for i in varying)
    )
    hosts = groups // gpu.gpus_per_host
    if (hosts == hosts[:, :1]).all():
        return "link", gpu.link_bandwidth
    together = min(int(np.unique(group, return_counts=True)[1].max()) for group in hosts)
    network = together * gpu.network_bandwidth
    return ("network", network) if network < gpu.link_bandwidth else ("link", gpu.link_bandwidth)


def bound_time(items: Sequence[Item], rates: Rates) -> StepTime:
    """What no step of this schedule beats: its work, or what it sends over a link, whichever takes longer."""
    work: defaultdict[str, float] = defaultdict(float)
    for one, times in list_work(items):
        work[f"{one.part}, {one.pass_name}"] += rates.time_work(one) * times
    sent = _sum_sent(items, rates)
    return StepTime(total=max(sum(work.values()), *sent.values(), 0.0), work=dict(work), sent=sent)


def estimate_time(items: Sequence[Item], rates: Rates) -> StepTime:
    """The time of the schedule in its order, with collectives beside the work until they are waited for."""
    timeline = _Timeline(rates)
    total = timeline.run(items)
    return StepTime(
        total=total,
        work=dict(timeline.work),
        sent=_sum_sent(items, rates),
        exposed=dict(timeline.exposed),
    )


def _sum_sent(items: Sequence[Item], rates: Rates, times: int = 1) -> dict[str, float]:
    sent: defaultdict[str, float] = defaultdict(float)
    for item in items:
        if isinstance(item, Send):
            sent[item.axes] += item.sent / rates.links[item.axes] * times
        elif isinstance(item, Loop):
            for axes, seconds in _sum_sent(item.items, rates, times * item.times).items():
                sent[axes] += seconds
    return sent


@dataclass
class _Timeline:
    """The work of one GPU in its order, and each link's collectives beside it, one after another."""

    rates: Rates
    work: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    exposed: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def run(self, items: Sequence[Item], times: int = 1) -> float:
        """Seconds of the items once; what they take is counted `times` times."""
        now = 0.0
        free: dict[str, float] = {}  # when the link along these axes is free
        ends: dict[str, tuple[str, float]] = {}  # of collectives that have begun: their axes, and when they end
        for item in items:
            match item:
                case Loop():
                    now += item.times * self.run(item.items, times * item.times)
                case Work():
                    seconds = self.rates.time_work(item)
                    self.work[f"{item.part}, {item.pass_name}"] += seconds * times
                    now += seconds
                case Send():
                    begun = max(now, free.get(item.axes, 0.0))
                    end = free[item.axes] = begun + item.sent / self.rates.links[item.axes]
                    if item.is_async:
                        ends[item.name] = item.axes, end
                    else:
                        now = self._wait(item.axes, now, end, times)
                case Wait():
                    axes, end = ends.pop(item.name)
                    now = self._wait(axes, now, end, times)
        return now

    def _wait(self, axes: str, now: float, end: float, times: int) -> float:
        self.exposed[axes] += max(0.0, end - now) * times
        return max(now, end)
