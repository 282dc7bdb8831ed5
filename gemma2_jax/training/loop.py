"""A run from its first step to its last: `train`, which reads like the list of what it does.

Everything that can be decided beforehand is decided before the loop, as values; the loop itself has no modes. It
waits for the devices only to log a step when the step after it is already under way, to evaluate, and to save.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config
from gemma2_jax.data.batches import Batches, EvalBatches, Layout, eval_batches, train_batches
from gemma2_jax.data.inspection import list_documents
from gemma2_jax.data.store import cache_folder
from gemma2_jax.mesh import balance_context, make_mesh
from gemma2_jax.training import environment, metrics, resume, startup, trackers
from gemma2_jax.training.best import BestLoss, export_step
from gemma2_jax.training.checkpoint import Checkpoints, make_policies
from gemma2_jax.training.export import AdapterExports
from gemma2_jax.training.fit import check_fit
from gemma2_jax.training.guard import Guard
from gemma2_jax.training.kept_program import keep_program
from gemma2_jax.training.lock import lock_workdir
from gemma2_jax.training.profiling import Trace
from gemma2_jax.training.samples import Sampler, encode_prompts
from gemma2_jax.training.step import Batch, Program, State, compile_step
from gemma2_jax.training.stopping import Stop
from gemma2_jax.training.tokenizer import (
    find_tokens,
    grow_vocabulary,
    keep_tokenizer,
    load_run_tokenizer,
    without_texts,
)
from gemma2_jax.training.uploads import Uploads
from gemma2_jax.training.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call of `train` leaves behind."""

    step: int  # the last step taken
    losses: dict[int, float]  # training loss (nats per target token) by logged step, of the steps of this call
    eval_losses: dict[int, float]  # held-out loss by step, likewise
    program: Program
    state: State  # after the last step, on the devices
    stopped: str = ""  # what the run was told to stop by before its last step: SIGTERM, Ctrl-C, train.stop_after...

    @property
    def folder(self) -> Path:
        """The run's working directory."""
        return self.program.config.output


def train(config: Config) -> Result:
    """Carries out the run, or resumes it if its working directory has checkpoints of the same config.

    Raises ValueError if the config cannot be carried out, FloatingPointError if the loss or its gradient stays
    other than finite, and OSError if the disk cannot be written to.
    """
    trackers.check_services(config)
    uploads, console = Uploads(config), Console()
    mesh = make_mesh(config.mesh)
    Program(without_texts(config), mesh)  # what does not fit is said before anything is read
    with hosts.process_zero_first("open_source"):  # which may download it
        source = resume.open_source(config)
    with (
        jax.set_mesh(mesh),
        lock_workdir(config.output),
        uploads,
        Checkpoints(
            config.output,
            config.train.keep_checkpoints,
            config.train.save_deadline,
            [*make_policies(config.train), uploads],
        ) as checkpoints,
    ):
        tokenizer = load_run_tokenizer(config, source, resumes=checkpoints.latest is not None)
        config = grow_vocabulary(find_tokens(config, source, tokenizer), source, tokenizer)
        program = Program(config, mesh)
        changes = resume.claim_workdir(config, checkpoints.latest)
        keep_tokenizer(config, source, tokenizer)
        adapters = AdapterExports(config, source)
        best = resume.restore_best(config, checkpoints)
        if checkpoints.latest is not None and (checkpoints.latest >= config.steps or best.is_out_of_patience):
            state, _ = resume.start_state(program, source, checkpoints)
            adapters.save(checkpoints.latest, state.params)  # the run may have ended before it was written
            adapters.finish()
            return report_finished(console, program, checkpoints, best, state)
        environment.record_start(config.output, checkpoints.latest or 0)
        with hosts.process_zero_first("tokenize"):
            batches, held_out_batches = open_data(program, tokenizer)
        shapes = [shape for store in batches.stores for shape in store.report.shapes]
        prompts = encode_prompts(config, source, tokenizer, shapes) if config.sample.tokens else None
        compile_started = time.perf_counter()
        train_step = compile_step(program, program.train_step, program.batch, donate_argnums=0)
        if config.profile.keep_program:
            keep_program(program, train_step)
        memory_limit = check_fit(program, train_step)  # before any of the state is made or read
        evaluate = compile_evaluation(program, held_out_batches) if held_out_batches else None
        sample = Sampler(program, prompts, tokenizer) if prompts else None
        compile_seconds = time.perf_counter() - compile_started
        state, position = resume.start_state(program, source, checkpoints)
        guard = Guard(
            config,
            program.describe_skip,
            lambda step: list_documents(batches.read_shares(step - 1), tokenizer, program.sources["train"]),
        )
        start_step = resume.restore_position(config, batches, guard, position)
        if start_step:
            adapters.save(start_step, state.params)  # the run may have ended before it was written
        startup.print_startup(
            console,
            startup.Startup(
                program=program,
                source=source,
                batches=batches,
                example=batches.describe_example(tokenizer),
                eval_batches=held_out_batches,
                prompts=prompts,
                train_step=train_step,
                memory_limit=memory_limit,
                compile_seconds=compile_seconds,
                start_step=start_step,
                changes=changes,
                checkpoint=checkpoints.opened,
                shortage=checkpoints.describe_shortage(program.params, program.state.optimizer),
            ),
        )
        watchdog = Watchdog(config)
        log = metrics.Metrics(
            config,
            console,
            start_step=start_step,
            guard=guard,
            watchdog=watchdog,
            eval_sources=program.sources["eval"],
            count_epochs=batches.count_epochs,
        )
        run = Run(program, batches, train_step, evaluate, sample, guard, watchdog, best, checkpoints, adapters)
        # Trackers are closed last, when no step is watched any more, as a slow service is waited for.
        with log, watchdog, Trace(config, start_step, log, train_step) as trace, Stop(config, start_step) as stop:
            state, step = take_steps(run, state, start_step, log, trace, stop)
        stopped = "" if step == config.steps or best.is_out_of_patience else stop.reason
        if stopped:
            uploads.end_early()
        else:
            adapters.finish()
        exported = None if stopped else export_best(config, checkpoints)
    if not stopped:
        startup.print_ending(console, config, step, trace.folder, exported)
    return Result(
        step=step,
        losses=log.losses,
        eval_losses=log.eval_losses,
        program=program,
        state=state,
        stopped=stopped,
    )


