"""What a run's folder says of it: its metrics by name, its events, its config, its environment. JAX is not needed.

A run may still be writing, so the last line of its metrics may be cut off. Steps that were taken again after a resume
count as they were taken last. Metrics are read line by line, and what is kept of them does not grow with the run.
"""

import itertools
import json
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax import config_text
from gemma2_jax.config import Config
from gemma2_jax.reporting.curves import Curve, Series

QUIET_SECONDS = 600  # after which a run that wrote nothing, and has not ended, is called silent
KEPT_EVENTS = 200  # the last
KEPT_SAMPLES = 10  # evaluations with samples: the first, and as many of the last
_BATCH_LINES = 4096  # that are in memory at one time

_ENDINGS = {"stop": "stopped", "end": "ended"}  # by event: the same command goes on, or there is nothing to do

Line = dict[str, Any]


@dataclass(kw_only=True)
class Metrics:
    """What is kept of the lines of metrics.jsonl."""

    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))  # by name, as they came
    events: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))  # with step, event and text
    event_count: int = 0  # with those that are not kept
    first_samples: list[Line] = field(default_factory=list)  # with step and samples: prompts with what was generated
    last_samples: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT_SAMPLES))  # after those
    step: int = 0  # the last that is known to have been taken
    written: float = 0.0  # when the last line was (Unix seconds)

    def add(self, lines: Sequence[Line]) -> None:
        """Takes lines that have been checked, some thousands at a time. Only finite numbers are in curves."""
        steps = np.array([line["step"] for line in lines], np.int64)
        values: Line = {}
        for line in lines:
            values.update(line)
            if "event" in line:
                self.events.append(line)
                self.event_count += 1
            if "samples" in line:
                kept = self.first_samples if len(self.first_samples) < KEPT_SAMPLES else self.last_samples
                kept.append(line)
        for name in values:
            if name not in ("step", "time"):
                self.curves[name].add(steps, _make_numbers([line.get(name) for line in lines]))
        self.step = max(self.step, int(steps.max(initial=0)))
        self.written = max(line.get("time", 0) for line in ({"time": self.written}, *lines))


def _make_numbers(values: list[Any]) -> np.ndarray:
    """The values as float64, where what is no number, or none that a float64 has, is not a number."""
    if not {*map(type, values)} <= {float, int, type(None)}:
        values = [x if isinstance(x, int | float) else None for x in values]
    try:
        return np.array(values, np.float64)
    except OverflowError:  # of an integer
        return np.array([x if x is not None and abs(x) <= sys.float_info.max else None for x in values], np.float64)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder describes it."""

    name: str
    folder: Path
    config: Config
    metrics: Metrics
    starts: list[dict[str, Any]]  # of environment.json, one for each time that it was started

    def series(self, name: str) -> Series:
        """A metric by its name in metrics.jsonl, where it is a number; empty where it was never logged."""
        return self._find(name).series

    def means(self, name: str) -> Series:
        """A metric, likewise, as means where it has so many steps that some of them share a bucket."""
        return self._find(name).means

    def sum(self, name: str) -> float:
        """A metric added up over all steps."""
        return self._find(name).sum

    def list_names(self, prefix: str) -> dict[str, str]:
        """The metrics whose names begin with this and a slash, such as losses by source, by the rest of their names."""
        return {n.removeprefix(f"{prefix}/"): n for n in self.metrics.curves if n.startswith(f"{prefix}/")}

    def _find(self, name: str) -> Curve:
        return self.metrics.curves.get(name, Curve())

    @property
    def step(self) -> int:
        """The last step that is known to have been taken."""
        return self.metrics.step

    @property
    def samples(self) -> list[Line]:
        """Lines with step and samples: of the first evaluations and of the last."""
        return [*self.metrics.first_samples, *self.metrics.last_samples]

    @property
    def bucket_width(self) -> int:
        """Of how many steps a curve of this run keeps the lowest and the highest value, at most; 1: it has them all."""
        return max((curve.width for curve in self.metrics.curves.values()), default=1)

    @property
    def ending(self) -> str:
        """The event that ended the run before its last step, "stop" or "end"; empty if none did."""
        last = self.metrics.events[-1] if self.metrics.events else {"step": 0, "event": ""}
        return last["event"] if last["event"] in _ENDINGS and last["step"] == self.step else ""

    @property
    def status(self) -> str:
        """Whether the run has ended, goes on or is silent, in words."""
        steps = self.config.steps
        if self.step >= steps and self.ending != "stop":
            return f"finished, {steps:,} steps"
        progress = f"step {self.step:,} of {steps:,}"
        if self.ending:
            return f"{progress}, {_ENDINGS[self.ending]}"
        if not self.metrics.written:  # as in a copy by train.upload, which has no metrics
            return progress if self.metrics.curves else f"{steps:,} steps, no metrics"
        silent = time.time() - self.metrics.written
        if silent < QUIET_SECONDS:
            return f"{progress}, under way"
        return f"{progress}, has written nothing for {describe_seconds(silent)}"


def describe_seconds(seconds: float) -> str:
    """A span of time with its two largest units: 3 d 4 h, 2 h 5 min, 3 min 20 s, 12.3 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts, rest = [], round(seconds)
    for name, size in units:
        if rest >= size or parts:
            parts.append(f"{rest // size} {name}")
            rest %= size
    return " ".join(parts[:2])


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises ValueError naming what is missing or damaged."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the working directory of a run")
    if not (folder / "config.txt").exists():
        raise ValueError(f"{folder} is not a run's working directory, as it has no config.txt")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config_text.from_file(folder / "config.txt"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        starts=_read_starts(folder / "environment.json"),
    )


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that tell them apart: their folders' own, or whole paths where two are called alike."""
    counts = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder)) if counts[run.name] > 1 else run for run in runs]


def read_metrics(path: Path) -> Metrics:
    """What is kept of metrics.jsonl; nothing where there is no such file yet.

    Raises ValueError for a line that is not one of them, but for the last, which may be cut off.
    """
    metrics = Metrics()
    if not path.exists():
        return metrics
    if not path.is_file():
        raise ValueError(f"{path} is not a file, which the metrics of a run are; move it away")
    for lines in itertools.batched(_read_lines(path), _BATCH_LINES):
        metrics.add(lines)
    return metrics


def _read_lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text.decode(errors="replace"))
                _check_line(line)
            except (ValueError, RecursionError) as error:
                if text.endswith(b"\n"):
                    raise ValueError(f"{path}:{number} is not a line of metrics ({error}); remove it") from error
                return
            yield line


def _check_line(line: Any) -> None:
    """Raises ValueError unless this is a line of metrics as far as the page uses it."""
    if not isinstance(line, dict) or not isinstance(step := line.get("step"), int) or not 0 <= step < 2**31:
        raise ValueError("it is no object with a step")
    if not _is_number(line.get("time", 0)):
        raise ValueError("its time is no number")
    if "event" in line and not (isinstance(line["event"], str) and isinstance(line.get("text"), str)):
        raise ValueError("its event has no text")
    if "samples" in line and not _are_samples(line["samples"]):
        raise ValueError("its samples are no prompts with completions")


def _are_samples(samples: Any) -> bool:
    return isinstance(samples, list) and all(
        isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in ("prompt", "completion"))
        for sample in samples
    )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) <= sys.float_info.max


def _read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a run; none where it was of a version that did not keep them, or the file is another."""
    try:
        starts = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    if not isinstance(starts, list):
        return []
    return [start for start in starts if isinstance(start, dict) and {"time", "step"} <= start.keys()]
