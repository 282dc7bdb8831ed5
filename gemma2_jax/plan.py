"""`python -m gemma2_jax.plan --config NAME --gpus N`: what a training step would hold and send on H100s not at hand.

Compiles the real step at its real size for GPUs that are only described, and reads memory and collectives off the
result. Nothing is run, and nothing is said of time. The same description of the GPU gives the same program.

Nothing here imports JAX before the arguments are understood.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gemma2_jax import train
from gemma2_jax.cluster import platforms
from gemma2_jax.config import Config
from gemma2_jax.planning.traffic import SENT, Collective, read_traffic, sum_traffic

if TYPE_CHECKING:
    from gemma2_jax.training.step import Program

PER_HOST = 8  # GPUs
MOST = 512  # GPUs
DEVICE_BYTES = 84_942_979_072  # of an H100 SXM
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


@dataclass(frozen=True, kw_only=True)
class Command(train.Recipe):
    """Says whether a training step fits on so many H100s, and what it sends between them, without having any.

    The defaults shown are those of the recipe that --config names. Fields may also be given as group.field=value.
    """

    gpus: int = PER_HOST  # H100s, 8 a host


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled step, and what was found in it. Bytes are of one GPU."""

    program: Program
    lower_seconds: float
    compile_seconds: float
    arguments: int  # state and batch; the state's memory becomes the next state's
    temporaries: int
    outputs: int  # results that do not take an argument's place
    text: str  # scheduled HLO

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs

    @property
    def layout(self) -> str:
        """The mesh in words."""
        from gemma2_jax.mesh import describe_mesh

        return describe_mesh(self.program.mesh)

    @property
    def layers_per_stage(self) -> int | None:
        """Trips of a loop over the layers of one stage of a pipeline; None without one."""
        stages = self.program.mesh.shape.get("stage", 1)
        return -(-self.program.config.model.layers // stages) if stages > 1 else None

    @property
    def traffic(self) -> list[Collective]:
        return read_traffic(self.text, self.program.mesh.shape, self.layers_per_stage)


def describe_cluster(gpus: int) -> list:
    """H100s that can be compiled for and nothing else. `prepare_jax` comes before JAX.

    Raises ValueError for a number that hosts of 8 do not give, ImportError without the extra `plan`.
    """
    hosts, rest = divmod(gpus, PER_HOST)
    if not 1 <= gpus <= MOST or (hosts and rest):
        raise ValueError(
            f"{gpus} GPUs cannot be planned for: use 1 to {PER_HOST}, or a multiple of {PER_HOST} up to {MOST}"
        )
    from jax.experimental import topologies

    shape = f"1x{max(hosts, 1)}x{min(gpus, PER_HOST)}"
    try:
        with platforms.silence_stderr():
            return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=shape).devices
    except RuntimeError as error:
        raise ImportError(
            "compiling for GPUs that are not there needs JAX's CUDA plugin and ptxas: pip install 'gemma2-jax[plan]'"
        ) from error


def make_program(config: Config, gpus: int) -> Program:
    """The run of `config` on so many GPUs, before anything is compiled."""
    from gemma2_jax.mesh import make_mesh
    from gemma2_jax.training.step import Program

    return Program(config, make_mesh(config.mesh, describe_cluster(gpus)))


def compile_step(config: Config, gpus: int) -> Plan:
    """The training step of `config`, compiled as the loop compiles it."""
    import jax

    program = make_program(config, gpus)
    state, batch = program.state, program.batch  # before the mesh is set: optax runs small operations in here
    with jax.set_mesh(program.mesh):
        started = time.perf_counter()
        traced = jax.jit(program.train_step, donate_argnums=0).trace(state, batch)
        lowered = traced.lower(lowering_platforms=("cuda",))
        lowered_at = time.perf_counter()
        compiled = lowered.compile(program.compiler_options)
        compiled_at = time.perf_counter()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None and text is not None
    return Plan(
        program=program,
        lower_seconds=lowered_at - started,
        compile_seconds=compiled_at - lowered_at,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        text=text,
    )


def prepare_jax() -> None:
    """Imports JAX such that it does not look for a GPU, nor complain that there is none."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no warnings of XLA: a step that does not fit is reported here
    platforms.prepare_process(cpu=True, cache=False)


def argument_bytes(program: Program) -> dict[str, int]:
    """Bytes of each kind of argument on one GPU."""
    state = program.state
    kinds = {
        "trained weights": state.params,
        "optimizer": state.optimizer,
        "frozen weights": state.frozen,
        "batch": program.batch,
    }
    return {name: size for name, tree in kinds.items() if (size := _shard_bytes(tree))}


def verdict(total: int) -> str:
    """Whether so many bytes fit on a GPU, and by how much."""
    spare = USABLE_BYTES - total
    return f"fits, {spare / 2**30:.1f} GiB to spare" if spare >= 0 else f"does not fit, by {-spare / 2**30:.1f} GiB"


def print_plan(console: Console, plan: Plan) -> None:
    """Prints what was found."""
    config, mesh = plan.program.config, plan.program.mesh
    train, kept = config.train, argument_bytes(plan.program)
    parts = [f"{name} {_gib(size)}" for name, size in kept.items()]
    parts += [f"temporaries {_gib(plan.temporaries)}", f"results {_gib(plan.outputs)}"]
    lines = {
        "devices": f"{mesh.size} x H100 80GB, compiled for and not run; mesh {plan.layout}",
        "step": f"{train.global_batch_size} rows x {train.sequence_length} tokens, micro batches of "
        f"{train.micro_batch_size} row(s)",
        "one GPU": f"{' + '.join(parts)} = {_gib(plan.total)} GiB",
        "": f"of {_gib(USABLE_BYTES)} ({DEVICE_BYTES:,} bytes less 5% for CUDA and NCCL): {verdict(plan.total)}",
        "compiled": f"lowered in {plan.lower_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s",
    }
    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        grid.add_row(f"[bold]{name}[/bold]", text)
    console.print(grid, highlight=False)
    found = plan.traffic
    if not found:
        return
    kinds = [kind for kind in SENT if any(c.kind == kind for c in found)]
    table = Table("GB a GPU sends a step, over")
    for column in (*kinds, "all"):
        table.add_column(column, justify="right")
    for name, sent in sorted(sum_traffic(found).items()):
        table.add_row(name, *(f"{sent[kind] / 1e9:,.3f}" for kind in kinds), f"{sent.total() / 1e9:,.3f}")
    console.print(table, highlight=False)
    for loop in sorted({c.loop for c in found if c.loop and c.times is not None}):
        console.print(f"assumed: {plan.layers_per_stage} trips of {loop}", highlight=False, markup=False)
    for c in found:
        if c.times is None:
            text = f"not counted: {c.kind} over {c.axes} of {c.where}, {c.sent / 1e6:,.1f} MB a trip of {c.loop}"
            console.print(text, highlight=False, markup=False)


def main() -> None:
    command = train.parse(sys.argv[1:], Command, "plan")
    prepare_jax()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    try:
        print_plan(console, compile_step(command.run, command.gpus))
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


def _shard_bytes(tree) -> int:
    import jax

    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main()
