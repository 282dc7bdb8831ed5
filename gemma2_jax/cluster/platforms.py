"""What JAX computes on where its CUDA plugin is installed and no GPU is: settled before JAX is imported.

The plugin is what compiles for GPUs that are not there (`plan`). Left to itself there, it prints notes and a stack
trace, and JAX then takes the CPU all the same.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator


def choose_platform() -> None:
    """Imports JAX; where it has a CUDA plugin and the machine no CUDA driver, for the CPU, and says so."""
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    plugged = importlib.util.find_spec("jax_plugins") and any(map(importlib.util.find_spec, plugins))
    if os.environ.get("JAX_PLATFORMS") or not plugged or _has_driver():
        return
    print("this machine has no CUDA driver (libcuda.so.1): computing on CPU", file=sys.stderr)
    import_jax_on_cpu()


def import_jax_on_cpu() -> None:
    """Imports JAX for the CPU, without what a CUDA plugin says of a machine that has no GPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with silence_stderr():
        import jax  # noqa: F401


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Keeps what C++ writes to standard error from being seen."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
