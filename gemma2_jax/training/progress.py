"""What a command shows on the console while it works: a progress bar, or lines where there is no terminal."""

import math
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

from gemma2_jax.command_line import notify

SHOWN_LETTERS = 80  # of a sample's prompt, and of what follows it; metrics.jsonl has them whole
PLAIN_LINE_SECONDS = 10  # between lines where there is no terminal to draw a bar on


class ConsoleLines:
    """Shows the lines of `metrics.jsonl` to a reader. `trackers` says what its methods mean."""

    def __init__(self, console: Console, *, start_step: int, steps: int):
        self._console, self._steps = console, steps
        self._last_line_time = -math.inf
        self._is_silent = False  # whether a line could not be printed
        self._bar = progress_bar(console, "step", hidden=not console.is_terminal)
        self._task = self._bar.add_task("train", total=steps, completed=start_step, text="")

    def open(self) -> None:
        self._bar.start()

    def log(self, line: Mapping[str, Any]) -> None:
        if "loss" in line:
            self._show_step(line)
        if "eval_loss" in line:
            self.print(f"step {line['step']}: {describe_evaluation(line)}")
        for sample in line.get("samples", ()):
            self.print(f"step {line['step']}: {_shorten(sample['prompt'])} -> {_shorten(sample['completion'])}")
        if "event" in line:
            self.print(f"step {line['step']}: {line['text']}")

    def close(self, failed: bool) -> None:
        self._bar.stop()

    def print(self, text: str) -> None:
        """Prints a line, which waits for the next where standard output cannot be written to, as its disk is full.

        Raises BrokenPipeError or SystemExit where nobody reads it any more.
        """
        try:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._is_silent:
                notify(f"warning: standard output cannot be written to ({error.strerror}); training goes on")
            self._is_silent = True

    def _show_step(self, line: Mapping[str, Any]) -> None:
        text = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in line:
            text += f"  {line['mfu']:.1%} MFU"
        self._bar.update(self._task, completed=line["step"], text=text)
        now = time.perf_counter()
        if self._bar.disable and (now - self._last_line_time > PLAIN_LINE_SECONDS or line["step"] == self._steps):
            self._last_line_time = now
            self.print(f"step {line['step']}/{self._steps}  {text}  {line['padding']:.1%} padding")


def describe_evaluation(line: Mapping[str, Any]) -> str:
    """The held-out loss and perplexity of a line, and those of each source."""
    loss, prefix = line["eval_loss"], "eval_loss/"
    parts = "".join(
        f", {name.removeprefix(prefix)} {x:.4f} ({perplexity(x):,.2f})"
        for name, x in line.items()
        if name.startswith(prefix)
    )
    return f"held-out loss {loss:.4f} (perplexity {perplexity(loss):,.2f}){parts}"


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats per token, or of 100 where it is larger, since JSON has only finite numbers."""
    return math.exp(min(loss, 100))


def _shorten(text: str) -> str:
    """A text as Python writes it, on one line, cut after SHOWN_LETTERS."""
    return repr(text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}...")


def print_block(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Prints subjects and what is said of each, aligned, and folded to the width of a terminal."""
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        folded = textwrap.wrap(text, max(console.width - width, 20)) if console.is_terminal else [text]
        console.print(Text.assemble((name.ljust(width), "bold"), f"\n{' ' * width}".join(folded)), soft_wrap=True)


def progress_bar(console: Console, counted: str, *, hidden: bool) -> Progress:
    """A bar that counts steps, texts, or such. Its tasks have a field `text`. In a narrow terminal it gets shorter."""
    text = TextColumn("{task.fields[text]}")
    columns = (
        TextColumn(counted),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        text,
    )
    return _Bar(*columns, _Elapsed(), _Remaining(), console=console, disable=hidden, expand=True, refresh_per_second=4)


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
