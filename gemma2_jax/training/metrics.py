"""What a run says while it trains: metrics.jsonl, lines or a progress bar, and how fast it is.

The loop hands over each step's metrics as arrays on the devices and goes on. They are read when a step is to be logged
and the step after it is under way, so that no device waits for the host; and before an evaluation or a save.
"""

import contextlib
import hashlib
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from gemma2_jax.config import Config
from gemma2_jax.config_text import to_text

PLAIN_LINE_SECONDS = 10  # between lines where there is no terminal to draw a bar on


class Throughput:
    """Tokens trained on per second, without padding, counting only the time in which steps were under way.

    The clock runs between `start` and `stop`. `measure` updates `tokens_per_second` and `padding`, which are those of
    the steps that ended since it was last called.
    """

    def __init__(self, positions: int):
        self._positions = positions  # of one step's batch, padding included
        self._tokens, self._steps = 0, 0
        self._seconds, self._started = 0.0, math.nan
        self.tokens_per_second, self.padding = 0.0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._started

    def add_step(self, tokens: int) -> None:
        """Counts a step that has ended, with this many tokens in its batch."""
        self._tokens, self._steps = self._tokens + tokens, self._steps + 1

    def measure(self) -> None:
        if not self._steps:
            return  # all that has ended was measured before, and the time since belongs to the steps to come
        self.stop()
        self.tokens_per_second = self._tokens / max(self._seconds, 1e-9)
        self.padding = 1 - self._tokens / (self._steps * self._positions)
        self._tokens, self._steps, self._seconds = 0, 0, 0.0
        self.start()


