"""Ways to lay a run out over GPUs, and what each would take, by closed formulas: the first sieve of a search.

A layout is a mesh, the rows of a pass, and what is kept of a block for its backward pass. Memory and time follow from
sizes alone (`dense_step`, `kept_outputs`), in milliseconds for hundreds of layouts; a search compiles the best of them.
Nothing here compiles, and no device is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gemma2_jax.config import Config, KeptOutput, MeshConfig
from gemma2_jax.planning.dense_step import DenseStep, describe_gemma
from gemma2_jax.planning.gpus import Gpu
from gemma2_jax.planning.kept_outputs import choose_kept_outputs, list_candidates
from gemma2_jax.planning.speed import FACTORS, bound_time, data_sheet_rates, estimate_time, expected_rates
from gemma2_jax.training.smaller_steps import list_divisors

MAX_TENSOR_SHARDS = 8
_PARTS = {"attn": ("attention/qkv", "attention/o"), "mlp": ("mlp/gate_up", "mlp/down")}
_RECOMPUTING = ("block", "offload")
# Bytes for each token and element of the MLP's width: of a layer's intermediate results while it computes its backward
# pass, and of all that a layer keeps for that with compute.remat none, as read off compiled steps of 2B and 9B.
_LAYER_BYTES = 16
_KEPT_BYTES = 33
_SLACK = 1.1  # temporaries over those that are counted here: gaps between buffers, and what is too small to count


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid out: what may differ between runs that compute the same."""

    mesh: MeshConfig  # with every axis given
    micro_batch_size: int
    remat: Literal["none", "dots", "block", "offload"]
    kept_outputs: tuple[KeptOutput, ...] = ()

    def apply(self, config: Config) -> Config:
        """The run with this layout."""
        compute = replace(config.compute, remat=self.remat, kept_outputs=self.kept_outputs)
        train = replace(config.train, micro_batch_size=self.micro_batch_size)
        return replace(config, mesh=self.mesh, train=train, compute=compute)

    def list_options(self, config: Config) -> list[str]:
        """Options of `plan` and `train` that give a run this layout, which has another."""
        sizes = dataclasses.asdict(self.mesh)
        given = {name: getattr(config.mesh, name) for name in sizes}
        options = [f"--mesh.{name} {size}" for name, size in sizes.items() if given[name] not in (size, -1)]
        if self.micro_batch_size != config.train.micro_batch_size:
            options.append(f"--train.micro_batch_size {self.micro_batch_size}")
        if self.remat != config.compute.remat:
            options.append(f"--compute.remat {self.remat}")
        if self.kept_outputs != config.compute.kept_outputs:
            options.append(" ".join(["--compute.kept_outputs", *self.kept_outputs]))
        return options

    def __str__(self) -> str:
        axes = [f"{name} {size}" for name, size in dataclasses.asdict(self.mesh).items() if size > 1]
        kept = f", keeps {' '.join(self.kept_outputs)}" if self.kept_outputs else ""
        return f"{' x '.join(axes) or 'one device'}, micro batches of {self.micro_batch_size}, {self.remat}{kept}"


