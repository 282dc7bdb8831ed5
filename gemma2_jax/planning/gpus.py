"""GPUs by name, as data sheets have them: what XLA compiles for, how much they hold, and how fast they can be at best.

A GPU that is not here is a TOML file of the fields that differ from those of one that is, its `base`:

    base = "h100"
    title = "our H100, with half of the network"
    network_bandwidth = 25e9

Figures that XLA compiles by are those of OpenXLA (xla/backends/gpu/target_config/specs in openxla/xla), where it has
the GPU. Nothing here imports JAX.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, and the hosts that it is in."""

    name: str
    title: str
    device_kind: str  # as its driver names it
    capability: tuple[int, int]  # CUDA compute capability
    multiprocessors: int
    float_units: int = 128  # of each multiprocessor
    clock_ghz: float
    shared_memory: int  # bytes of each multiprocessor
    block_shared_memory: int  # bytes that a block may take of that
    cache_bytes: int  # of level 2
    memory_bytes: int  # as the driver reports it
    memory_bandwidth: float  # bytes/s
    tflops: float  # TFLOP/s of dense bfloat16 products, as `cluster.devices.PEAKS` has it
    link_bandwidth: float  # bytes/s that a GPU can send to others of its host
    link_name: str = "NVLink"  # by which they are linked
    network_bandwidth: float = 50e9  # bytes/s that a GPU can send to other hosts: one 400 Gbit/s adapter each, assumed
    gpus_per_host: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} of the GPU {self.name} is {value}; it must be above 0")

    @property
    def usable_bytes(self) -> int:
        """What XLA may allocate, by XLA_CLIENT_MEM_FRACTION=0.95.

        The rest is an allowance, not a measurement, for the CUDA context and NCCL's buffers.
        """
        return self.memory_bytes * 95 // 100

    @property
    def vector_flops(self) -> float:
        """FLOP/s in bfloat16 without tensor cores: each unit multiplies and adds two numbers a clock."""
        return 4 * self.multiprocessors * self.float_units * self.clock_ghz * 1e9

    @property
    def target_config(self) -> str:
        """XLA's description of the GPU, as the text of a protocol buffer."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory} threads_per_core_limit: {1536 if minor == 9 else 2048}
  core_count: {self.multiprocessors} fpus_per_core: {self.float_units} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {self.memory_bandwidth:.0f}
  l2_cache_size: {self.cache_bytes} clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory_bytes}
  shared_memory_per_block_optin: {self.block_shared_memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{self.device_kind}"
"""


_HOPPER = {"capability": (9, 0), "shared_memory": 233_472, "block_shared_memory": 232_448, "cache_bytes": 50 * 2**20}
_AMPERE = {
    "capability": (8, 0),
    "multiprocessors": 108,
    "float_units": 64,
    "clock_ghz": 1.41,
    "shared_memory": 167_936,
    "block_shared_memory": 166_912,
    "cache_bytes": 40 * 2**20,
    "tflops": 312.0,
    "link_bandwidth": 300e9,  # NVLink 3 (NVIDIA A100 data sheet: 600 GB/s both ways)
}

