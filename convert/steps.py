"""The steps of a run, each a folder checkpoints/STEP that training writes: which there are, and whether they are whole.

A step's checksums are written after the step itself, so a run that was killed between the two leaves a step without;
so did versions of gemma2_jax that wrote none. Such a step is read from end to end instead, by which a file that is
missing or cut short is found, but not every bit that has flipped.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_jax import config_text
from gemma2_jax.config import Config
from gemma2_jax.convert.files import checksums, orbax
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.sources import OrbaxSource

_STEP_NAME = re.compile(r"0|[1-9]\d{0,9}")  # steps are counted in int32
ITEMS = ("params", "optimizer")  # of arrays; beside them is loop, which is JSON

# What training keeps as loop beside the step, to be read by `_matches`. Version 0.1 kept the data alone.
_NUMBER = (float, int)
_ROWS = {"rows": int, "length": int, "tokens": int}
_POSITION = {
    "data": {
        "batches": ({"next_index": int}, {"rows": int, "digest": str}),
        "of": (
            {"batch_size": int, **_ROWS},
            {"batch_size": int, "sources": [_ROWS], "weights": [str]},
            {"batch_size": int, "length": int, "order": str},
            {"batch_size": int, "length": int, "stream": str},
        ),
    },
    "history": dict.fromkeys(("count", "mean", "variance"), _NUMBER),
    "guard": {"skipped": int, "row": int, "losses": [int, _NUMBER, _NUMBER]},
    "best": {"step": int, "loss": (_NUMBER, type(None)), "passed": int},
}


def list_steps(folder: Path) -> list[int]:
    """The steps in a run's folder of checkpoints, in order. Those that are set aside have other names.

    Raises ValueError where something else has the name of a step, as Orbax would take it for one.
    """
    found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    for path in found:
        if not _STEP_NAME.fullmatch(path.name) or not path.is_dir():
            raise ValueError(f"{path} is no step of a run, and has the name of one; move it away")
    return sorted(int(path.name) for path in found)


def has_checksums(step: Path) -> bool:
    """Whether damage of a step's folder can be found for certain."""
    return (step / checksums.CHECKSUMS).exists()


def find_damage(
    step: Path, index: int = 0, count: int = 1, progress: Callable[[float], None] = lambda count: None
) -> str:
    """What is wrong with a step's folder, as words that follow its name and a colon; empty if it is whole.

    Of `count` processes that share the work, this one is `index`, and finds what is wrong with its share of the files.
    `progress` is called with the bytes of each that is done.
    """
    try:
        sums = checksums.read_checksums(step)
    except ValueError as error:
        return str(error)
    if sums is None:
        return _find_unreadable(step) if index == 0 else ""
    by_size = sorted(sums, key=lambda name: sums[name], reverse=True)
    return checksums.find_damage(step, {name: sums[name] for name in by_size[index::count]}, progress)


@dataclass(frozen=True, kw_only=True)
class StepCheck:
    """What was found in a step's folder."""

    name: str  # of the folder: the step, or STEP.damaged, which training has set aside
    files: int
    size: int  # bytes
    verified: bool  # by checksums; else only by reading all of it
    problem: str  # empty if there is none

    @property
    def in_use(self) -> bool:
        """Whether training would go on from it, and other commands would read it."""
        return self.name.isdecimal()


def list_folders(path: Path) -> list[Path]:
    """The steps of a run and those that are set aside, in order; of a step itself, that step.

    Raises ValueError where the path is neither a run nor a step of one, and where the run has none.
    """
    if path.absolute().parent.name == "checkpoints" and (path.absolute().parents[1] / "config.txt").is_file():
        if not path.is_dir():
            there = ", ".join(map(str, list_steps(path.absolute().parent))) or "none"
            raise ValueError(f"there is no step {path.name} in {path.parent}; the steps there: {there}")
        return [path]
    if not path.exists():
        raise ValueError(f"there is no {path}; give the folder of a run, or of a step of one")
    if not (path / "config.txt").is_file() or not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} is neither a run, which has config.txt and checkpoints, nor a step of one; to compare it with "
            f"another checkpoint, give that too: verify {path} B"
        )
    named = [(re.fullmatch(r"(\d+)(\.damaged.*)?", step.name), step) for step in (path / "checkpoints").iterdir()]
    folders = [step for found, step in sorted((int(found[1]), step) for found, step in named if found)]
    if not folders:
        raise ValueError(f"{path / 'checkpoints'} has no steps, as that run has saved none")
    return folders


