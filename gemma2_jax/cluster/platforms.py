"""Settings that a process needs before JAX starts: XLA's flags, the share of GPU memory, the platform, the cache.

Importing the package sets nothing. Every command calls `prepare_process`, and so does every function that a user of the
library may call first.
"""

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from gemma2_jax.cluster import jax_internals

# On CPU, jaxlib 0.11.2 computes some fused sums with the YNNPACK library from memory that was never written, so that
# results differ from run to run and are NaN at times (`test_sums_are_repeatable` shows it). The flag leaves to that
# library nothing but single matrix products.
_FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# After so long XLA gives up a collective of GPUs, where it can; by itself it would wait for ever. `training.watchdog`
# is to notice it before: runs have been reported in which the flag did not help (marin-community/marin, issue 7344).
_COLLECTIVE_FLAG, _COLLECTIVE_SECONDS = "--xla_gpu_nccl_termination_timeout_seconds", 7200
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX refuses both at once
# glibc then asks for huge pages for what it maps. XLA maps a step's temporaries anew in each step, and a kernel that
# gives them in pages of 4 KiB takes up to a quarter of a step for it on CPU.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_PAGES_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ANSWER_SECONDS = 300  # for which a process waits for another's answer about the cache
_CACHE_SWITCH, _CACHE_FOLDER = "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"


def prepare_process(*, cpu: bool = False, cache: bool = True) -> None:
    """Imports JAX with the settings that this package needs. Settings of the user are left as they are.

    `cpu` makes JAX compute on the CPU. Without it, the CPU is chosen if a CUDA plugin is installed and the machine has
    no CUDA driver. `cache` keeps compiled programs on disk, see `enable_cache`. A second call changes nothing. Warns if
    JAX had started before and computes with other settings.
    """
    if jax_internals.has_started():
        _warn_of_late_call()
    else:
        on_cpu = cpu or os.environ.get("JAX_PLATFORMS") == "cpu" or _lacks_driver()
        _set_flags(on_cpu)
        if on_cpu:
            _import_jax_on_cpu()
    if cache:
        enable_cache()


