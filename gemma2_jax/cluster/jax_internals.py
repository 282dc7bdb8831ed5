"""All uses of JAX's private names, in one place.

Checked with jax and jaxlib 0.11.2 and 0.12.0. With a new release of JAX, check this file first.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any


def has_started() -> bool:
    """Whether JAX has looked for devices in this process: after that it reads no more flags or variables.

    `jax.devices()` and the like cannot be asked, as they would start it.
    """
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def serve_processes(address: str, count: int, shutdown_seconds: int) -> Any:
    """JAX's service through which `count` processes find one another; it ends when the returned object is dropped.

    `jax.distributed.initialize` can start one only in process 0, where it would die with that process before the others
    could be told. This imports jaxlib alone, as the coordinator needs nothing else of JAX.
    """
    jaxlib = importlib.import_module("jaxlib._jax")
    return jaxlib.get_distributed_runtime_service(address, count, shutdown_timeout=shutdown_seconds)


def reset_profiler() -> None:
    """Has JAX's profiler be ready for another trace, which it is not after one that it could not write."""
    importlib.import_module("jax._src.profiler")._profile_state.reset()


def wait_for_all(name: str, seconds: int) -> None:
    """Returns when every process of the run has called it with this name.

    `multihost_utils.sync_global_devices` is a collective of the devices, which Gloo and NCCL give up after minutes;
    reading and tokenizing data may take hours.
    """
    distributed = importlib.import_module("jax._src.distributed")
    distributed.global_state.client.wait_at_barrier(name, seconds * 1000)


def give_answer(question: str, answer: str) -> None:
    """Gives this process's answer to a question without waiting for those that `gather_answers` collects."""
    state = importlib.import_module("jax._src.distributed").global_state
    state.client.key_value_set(f"{question}/{state.process_id}", answer)


def post_notice(topic: str, text: str) -> None:
    """Posts a text for all processes, in place of what was posted of the topic before."""
    client = importlib.import_module("jax._src.distributed").global_state.client
    client.key_value_set(f"{topic}/text", text, allow_overwrite=True)


def read_notice(topic: str) -> str:
    """The text that was posted of a topic; empty if none was."""
    client = importlib.import_module("jax._src.distributed").global_state.client
    return dict(client.key_value_dir_get(topic)).get(f"{topic}/text", "")


def gather_answers(question: str, answer: str, seconds: int) -> list[str]:
    """Gives this process's answer to a question, and returns those of all processes, by index. Each asks it once.

    `multihost_utils.process_allgather` cannot do it: it is a collective of the devices, which may not have started yet,
    or may be busy with a step. Raises JaxRuntimeError where an answer does not come in time.
    """
    give_answer(question, answer)
    state = importlib.import_module("jax._src.distributed").global_state
    return [
        state.client.blocking_key_value_get(f"{question}/{index}", seconds * 1000)
        for index in range(state.num_processes)
    ]


def replace_damaged_programs(report: Callable[[str], None]) -> None:
    """Makes JAX recompile a damaged program of its cache, such as one that a full disk cut off; reports its name.

    By itself, JAX warns of it at every start and never replaces it, as it does not overwrite an entry. Here process 0,
    which alone writes, removes it. JAX has no setting for that, and its warning does not name the file.
    """
    module: Any = importlib.import_module("jax._src.compilation_cache")
    distributed = importlib.import_module("jax._src.distributed")
    open_cache = module.get_file_cache
    if hasattr(open_cache, "__wrapped__"):
        return

    @functools.wraps(open_cache)
    def open_checked_cache(path: str) -> Any:
        opened = open_cache(path)
        cache, _ = opened
        read = cache.get

        def read_whole(key: str) -> bytes | None:
            program = read(key)
            try:
                if program is not None:
                    module.decompress_executable(program)  # checks a sum of all bytes; a program has a few megabytes
            except Exception:  # each way of compressing has an error of its own
                if distributed.global_state.process_id == 0:
                    (cache._path / f"{key}-cache").unlink(missing_ok=True)
                    report(key.rpartition("-")[0])
                return None
            return program

        cache.get = read_whole
        return opened

    module.get_file_cache = open_checked_cache
