"""Where the lines of `metrics.jsonl` go: that file, the console, and TensorBoard, W&B and MLflow where they are asked.

A tracker has three methods. `open` begins, and goes on with the same page where the run resumes. `log` takes a line: a
dict with "step", and numbers, texts or lists of texts by name. `close` ends, and is told whether the run failed. Only
process 0 has trackers.
"""

import contextlib
import html
import importlib
import json
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console

from gemma2_jax import config_text
from gemma2_jax.command_line import notify
from gemma2_jax.config import Config
from gemma2_jax.training.environment import hide_secrets
from gemma2_jax.training.progress import ConsoleLines

QUEUED_LINES = 10_000  # that may wait for a service
RETRY_SECONDS = 60.0  # after the first failure of a service, before it is tried again
CLOSING_SECONDS = 30.0  # that the end of a run waits for a service

type Line = Mapping[str, Any]


class Tracker(Protocol):
    """What the module's docstring says."""

    def open(self) -> None: ...

    def log(self, line: Line) -> None: ...

    def close(self, failed: bool) -> None: ...


def open_trackers(config: Config, console: Console, start_step: int) -> list[Tracker]:
    """The trackers of a run that has taken `start_step` steps, opened; none but in process 0."""
    if jax.process_index() != 0:
        return []
    shown = ConsoleLines(console, start_step=start_step, steps=config.steps)
    trackers: list[Tracker] = [MetricsFile(config.output / "metrics.jsonl"), shown]
    for service in SERVICES:
        if service.asked(config):
            trackers.append(Background(service.name, service.tracker(config, start_step), shown.print))
    for tracker in trackers:
        tracker.open()
    return trackers


def check_services(config: Config) -> None:
    """Raises ValueError if the config asks for a tracker whose package is not installed, or that needs a login."""
    if jax.process_index() != 0:
        return
    for service in SERVICES:
        if not service.asked(config):
            continue
        asked = f"train.{service.field} is {service.asked(config)!r}"
        leave = f"or leave train.{service.field} {service.off}"
        try:
            package = importlib.import_module(service.package)
        except ImportError as error:
            install = f"pip install 'gemma2-jax[{service.field}]'"
            raise ValueError(f"{asked}, but {service.package} is not installed: {install}, {leave}") from error
        if service.field == "wandb":
            try:
                package.login(verify=False)  # asks for a key where there is a terminal
            except package.errors.UsageError as error:
                remedy = "run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline to keep the page in the workdir"
                raise ValueError(f"{asked}, but W&B has no key of yours; {remedy}, {leave}") from error


