"""H100s that are only described: XLA compiles for them on a machine that has none.

The description is NVIDIA's H100 SXM with 80 GB, and the same description gives the same program on every machine.
Nothing here imports JAX before it is asked to: `prepare_jax` must come first.
"""

import os

from gemma2_jax.cluster import platforms

GPUS_PER_HOST = 8
MAX_GPUS = 512
DEVICE_BYTES = 84_942_979_072  # memory of one H100 SXM
# What XLA may allocate: XLA_CLIENT_MEM_FRACTION=0.95. The rest is an allowance, not a measurement, for the CUDA
# context and NCCL's buffers.
USABLE_BYTES = DEVICE_BYTES * 95 // 100
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {DEVICE_BYTES} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare_jax() -> None:
    """Imports JAX so that it neither looks for a GPU nor complains that there is none. Call it before using JAX."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no warnings of XLA's: the plan itself says what does not fit
    platforms.prepare_process(cpu=True, cache=False)


def describe_cluster(gpus: int) -> list:
    """JAX devices that programs can be compiled for but not run on: `gpus` H100s, eight to a host.

    Raises ValueError if the number is neither 1 to 8 nor a multiple of 8 up to `MAX_GPUS`, and ImportError without the
    extra `plan`.
    """
    hosts, remainder = divmod(gpus, GPUS_PER_HOST)
    if not 1 <= gpus <= MAX_GPUS or (hosts and remainder):
        raise ValueError(
            f"{gpus} GPUs cannot be planned for: use 1 to {GPUS_PER_HOST}, or a multiple of {GPUS_PER_HOST} up to "
            f"{MAX_GPUS}"
        )
    from jax.experimental import topologies

    shape = f"1x{max(hosts, 1)}x{min(gpus, GPUS_PER_HOST)}"
    try:
        with platforms.silence_stderr():
            return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=shape).devices
    except RuntimeError as error:
        raise ImportError(
            "compiling for GPUs that are not there needs JAX's CUDA plugin and ptxas: pip install 'gemma2-jax[plan]'"
        ) from error
