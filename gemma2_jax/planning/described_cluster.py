"""GPUs that are only described: XLA compiles for them on a machine that has none.

The same description gives the same program on every machine. Nothing here imports JAX before it is asked to:
`prepare_jax` must come first.
"""

import os

from gemma2_jax.cluster import platforms
from gemma2_jax.planning.gpus import H100, Gpu

MAX_GPUS = 512


def prepare_jax() -> None:
    """Imports JAX so that it neither looks for a GPU nor complains that there is none. Call it before using JAX."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA logs errors too where a step does not fit, as plan says
    platforms.prepare_process(cpu=True, cache=False)


def describe_cluster(gpus: int, gpu: Gpu = H100) -> list:
    """JAX devices that programs can be compiled for but not run on: so many of a kind of GPU, as many to a host as fit.

    Raises ValueError if they do not fill whole hosts or are more than `MAX_GPUS`, and ImportError without the extra
    `plan`.
    """
    size = gpu.gpus_per_host
    hosts, remainder = divmod(gpus, size)
    if not 1 <= gpus <= MAX_GPUS or (hosts and remainder):
        raise ValueError(
            f"{gpus} GPUs cannot be planned for: use 1 to {size}, or a multiple of {size} up to {MAX_GPUS}"
        )
    from jax.experimental import topologies

    shape = f"1x{max(hosts, 1)}x{min(gpus, size)}"
    try:
        with platforms.silence_stderr():
            return topologies.get_topology_desc(
                platform="cuda", target_config=gpu.target_config, topology=shape
            ).devices
    except RuntimeError as error:
        raise ImportError(
            "compiling for GPUs that are not there needs JAX's CUDA plugin and ptxas: pip install 'gemma2-jax[plan]'"
        ) from error