def find_own(config: Config, gpus: int) -> Layout | None:
    """The layout that a run has by itself on so many GPUs; None where it does not divide over them."""
    sizes = dataclasses.asdict(config.mesh)
    rest, remainder = divmod(gpus, math.prod(size for size in sizes.values() if size != -1))
    if remainder or not rest or (rest > 1 and -1 not in sizes.values()):
        return None
    mesh = MeshConfig(**{axis: rest if size == -1 else size for axis, size in sizes.items()})
    if not is_divisible(config, mesh, config.train.micro_batch_size):
        return None
    return Layout(
        mesh=mesh,
        micro_batch_size=config.train.micro_batch_size,
        remat=config.compute.remat,
        kept_outputs=config.compute.kept_outputs,
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a layout would take by closed formulas, on one GPU."""

    layout: Layout
    memory: int  # bytes
    bound: float  # seconds that no step beats
    estimate: float  # seconds


def list_meshes(gpus: int, gpu: Gpu) -> Iterator[MeshConfig]:
    """Every mesh of so many GPUs, with as many tensor shards as a host has GPUs at most."""
    for tensor in list_divisors(gpus):
        if tensor > min(MAX_TENSOR_SHARDS, gpu.gpus_per_host):
            continue
        for context in list_divisors(gpus // tensor):
            for fsdp in list_divisors(gpus // tensor // context):
                for stage in list_divisors(gpus // tensor // context // fsdp):
                    data = gpus // tensor // context // fsdp // stage
                    yield MeshConfig(data=data, stage=stage, fsdp=fsdp, context=context, tensor=tensor)


def list_predictions(config: Config, gpus: int, gpu: Gpu) -> list[Prediction]:
    """Layouts of a run on so many GPUs that may fit, those that would be fastest first."""
    found = []
    for mesh in list_meshes(gpus, gpu):
        shards = mesh.data * mesh.fsdp
        rows = config.train.global_batch_size // shards
        for micro in list_divisors(rows) if rows * shards == config.train.global_batch_size else ():
            if is_divisible(config, mesh, micro):
                found += _predict_memory_choices(config, mesh, micro, gpu)
    return sorted(found, key=lambda prediction: (prediction.estimate, prediction.memory))


def is_divisible(config: Config, mesh: MeshConfig, micro_batch_size: int) -> bool:
    """Whether a run divides over a mesh."""
    from jax.sharding import AbstractMesh

    from gemma2_jax.mesh import AXES, check_mesh

    layout = Layout(mesh=mesh, micro_batch_size=micro_batch_size, remat="block")
    abstract = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
    try:
        check_mesh(layout.apply(config), abstract)
    except ValueError:
        return False
    return True


def _predict_memory_choices(config: Config, mesh: MeshConfig, micro: int, gpu: Gpu) -> Iterator[Prediction]:
    """Predictions of what may be kept of a block: everything, the best that fits, or nothing on the GPU itself.

    Where weights are gathered, keeping everything keeps those of all layers too, which no search has found worth it.
    """
    is_whole = mesh.fsdp * mesh.context == 1
    layouts = [Layout(mesh=mesh, micro_batch_size=micro, remat="none")] if is_whole else []
    plain = Layout(mesh=mesh, micro_batch_size=micro, remat="block")
    memory = predict(config, plain, gpu).memory
    if memory <= gpu.usable_bytes:
        arguments = count_arguments(config, describe_step(plain.apply(config), dataclasses.asdict(mesh)))
        # As much as fits, as much as leaves room to hide communication, and nothing.
        limits = gpu.usable_bytes, arguments + _scheduler_limit(arguments, gpu)
        budgets = [max(0, round((limit - memory) / _SLACK)) for limit in limits]
        sets = [choose_kept_outputs(config, dataclasses.asdict(mesh), budget) for budget in budgets]
        layouts += [replace(plain, kept_outputs=kept) for kept in dict.fromkeys((*sets, ()))]
    else:
        layouts.append(replace(plain, remat="offload"))
    for layout in layouts:
        prediction = predict(config, layout, gpu)
        if prediction.memory <= gpu.usable_bytes:
            yield prediction


def predict(config: Config, layout: Layout, gpu: Gpu) -> Prediction:
    """What a layout would take, by closed formulas."""
    run, mesh = layout.apply(config), dataclasses.asdict(layout.mesh)
    step = describe_step(run, mesh)
    candidates = list_candidates(run, mesh) if layout.kept_outputs else ()
    kept = [one for one in candidates if one.name in layout.kept_outputs]
    arguments = count_arguments(run, step)
    temporaries = round(4 * step.trained + _SLACK * (_count_temporaries(run, step) + sum(one.size for one in kept)))
    overlaps = temporaries <= _scheduler_limit(arguments, gpu)
    schedule = replace(step, overlaps=overlaps).describe()
    axes = [name for name, size in mesh.items() if size > 1] + ["fsdp+context"]
    rates = data_sheet_rates(gpu, mesh, axes), expected_rates(gpu, mesh, axes)
    times = bound_time(schedule, rates[0]).total, estimate_time(schedule, rates[1]).total
    saved = sum(one.flops for one in kept) / (gpu.tflops * 1e12)
    return Prediction(
        layout=layout,
        memory=arguments + temporaries,
        bound=max(0.0, times[0] - saved),
        estimate=max(0.0, times[1] - saved / FACTORS["products"].share),
    )


def _scheduler_limit(arguments: int, gpu: Gpu) -> int:
    """Bytes of temporaries beyond which XLA gives up hiding communication, to save memory.

    It is 95% of what arguments leave of 80% of the device's memory: GetSchedulerMemoryLimit of openxla/xla
    (service/gpu/gpu_hlo_schedule.cc).
    """
    return (gpu.memory_bytes * 80 // 100 - arguments) * 95 // 100


def describe_step(config: Config, mesh: Mapping[str, int]) -> DenseStep:
    """A run's step by its sizes."""
    train, adapter = config.train, config.adapter
    adapted = tuple(
        part
        for room, parts in _PARTS.items()
        for part in parts
        if any(target.startswith(room) for target in adapter.targets)
    )
    return DenseStep(
        model=describe_gemma(config.model),
        rows=train.micro_batch_size,
        length=train.sequence_length,
        passes=train.global_batch_size // (train.micro_batch_size * mesh["data"] * mesh["fsdp"]),
        data=mesh["data"],
        stage=mesh["stage"],
        fsdp=mesh["fsdp"],
        context=mesh["context"],
        tensor=mesh["tensor"],
        rank=0 if adapter.kind == "none" else adapter.rank,
        adapted=() if adapter.kind == "none" else adapted,
        gradient_bytes=4,
        remat="block" if config.compute.remat in _RECOMPUTING else "none",
    )


def count_arguments(config: Config, step: DenseStep) -> int:
    """Bytes of weights and of the optimizer's moments on one GPU."""
    sizes = {"float32": 4, "bfloat16": 2}
    compute, shards = config.compute, step.weight_shards * step.tensor * step.stage
    frozen = 0 if config.adapter.kind == "none" else config.model.parameter_count() / shards
    return round(step.trained * 3 * sizes[compute.trained_dtype] + frozen * sizes[compute.frozen_dtype])


def _count_temporaries(config: Config, step: DenseStep) -> float:
    """Bytes that are alive in a backward pass on one GPU, without outputs that are kept by name."""
    model, tokens, layers = config.model, step.tokens, -(-config.model.layers // step.stage)
    live = 2 * step.stage - 1
    size = 2 if config.compute.dtype == "bfloat16" else 4
    inputs = 0 if config.compute.remat == "offload" else size * live * layers * tokens * model.width / step.tensor
    layer = _LAYER_BYTES * tokens * model.mlp_width / step.tensor
    if step.remat == "none":
        inputs += _KEPT_BYTES * tokens * model.mlp_width / step.tensor * live * layers
    weights = 2 * size * step.weights / step.tensor  # of this layer and of the next
    rows = step.rows * min(config.compute.loss_chunk, step.length)
    vocabulary = model.vocab_size / (step.tensor * step.stage)
    logits = 3 * 4 * rows / step.context * vocabulary
    embedding = size * model.width * vocabulary / step.weight_shards
    return inputs + layer + weights + logits + embedding