def restart_with_huge_pages() -> None:
    """On CPU, starts this command anew in its process with huge pages for memory, which only a new program can have.

    It does so where this process is a command of this package, and the kernel gives huge pages to who asks for them.
    What the user has set of glibc's huge pages stays.
    """
    given = os.environ.get(_TUNABLES, "")
    if not _is_own_command() or "glibc.malloc.hugetlb" in given or not _computes_on_cpu() or not _asks_for_pages():
        return
    os.environ[_TUNABLES] = ":".join(filter(None, [given, _HUGE_PAGES]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_own_command() -> bool:
    main = sys.modules["__main__"]
    module = main.__spec__.name if main.__spec__ else Path(getattr(main, "__file__", None) or "").name
    return module.partition(".")[0] in ("gemma2_jax", "gemma2-jax")


def _computes_on_cpu() -> bool:
    platform = os.environ.get("JAX_PLATFORMS")
    return platform == "cpu" if platform else not (_find_plugins() and _has_driver())


def _asks_for_pages() -> bool:
    """Whether the kernel gives huge pages to who asks for them, and to nobody else."""
    try:
        return "[madvise]" in _PAGES_SETTING.read_text()
    except OSError:
        return False


def check_platform() -> None:
    """Raises ValueError where JAX_PLATFORMS names what this machine does not have. JAX finds its devices with it."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of a plugin without its device
        raise ValueError(
            f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device; every machine has cpu. Set JAX_PLATFORMS=cpu, "
            "or unset it to have JAX choose"
        ) from error


def enable_cache() -> None:
    """Keeps compiled programs in a folder, from which the next process reads them instead of compiling them again.

    The folder is JAX_COMPILATION_CACHE_DIR, else gemma2_jax/xla in $XDG_CACHE_HOME or ~/.cache.
    With JAX_ENABLE_COMPILATION_CACHE=0 nothing is kept, and every program is compiled.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax_internals.replace_damaged_programs(_report_damage)
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    compilation_cache.reset_cache()  # JAX decides once whether it has one, with its first program


def cache_root() -> Path:
    """The folder of all that this package keeps for a next time: gemma2_jax in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma2_jax"


def find_driver() -> str | None:
    """The version of NVIDIA's kernel module; None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)*", path.read_text()) if path.exists() else None
    return found[0] if found else None


def name_gpu(index: int) -> str:
    """The GPU that CUDA counts as `index` in this process, as CUDA_VISIBLE_DEVICES names it for another process."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _report_damage(program: str) -> None:
    print(
        f"{program} in the cache of compiled programs was cut off or damaged; it is removed and compiled again",
        file=sys.stderr,
    )


def restrict_cache(index: int) -> None:
    """Turns the cache off unless all processes of the run see the same folder of it. `index` is that of this process.

    XLA divides the search for a GPU's fastest kernels among the processes of a program. A process that compiles it
    would wait for one that read it from a folder of its own and takes no part in the search.
    """
    import jax

    folder = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    is_local = bool(folder) and "://" not in str(folder)
    with contextlib.ExitStack() as stack:
        marker = "-"
        if index == 0 and folder and is_local:
            with contextlib.suppress(OSError):
                Path(folder).mkdir(parents=True, exist_ok=True)
                marker = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix="seen-by-all-")).name
        marker = Path(jax_internals.gather_answers("cache_marker", marker, _ANSWER_SECONDS)[0]).name
        sees = (Path(folder) / marker).exists() if folder and is_local else bool(folder)
        answers = jax_internals.gather_answers("cache_seen", str(sees), _ANSWER_SECONDS)
    if folder and "False" in answers:
        jax.config.update("jax_compilation_cache_dir", None)


def describe_cache() -> str:
    """Where compiled programs are kept and how to turn that off, or why they are not."""
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return f"not kept: {_CACHE_SWITCH} is off"
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return f"not kept: the processes do not all see one folder for them; {_CACHE_FOLDER} names one"
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return f"not kept: {folder} cannot be written to ({error.strerror}); {_CACHE_FOLDER} names another folder"
    if Path(folder).is_relative_to(Path.home()):
        folder = f"~/{Path(folder).relative_to(Path.home())}"
    return f"kept in {folder} ({_CACHE_SWITCH}=0 turns it off)"


def describe_collective_timeout() -> str:
    """After how long XLA gives up a collective of GPUs, as its flag says."""
    found = re.search(rf"{_COLLECTIVE_FLAG}=(\S+)", os.environ.get("XLA_FLAGS", ""))
    name = _COLLECTIVE_FLAG.removeprefix("--")
    return f"{name}={found[1]}" if found else f"{name} not set, so that a collective may wait for ever"


def describe_memory_fraction() -> str:
    """The share of a GPU's memory that JAX takes, and the variable that sets it."""
    variable = _find_memory_variable()
    return f"{variable}={os.environ[variable]}" if variable else f"{_MEMORY_VARIABLES[0]} not set, which is 0.75"


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Hides what C++ libraries write to standard error during the block."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _set_flags(on_cpu: bool) -> None:
    flags = {_FUSION_FLAG: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    if not on_cpu:
        flags[_COLLECTIVE_FLAG] = str(_COLLECTIVE_SECONDS)
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"{name}={value}" for name, value in flags.items() if name not in given]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    if _find_memory_variable() is None:
        # JAX takes three quarters unless told otherwise. The 5% that are left are for CUDA and NCCL.
        os.environ[_MEMORY_VARIABLES[0]] = "0.95"


def _find_memory_variable() -> str | None:
    """The variable that sets the share of a GPU's memory that JAX takes, or None if neither is set."""
    return next((name for name in _MEMORY_VARIABLES if os.environ.get(name)), None)


def _warn_of_late_call() -> None:
    """Warns of the settings that JAX started without, if they matter on the platform that it computes on."""
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
    """Whether a CUDA plugin is installed and the machine has no CUDA driver; prints it if so."""
    if os.environ.get("JAX_PLATFORMS") or not _find_plugins() or _has_driver():
        return False
    print("this machine has no CUDA driver (libcuda.so.1): computing on CPU", file=sys.stderr)
    return True


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _find_plugins() -> list[Path]:
    """The libraries of the CUDA plugins of JAX that are installed."""
    if not importlib.util.find_spec("jax_plugins"):
        return []
    specs = map(importlib.util.find_spec, ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"))
    return [Path(spec.origin).with_name("xla_cuda_plugin.so") for spec in specs if spec and spec.origin]


def _import_jax_on_cpu() -> None:
    """Imports JAX for the CPU, and hides what a CUDA plugin prints on a machine that has no GPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with silence_stderr():
        import jax

        for library in _find_plugins():  # JAX loads them with its first array, for the CPU too, and each prints then
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))
    jax.config.update("jax_platforms", "cpu")  # for a process that had imported it before
