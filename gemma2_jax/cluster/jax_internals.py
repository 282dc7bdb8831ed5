"""What this project uses of JAX that has no public name, in one place.

Checked with jax and jaxlib 0.11.2 and 0.12.0. A new release of JAX is tried here first.
"""

import importlib
import sys
from typing import Any


def has_started() -> bool:
    """Whether this process has looked for devices, after which JAX reads no flag or variable any more.

    `jax.devices()` and the like answer only by starting what is asked about.
    """
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def serve_processes(address: str, count: int, shutdown_seconds: int) -> Any:
    """JAX's service through which `count` processes find one another; it ends when the returned object is dropped.

    `jax.distributed.initialize` starts one in process 0 and in no other place, and it would die with that process
    before the others could be told. Imports jaxlib alone, as the coordinator has no use for JAX.
    """
    jaxlib = importlib.import_module("jaxlib._jax")
    return jaxlib.get_distributed_runtime_service(address, count, shutdown_timeout=shutdown_seconds)


def wait_for_all(name: str, seconds: int) -> None:
    """Returns when every process of the run has called it with this name.

    `multihost_utils.sync_global_devices` is a collective of the devices: Gloo and NCCL give one up after minutes,
    where reading and tokenizing data may take hours.
    """
    distributed = importlib.import_module("jax._src.distributed")
    distributed.global_state.client.wait_at_barrier(name, seconds * 1000)
