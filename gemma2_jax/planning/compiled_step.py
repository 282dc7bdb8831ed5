"""Compiles the real training step, at its real size, for a described cluster, and reads memory and traffic off it.

Nothing is run. `described_cluster.prepare_jax` must be called before JAX is used.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_jax.config import Config
from gemma2_jax.planning.described_cluster import describe_cluster
from gemma2_jax.planning.gpus import H100, Gpu
from gemma2_jax.planning.memory import Dump, Peak, find_peak, read_dump, squeeze_type
from gemma2_jax.planning.schedule import Item, count_attention, read_schedule
from gemma2_jax.planning.traffic import Collective, read_traffic

if TYPE_CHECKING:
    from gemma2_jax.training.step import Program


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A compiled training step. Bytes are those of one GPU."""

    program: Program
    device: Gpu
    lower_seconds: float
    compile_seconds: float
    arguments: int  # bytes of state and batch; the state's memory becomes the next state's
    temporaries: int  # bytes
    outputs: int  # bytes of results that do not reuse an argument's memory
    text: str  # the compiled HLO
    dump: Dump | str  # what XLA wrote about memory, or why it cannot be read

    @property
    def total(self) -> int:
        """Bytes of memory that the step needs in all."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def layout(self) -> str:
        """The mesh in words."""
        from gemma2_jax.mesh import describe_mesh

        return describe_mesh(self.program.mesh)

    @property
    def layers_per_stage(self) -> int | None:
        """Trips of a loop over the layers of one pipeline stage; None without a pipeline."""
        stages = self.program.mesh.shape.get("stage", 1)
        return -(-self.program.config.model.layers // stages) if stages > 1 else None

    @cached_property
    def schedule(self) -> tuple[Item, ...]:
        """What each GPU does, in its order."""
        config = self.program.config
        attention = count_attention(config.model, config.train.sequence_length)
        return read_schedule(self.text, self.program.mesh.shape, attention, self.layers_per_stage)

    @property
    def peak(self) -> Peak | str:
        """The owners of temporaries where the step needs most memory, or why they are not known."""
        if isinstance(self.dump, str):
            return self.dump
        gradients = _gradient_types(self.program)
        layers = self.layers_per_stage or self.program.config.model.layers
        try:
            return find_peak(self.dump, self.text, self.temporaries, gradients, layers)
        except ValueError as error:
            return str(error)

    @property
    def traffic(self) -> list[Collective]:
        """Every collective of the step."""
        return read_traffic(self.text, self.program.mesh.shape, self.layers_per_stage)


def make_program(config: Config, gpus: int, device: Gpu = H100) -> Program:
    """The run of `config` on so many described GPUs, before anything is compiled."""
    from gemma2_jax.mesh import make_mesh
    from gemma2_jax.training.step import Program

    return Program(config, make_mesh(config.mesh, describe_cluster(gpus, device)))


def compile_step(config: Config, gpus: int, device: Gpu = H100) -> CompiledStep:
    """The training step of `config`, compiled as the training loop compiles it, for so many described GPUs.

    Raises ValueError if the run does not divide over the mesh, and ImportError without the extra `plan`.
    """
    import jax

    program = make_program(config, gpus, device)
    state, batch = program.state, program.batch  # before the mesh is set, as optax runs small operations to make these
    with jax.set_mesh(program.mesh):
        start = time.perf_counter()
        traced = jax.jit(program.train_step, donate_argnums=0).trace(state, batch)
        lowered = traced.lower(lowering_platforms=("cuda",))
        lowering_end = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            dumping = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = lowered.compile(program.compiler_options | dumping)
            compiling_end = time.perf_counter()
            dump = _read_dump(Path(folder))
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None and text is not None
    return CompiledStep(
        program=program,
        device=device,
        lower_seconds=lowering_end - start,
        compile_seconds=compiling_end - lowering_end,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        text=text,
        dump=dump,
    )


def _read_dump(folder: Path) -> Dump | str:
    try:
        return read_dump(folder)
    except ValueError as error:
        return str(error)


def _gradient_types(program: Program) -> set[str]:
    """The types that gradients of the trained weights have on one GPU, in float32."""
    import jax

    leaves = jax.tree.leaves(program.state.params)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return {squeeze_type(f"f32[{','.join(map(str, shape))}]") for shape in shapes}
