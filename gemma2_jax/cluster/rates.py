"""How fast the devices compute, copy, and send to one another along each axis of a mesh.

Bus bandwidth is as the nccl-tests define it (their doc/PERFORMANCE.md): the rate of the links that an ideal algorithm
would have, which compares over numbers of devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax.cluster.devices import find_peak
from gemma2_jax.cluster.findings import Row, skip
from gemma2_jax.cluster.timing import measure_seconds

# Shares of what a data sheet promises below which something is slow: products and copies of this size reach more on
# GPUs that are in order, and collectives have been seen at four fifths of a link.
_COMPUTE_SHARE, _MEMORY_SHARE, _LINK_SHARE = 0.55, 0.7, 0.5
_EVEN_SHARE = 0.9  # of the fastest device's rate, that the slowest reaches


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is computed and sent to see how fast it goes.

    Attributes:
      product: rows and columns of the matrices of a product.
      copied: bytes that are copied.
      sent: bytes of each device in a collective.
      least, rounds: of `measure_seconds`.
    """

    product: int
    copied: int
    sent: int
    least: float = 0.1
    rounds: int = 3


GPU = Sizes(product=8192, copied=1 << 30, sent=64 << 20)
CPU = Sizes(product=512, copied=16 << 20, sent=1 << 20, least=0.02, rounds=2)


def choose_sizes(platform: str) -> Sizes:
    return GPU if platform == "gpu" else CPU


def measure_product(device: Any, sizes: Sizes) -> float:
    """FLOP/s of a product of square bfloat16 matrices on a device; float32 where that is a CPU."""
    dtype = jnp.bfloat16 if device.platform == "gpu" else jnp.float32
    matrix = jax.device_put(jnp.ones((sizes.product, sizes.product), dtype), device)
    seconds = measure_seconds(jax.jit(jnp.matmul), matrix, matrix, least=sizes.least, rounds=sizes.rounds)
    return 2 * sizes.product**3 / seconds


