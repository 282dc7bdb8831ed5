"""What a run says: the start-up block, metrics.jsonl, the progress bar, and the step clock.

The loop hands over a step's device arrays and goes on; they are read when the next step has been dispatched, so
that the device is never waited for with nothing to do.
"""

import hashlib
import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gemma2_jax.config import Config, to_text

PLAIN_LINE_SECONDS = 10  # between lines where there is no terminal to draw a bar on


class Metrics:
    """Metrics of one run. Use as a context manager.

    `losses` and `eval_losses` hold what has been logged, by step, in nats per target token.
    """

    def __init__(self, config: Config, console: Console, *, first_step: int):
        self._config, self._console = config, console
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self._wandb = open_wandb_run(config) if config.train.wandb and jax.process_index() == 0 else None
        self._file = (config.output / "metrics.jsonl").open("a", buffering=1) if jax.process_index() == 0 else None
        self._pending: tuple[int, Mapping[str, jax.Array], int] | None = None
        self._tokens = config.train.global_batch_size * config.train.sequence_length
        self._clock, self._clock_step = time.perf_counter(), first_step
        self._last_line, self._eval_text = 0.0, ""
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal or self._file is None)
        self._task = self._bar.add_task("train", total=config.steps, completed=first_step, text="")

    def __enter__(self) -> "Metrics":
        self._bar.start()
        return self

    def __exit__(self, failed, *_) -> None:
        if failed is None:
            self.flush()
        self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if failed is None else 1)

    def step(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of `step` (steps taken) and logs those of the step before it."""
        self.flush()
        self._pending = step, values, self._tokens

    def flush(self) -> None:
        """Logs what is pending, waiting for it. Raises FloatingPointError where loss or gradient is not finite."""
        if self._pending is None:
            return
        (step, values, tokens), self._pending = self._pending, None
        read = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        now = time.perf_counter()
        speed = tokens * (step - self._clock_step) / max(now - self._clock, 1e-9)
        if not (math.isfinite(read["loss"]) and math.isfinite(read["grad_norm"])):
            raise FloatingPointError(
                f"step {step} has loss {read['loss']} and gradient norm {read['grad_norm']}; it was not saved. "
                "Start again in another --workdir with a lower optim.lr, a lower optim.clip_norm or more "
                "optim.warmup_steps"
            )
        if step % self._config.train.log_every and step != self._config.steps:
            return
        self._clock, self._clock_step = now, step
        self.losses[step] = read["loss"]
        tflops = speed * self._config.training_flops / jax.device_count() / 1e12
        self._write({"step": step, **read, "tokens_per_s": round(speed, 1), "tflops_per_device": round(tflops, 4)})
        text = f"loss {read['loss']:.4f}  {speed:,.0f} tokens/s{self._eval_text}"
        self._bar.update(self._task, completed=step, text=text)
        if self._bar.disable and (now - self._last_line > PLAIN_LINE_SECONDS or step == self._config.steps):
            self._last_line = now
            self._print(f"step {step}/{self._config.steps}  {text}")

    def evaluation(self, step: int, loss: float) -> None:
        """Logs a held-out loss (nats per target token), whose time is left out of the speed of training."""
        self._clock = time.perf_counter()
        self.eval_losses[step] = loss
        self._write({"step": step, "eval_loss": loss})
        self._eval_text = f"  held-out {loss:.4f}"
        self._print(f"step {step}: held-out loss {loss:.4f} (perplexity {math.exp(min(loss, 100)):,.2f})")

    def _write(self, line: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log(line, step=line["step"])

    def _print(self, text: str) -> None:
        if self._file is not None:
            self._console.print(text, highlight=False)


def check_wandb(config: Config) -> None:
    """Raises ValueError where metrics are to go to what is not installed."""
    try:
        if config.train.wandb and jax.process_index() == 0:  # which alone has a page there
            importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"train.wandb is {config.train.wandb!r}, but wandb is not installed: pip install 'gemma2-jax[wandb]', or "
            "leave train.wandb empty"
        ) from error


def open_wandb_run(config: Config):
    """The run's page at Weights & Biases, the same one when it resumes."""
    wandb = importlib.import_module("wandb")
    lines = dict(line.split(" = ", 1) for line in to_text(config).splitlines())
    page = hashlib.blake2b(str(config.output.absolute()).encode(), digest_size=8).hexdigest()
    return wandb.init(
        project=config.train.wandb, name=config.output.name, id=page, resume="allow", dir=config.output, config=lines
    )


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl beyond `step`: those of steps that are about to be taken again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _line_step(line) <= step]
    if len(kept) < len(lines):
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(f"{line}\n" for line in kept))
        beside.replace(path)


def _line_step(line: str) -> float:
    """The step of a line of metrics; infinite for one cut short when a process was killed."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
