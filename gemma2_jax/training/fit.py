"""Whether the step of a run fits in its devices' memory, which is known before any of it is taken.

What XLA says that the compiled step needs is compared with what the device can give. Where that is too little, the run
ends with a sentence that says with which changes it fits, each compiled for the devices at hand.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import jax

from gemma2_jax import command_line
from gemma2_jax.cluster import hosts
from gemma2_jax.cluster.devices import MemoryLimit, find_memory_limit
from gemma2_jax.config import Config
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training.smaller_steps import (
    Change,
    LargeStep,
    LargeStepError,
    argument_bytes,
    find_changes,
    list_changes,
)
from gemma2_jax.training.step import Program, compile_step

_GPUS_PER_HOST = 8  # over which a mesh is rather divided than over more
_LEAST_SHARE = 0.005  # of what a step needs; owners of less are not named


def check_fit(program: Program, compiled: jax.stages.Compiled) -> MemoryLimit | None:
    """What a device can give to the compiled step of a run; None where that is not known.

    Every process calls it once, and all of them come to the same answer: that of the device with the least.

    Raises LargeStepError where the step needs more.
    """
    limit = _agree_on_limit(find_memory_limit())
    need = measure_need(program, compiled)
    if limit is None or need is None or sum(need.values()) <= limit.size:
        return limit
    raise LargeStepError(
        f"{_describe_need(need, limit)}. {_describe_changes(program, need, limit)}",
        program.device.device_kind,
        program.mesh.size,
    )


def measure_need(program: Program, compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of one device that a compiled step of the program needs, by owner; None where XLA does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    owners = argument_bytes(program)
    return owners | {
        "other state": max(0, stats.argument_size_in_bytes - sum(owners.values())),
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    }


def _agree_on_limit(own: MemoryLimit | None) -> MemoryLimit | None:
    """The least of what the processes of the run have found."""
    answers = hosts.gather_answers("memory_limit", json.dumps(own and asdict(own)))
    found = [MemoryLimit(**answer) for answer in map(json.loads, answers) if answer]
    return min(found, key=lambda limit: limit.size, default=None)


def _describe_need(need: dict[str, int], limit: MemoryLimit) -> str:
    total = sum(need.values())
    owners = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in need.items() if size >= _LEAST_SHARE * total)
    return (
        f"a step needs {total / 2**30:.2f} GiB of each device ({owners}), and {limit.source} {limit.size / 2**30:.2f} "
        "GiB; nothing was loaded"
    )


def _describe_changes(program: Program, need: dict[str, int], limit: MemoryLimit) -> str:
    """With which options the step fits on these devices, as far as they were found by compiling it."""

    devices = sorted(program.mesh.devices.flat, key=lambda device: device.id)

    def make(config: Config, _: int) -> Program:
        return Program(config, make_mesh(config.mesh, devices))

    texts: dict[Change, str] = {}

    def measure(change: Change) -> int:
        options = " ".join(change.list_options(program.config))
        if jax.process_index() == 0:
            command_line.notify(f"the step does not fit; compiling it with {options}")
        smaller = make(change.config, change.devices)
        with jax.set_mesh(smaller.mesh):
            compiled = compile_step(smaller, smaller.train_step, smaller.batch, donate_argnums=0)
        sizes = measure_need(smaller, compiled)
        assert sizes is not None, "known of the step as it was"
        texts[change] = f"with {options} ({sum(sizes.values()) / 2**30:.2f} GiB)"
        return sum(sizes.values())

    step = LargeStep(
        program=program, temporaries=need["temporaries"], limit=limit.size, devices_per_host=_GPUS_PER_HOST
    )
    # Another `tensor` would have other kernels, which are not checked while this process has the devices.
    sizes = find_changes(step, list_changes(step, ("fsdp",), program.mesh.size), make, measure)
    fitting = [texts[change] for change, size in sizes.items() if size <= limit.size]
    if fitting:
        return f"It fits {', or '.join(fitting)}, as compiled for these devices"
    tried = f": it does not fit {', nor '.join(texts.values())}" if texts else ""
    return f"No smaller step was found that fits on these devices{tried}"