def measure_copy(device: Any, sizes: Sizes) -> float:
    """Bytes a second of a device's memory, read and written, while it copies an array and adds to it."""
    array = jax.device_put(jnp.ones(sizes.copied // 4, jnp.float32), device)
    seconds = measure_seconds(jax.jit(lambda x: x + 1), array, least=sizes.least, rounds=sizes.rounds)
    return 2 * sizes.copied / seconds


def check_devices(sizes: Sizes) -> list[Row]:
    """How fast this process's devices compute and copy, against their data sheet and against one another."""
    local = jax.local_devices()
    peak = find_peak(local[0].device_kind)
    products = [measure_product(device, sizes) for device in local]
    copies = [measure_copy(device, sizes) for device in local]
    dtype = "bfloat16" if local[0].platform == "gpu" else "float32"
    return [
        _judge_rates(
            f"product of {sizes.product} x {sizes.product} in {dtype}",
            [rate / 1e12 for rate in products],
            "TFLOP/s",
            peak.tflops if peak else None,
            _COMPUTE_SHARE,
        ),
        _judge_rates(
            f"copy of {sizes.copied >> 20} MiB",
            [rate / 1e9 for rate in copies],
            "GB/s",
            peak.memory_bandwidth / 1e9 if peak and peak.memory_bandwidth else None,
            _MEMORY_SHARE,
        ),
    ]


def _judge_rates(subject: str, rates: list[float], unit: str, peak: float | None, share: float) -> Row:
    """A row of the rates of several devices: slow where they are below a share of the peak, or uneven."""
    slowest, fastest = min(rates), max(rates)
    spread = f"{slowest:,.4g} to {fastest:,.4g}" if len(rates) > 1 else f"{slowest:,.4g}"
    found = f"{spread} {unit}" + (f" of {peak:,.4g} ({slowest / peak:.0%})" if peak else "")
    row = partial(Row, subject=subject, found=found, numbers={f"slowest {unit}": slowest, f"fastest {unit}": fastest})
    if peak and slowest < share * peak:
        reason = f"{slowest / peak:.0%} of the data sheet, and {share:.0%} is to be expected"
        advice = "nvidia-smi -q -d PERFORMANCE says what slows a GPU down: heat, power, a limit, another process"
        return row(verdict="slow", reason=reason, advice=advice)
    if slowest < _EVEN_SHARE * fastest and peak:
        index = rates.index(slowest)
        reason = f"device {index} reaches {slowest / fastest:.0%} of the fastest, and every step waits for it"
        return row(verdict="slow", reason=reason, advice="have it looked at, or leave it out with CUDA_VISIBLE_DEVICES")
    return row()


def _permute(x: jax.Array, axis: str, size: int) -> jax.Array:
    return jax.lax.ppermute(x, axis, [(source, (source + 1) % size) for source in range(size)])


# For each collective over n devices: what a device does with its part, and the factor that makes bus bandwidth of the
# bytes of that part a second.
COLLECTIVES: dict[str, tuple[Callable[[jax.Array, str, int], jax.Array], Callable[[int], float]]] = {
    "all-reduce": (lambda x, axis, size: jax.lax.psum(x, axis), lambda n: 2 * (n - 1) / n),
    # n parts are the result, (n - 1) / n of which come over the links.
    "all-gather": (lambda x, axis, size: jax.lax.all_gather(x, axis, tiled=True), lambda n: n * (n - 1) / n),
    "permute": (_permute, lambda n: 1.0),
}


def measure_collective(mesh: Mesh, axis: str, name: str, sizes: Sizes) -> float:
    """Bus bandwidth in bytes a second of a collective over an axis, in all groups of devices at the same time."""
    collective, factor = COLLECTIVES[name]
    spec, size = PartitionSpec(mesh.axis_names), mesh.shape[axis]
    sharding = NamedSharding(mesh, spec)
    shape = (mesh.devices.size * sizes.sent // 4,)
    array = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=sharding)()
    run = jax.shard_map(lambda x: collective(x, axis, size), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    seconds = measure_seconds(jax.jit(run), array, least=sizes.least, rounds=sizes.rounds, times=_call_count(sizes))
    return factor(size) * sizes.sent / seconds


def _call_count(sizes: Sizes) -> int:
    """Calls of a round of collectives: the same in every process, as all take part in each."""
    return 20 if sizes is GPU else 3


def check_collectives(mesh: Mesh, sizes: Sizes) -> list[Row]:
    """How fast devices send along each axis of the mesh that has several of them."""
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    if not axes:
        return [skip("collectives", "the mesh has one device")]
    peak = find_peak(mesh.devices.flat[0].device_kind)
    rows = []
    for axis in axes:
        rates = {name: measure_collective(mesh, axis, name, sizes) / 1e9 for name in COLLECTIVES}
        link = peak.link_bandwidth / 1e9 if peak and peak.link_bandwidth and _is_within_host(mesh, axis) else None
        found = ", ".join(f"{name} {rate:,.3g}" for name, rate in rates.items())
        row = partial(
            Row,
            subject=f"collectives over {axis} ({mesh.shape[axis]})",
            found=f"{found} GB/s of bus bandwidth" + (f"; a link has {link:,.4g}" if link else ""),
            numbers={f"{name} GB/s": rate for name, rate in rates.items()},
        )
        if link and rates["all-reduce"] < _LINK_SHARE * link:
            share = rates["all-reduce"] / link
            advice = "NCCL_DEBUG=INFO says which way it takes; nvidia-smi nvlink -s whether links are up"
            rows.append(row(verdict="slow", reason=f"all-reduce reaches {share:.0%} of a link", advice=advice))
        else:
            rows.append(row())
    return rows


def _is_within_host(mesh: Mesh, axis: str) -> bool:
    """Whether the devices along an axis are of one process, as those of a host are where one process drives it."""
    groups = mesh.devices.swapaxes(mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return all(len({device.process_index for device in group}) == 1 for group in groups)