class MetricsFile:
    """The file itself, which is what a run keeps; each line is in it before anything else is told.

    Where it cannot be written to, as its disk is full, that is said, and lines wait in memory until it can.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting = bytearray()  # lines, of which the first may be in the file in part
        self._reason = ""  # why they wait

    def open(self) -> None:
        self._file = self._path.open("ab", buffering=0)

    def log(self, line: Line) -> None:
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            reason = error.strerror or str(error)
            if not self._reason:
                notify(f"warning: {self._path} cannot be written to ({reason}); training goes on, and lines wait")
            self._reason = reason
        else:
            if self._reason:
                notify(f"{self._path} has the lines that waited")
            self._reason = ""

    def close(self, failed: bool) -> None:
        if self._waiting:
            count = self._waiting.count(b"\n")
            notify(f"warning: {self._path} lacks the last {count} line(s) of this run ({self._reason})")
        self._file.close()


class Background:
    """A tracker in a thread of its own, for which training never waits, and whose failures do not end it.

    It is opened until that succeeds. A line that fails is left out. After each failure the thread waits, each time
    RETRY_SECONDS longer, up to an hour; lines wait in a queue meanwhile. The first failure is said, and at the end how
    many lines were left out.
    """

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]):
        self._name, self._tracker, self._say = name, tracker, say
        self._lines: queue.Queue[Line | bool] = queue.Queue(QUEUED_LINES)  # whether the run failed comes last
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._closing = threading.Event()
        self._failures = 0
        self._given, self._taken = 0, 0  # lines

    def open(self) -> None:
        self._thread.start()

    def log(self, line: Line) -> None:
        self._given += 1
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self, failed: bool) -> None:
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._lines.put(failed, timeout=CLOSING_SECONDS)
        self._thread.join(CLOSING_SECONDS)
        if missing := self._given - self._taken:
            self._say(f"{self._name} lacks {missing} line(s), which metrics.jsonl has")
        elif self._thread.is_alive():
            self._say(f"{self._name} was not done in {CLOSING_SECONDS:g} s; it may lack the last lines")

    def _serve(self) -> None:
        while not self._attempt(self._tracker.open):
            if self._closing.is_set():
                return
        while not isinstance(line := self._lines.get(), bool):
            self._taken += self._attempt(self._tracker.log, line)
        self._attempt(self._tracker.close, line)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> bool:
        """Whether it succeeds. After a failure it returns when it is time to go on."""
        try:
            action(*arguments)
        except Exception as error:  # whatever a client may raise
            self._failures += 1
            if self._failures == 1:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self._say(f"warning: {self._name} failed ({reason}); training goes on, and it is tried again")
            self._closing.wait(min(self._failures * RETRY_SECONDS, 3600))
            return False
        return True


class TensorBoard:
    """Event files in WORKDIR/tensorboard. Those of steps that are taken again are purged when they are read."""

    def __init__(self, config: Config, start_step: int):
        self._config, self._start_step = config, start_step

    def open(self) -> None:
        tensorboard = importlib.import_module("tensorboardX")
        self._writer = tensorboard.SummaryWriter(
            str(self._config.output / "tensorboard"), purge_step=self._start_step + 1, flush_secs=10
        )
        if self._start_step == 0:
            text = "".join(f"    {line}\n" for line in _describe_config(self._config))  # as Markdown has code
            self._writer.add_text("config", text, 0)

    def log(self, line: Line) -> None:
        step, time = line["step"], line.get("time")
        for name, number in list_numbers(line).items():
            self._writer.add_scalar(name, number, step, time)
        for name, text in list_texts(line).items():
            self._writer.add_text(name, text, step, time)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A page at Weights & Biases. Of steps that are taken again it keeps what it had, since its steps only go up."""

    def __init__(self, config: Config, start_step: int):
        self._config, self._start_step = config, start_step

    def open(self) -> None:
        self._wandb = importlib.import_module("wandb")
        page = PageId(self._config, "wandb", self._start_step)
        self._run = self._wandb.init(
            project=self._config.train.wandb,
            name=self._config.output.name,
            id=page.read() or page.keep(uuid.uuid4().hex[:12]),
            resume="allow",
            dir=self._config.output,
            config=dict(line.split(" = ", 1) for line in _describe_config(self._config)),
        )
        self._next_step = self._run.step

    def log(self, line: Line) -> None:
        if line["step"] < self._next_step:
            return
        texts = {name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in list_texts(line).items()}
        self._run.log(list_numbers(line) | texts, step=line["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of an MLflow experiment, on the server or in the folder that MLFLOW_TRACKING_URI names."""

    def __init__(self, config: Config, start_step: int):
        self._config, self._start_step = config, start_step

    def open(self) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(self._config.train.mlflow)
        page = PageId(self._config, "mlflow", self._start_step)
        known = page.read()
        run = self._mlflow.start_run(run_id=known or None, run_name=None if known else self._config.output.name)
        if not known:
            page.keep(run.info.run_id)
            lines = _describe_config(self._config)
            self._mlflow.log_params(dict(line.split(" = ", 1) for line in lines))

    def log(self, line: Line) -> None:
        numbers = {_allowed_name(name): number for name, number in list_numbers(line).items()}
        self._mlflow.log_metrics(numbers, step=line["step"])
        for name, text in list_texts(line).items():
            self._mlflow.log_text(text, f"{_allowed_name(name)}/step-{line['step']}.txt")

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _allowed_name(name: str) -> str:
    """A name with what MLflow does not allow in it replaced."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


@dataclass(frozen=True)
class Service:
    """A tracker that is asked for by a field of `train`, and needs a package."""

    name: str
    field: str  # of `train`, and the extra that installs the package
    package: str
    off: str  # how one leaves it out
    tracker: Callable[[Config, int], Tracker]

    def asked(self, config: Config) -> Any:
        """The field's value, which is false where the tracker is not asked for."""
        return getattr(config.train, self.field)


SERVICES = (
    Service("TensorBoard", "tensorboard", "tensorboardX", "False", TensorBoard),
    Service("W&B", "wandb", "wandb", "empty", Wandb),
    Service("MLflow", "mlflow", "mlflow", "empty", MLflow),
)


class PageId:
    """The identifier of a run's page at a service, kept in WORKDIR/trackers, so that a resumed run goes on with it.

    A run that starts from its first step gets a new page.
    """

    def __init__(self, config: Config, service: str, start_step: int):
        self._path, self._is_new = config.output / "trackers" / f"{service}.txt", start_step == 0

    def read(self) -> str:
        """The identifier, empty where there is none."""
        return "" if self._is_new or not self._path.exists() else self._path.read_text().strip()

    def keep(self, identifier: str) -> str:
        """Writes the identifier, and returns it."""
        self._path.parent.mkdir(exist_ok=True)
        complete = self._path.with_suffix(".tmp")
        complete.write_text(f"{identifier}\n")
        complete.replace(self._path)
        return identifier


def list_numbers(line: Line) -> dict[str, float]:
    """The metrics of a line: its numbers but for step and time."""
    return {name: x for name, x in line.items() if isinstance(x, int | float) and name not in ("step", "time")}


def list_texts(line: Line) -> dict[str, str]:
    """The texts of a line: an event by its name, and a list of dicts as a paragraph for each."""
    texts = {line["event"]: line["text"]} if "event" in line else {}
    for name, entries in line.items():
        if isinstance(entries, Sequence) and not isinstance(entries, str):
            texts[name] = "\n\n".join("\n".join(f"{key}: {text}" for key, text in entry.items()) for entry in entries)
    return texts


def _describe_config(config: Config) -> list[str]:
    """The config's lines, without what gives access to something."""
    return hide_secrets(config_text.to_text(config)).splitlines()


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl beyond `step`, since those steps are about to be taken again."""
    if not path.exists():
        return
    with path.open("rb") as file:
        # The last line may lack its end, which the next line would be written after.
        if all(_line_step(line) <= step and line.endswith(b"\n") for line in file):
            return
        file.seek(0)
        shorter = path.with_suffix(".tmp")
        with shorter.open("wb") as kept:
            kept.writelines(line.rstrip(b"\n") + b"\n" for line in file if _line_step(line) <= step)
        shorter.replace(path)


def _line_step(line: bytes) -> float:
    """The step of a line of metrics; infinite for one cut short when a process was killed, or damaged since."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None
    return step if isinstance(step, int | float) else float("inf")