H100 = Gpu(
    name="h100",
    title="H100 80GB",
    device_kind="NVIDIA H100 80GB HBM3",
    multiprocessors=132,
    clock_ghz=1.98,
    memory_bytes=84_942_979_072,
    memory_bandwidth=3.35232e12,
    tflops=989.5,
    link_bandwidth=450e9,  # NVLink 4 (NVIDIA H100 data sheet: 900 GB/s both ways)
    **_HOPPER,
)
GPUS = {
    gpu.name: gpu
    for gpu in (
        H100,
        Gpu(
            name="h100-pcie",
            title="H100 PCIe",
            device_kind="NVIDIA H100 PCIe",
            multiprocessors=114,
            clock_ghz=1.755,
            memory_bytes=84_942_979_072,
            memory_bandwidth=2.03904e12,
            tflops=756.5,
            link_bandwidth=64e9,  # PCIe 5 x16 (data sheet: 128 GB/s both ways); the bridges of pairs are not counted
            link_name="PCIe",
            **_HOPPER,
        ),
        Gpu(
            name="h100-nvl",
            title="H100 NVL",
            device_kind="NVIDIA H100 NVL",
            multiprocessors=132,
            clock_ghz=1.785,
            memory_bytes=95_830 * 2**20,  # nvidia-smi
            memory_bandwidth=3.9e12,  # NVIDIA H100 data sheet
            tflops=835.5,
            link_bandwidth=64e9,  # as of h100-pcie
            link_name="PCIe",
            **_HOPPER,
        ),
        Gpu(
            name="h200",
            title="H200 141GB",
            device_kind="NVIDIA H200",
            multiprocessors=132,
            clock_ghz=1.98,
            memory_bytes=151_397_597_184,
            memory_bandwidth=4.8e12,
            tflops=989.5,
            link_bandwidth=450e9,  # NVIDIA H200 data sheet: 900 GB/s both ways
            **_HOPPER,
        ),
        Gpu(
            name="a100-40",
            title="A100 40GB",
            device_kind="NVIDIA A100-SXM4-40GB",
            memory_bytes=42_331_013_120,
            memory_bandwidth=1.5552e12,
            **_AMPERE,
        ),
        Gpu(
            name="a100-80",
            title="A100 80GB",
            device_kind="NVIDIA A100-SXM4-80GB",
            memory_bytes=85_100_068_864,
            memory_bandwidth=2.03904e12,
            **_AMPERE,
        ),
        Gpu(
            name="l40s",
            title="L40S 48GB",
            device_kind="NVIDIA L40S",
            capability=(8, 9),
            multiprocessors=142,
            clock_ghz=2.52,
            shared_memory=102_400,
            block_shared_memory=101_376,
            cache_bytes=96 * 2**20,
            memory_bytes=46_068 * 2**20,  # nvidia-smi
            memory_bandwidth=864e9,  # NVIDIA L40S data sheet
            tflops=362.05,
            link_bandwidth=32e9,  # PCIe 4 x16 (data sheet: 64 GB/s both ways)
            link_name="PCIe",
        ),
        Gpu(
            name="b200",
            title="B200 180GB",
            device_kind="NVIDIA B200",
            capability=(10, 0),
            multiprocessors=148,
            clock_ghz=1.965,
            shared_memory=233_472,
            block_shared_memory=232_448,
            cache_bytes=132_644_864,
            memory_bytes=191_514_411_008,
            memory_bandwidth=7.67232e12,
            tflops=2250.0,
            link_bandwidth=900e9,  # NVLink 5 (NVIDIA HGX data sheet: 1.8 TB/s both ways)
        ),
    )
}


def find_kind(device_kind: str) -> Gpu | None:
    """The GPU that its driver names like this; None where it is not known here."""
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, or of a TOML file. Raises ValueError where there is neither, or the file is no GPU."""
    if name in GPUS:
        return GPUS[name]
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise ValueError(f"no GPU is called {name}; there are {', '.join(GPUS)}, or give a TOML file with a base")
    try:
        fields = tomllib.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} is no TOML file: {error}") from error
    base = fields.pop("base", None)
    if base not in GPUS:
        raise ValueError(f"base in {name} is {base!r}; give one of {', '.join(GPUS)}")
    known = {field.name for field in dataclasses.fields(Gpu)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{name} has {', '.join(unknown)}, which no GPU has; it may have {', '.join(sorted(known))}")
    for field, value in fields.items():
        kind = type(getattr(GPUS[base], field))
        if kind is tuple or (type(value) is not kind and not (kind is float and type(value) is int)):
            raise ValueError(f"{field} in {name} is {value!r}; give {_describe_kind(kind)}, or leave it out")
    return dataclasses.replace(GPUS[base], **{"name": path.stem, "title": path.stem} | fields)


def _describe_kind(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", tuple: "another base"}[kind]