def check_steps(folders: list[Path], progress: Callable[[float], None] = lambda count: None) -> Iterator[StepCheck]:
    """Checks each step's files by their checksums, and its arrays by the run's config.

    Raises ValueError where the config is damaged.
    """
    for step in folders:
        config = config_text.from_file(step.absolute().parents[1] / "config.txt")
        sizes = [path.stat().st_size for path in step.rglob("*") if path.is_file()]
        yield StepCheck(
            name=step.absolute().name,
            files=len(sizes),
            size=sum(sizes),
            verified=has_checksums(step),
            problem=find_damage(step, progress=progress) or _find_mismatch(step, config),
        )


def _find_mismatch(step: Path, config: Config) -> str:
    """What arrays are not those of the run's config; empty if all are."""
    rows = table.MODEL
    if config.adapter.kind != "none":
        rows = table.table_rows(config.adapter, config.model.layers)
    try:
        OrbaxSource.open(step / "params", rows, config.model, of_run=True)
    except (ValueError, OSError) as error:
        return orbax.error_summary(error)
    params, optimizer = (orbax.Reader(step / item).shapes for item in ITEMS)
    for path, kept in optimizer.items():
        owner = next((name for name in params if path.endswith(f"/{name}")), None)
        if owner and kept.shape != params[owner].shape:
            return f"optimizer has {path} of {kept.shape}, and params has {owner} of {params[owner].shape}"
    return ""


def _find_unreadable(step: Path) -> str:
    """What cannot be read of a step's folder that has no checksums; empty if nothing."""
    missing = [name for name in (*ITEMS, "loop") if not (step / name).is_dir()]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    try:
        loop, number = json.loads((step / "loop" / "metadata").read_text()), step.name.partition(".")[0]
        if not isinstance(loop, dict) or type(loop.get("step")) is not int or str(loop["step"]) != number:
            return "its loop/metadata is not of this step"
        if strange := _find_strange(loop):
            return f"the {strange} of its loop/metadata is not what training writes"
        for item in ITEMS:
            reader = orbax.Reader(step / item)
            for path in reader.shapes:
                _read_array(reader, path)
    except (ValueError, OSError, RecursionError) as error:
        reason = orbax.error_summary(error).partition(" [")[0].rstrip(".")  # TensorStore adds its JSON
        return reason.removeprefix(f"{step}/").removesuffix("; copy it again")
    return ""


def _find_strange(loop: dict[str, Any]) -> str:
    """The name of the first part of a step's position that is not as training writes it; empty if there is none."""
    for name, shape in _POSITION.items():
        if (name in loop or name == "data") and not _matches(loop.get(name), shape):
            return name
    return ""


def _matches(value: Any, shape: Any) -> bool:
    """Whether JSON has a shape: a type, a dict with these keys, a list, or one shape of a tuple.

    An int is a count. A list of one shape has any number of these.
    """
    match shape:
        case tuple():  # of alternatives
            return any(_matches(value, s) for s in shape)
        case dict():
            return isinstance(value, dict) and all(k in value and _matches(value[k], s) for k, s in shape.items())
        case [each]:
            return isinstance(value, list) and all(_matches(x, each) for x in value)
        case list():
            return isinstance(value, list) and len(value) == len(shape) and all(map(_matches, value, shape))
    return type(value) is shape and (shape is not int or value >= 0)


def _read_array(reader: orbax.Reader, path: str) -> None:
    """Reads all of an array, some rows of its chunks at a time, as a stack of layers may be larger than memory."""
    shape = reader.shapes[path].shape
    rows = reader.chunk(path)[0] if shape else 1
    for start in range(0, shape[0] if shape else 1, rows):
        first = [slice(start, min(start + rows, shape[0]))] if shape else []
        reader.read(path, (*first, *(slice(size) for size in shape[1:])))
