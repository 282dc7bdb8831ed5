"""GPUs by name and by file: their figures agree with each other, and XLA compiles for each."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_plugin

from gemma2_jax.cluster.devices import find_peak
from gemma2_jax.config import ComputeConfig
from gemma2_jax.model.attention.choice import choose_attention
from gemma2_jax.model_config import GEMMA2_9B
from gemma2_jax.planning.described_cluster import describe_cluster
from gemma2_jax.planning.gpus import GPUS, H100, find_gpu


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_peaks_are_those_of_devices(gpu):
    peak = find_peak(gpu.device_kind)
    assert peak and peak.tflops == gpu.tflops
    assert gpu.memory_bandwidth == pytest.approx(peak.memory_bandwidth or gpu.memory_bandwidth, rel=0.05)
    assert gpu.link_bandwidth == (peak.link_bandwidth or gpu.link_bandwidth)


@needs_plugin
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_xla_compiles_for_it(gpu):
    """And attention is that of the kernels on Hopper alone, as on real ones."""
    (device,) = describe_cluster(1, gpu)
    assert device.device_kind == gpu.device_kind
    assert device.compute_capability == ".".join(map(str, gpu.capability))
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    text = jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=("cuda",)).compile().as_text()
    assert text is not None and "bf16[64,64]" in text
    _, reason = choose_attention(GEMMA2_9B, ComputeConfig(dtype="bfloat16"), device)
    assert reason.startswith("mosaic" if gpu.capability == (9, 0) else "xla"), reason


def test_a_gpu_of_a_file(tmp_path):
    path = tmp_path / "slow.toml"
    path.write_text('base = "h100"\nnetwork_bandwidth = 25e9\ngpus_per_host = 4\n')
    expected = dataclasses.replace(H100, name="slow", title="slow", network_bandwidth=25e9, gpus_per_host=4)
    assert find_gpu(str(path)) == expected
    assert find_gpu("h100") is H100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base = "h1000"', "base in FILE is 'h1000'; give one of h100, "),
        ("tflops = 3.0", "base in FILE is None; give one of h100, "),
        ('base = "h100"\nspeed = 3', "FILE has speed, which no GPU has; it may have block_shared_memory, "),
        ('base = "h100"\ntflops = "3"', "tflops in FILE is '3'; give a number, or leave it out"),
        ('base = "h100"\nmemory_bytes = true', "memory_bytes in FILE is True; give a whole number, or leave it out"),
        ('base = "h100"\ncapability = [8, 0]', r"capability in FILE is \[8, 0\]; give another base, or leave it out"),
        ('base = "h100"\nclock_ghz = 0', "clock_ghz of the GPU gpu is 0; it must be above 0"),
        ("base = ", "FILE is no TOML file: "),
    ],
)
def test_files_that_are_no_gpu(tmp_path, text, said):
    path = tmp_path / "gpu.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said.replace("FILE", re.escape(str(path)))):
        find_gpu(str(path))


@pytest.mark.parametrize("name", ["h100 ", "mine", "mine.toml", ""])
def test_names_of_no_gpu(name):
    with pytest.raises(ValueError, match=f"no GPU is called {name}; there are h100, .*, b200, or give a TOML file"):
        find_gpu(name)
