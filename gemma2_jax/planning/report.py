"""A plan as plain numbers: memory, FLOPs, traffic, whether the step fits, and how fast it can be at best.

A step is compiled for described GPUs in a process of its own (`plan_in_subprocess`), because JAX must be prepared for
them before it is first used, and the caller may already have used it. That process is `python -m
gemma2_jax.planning.report GPUS DEVICE`: it reads a config as text and writes a plan as JSON.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_jax import config as configs, config_text
from gemma2_jax.config import Config
from gemma2_jax.planning import described_cluster
from gemma2_jax.planning.gpus import H100, Gpu
from gemma2_jax.planning.memory import Buffer, Peak
from gemma2_jax.planning.schedule import PASSES, list_work, sum_flops
from gemma2_jax.planning.speed import FACTORS, StepTime, find_link, time_step
from gemma2_jax.planning.traffic import Collective, sum_traffic

if TYPE_CHECKING:
    from gemma2_jax.planning.compiled_step import CompiledStep

_LEAST_SHARE = 0.02  # of a step's time; parts that take less are listed as one
_LEAST_SHOWN = 2**30 // 200  # bytes; owners of less are listed as one
REST = "the rest"
_ERRORS = {kind.__name__: kind for kind in (ValueError, ImportError)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one GPU does in a step for a part of the model."""

    name: str
    flops: dict[str, int]  # by pass
    bound: float  # seconds
    estimate: float  # seconds


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one GPU sends in a step along some axes of the mesh by one kind of collective, and what that takes."""

    axes: str
    kind: str
    link: str  # that the groups along these axes use: "link" inside a host, "network" between hosts
    bandwidth: float  # bytes/s of it, by the data sheet
    sent: int  # bytes
    bound: float  # seconds by the data sheet
    estimate: float  # seconds by `speed.FACTORS`


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one training step holds on each of its GPUs, does there, and sends between them."""

    config: Config
    device: Gpu
    gpus: int
    mesh: str  # the mesh in words, such as "data 2 x tensor 4"
    mesh_sizes: dict[str, int]  # of all axes, in their order
    memory: dict[str, int]  # bytes of one GPU by owner: trained weights, optimizer, ..., temporaries, results
    total: int  # bytes that one GPU needs at once
    peak: Peak | str  # temporaries by owner where a step needs most memory, or why they are not known
    lower_seconds: float
    compile_seconds: float
    layers_per_stage: int | None  # the trip count assumed for loops whose count the compiler does not know
    collectives: tuple[Collective, ...]
    flops: dict[str, dict[str, int]]  # of one GPU in a step: by part of the model, then by pass
    memory_traffic: int  # bytes that one GPU reads from its memory and writes to it in a step, caches aside
    bound: StepTime  # what no run beats, by the rates of data sheets
    estimate: StepTime  # what may be expected, by `speed.FACTORS`; nobody has measured it

    @property
    def fits(self) -> bool:
        """Whether the step fits in the part of a GPU's memory that XLA may allocate."""
        return self.total <= self.device.usable_bytes

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.train.global_batch_size * self.config.train.sequence_length

    def token_rate(self, time: StepTime) -> float:
        """Tokens per second and GPU, where a step takes this time."""
        return self.tokens / time.total / self.gpus

    def flops_utilization(self, time: StepTime) -> float:
        """MFU where a step takes this time: `Config.training_flops` over what the GPUs can do at best."""
        return self.config.training_flops * self.token_rate(time) / (self.device.tflops * 1e12)

    def gpu_hours(self, time: StepTime) -> float:
        """Hours of all GPUs together for the recipe's steps, where each takes this time."""
        return time.total * self.config.steps * self.gpus / 3600

    @property
    def owners(self) -> dict[str, int]:
        """Bytes of one GPU by owner, largest first, with temporaries divided where that is known; their sum is all."""
        owners = {name: size for name, size in self.memory.items() if size}
        if isinstance(self.peak, Peak):
            del owners["temporaries"]
            owners |= self.peak.owners
        owners["other state"] = self.total - sum(owners.values())
        return dict(sorted(owners.items(), key=lambda item: -item[1]))

    @property
    def passes(self) -> list[str]:
        """The passes in which a step computes products."""
        return [name for name in PASSES if any(name in flops for flops in self.flops.values())]

    def list_owners(self) -> dict[str, int]:
        """`owners`, with small ones as one, which is last."""
        shown = {name: size for name, size in self.owners.items() if size >= _LEAST_SHOWN}
        return shown | {REST: self.total - sum(shown.values())}

    def list_parts(self) -> list[Part]:
        """The parts of a step, those that are expected to take longest first, with short ones as one, which is last."""
        bound, estimate = (_sum_parts(time) for time in (self.bound, self.estimate))
        small = [part for part, seconds in estimate.items() if seconds < _LEAST_SHARE * self.estimate.computing]
        shown = [part for part in sorted(estimate, key=lambda part: -estimate[part]) if part not in small]
        found = []
        for name, parts in ({part: [part] for part in shown} | ({REST: small} if small else {})).items():
            flops = {one: sum(self.flops.get(part, {}).get(one, 0) for part in parts) for one in PASSES}
            seconds = [sum(times[part] for part in parts) for times in (bound, estimate)]
            found.append(Part(name=name, flops=flops, bound=seconds[0], estimate=seconds[1]))
        return found

    @property
    def traffic(self) -> dict[str, Counter]:
        """Bytes that one GPU sends in a step: by mesh axis, then by kind of collective."""
        return sum_traffic(self.collectives)

    def list_notes(self) -> list[str]:
        """What was assumed to count the traffic, and what could not be counted."""
        assumed = sorted({c.loop for c in self.collectives if c.loop and c.times is not None})
        notes = [f"assumed: {self.layers_per_stage} trips of {loop}" for loop in assumed]
        return notes + [
            f"not counted: {c.kind} over {c.axes} of {c.where}, {c.sent / 1e6:,.1f} MB a trip of {c.loop}"
            for c in self.collectives
            if c.times is None
        ]

    def describe_link(self, axes: str) -> str:
        """The link that groups along these axes use, and its rate by the data sheet."""
        link, bandwidth = find_link(self.device, self.mesh_sizes, axes)
        return f"{self.device.link_name if link == 'link' else link}, {bandwidth / 1e9:g} GB/s"

    def list_traffic(self) -> list[Traffic]:
        """What `traffic` has, with the link that it goes over, and how long it takes there."""
        rows = []
        for axes, kinds in sorted(self.traffic.items()):
            link, bandwidth = find_link(self.device, self.mesh_sizes, axes)
            for kind, sent in kinds.items():
                seconds = sent / bandwidth
                rows.append(
                    Traffic(
                        axes=axes,
                        kind=kind,
                        link=link,
                        bandwidth=bandwidth,
                        sent=sent,
                        bound=seconds,
                        estimate=seconds / FACTORS[link].share,
                    )
                )
        return rows

    def __str__(self) -> str:
        owners = " + ".join(f"{name} {format_gib(size)}" for name, size in self.memory.items())
        return (
            f"{self.gpus} x {self.device.title}, mesh {self.mesh}: {owners} = {format_gib(self.total)} GiB a GPU; "
            f"{describe_fit(self.total, self.device)}"
        )

    def as_json(self) -> dict:
        """All of it as JSON, with what follows from it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        times = {
            name: dataclasses.asdict(time)
            | {
                "tokens_per_second_and_gpu": self.token_rate(time),
                "mfu": self.flops_utilization(time),
                "gpu_hours": self.gpu_hours(time),
            }
            for name, time in (("bound", self.bound), ("estimate", self.estimate))
        }
        return fields | {
            "config": config_text.to_text(self.config),
            "device": dataclasses.asdict(self.device),
            "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
            "peak": dataclasses.asdict(self.peak) if isinstance(self.peak, Peak) else self.peak,
            "owners": self.owners,
            "traffic": [dataclasses.asdict(traffic) for traffic in self.list_traffic()],
            "fits": self.fits,
            "usable_bytes": self.device.usable_bytes,
            "factors": {name: dataclasses.asdict(factor) for name, factor in FACTORS.items()},
            **times,
        }


def _sum_parts(time: StepTime) -> dict[str, float]:
    """Seconds of work by part, whatever the pass."""
    total: dict[str, float] = {}
    for name, seconds in time.work.items():
        part = name.rpartition(", ")[0]
        total[part] = total.get(part, 0.0) + seconds
    return total


def describe_fit(total: int, device: Gpu = H100) -> str:
    """Says whether `total` bytes fit on such a GPU, and by how much."""
    spare = device.usable_bytes - total
    return f"fits, {spare / 2**30:.1f} GiB to spare" if spare >= 0 else f"does not fit, by {-spare / 2**30:.1f} GiB"


def describe_seconds(seconds: float) -> str:
    """The time of a step, in the unit that suits it."""
    return f"{seconds:,.3f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def shorten_operation(name: str) -> str:
    """The name of a program's operation without what all have."""
    return re.sub(r"^jit\(\w+\)/|while/body/|eval_jaxpr/", "", name)


