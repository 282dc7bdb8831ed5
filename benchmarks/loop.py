"""What the loop of training costs beside its steps, on this CPU: metrics of every step, their files, the progress bar.

    python -m benchmarks.loop [--pairs 24] [--steps 4]

One compiled step of tiny_sft is run by a bare loop, which only gets batches and steps, and by the loop of
`gemma2_jax.training.loop`, which also measures, logs and shows each step, to TensorBoard too if tensorboardX is
installed. Evaluations and checkpoints are left out. The loops take turns on the same data, some steps each, and which
of the two begins changes from pair to pair, so that what else the machine does strikes both alike. The milliseconds
that the loop costs are the same beside a longer step; on a GPU they pass while it computes.
"""

import copy
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.options import make_parser

CLOCKS = {
    "CPU time, all threads": time.process_time,
    "CPU time, the loop's thread": time.thread_time,
    "wall time": time.perf_counter,
}


def main() -> None:
    parser = make_parser("loop", __doc__)
    parser.add_argument("--pairs", type=int, default=24, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from gemma2_jax.cluster import platforms

    platforms.prepare_process(cpu=True)
    has_tensorboard = importlib.util.find_spec("tensorboardX") is not None
    with tempfile.TemporaryDirectory() as workdir:
        seconds = measure(Path(workdir), options.pairs, options.steps, has_tensorboard)
    trackers = "metrics.jsonl, the bar" + (" and TensorBoard" if has_tensorboard else "; tensorboardX is not installed")
    title = f"ms a step, medians of {options.pairs} turns of {options.steps} steps; logged each step to {trackers}"
    table = Table(title=title, title_justify="left", width=118)
    for column in ("", "bare loop", "training's loop", "difference of a pair (quartiles)", "of the bare loop"):
        table.add_column(column, justify="right" if column else "left")
    for clock, times in zip(CLOCKS, np.moveaxis(seconds, -1, 0) * 1e3 / options.steps, strict=True):
        bare, full = np.median(times, axis=0)
        low, middle, high = np.percentile(times[:, 1] - times[:, 0], (25, 50, 75))
        table.add_row(
            clock, f"{bare:.2f}", f"{full:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{middle / bare:.1%}"
        )
    Console(width=120).print(table)


def measure(workdir: Path, pairs: int, steps: int, tensorboard: bool) -> np.ndarray:
    """Seconds of each turn of the bare loop and of training's, [pairs, 2, clocks]."""
    import jax

    from gemma2_jax import recipes
    from gemma2_jax.mesh import make_mesh
    from gemma2_jax.training import guard, loop, metrics, profiling, stopping
    from gemma2_jax.training.best import BestLoss
    from gemma2_jax.training.step import Program
    from gemma2_jax.training.tokenizer import load_run_tokenizer
    from gemma2_jax.training.watchdog import Watchdog

    recipe = recipes.load_recipe("tiny_sft")
    train = replace(recipe.train, log_every=1, eval_every=0, tensorboard=tensorboard)
    config = replace(recipe, init="", workdir=str(workdir), steps=(pairs + 1) * steps, train=train)
    config = replace(
        config, data=replace(config.data, tokenizer="assets/tiny-gemma2", train="tests/fixtures/sums.jsonl")
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = Program(config, mesh)
        batches, _ = loop.open_data(program, load_run_tokenizer(config, None, resumes=False))
        train_step = loop.compile_step(program, program.train_step, program.batch, donate_argnums=0)
        states = {name: program.initial_state(program.random_base()) for name in ("bare", "full")}
        unused: Any = SimpleNamespace(save=lambda *_: False, is_overdue=lambda step: False)
        watch = guard.Guard(config, program.describe_skip, lambda step: [])
        watchdog = Watchdog(config)
        run = loop.Run(program, batches, train_step, None, None, watch, watchdog, BestLoss(0), unused, unused)
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        log = metrics.Metrics(config, console, start_step=0, guard=watch, watchdog=watchdog)
        done = 0

        def run_bare() -> None:
            state = states["bare"]
            for _ in range(steps):
                state, _ = train_step(state, loop.place_batch(program, next(batches)))
            states["bare"] = jax.block_until_ready(state)

        def run_full() -> None:
            nonlocal done
            part = copy.copy(program)
            part.config = replace(
                config, steps=done + steps
            )  # the last step of a turn is followed by a save, of nothing
            states["full"], _ = loop.take_steps(replace(run, program=part), states["full"], done, log, trace, stop)
            done += steps

        with watchdog, log, profiling.Trace(config, 0, log, train_step) as trace, stopping.Stop(config, 0) as stop:
            seconds = []
            for pair in range(pairs + 1):  # the first is thrown away
                turns: list[Callable[[], None]] = [run_bare, run_full]
                times = {turn: time_turn(turn) for turn in (turns if pair % 2 else turns[::-1])}
                seconds.append([times[turn] for turn in turns])
    return np.array(seconds[1:])


def time_turn(turn: Callable[[], None]) -> list[float]:
    """What each clock says of a call."""
    starts = [clock() for clock in CLOCKS.values()]
    turn()
    return [clock() - start for clock, start in zip(CLOCKS.values(), starts, strict=True)]


if __name__ == "__main__":
    main()