@dataclass(frozen=True)
class Run:
    """What the steps of a run use; all of it is made before the first step."""

    program: Program
    batches: Batches
    train_step: jax.stages.Compiled
    evaluate: Callable[[State], np.ndarray] | None
    sample: Sampler | None
    guard: Guard
    watchdog: Watchdog
    best: BestLoss
    checkpoints: Checkpoints
    adapters: AdapterExports


def take_steps(
    run: Run, state: State, start_step: int, log: metrics.Metrics, trace: Trace, stop: Stop
) -> tuple[State, int]:
    """Takes the steps after `start_step`, evaluates and saves when due; returns the last state and its step.

    The last step is that of the config, or an earlier one where the run is told to stop, which is then saved too.
    """
    config, step, saved_step = run.program.config, start_step, start_step
    is_last, is_unsaved = False, False
    if start_step == 0:
        evaluate(run, 0, state, log)
    while not is_last and not stop.ends_before(step + 1):
        step += 1
        trace.before_step(step)
        run.watchdog.begin("batch", step)
        with log.wait():
            batch = place_batch(run.program, next(run.batches))
        run.watchdog.begin("dispatch", step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, values = run.train_step(state, batch)
        log.step(step, values)
        trace.after_step(step)
        if is_due(step, config.train.eval_every, config.steps):
            evaluate(run, step, state, log)
        is_last = step == config.steps or run.best.is_out_of_patience
        is_unsaved |= is_last or step % config.train.checkpoint_every == 0 or run.checkpoints.is_overdue(step)
        if is_unsaved:
            with log.pause():
                if run.guard.row == 0 or is_last:  # else these weights may be why steps are skipped
                    if save(run, step, state):
                        log.log_checkpoint(step)
                        saved_step = step
                    is_unsaved = False
        if run.guard.is_exhausted:
            log.log_event(step, "stop", f"stopped, as {run.guard.row} step(s) in a row were skipped (guard.skip_limit)")
            raise FloatingPointError(run.guard.describe_end())
    if run.best.is_out_of_patience:
        with log.pause():
            log.log_event(step, "end", run.best.describe_end(step))
    if not is_last:
        with log.pause():
            log.log_event(step, "stop", f"stopped by {stop.reason}")
            if saved_step < step:
                save(run, step, state)
    return state, step


def evaluate(run: Run, step: int, state: State, log: metrics.Metrics) -> None:
    """Logs the held-out loss after a step, and samples, where the run has held-out data and prompts."""
    if run.evaluate:
        with log.pause():
            run.watchdog.begin("evaluation", step)
            losses = run.evaluate(state)
            log.log_evaluation(step, losses)
        run.best.add(step, float(np.ravel(losses)[0]))
    if run.sample:
        with log.pause():
            run.watchdog.begin("samples", step)
            log.log_samples(step, run.sample(state))


def save(run: Run, step: int, state: State) -> bool:
    """Starts writing the checkpoint of a step, to which all steps before it have ended; and writes its adapter.

    False where there is no room for it.
    """
    run.watchdog.begin("checkpoint", step)
    history = {name: float(x) for name, x in jax.device_get(state.history).items()}
    position = {"step": step, "data": run.batches.get_state(), "history": history, "guard": run.guard.get_state()}
    position["best"] = run.best.get_state()
    if not run.checkpoints.save(step, state.params, state.optimizer, position, run.best.find_loss(step)):
        return False
    run.adapters.save(step, state.params)
    return True


def export_best(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The best step as `train.export_best` asks for it; None where it asks for none, or no step has a held-out loss."""
    step = checkpoints.best if config.train.export_best else None
    return None if step is None else export_step(config, step)


def report_finished(
    console: Console, program: Program, checkpoints: Checkpoints, best: BestLoss, state: State
) -> Result:
    """Says that the run has already taken all its steps, and where its result is."""
    config, step = program.config, checkpoints.latest
    assert step is not None
    startup.print_nothing_to_do(console, config, step, best.describe_end(step) if best.is_out_of_patience else "")
    startup.print_ending(console, config, step, best=export_best(config, checkpoints))
    return Result(step=step, losses={}, eval_losses={}, program=program, state=state)


def compile_evaluation(program: Program, batches: EvalBatches) -> Callable[[State], np.ndarray]:
    """A function from a state to its `mean_loss` over all these batches."""
    eval_step = compile_step(program, program.eval_step, program.eval_batch)
    return lambda state: mean_loss(eval_step, state, (place_batch(program, batch) for batch in batches))


def is_due(step: int, every: int, last: int) -> bool:
    """True if `step` is a multiple of `every`, unless that is 0, or the last step."""
    return (every > 0 and step % every == 0) or step == last


def place_batch(program: Program, batch: dict[str, np.ndarray]) -> Batch:
    """This process's rows as its part of the global arrays."""
    first_row = program.process_rows.start
    shapes = program.batch | program.eval_batch

    def make_array(abstract: jax.ShapeDtypeStruct, rows: np.ndarray) -> jax.Array:
        if rows.ndim > 1:
            rows = balance_context(rows, program.mesh.shape["context"])

        def read_shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(abstract.shape[0])
            return rows[(slice(start - first_row, stop - first_row), *index[1:])]

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, read_shard)

    return {name: make_array(shapes[name], rows) for name, rows in batch.items()}


def mean_loss(eval_step: Callable, state: State, batches: Iterable[Batch]) -> np.ndarray:
    """Loss per target token (nats) over batches, which are all dispatched before the first is waited for.

    A scalar; of several sources, of all and of each, not a number where a source has no target tokens.
    """
    sums = [eval_step(state, batch) for batch in batches]
    losses, targets = zip(*jax.device_get(sums), strict=True)
    losses, targets = np.asarray(sum(losses)), np.asarray(sum(targets))
    return np.divide(losses, targets, out=np.full(losses.shape, np.nan), where=targets > 0)


def open_data(program: Program, tokenizer) -> tuple[Batches, EvalBatches | None]:
    """The batches to train on, and those to evaluate on, or None if the run does not evaluate."""
    config = program.config
    rows, batch_size = program.process_rows, config.train.global_batch_size
    layout = Layout(
        sequence_length=config.train.sequence_length,
        batch_size=batch_size,
        share_index=rows.start // len(rows),
        share_count=batch_size // len(rows),
    )
    cache = cache_folder(config.data)
    batches = train_batches(config.data, tokenizer, layout, cache=cache, steps=config.steps)
    if not (config.data.has_eval and config.train.eval_every):
        return batches, None
    evaluations = config.steps // config.train.eval_every + 1  # as Megatron-LM counts them
    held_out = eval_batches(
        config.data,
        tokenizer,
        layout,
        cache=cache,
        max_batches=config.train.eval_batches,
        evaluations=evaluations,
    )
    return batches, held_out
