"""Three steps of a run's own program on the devices at hand, beside what the plan says of that very program.

The bound and the estimate are those of `planning.speed`, read off the text of the step as it was compiled here. XLA's
options for more communication beside compute (`compute.gpu_flags`) are measured too.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.cluster import hosts
from gemma2_jax.cluster.findings import Row, skip
from gemma2_jax.config import Config
from gemma2_jax.planning.gpus import GPUS, Gpu, find_kind
from gemma2_jax.planning.schedule import count_attention, list_work, read_schedule
from gemma2_jax.planning.speed import EXPECTED_RATIO, time_step
from gemma2_jax.training.loop import place_batch
from gemma2_jax.training.step import BATCH_DTYPES, GPU_FLAGS, Program, compile_step
from gemma2_jax.training.tokenizer import without_texts

STEPS = 3
_CPU_PARAMETERS = 100_000_000  # of the largest model whose steps a CPU takes in a time that one waits for
_EVEN_RATIO = 1.02  # of two times that are as good as the same


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What the parts look at: a run, its mesh, and its program, of which nothing is in memory yet."""

    config: Config
    mesh: Mesh
    program: Program

    @property
    def device(self) -> Any:
        return jax.local_devices()[0]


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """What was found of a program's steps.

    Attributes:
      seconds: of a step, of the fastest.
      compile_seconds: of compiling it.
      loss: of the last step.
      text: the compiled program; empty where the platform has none.
    """

    seconds: float
    compile_seconds: float
    loss: float
    text: str


def check_steps(checkup: Checkup) -> list[Row]:
    """Three steps of the run's own program, on random weights and random tokens: how long, and how long by the plan."""
    program, config = checkup.program, checkup.config
    count, subject = config.model.parameter_count(), f"{STEPS} steps"
    if checkup.device.platform == "cpu" and count > _CPU_PARAMETERS:
        return [skip(subject, f"{count / 1e9:.1f} billion parameters are many for a CPU")]
    measured = take_steps(program)
    seconds, tokens = measured.seconds, config.train.global_batch_size * config.train.sequence_length
    found = (
        f"{seconds:.3f} s a step, {tokens / seconds:,.0f} tokens/s, compiled in {measured.compile_seconds:.1f} s; "
        f"attention {program.attention_reason}"
    )
    numbers = {
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "compile_seconds": measured.compile_seconds,
    }
    row = Row(subject=subject, found=found, numbers=numbers)
    if not math.isfinite(measured.loss):
        row = replace(row, verdict="wrong", reason=f"the loss of random weights is {measured.loss}")
    return [row, compare_with_plan(checkup, measured), check_flags(checkup, seconds)]


def take_steps(program: Program) -> MeasuredSteps:
    """Compiles the program's step, and takes it three times after once."""
    with jax.set_mesh(program.mesh):
        began = time.perf_counter()
        step = compile_step(program, program.train_step, program.batch, donate_argnums=0)
        compile_seconds = time.perf_counter() - began
        state = program.initial_state(program.random_base())
        batch = place_batch(program, make_batch(program))
        hosts.wait_for_processes(f"check_steps/{program.config.compute.gpu_flags}")
        loss, times = math.nan, []
        for _ in range(STEPS + 1):  # the first is a warm-up
            began = time.perf_counter()
            state, values = step(state, batch)
            loss = float(values["loss"])
            times.append(time.perf_counter() - began)
    text = step.as_text() or ""
    return MeasuredSteps(seconds=min(times[1:]), compile_seconds=compile_seconds, loss=loss, text=text)