def format_gib(size: int) -> str:
    """Bytes as GiB with two decimals, without the unit."""
    return f"{size / 2**30:.2f}"


def summarize_step(step: "CompiledStep") -> Plan:
    """The plan of a compiled step."""
    from gemma2_jax.training.smaller_steps import argument_bytes

    flops: dict[str, dict[str, int]] = {}
    for (part, pass_name), count in sum_flops(step.schedule).items():
        flops.setdefault(part, {})[pass_name] = count
    bound, estimate = time_step(step.schedule, step.device, step.program.mesh.shape)
    owners = argument_bytes(step.program) | {"temporaries": step.temporaries, "results": step.outputs}
    return Plan(
        config=step.program.config,
        device=step.device,
        gpus=step.program.mesh.size,
        mesh=step.layout,
        mesh_sizes=dict(step.program.mesh.shape),
        memory=owners,
        total=step.total,
        peak=step.peak,
        lower_seconds=step.lower_seconds,
        compile_seconds=step.compile_seconds,
        layers_per_stage=step.layers_per_stage,
        collectives=tuple(step.traffic),
        flops=flops,
        memory_traffic=round(sum(work.memory * times for work, times in list_work(step.schedule))),
        bound=bound,
        estimate=estimate,
    )


class PlanProcess:
    """A process that compiles the training step of `config` for so many GPUs."""

    def __init__(self, config: Config, gpus: int, device: Gpu) -> None:
        package = str(Path(configs.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._config = config_text.to_text(config)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemma2_jax.planning.report", str(gpus), json.dumps(dataclasses.asdict(device))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def finish(self) -> dict:
        """What `read_plan` reads, when the process has ended. Raises RuntimeError where it has failed."""
        answer, errors = self._process.communicate(self._config)
        if self._process.returncode:
            raise RuntimeError(f"the process that compiles the step failed: {errors.strip()}")
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process before it has finished."""
        self._process.kill()


def plan_in_subprocess(config: Config, gpus: int, device: Gpu = H100) -> Plan:
    """Compiles the training step of `config` for so many GPUs in a new process; this one may have used JAX.

    Raises ValueError if the run does not divide over the GPUs, and ImportError without the extra `plan`.
    """
    return read_plan(PlanProcess(config, gpus, device).finish(), config, device)


def read_plan(answer: dict, config: Config, device: Gpu) -> Plan:
    """The plan that a process has written. Raises the error that it ended with instead."""
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    fields = dict(answer)
    collectives = tuple(Collective(**one) for one in fields.pop("collectives"))
    times = {name: StepTime(**fields.pop(name)) for name in ("bound", "estimate")}
    if isinstance(peak := fields.pop("peak"), dict):
        buffers = tuple(Buffer(**one) for one in peak["buffers"])
        peak = Peak(where=peak["where"], owners=peak["owners"], buffers=buffers)
    return Plan(config=config, device=device, collectives=collectives, peak=peak, **times, **fields)


def _answer(config: Config, gpus: int, device: Gpu) -> dict:
    """The fields of a plan without its config, or the error that planning ended with."""
    from gemma2_jax.planning.compiled_step import compile_step

    try:
        plan = summarize_step(compile_step(config, gpus, device))
    except (ValueError, ImportError) as error:
        kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
        return {"error": kind, "message": str(error)}
    fields = dataclasses.asdict(plan)
    return {name: value for name, value in fields.items() if name not in ("config", "device")}


def main() -> None:
    """Reads a config from standard input, and writes its plan to standard output as JSON."""
    config = config_text.from_text(sys.stdin.read(), "the config of the plan")
    described_cluster.prepare_jax()
    fields = json.loads(sys.argv[2])
    device = Gpu(**fields | {"capability": tuple(fields["capability"])})
    print(json.dumps(_answer(config, int(sys.argv[1]), device)))


if __name__ == "__main__":
    main()
