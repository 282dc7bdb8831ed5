"""What is known of the devices: how fast they can be at best, and how much of their memory is taken."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from gemma2_jax.cluster import platforms

_NVIDIA = "https://www.nvidia.com/en-us/data-center"


@dataclass(frozen=True)
class Peak:
    """The most that one kind of device can compute, as its maker states it."""

    device_kind: str  # a regular expression that is found in `jax.Device.device_kind`, the name its driver gives it
    tflops: float  # TFLOP/s of dense bfloat16 products that accumulate in float32
    source: str  # whose data sheet; where that states 2:4 sparsity, which training has not, here is half of it
    memory_bandwidth: float | None = None  # bytes/s, by the same sheet; None where kinds of one name differ in it
    link_bandwidth: float | None = None  # bytes/s by NVLink in one direction, half of what the sheet states; None: none


# The first that fits counts.
PEAKS = (
    Peak(r"\bGB200\b", 2500.0, f"{_NVIDIA}/gb200-nvl72: 5 PFLOPS with sparsity a GPU", 8e12, 900e9),
    Peak(r"\bB200\b", 2250.0, f"{_NVIDIA}/hgx: 4.5 PFLOPS with sparsity a GPU", 8e12, 900e9),
    Peak(r"\bGH200\b", 989.5, f"{_NVIDIA}/grace-hopper-superchip: 1,979 with sparsity"),
    Peak(r"\bH200 NVL\b", 835.5, f"{_NVIDIA}/h200: 1,671 with sparsity", 4.8e12),
    Peak(r"\bH200\b", 989.5, f"{_NVIDIA}/h200: 1,979 with sparsity", 4.8e12, 450e9),
    Peak(r"\bH100 NVL\b", 835.5, f"{_NVIDIA}/h100: 1,671 with sparsity", 3.9e12),
    Peak(r"\bH100 PCIe\b", 756.5, "NVIDIA H100 PCIe product brief: 1,513 with sparsity", 2e12),
    Peak(r"\bH100\b", 989.5, f"{_NVIDIA}/h100: 1,979 with sparsity, of SXM", 3.35e12, 450e9),
    Peak(r"\bH20\b", 148.0, "NVIDIA H20 data sheet: 148", 4e12, 450e9),
    Peak(r"\bA[18]00\b", 312.0, f"{_NVIDIA}/a100: 312, of SXM and PCIe; A800 is its chip"),
    Peak(r"\bA40\b", 149.7, f"{_NVIDIA}/a40: 149.7", 696e9),
    Peak(r"\bA30\b", 165.0, f"{_NVIDIA}/products/a30-gpu: 165", 933e9),
    Peak(r"\bA10\b", 125.0, f"{_NVIDIA}/products/a10-gpu: 125", 600e9),
    Peak(r"\bL40S\b", 362.05, f"{_NVIDIA}/l40s: 362.05", 864e9),
    Peak(r"\bL40\b", 181.05, f"{_NVIDIA}/l40: 181.05", 864e9),
    Peak(r"\bL4\b", 121.0, f"{_NVIDIA}/l4: 242 with sparsity", 300e9),
)


def find_peak(device_kind: str) -> Peak | None:
    """What a device can do at most; None where the kind is not in `PEAKS`, or is a slice of one (MIG)."""
    if re.search(r"\bMIG\b", device_kind):
        return None
    return next((peak for peak in PEAKS if re.search(peak.device_kind, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device at most; None where `find_peak` finds none."""
    peak = find_peak(device_kind)
    return peak.tflops * 1e12 if peak else None


def measure_memory() -> dict[str, int]:
    """Bytes in use now, and at most since the process began, on the fullest of this process's devices.

    Empty where devices do not tell, as CPUs do not. It asks the allocator, and waits for no computation.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: max(counts[key] for counts in stats)
        for name, key in names.items()
        if all(key in counts for counts in stats)
    }


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """What a device can give to a program."""

    size: int  # bytes
    source: str  # whose memory it is, as the beginning of "... 75.15 GiB"


def find_memory_limit() -> MemoryLimit | None:
    """What the fullest of this process's devices can give; None where that is not known.

    Of a GPU it is what XLA may take, less what is in use already. CPU devices share the memory and the swap space of
    their machine or its container, whatever else runs there: a program that needs more cannot run.
    """
    devices = jax.local_devices()
    device = devices[0]
    if device.platform == "cpu":
        return MemoryLimit(size=machine_memory() // len(devices), source=_name_share(len(devices)))
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in counts for counts in stats):
        return None
    size = min(counts["bytes_limit"] - counts.get("bytes_in_use", 0) for counts in stats)
    return MemoryLimit(size=size, source=f"{device.device_kind}, with {platforms.describe_memory_fraction()}, can give")


def _name_share(count: int) -> str:
    return "this machine has" if count == 1 else f"this machine has for each of its {count} CPU devices"


def machine_memory() -> int:
    """Bytes of memory and swap space of this machine, or of the container that this process is in."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = re.search(r"^SwapTotal:\s+(\d+) kB", _read_text("/proc/meminfo"), re.MULTILINE)
    size += int(found[1]) * 1024 if found else 0
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of version 2, 1
        if (limit := _read_text(file).strip()).isdigit():
            size = min(size, int(limit))
    return size


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
