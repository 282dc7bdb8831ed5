"""What a process needs set before JAX starts in it: XLA's flags, its share of GPU memory, a platform, a cache.

Importing the package sets nothing. Each command, and each function that a library user calls first, calls
`prepare_process`.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from gemma2_jax.cluster import jax_internals

# On CPU, jaxlib 0.11.2 computes some fused sums with the YNNPACK library from memory that was never written, so that
# results differ from run to run and are NaN at times (`test_sums_are_repeatable` shows it). The flag leaves to that
# library nothing but single matrix products.
_FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX refuses both at once
_CACHE_SWITCH, _CACHE_FOLDER = "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"


def prepare_process(*, cpu: bool = False, cache: bool = True) -> None:
    """Imports JAX, with what this package needs set in this process. What the user has set is left as it is.

    `cpu` has it compute on the CPU. Without it, the CPU is chosen where a CUDA plugin is installed and the machine has
    no CUDA driver. `cache` keeps compiled programs on disk, see `enable_cache`. A second call changes nothing. Warns
    where JAX had started before and computes with other flags.
    """
    if jax_internals.has_started():
        _warn_of_late_call()
    else:
        _set_flags()
        if cpu or _lacks_driver():
            _import_jax_on_cpu()
    if cache:
        enable_cache()


def enable_cache() -> None:
    """Keeps compiled programs in a folder, from which the next process reads them instead of compiling them again.

    The folder is JAX_COMPILATION_CACHE_DIR, else gemma2_jax/xla in $XDG_CACHE_HOME or ~/.cache.
    JAX_ENABLE_COMPILATION_CACHE=0 has every program compiled.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "gemma2_jax" / "xla"))
    compilation_cache.reset_cache()  # JAX decides once whether it has one, with its first program


def restrict_cache() -> None:
    """Turns the cache off where the processes of this run could not all read it. Starts JAX.

    JAX has process 0 alone write. Where the others find nothing, they compile what process 0 reads, and it is minutes
    ahead of them at the first collective, where Gloo gives up after 30 seconds.
    """
    import jax

    if _explain_unshared_cache():
        jax.config.update("jax_enable_compilation_cache", False)


def describe_cache() -> str:
    """Where compiled programs are kept and how to turn that off, or why they are not."""
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return f"not kept: {_explain_unshared_cache() or f'{_CACHE_SWITCH} is off'}"
    folder = jax.config.jax_compilation_cache_dir
    if folder and Path(folder).is_relative_to(Path.home()):
        folder = f"~/{Path(folder).relative_to(Path.home())}"
    return f"kept in {folder} ({_CACHE_SWITCH}=0 turns it off)" if folder else f"not kept: {_CACHE_FOLDER} is empty"


def _explain_unshared_cache() -> str:
    """Why the processes of this run could not all read what process 0 keeps; empty if they can."""
    import jax

    if jax.process_count() == 1:
        return ""
    if jax.default_backend() == "cpu":  # jax 0.11.2 strips the devices from a program's key on GPU only
        return "on CPU, each of several processes has a key of its own for a program, and process 0 alone writes"
    if not os.environ.get(_CACHE_FOLDER):
        return f"with several processes, {_CACHE_FOLDER} has to name a folder that all hosts share"
    return ""


def describe_memory_fraction() -> str:
    """The share of a GPU's memory that JAX takes, and the variable that says so."""
    variable = _find_memory_variable()
    return f"{variable}={os.environ[variable]}" if variable else f"{_MEMORY_VARIABLES[0]} not set, which is 0.75"


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


def _set_flags() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if _FUSION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSION_FLAG}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT".strip()
    if _find_memory_variable() is None:
        # JAX takes three quarters unless told otherwise; the 5% that are left are for CUDA and NCCL.
        os.environ[_MEMORY_VARIABLES[0]] = "0.95"


def _find_memory_variable() -> str | None:
    """The variable that says which share of a GPU's memory JAX takes, if one does."""
    return next((name for name in _MEMORY_VARIABLES if os.environ.get(name)), None)


def _warn_of_late_call() -> None:
    """Says what JAX, which has started, was not told, where that matters on the platform that it computes on."""
    import jax

    platform = jax.default_backend()
    if platform == "cpu" and _FUSION_FLAG not in os.environ.get("XLA_FLAGS", ""):
        loss = f"sums on CPU may differ from run to run: XLA_FLAGS lacks {_FUSION_FLAG}"
    elif platform == "gpu" and _find_memory_variable() is None:
        loss = f"it takes three quarters of the GPU's memory and not 95%: {_MEMORY_VARIABLES[0]} is not set"
    else:
        return
    warnings.warn(
        f"JAX had started before gemma2_jax could prepare it, so that {loss}; call gemma2_jax first, or "
        "gemma2_jax.cluster.platforms.prepare_process() before the first use of JAX",
        stacklevel=2,  # one place, whichever function is called first, so that Python shows it once
    )


def _lacks_driver() -> bool:
    """Whether a CUDA plugin is installed and would find no CUDA driver; says so."""
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    plugged = importlib.util.find_spec("jax_plugins") and any(map(importlib.util.find_spec, plugins))
    if os.environ.get("JAX_PLATFORMS") or not plugged:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        print("this machine has no CUDA driver (libcuda.so.1): computing on CPU", file=sys.stderr)
        return True
    return False


def _import_jax_on_cpu() -> None:
    """Imports JAX for the CPU, without what a CUDA plugin says of a machine that has no GPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with silence_stderr():
        import jax
    jax.config.update("jax_platforms", "cpu")  # for a process that had imported it before