def compare_with_plan(checkup: Checkup, measured: MeasuredSteps) -> Row:
    """The measured step beside its bound and its estimate, of the program as it was compiled here."""
    subject, kind = "steps against the plan", checkup.device.device_kind
    gpu = find_kind(kind)
    if gpu is None:
        return skip(subject, f"the plan does not know {kind}; it knows {', '.join(gpu.title for gpu in GPUS.values())}")
    mesh, config = checkup.program.mesh.shape, checkup.config
    stages = mesh["stage"]
    attention = count_attention(config.model, config.train.sequence_length)
    try:
        schedule = read_schedule(
            measured.text, mesh, attention, -(-config.model.layers // stages) if stages > 1 else None
        )
    except ValueError as error:
        return skip(subject, f"the text of the compiled step cannot be read: {error}")
    if not any(work.products for work, _ in list_work(schedule)):
        return skip(subject, "the text of the compiled step has no products that the plan can count")
    bound, estimate = time_step(schedule, gpu, mesh)
    return judge_step(measured.seconds, bound.total, estimate.total, gpu)


def judge_step(seconds: float, bound: float, estimate: float, gpu: Gpu) -> Row:
    """The row of a step that took so long: wrong where it beats the bound, slow beyond what the estimate leaves room
    for."""
    ratio, (least, most) = seconds / estimate, EXPECTED_RATIO
    row = Row(
        subject="steps against the plan",
        found=f"{seconds:.3f} s a step is {ratio:.2f} times the estimate of {estimate:.3f} s and {seconds / bound:.2f} "
        f"times the bound of {bound:.3f} s, by the program compiled here and the figures of {gpu.title}",
        numbers={"step_seconds": seconds, "bound_seconds": bound, "estimate_seconds": estimate},
    )
    if seconds < bound:
        reason = "faster than the data sheet allows, so that the step, the clock or the plan is mistaken"
        return replace(row, verdict="wrong", reason=reason, advice="report it with --json's file")
    if ratio > most:
        reason = f"{ratio:.2f} times the estimate, and {least:g} to {most:g} times is to be expected"
        advice = "see the rows above for what is slow; python -m gemma2_jax.profile says where the time of a step goes"
        return replace(row, verdict="slow", reason=reason, advice=advice)
    return replace(row, reason=f"faster than the {least:g} times that is to be expected") if ratio < least else row


def check_flags(checkup: Checkup, seconds: float) -> Row:
    """Steps with the other choice of `compute.gpu_flags`, beside those with the run's own, which took `seconds`."""
    subject, chosen = "compute.gpu_flags", checkup.config.compute.gpu_flags
    if checkup.device.platform != "gpu":
        return skip(subject, f"they are for GPUs, and this is {checkup.device.platform}")
    times = {chosen: seconds}
    for name in GPU_FLAGS.keys() - times.keys():
        compute = replace(checkup.config.compute, gpu_flags=name)
        config = without_texts(replace(checkup.config, compute=compute))
        try:
            times[name] = take_steps(Program(config, checkup.mesh)).seconds
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:  # the others would wait for this one
                raise
            return skip(subject, f"{name} could not be measured: {(str(error).splitlines() or [''])[0][:300]}")
    return judge_flags(times, chosen)


def judge_flags(times: dict[str, float], chosen: str) -> Row:
    """The row of the seconds of a step by `compute.gpu_flags`: slow where the run's own choice is not the fastest."""
    best = min(times, key=lambda name: times[name])
    row = Row(
        subject="compute.gpu_flags",
        found=", ".join(f"{name} {seconds:.3f} s a step" for name, seconds in sorted(times.items())),
        numbers={f"{name} step_seconds": seconds for name, seconds in times.items()},
    )
    ratio = times[chosen] / times[best]
    if ratio <= _EVEN_RATIO:
        return row
    return replace(
        row,
        verdict="slow",
        reason=f"{chosen} takes {ratio:.2f} of the time of {best}",
        advice=f"--compute.gpu_flags {best}",
    )


def make_batch(program: Program) -> dict[str, np.ndarray]:
    """This process's rows of a batch of random tokens, each row one document."""
    rows, length = len(program.process_rows), program.config.train.sequence_length
    drawn = np.random.default_rng(0).integers(3, program.config.model.vocab_size, (rows, length + 1), dtype=np.int32)
    batch = {
        "tokens": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": np.ones((rows, length), np.float32),
    }
    assert batch.keys() == BATCH_DTYPES.keys()
    if "sources" in program.batch:
        batch["sources"] = np.zeros(rows, np.int32)
    return batch