class Metrics:
    """Metrics of one run. Use as a context manager.

    `losses` and `eval_losses` hold what has been logged, by step, in nats per target token.
    """

    def __init__(
        self,
        config: Config,
        console: Console,
        *,
        start_step: int,
        eval_sources: Sequence[str] = (),  # names of the sources of held-out data
        count_epochs: Callable[[int], dict[str, float]] = lambda step: {},  # by source, where there are several
    ):
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self._config, self._console = config, console
        self._eval_sources, self._count_epochs = eval_sources, count_epochs
        self._wandb = open_wandb_run(config) if config.train.wandb and jax.process_index() == 0 else None
        self._file = (config.output / "metrics.jsonl").open("a", buffering=1) if jax.process_index() == 0 else None
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []  # steps whose metrics have not been read
        self._counted_step = start_step  # the last step whose tokens the throughput has counted
        self._throughput = Throughput(config.train.global_batch_size * config.train.sequence_length)
        self._last_line_time = -math.inf
        self._bar = progress_bar(console, hidden=not console.is_terminal or self._file is None)
        self._task = self._bar.add_task("train", total=config.steps, completed=start_step, text="")

    def __enter__(self) -> "Metrics":
        self._bar.start()
        self._throughput.start()
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
        """Takes the metrics of `step`, which was just dispatched, and logs the step before it if that is due."""
        if self._pending and self._is_logged(self._pending[-1][0]):
            self._pending.append((step, values))
            self._read(step - 1)
        else:
            self._pending.append((step, values))

    def flush(self) -> None:
        """Waits for every step, and logs the last if that is due. Raises FloatingPointError as `step` does."""
        if self._pending:
            self._read(self._pending[-1][0])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for every step before the block, whose time is left out of the speed of training."""
        self.flush()
        self._throughput.stop()
        yield
        self._throughput.start()

    def log_evaluation(self, step: int, losses: np.ndarray) -> None:
        """Logs a held-out loss (nats per target token): a scalar, or that of all sources and that of each."""
        loss, *source_losses = np.atleast_1d(losses).tolist()
        named = zip(self._eval_sources, source_losses, strict=False)  # none of a single source
        by_source = {name: value for name, value in named if math.isfinite(value)}
        self.eval_losses[step] = loss
        self._write({"step": step, "eval_loss": loss} | {f"eval_loss/{name}": x for name, x in by_source.items()})
        parts = "".join(f", {name} {value:.4f}" for name, value in by_source.items())
        self._print(f"step {step}: held-out loss {loss:.4f} (perplexity {math.exp(min(loss, 100)):,.2f}){parts}")

    def _is_logged(self, step: int) -> bool:
        return step % self._config.train.log_every == 0 or step == self._config.steps

    def _read(self, step: int) -> None:
        """Waits for the steps up to this one, checks them, and logs this one if that is due.

        Raises FloatingPointError naming the first whose loss or gradient is not finite.
        """
        count = sum(number <= step for number, _ in self._pending)
        ended, self._pending = self._pending[:count], self._pending[count:]
        read = jax.device_get([dict(values) for _, values in ended])
        for (number, _), values in zip(ended, read, strict=True):
            _check_finite(number, float(values["loss"]), float(values["grad_norm"]))
            self._count_tokens(number, int(values["tokens"]))
        for number, values in self._pending:
            if _is_ready(values["tokens"]):  # on some platforms dispatching a step takes as long as the step itself
                self._count_tokens(number, int(values["tokens"]))
        if self._is_logged(step):
            values = {name: float(value) for name, value in read[-1].items() if name != "tokens"}
            # A step may have no target tokens of a source.
            self._log(step, {name: x for name, x in values.items() if not (name.startswith("loss/") and math.isnan(x))})

    def _count_tokens(self, step: int, tokens: int) -> None:
        if step > self._counted_step:
            self._throughput.add_step(tokens)
            self._counted_step = step

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._throughput.measure()
        speed, padding = self._throughput.tokens_per_second, self._throughput.padding
        tflops = speed * self._config.training_flops / jax.device_count() / 1e12
        self.losses[step] = values["loss"]
        self._write(
            {"step": step, **values, "tokens_per_s": round(speed, 1), "padding": round(padding, 4)}
            | {"tflops_per_device": round(tflops, 4)}
            | {f"epochs/{name}": round(epochs, 4) for name, epochs in self._count_epochs(step).items()}
        )
        text = f"loss {values['loss']:.4f}  {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, text=text)
        now = time.perf_counter()
        if self._bar.disable and (now - self._last_line_time > PLAIN_LINE_SECONDS or step == self._config.steps):
            self._last_line_time = now
            self._print(f"step {step}/{self._config.steps}  {text}  {padding:.1%} padding")

    def _write(self, line: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log(line, step=line["step"])

    def _print(self, text: str) -> None:
        if self._file is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console, *, hidden: bool) -> Progress:
    """The progress bar of a run, whose tasks have a field `text`. In a narrow terminal the bar itself gets shorter."""
    text = TextColumn("{task.fields[text]}")
    columns = TextColumn("step"), MofNCompleteColumn(table_column=Column(no_wrap=True)), BarColumn(bar_width=None), text
    return _Bar(*columns, _Elapsed(), _Remaining(), console=console, disable=hidden, expand=True)


class _Bar(Progress):
    def get_renderable(self) -> "_Narrow":
        return _Narrow(super().get_renderable())


@dataclass(frozen=True)
class _Narrow:
    """A bar that leaves the line's last columns free, in which a terminal shows the ^C of Ctrl-C.

    After a full line, the ^C would begin a new line, and the bar would be drawn a second time there.
    """

    bar: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield from console.render(self.bar, options.update_width(max(options.max_width - len("^C"), 1)))


class _Elapsed(TimeElapsedColumn):
    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return super().render(task) + Text(" elapsed")


class _Remaining(TimeRemainingColumn):
    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return super().render(task) + Text(" left")


def _check_finite(step: int, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {step} has loss {loss} and gradient norm {grad_norm}; it was not saved. Start again in another "
            "--workdir with a lower optim.lr, a lower optim.clip_norm or more optim.warmup_steps"
        )


def _is_ready(x: Any) -> bool:
    """Whether this array can be read without waiting. (`jax.Array` does not declare `is_ready`, hence Any.)"""
    return x.is_ready()


def check_wandb(config: Config) -> None:
    """Raises ValueError if the config asks for metrics at wandb and wandb is not installed."""
    try:
        if config.train.wandb and jax.process_index() == 0:  # the only process that sends them there
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
    """Drops the lines of metrics.jsonl beyond `step`, since those steps are about to be taken again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept_lines = [line for line in lines if _line_step(line) <= step]
    if len(kept_lines) < len(lines):
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(f"{line}\n" for line in kept_lines))
        shorter.replace(path)


def _line_step(line: str) -> float:
    """The step of a line of metrics; infinite for one cut short when a process was killed."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
