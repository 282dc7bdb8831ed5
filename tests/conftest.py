"""Eight virtual CPU devices for the whole suite, whose programs are compiled with few of LLVM's optimizations."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin, if it is there, compiles without a GPU
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the time goes into compiling; see `optimized`
# Without this flag sums are not repeatable, see `cluster.platforms`, which the commands get it from.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # tests leave the user's cache alone; `compiled_once` has its own
os.environ.pop("SAVE_DIR", None)  # which says where the user's own runs go
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests that run their own file as a program find the modules beside this one.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

import jax
import pytest

from gemma2_jax.data import encoding

# A shell has what it starts in the background ignore Ctrl-C, and tests raise it.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
# Warpgroups of an interpreted kernel wait for one another: were their programs enqueued, some would never begin.
jax.config.update("jax_cpu_enable_async_dispatch", False)


MOST_WORKERS = 8  # each of them takes up to 3 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The processes that pytest starts: one per core for the whole suite, none beside its own for what is named."""
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


def pytest_collection_finish() -> None:
    """Has Python look for garbage among what tests make, and not again and again in all that is imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(of_all_workers: Path) -> None:
    """Leaves the user's cache alone, and has the same data tokenized once."""
    os.environ["XDG_CACHE_HOME"] = str(of_all_workers / "cache")


@pytest.fixture(scope="session", autouse=True)
def torch_of_the_tests() -> Iterator[None]:
    """Leaves torch to the tests that compare with it, where others run commands in the same process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "hide_torch", lambda: None)
        yield


@pytest.fixture(scope="module")
def compiled_once(of_all_workers: Path) -> Iterator[None]:
    """Has a program compiled once, for modules whose tests train the same small models again and again.

    The commands that they start read what is kept, and add to it what took long. Steps of runs in this process are
    not even traced again.
    """
    from jax._src.lru_cache import LRUCache
    from jax.experimental.compilation_cache import compilation_cache

    from gemma2_jax.training import loop

    options = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(of_all_workers / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_max_size": 1 << 32,  # with a limit there is a lock
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        # For each program it would read the age of every other, which takes longer than most take to be compiled.
        patch.setattr(LRUCache, "_evict_if_needed", lambda *arguments, **sizes: None)
        patch.setattr(loop, "compile_step", partial(compile_step_once, loop.compile_step))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Has programs compiled as they are for use, where it is those that a module is about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


COMPILED_STEPS: dict[tuple, Any] = {}


def compile_step_once(compile_step: Callable, program: Any, step: Callable, batch: dict, **options: Any) -> Any:
    """What `compile_step` makes, kept by all that the step is made of; where data come from and go to is not in it."""
    config, train = program.config, program.config.train
    parts = config.model, config.adapter, config.optim, config.compute, config.guard, train.seed, train.micro_batch_size
    last = config.optim.decay_steps or config.steps
    made_of = str((parts, last, program.sources, program.attention, program.state, batch, options))
    key = getattr(step, "__func__", step), program.mesh, made_of
    if key not in COMPILED_STEPS:
        COMPILED_STEPS[key] = compile_step(program, step, batch, **options)
    return COMPILED_STEPS[key]


class AttnBackend(Enum):
    flash, fused, unfused, local, auto = range(1, 6)


@pytest.fixture
def megatron(monkeypatch):
    """The one class of Megatron's that the fixtures name, for torch's own reading."""
    for name in ("megatron", "megatron.core", "megatron.core.transformer", "megatron.core.transformer.enums"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["megatron.core.transformer.enums"].AttnBackend = AttnBackend
