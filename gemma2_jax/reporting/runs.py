"""What a run's folder says of it: its metrics by name, its events, its config, its environment. JAX is not needed.

A run may still be writing, so the last line of its metrics may be cut off. Steps that were taken again after a resume
count as they were taken last.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma2_jax import config_text
from gemma2_jax.config import Config

QUIET_SECONDS = 600  # after which a run that wrote nothing, and has not ended, is called silent

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over steps."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float:
        """The value of the last step."""
        return self.values[-1]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder describes it."""

    name: str
    folder: Path
    config: Config
    lines: list[Line]  # of metrics.jsonl, in order
    starts: list[dict[str, Any]]  # of environment.json, one for each time that it was started

    def series(self, name: str) -> Series:
        """A metric by its name in metrics.jsonl, where it is a number; empty where it was never logged."""
        found = {line["step"]: line[name] for line in self.lines if name in line and _is_number(line[name])}
        steps = sorted(found)
        return Series(steps=steps, values=[float(found[step]) for step in steps])

    def group(self, prefix: str) -> dict[str, Series]:
        """The metrics whose names begin with this and a slash, such as losses by source, by the rest of their names."""
        names = [name for name in self._names if name.startswith(f"{prefix}/")]
        return {name.removeprefix(f"{prefix}/"): self.series(name) for name in names}

    @cached_property
    def _names(self) -> dict[str, None]:
        """All names in metrics.jsonl, in order."""
        return dict.fromkeys(name for line in self.lines for name in line)

    @cached_property
    def events(self) -> list[Line]:
        """What happened: lines with step, event and text."""
        return [line for line in self.lines if "event" in line]

    @cached_property
    def samples(self) -> list[Line]:
        """Lines with step and samples, a list of prompts with what was generated."""
        return [line for line in self.lines if "samples" in line]

    @property
    def step(self) -> int:
        """The last step that is known to have been taken."""
        return max((line["step"] for line in self.lines), default=0)

    def sum(self, name: str) -> float:
        """A metric added up over all lines."""
        return sum(self.series(name).values)

    @property
    def status(self) -> str:
        """Whether the run has ended, goes on or is silent, in words."""
        steps = self.config.steps
        if self.step >= steps:
            return f"finished, {steps:,} steps"
        written = max((line.get("time", 0) for line in self.lines), default=0)
        silent = time.time() - written
        progress = f"step {self.step:,} of {steps:,}"
        if self.events and self.events[-1]["event"] == "stop" and self.events[-1]["step"] == self.step:
            return f"{progress}, stopped"
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
    lines = read_metrics(folder / "metrics.jsonl")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config_text.from_file(folder / "config.txt"),
        lines=lines,
        starts=_read_starts(folder / "environment.json"),
    )


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that tell them apart: their folders' own, or whole paths where two are called alike."""
    counts = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder)) if counts[run.name] > 1 else run for run in runs]


def read_metrics(path: Path) -> list[Line]:
    """The lines of metrics.jsonl; none where there is no such file yet.

    Raises ValueError for a line that is not one of them, but for the last, which may be cut off.
    """
    try:
        texts = path.read_bytes().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    lines, last = [], len(texts) - 1
    for number, text in enumerate(texts):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            _check_line(line)
            lines.append(line)
        except (ValueError, RecursionError) as error:
            if number < last:
                raise ValueError(f"{path}:{number + 1} is not a line of metrics ({error}); remove it") from error
    return lines


def _check_line(line: Any) -> None:
    """Raises ValueError unless this is a line of metrics as far as the page uses it."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError("it is no object with a step")
    if not _is_number(line.get("time", 0)):
        raise ValueError("its time is no number")
    if "event" in line and not (isinstance(line["event"], str) and isinstance(line.get("text"), str)):
        raise ValueError("its event has no text")
    samples = line.get("samples", [])
    if not isinstance(samples, list) or not all(
        isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in ("prompt", "completion"))
        for sample in samples
    ):
        raise ValueError("its samples are no prompts with completions")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a run; none where it was of a version that did not keep them, or the file is another."""
    try:
        starts = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    if not isinstance(starts, list):
        return []
    return [start for start in starts if isinstance(start, dict) and {"time", "step"} <= start.keys()]
