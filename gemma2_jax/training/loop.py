"""A run from its first step to its last: `train`, which reads like the list of what it does.

Everything that can be decided beforehand is decided before the loop, as values; the loop itself has no modes. It
waits for the device only to log a step whose successor is already under way, to evaluate, and to save.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config
from gemma2_jax.data import batches as pipeline
from gemma2_jax.mesh import balance_context, make_mesh
from gemma2_jax.training import metrics, resume, startup as report
from gemma2_jax.training.checkpoint import Checkpoints
from gemma2_jax.training.export import AdapterExports
from gemma2_jax.training.profiling import Trace
from gemma2_jax.training.step import Batch, Program, State


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call of `train` leaves behind."""

    folder: Path  # the run's working directory
    step: int  # the last step taken
    losses: dict[int, float]  # training loss (nats per target token) by logged step, of the steps of this call
    eval_losses: dict[int, float]  # held-out loss by step, likewise
    program: Program
    state: State  # after the last step, on the devices


def train(config: Config) -> Result:
    """Carries out the run. The same config and working directory resume it.

    Raises ValueError for what cannot be done as asked, FloatingPointError when the loss or its gradient is no longer
    finite, and OSError when the disk does not take what is written.
    """
    metrics.check_wandb(config)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width of its own
    mesh = make_mesh(config.mesh)
    program = Program(config, mesh)
    with hosts.process_zero_first("open_source"):  # which may download it
        source = resume.open_source(config)
    with jax.set_mesh(mesh), Checkpoints(config.output, config.train.keep_checkpoints) as checkpoints:
        changes = resume.claim_workdir(config, checkpoints.latest)
        tokenizer = resume.keep_tokenizer(config, source)
        with hosts.process_zero_first("tokenise"):
            batches, held_out = open_data(program, tokenizer)
        compile_started = time.perf_counter()
        arguments, options = (program.state, program.batch), program.compiler_options
        train_step = jax.jit(program.train_step, donate_argnums=0).lower(*arguments).compile(options)
        eval_step = jax.jit(program.eval_step).lower(*arguments).compile(options)
        compile_seconds = time.perf_counter() - compile_started
        state, loop = resume.start_state(program, source, checkpoints)
        adapters = AdapterExports(config)
        if loop is not None:
            batches.set_state(loop["data"])
            adapters.save(loop["step"], state.params)  # which the run may have ended before
        first = 0 if loop is None else loop["step"]
        report.print_startup(console, program, source, batches, held_out, train_step, compile_seconds, first, changes)

        def evaluate(state: State) -> float:
            return mean_loss(eval_step, state, (place_batch(program, batch) for batch in held_out))

        with metrics.Metrics(config, console, first_step=first) as log, Trace(config, first) as trace:
            if loop is None:
                log.evaluation(0, evaluate(state))
            for step in range(first + 1, config.steps + 1):
                trace.before_step(step)
                state, values = train_step(state, place_batch(program, next(batches)))
                log.step(step, values)
                if is_due(step, config.train.eval_every, config.steps):
                    log.flush()
                    log.evaluation(step, evaluate(state))
                if is_due(step, config.train.checkpoint_every, config.steps):
                    log.flush()  # which ends the run before weights that are not finite are saved
                    loop = {"step": step, "data": batches.get_state()}
                    checkpoints.save(step, state.params, state.optimizer, loop)
                    adapters.save(step, state.params)
    report.print_ending(console, config)
    return Result(
        folder=config.output,
        step=max(first, config.steps),
        losses=log.losses,
        eval_losses=log.eval_losses,
        program=program,
        state=state,
    )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and after the last, is done after this one."""
    return step % every == 0 or step == last


def place_batch(program: Program, batch: dict[str, np.ndarray]) -> Batch:
    """This process's rows as its part of the global arrays."""
    first = program.process_rows.start

    def array(like: jax.ShapeDtypeStruct, rows: np.ndarray) -> jax.Array:
        rows = balance_context(rows, program.mesh.shape["context"])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(like.shape[0])
            return rows[start - first : stop - first, index[1]]

        return jax.make_array_from_callback(like.shape, like.sharding, part)

    return {name: array(program.batch[name], rows) for name, rows in batch.items()}


def mean_loss(eval_step: Callable, state: State, batches) -> float:
    """Loss per target token (nats) over batches, which are all dispatched before the first is waited for."""
    sums = [eval_step(state, batch) for batch in batches]
    losses, targets = zip(*jax.device_get(sums), strict=True)
    return float(sum(losses) / max(sum(targets), 1))


def open_data(program: Program, tokenizer) -> tuple[pipeline.Batches, pipeline.EvalBatches]:
    config = program.config
    sizes: dict[str, Any] = dict(
        sequence_length=config.train.sequence_length,
        batch_size=config.train.global_batch_size,
        cache=config.output / "data",
        share_index=program.process_rows.start // len(program.process_rows),
        share_count=config.train.global_batch_size // len(program.process_rows),
    )
    batches = pipeline.train_batches(config.data, tokenizer, **sizes)
    return batches, pipeline.eval_batches(config.data, tokenizer, max_batches=config.train.eval_batches, **sizes)
