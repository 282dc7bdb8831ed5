"""A plan as plain numbers: memory of one GPU by owner, traffic by mesh axis, and whether the step fits.

A step is compiled for described GPUs in a process of its own (`plan_in_subprocess`), because JAX must be prepared for
them before it is first used, and the caller may already have used it. `python -m gemma2_jax.planning.report GPUS` is
that process: it reads a config as text and writes a plan as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_jax import config as configs, config_text
from gemma2_jax.config import Config
from gemma2_jax.planning import described_cluster
from gemma2_jax.planning.described_cluster import USABLE_BYTES
from gemma2_jax.planning.traffic import Collective, sum_traffic

if TYPE_CHECKING:
    from gemma2_jax.planning.compiled_step import CompiledStep

_ERRORS = {kind.__name__: kind for kind in (ValueError, ImportError)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one training step holds on each of its H100s, and what it sends between them."""

    config: Config
    gpus: int
    mesh: str  # the mesh in words, such as "data 2 x tensor 4"
    memory: dict[str, int]  # bytes of one GPU by owner: trained weights, optimizer, ..., temporaries, results
    total: int  # bytes that one GPU needs at once
    lower_seconds: float
    compile_seconds: float
    layers_per_stage: int | None  # the trip count assumed for loops whose count the compiler does not know
    collectives: tuple[Collective, ...]

    @property
    def fits(self) -> bool:
        """Whether the step fits in the part of an H100's 80 GB that XLA may allocate."""
        return self.total <= USABLE_BYTES

    @property
    def traffic(self) -> dict[str, Counter]:
        """Bytes that one GPU sends in a step: by mesh axis, then by kind of collective."""
        return sum_traffic(self.collectives)

    def __str__(self) -> str:
        owners = " + ".join(f"{name} {format_gib(size)}" for name, size in self.memory.items())
        return (
            f"{self.gpus} x H100 80GB, mesh {self.mesh}: {owners} = {format_gib(self.total)} GiB a GPU; "
            f"{describe_fit(self.total)}"
        )


def describe_fit(total: int) -> str:
    """Says whether `total` bytes fit on an H100, and by how much."""
    spare = USABLE_BYTES - total
    return f"fits, {spare / 2**30:.1f} GiB to spare" if spare >= 0 else f"does not fit, by {-spare / 2**30:.1f} GiB"


def format_gib(size: int) -> str:
    """Bytes as GiB with two decimals, without the unit."""
    return f"{size / 2**30:.2f}"


def summarize_step(step: "CompiledStep") -> Plan:
    """The plan of a compiled step."""
    from gemma2_jax.planning.compiled_step import argument_bytes

    owners = argument_bytes(step.program) | {"temporaries": step.temporaries, "results": step.outputs}
    return Plan(
        config=step.program.config,
        gpus=step.program.mesh.size,
        mesh=step.layout,
        memory=owners,
        total=step.total,
        lower_seconds=step.lower_seconds,
        compile_seconds=step.compile_seconds,
        layers_per_stage=step.layers_per_stage,
        collectives=tuple(step.traffic),
    )


def plan_in_subprocess(config: Config, gpus: int) -> Plan:
    """Compiles the training step of `config` for `gpus` H100s in a new process; this one may have used JAX.

    Raises ValueError if the run does not divide over the GPUs, and ImportError without the extra `plan`.
    """
    package = str(Path(configs.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, "-m", "gemma2_jax.planning.report", str(gpus)],
        input=config_text.to_text(config),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if process.returncode:
        raise RuntimeError(f"the process that compiles the step failed: {process.stderr.strip()}")
    answer = json.loads(process.stdout)
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    collectives = tuple(Collective(**fields) for fields in answer.pop("collectives"))
    return Plan(config=config, collectives=collectives, **answer)


def _answer(config: Config, gpus: int) -> dict:
    """The fields of a plan without its config, or the error that planning ended with."""
    from gemma2_jax.planning.compiled_step import compile_step

    try:
        plan = summarize_step(compile_step(config, gpus))
    except (ValueError, ImportError) as error:
        kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
        return {"error": kind, "message": str(error)}
    names = [field.name for field in dataclasses.fields(Plan) if field.name not in ("config", "collectives")]
    fields = {name: getattr(plan, name) for name in names}
    return fields | {"collectives": [dataclasses.asdict(collective) for collective in plan.collectives]}


def main() -> None:
    """Reads a config from standard input, and writes its plan to standard output as JSON."""
    config = config_text.from_text(sys.stdin.read(), "the config of the plan")
    described_cluster.prepare_jax()
    print(json.dumps(_answer(config, int(sys.argv[1]))))


if __name__ == "__main__":
    main()
