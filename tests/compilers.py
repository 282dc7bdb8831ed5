"""For tests of programs compiled for GPUs that are not there."""

import importlib.util

import pytest

from benchmarks import machine_code

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="no CUDA plugin: pip install 'gemma2-jax[plan]'"
)


def need() -> None:
    """Skips the test where what compiles them, or reads their machine code, is not installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("no CUDA plugin: pip install 'gemma2-jax[plan]'")
    try:
        machine_code.find_nvdisasm()
        machine_code.find_ptxas()
    except ImportError as error:
        pytest.skip(str(error))
