"""What `benchmarks.gpu` writes beside the times of kernels, so that files of several machines can be compared.

This is a library. It imports JAX, so that `benchmarks.gpu` imports it after choosing the platform. Its numbers are of
the devices that JAX finds; of a CPU they are tiny, and the file says that they are a CPU's.
"""

import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.options import describe_library
from gemma2_jax import recipes
from gemma2_jax.cluster import gpus, kernel_records, platforms, rates, software
from gemma2_jax.cluster.kernel_check import Spec
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.kernels.shapes import SHAPES
from gemma2_jax.kernels.tile_sizes import TILES
from gemma2_jax.mesh import make_mesh
from gemma2_jax.planning.checked_steps import Checkup, check_steps
from gemma2_jax.training.step import Program
from gemma2_jax.training.tokenizer import without_texts

FORMAT = 1  # of the file; it rises where a name in it changes its meaning
OF_A_CPU = "these numbers are of a CPU, at tiny sizes: they say that the command works, and nothing of a GPU"
_GPU_FIELDS = (
    *("index", "name", "driver_version", "vbios_version", "memory.total", "ecc.mode.current"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "clocks.applications.graphics"),
    *("power.limit", "power.max_limit", "temperature.gpu", "persistence_mode", "mig.mode.current"),
)
_TINY_VOCABULARY = 1024


def describe_machine() -> dict[str, Any]:
    """The commit, the time, the devices, and all versions that a speed depends on; None for what is not known."""
    device = jax.devices()[0]
    versions = software.find_versions()
    return {
        "format": FORMAT,
        "note": OF_A_CPU if device.platform == "cpu" else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "version": metadata.version("gemma2-jax"),
        "devices": {"kind": device.device_kind, "count": jax.device_count(), "platform": device.platform},
        "driver": platforms.find_driver(),
        "versions": dict(versions),
        "gpus": list_gpus(),
    }


def find_commit() -> str | None:
    """The commit of the code, with "-dirty" where files differ from it; None where Git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def list_gpus() -> list[gpus.Gpu]:
    """What nvidia-smi says of each GPU of this host: clocks, limits of power, ECC; none where it is not there."""
    try:
        text = gpus.run_smi([f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"])
    except OSError:
        return []
    return gpus.parse_gpus(text, _GPU_FIELDS)


def choose_tiles(name: str, device: Any) -> kernel_records.TileChoice:
    """The tiles that a run takes for a shape on a device."""
    shape = SHAPES[name]
    kv_heads = min(shape.kv_heads, 2)
    local = replace(shape, heads=shape.heads // shape.kv_heads * kv_heads, kv_heads=kv_heads)
    return kernel_records.find_tiles(Spec(shape=local), device)


def describe_tiles(shapes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The tiles that kernels take for shapes, by the shape's name, and where they come from."""
    choices = {name: choose_tiles(name, jax.devices()[0]) for name in shapes}
    return {
        name: {"tiles": asdict(choice.tiles or TILES[SHAPES[name].width]), "source": choice.source}
        for name, choice in choices.items()
    }


def measure_rates() -> dict[str, Any]:
    """How fast the devices multiply, copy, and send to one another: FLOP/s and bytes/s."""
    devices = jax.local_devices()
    sizes = rates.choose_sizes(devices[0].platform)
    mesh = make_mesh(MeshConfig(data=-1))
    collectives = {}
    if mesh.size > 1:
        collectives = {name: rates.measure_collective(mesh, "data", name, sizes) for name in rates.COLLECTIVES}
    return {
        "product": {"rows": sizes.product, "flops": [rates.measure_product(device, sizes) for device in devices]},
        "copy": {"bytes": sizes.copied, "bytes_per_second": [rates.measure_copy(device, sizes) for device in devices]},
        "collectives": {"devices": mesh.size, "bytes": sizes.sent, "bus_bytes_per_second": collectives},
    }


def measure_steps(name: str) -> list[dict[str, Any]]:
    """Three steps of a recipe on all devices, beside the plan's bound and estimate, with both `compute.gpu_flags`."""
    config = recipes.load_recipe(name)
    config = replace(config, init="", mesh=MeshConfig(data=1, fsdp=-1))
    if jax.devices()[0].platform == "cpu":
        config = shrink(config)
    mesh = make_mesh(config.mesh)
    program = Program(without_texts(config), mesh)
    rows = check_steps(Checkup(config=config, mesh=mesh, program=program))
    return [{"recipe": name, "mesh": dict(mesh.shape)} | asdict(row) for row in rows]


def shrink(config: Config) -> Config:
    """The recipe with a model and rows so small that a CPU takes a step in no time."""
    sizes = {"layers": 2, "width": 64, "mlp_width": 128, "heads": 2, "kv_heads": 1, "head_width": 64}
    model = replace(config.model, vocab_size=_TINY_VOCABULARY, **sizes)
    train = replace(config.train, sequence_length=64, global_batch_size=8, micro_batch_size=1)
    return replace(config, model=model, train=train)


if __name__ == "__main__":
    describe_library("gpu_report", __doc__)
