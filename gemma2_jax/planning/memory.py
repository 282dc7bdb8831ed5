"""Whose memory a compiled step takes: XLA's own total by owner, and the buffers that are alive where it needs most.

XLA writes where each buffer lies and when it is alive, if it is asked to dump. The state and the batch are known from
the program; what is temporary is told apart by shapes, by opcodes and by the operation that makes it. It reads text
and sizes only, and imports no JAX.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2_jax.planning.hlo import array_shapes, parse_program
from gemma2_jax.planning.traffic import SENT

GRADIENTS = "gradients"
KEPT = "kept for backward"
COLLECTIVES = "gathered weights and other collectives' buffers"
LOSS = "logits and loss"
OTHER = "other temporaries"
GAPS = "gaps between buffers"

_ALLOCATION = re.compile(r"^allocation \d+: size \d+, (.*)$")
_VALUE = re.compile(r"^ value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_ALIVE = re.compile(r"^\s+([\w.\-]+)(\{[\d,]*\}): (\d+) bytes")
_TEMPORARY = "preallocated-temp"


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A temporary buffer that is alive where a step needs most memory."""

    owner: str
    size: int  # bytes
    shape: str  # as HLO writes it
    operation: str  # of the program, that it comes from


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which a step needs most memory."""

    where: str  # forward, loss, backward or optimizer
    owners: dict[str, int]  # bytes of temporaries; with the gaps they are all of them
    buffers: tuple[Buffer, ...]  # largest first


@dataclass(frozen=True)
class Dump:
    """What XLA wrote about the memory of one program."""

    assignment: str
    live_ranges: str


def read_dump(folder: Path) -> Dump:
    """What XLA dumped into a folder. Raises ValueError where the files are not those known here."""
    texts = []
    for end in ("buffer-assignment.txt", "live-range.txt"):
        found = [path for path in folder.glob(f"*after_optimizations-{end}") if "train_step" in path.name]
        if len(found) != 1:
            raise ValueError(f"XLA dumped {len(found)} files *after_optimizations-{end} of the step, and not one")
        texts.append(found[0].read_text())
    return Dump(*texts)


def find_peak(dump: Dump, text: str, temporaries: int, gradients: Collection[str], layers: int) -> Peak:
    """The owners of a step's temporaries where it needs most memory.

    Args:
      dump: what XLA wrote.
      text: the compiled HLO.
      temporaries: bytes of them in all, by `memory_analysis`.
      gradients: types of the trained weights' gradients on one GPU, by `squeeze_type`.
      layers: layers of a pipeline stage; what is kept of them for the backward pass is stacked over these.

    Raises:
      ValueError: the dump is not written in the way that is known here.
    """
    places = _read_places(dump.assignment)
    index, alive = _read_alive(dump.live_ranges)
    _, computations = parse_program(text)
    made_by = {i.name: (i.opcode, i.where) for computation in computations.values() for i in computation}
    counted = _Intervals()
    owners: dict[str, int] = {}
    buffers = []
    for name, size in sorted(alive.items(), key=lambda item: -item[1]):
        if name not in places:
            continue  # an argument or a constant
        offset, type_ = places[name]
        opcode, where = made_by.get(name.partition("{")[0], ("", ""))
        owner = name_owner(type_, opcode, where, gradients, layers)
        if taken := counted.add(offset, offset + size):
            owners[owner] = owners.get(owner, 0) + taken
            shape = re.sub(r"(?<=\])\{[^}]*\}", "", type_)
            buffers.append(Buffer(owner=owner, size=taken, shape=shape, operation=where or name))
    gaps = temporaries - sum(owners.values())
    if gaps < 0:
        raise ValueError(f"the buffers that XLA's dump says are alive take {-gaps} bytes more than all temporaries")
    at = re.search(rf"^\s+{index}:([\w.\-]+)", dump.live_ranges, re.MULTILINE)
    where = made_by.get(at[1], ("", ""))[1] if at else ""
    return Peak(where=name_place(where), owners=owners | {GAPS: gaps}, buffers=tuple(buffers))


def name_owner(type_: str, opcode: str, where: str, gradients: Collection[str], layers: int) -> str:
    """Whose a temporary buffer is, by its type and the instruction that makes it."""
    if squeeze_type(type_) in gradients:
        return GRADIENTS
    if opcode.removesuffix("-start").removesuffix("-done") in SENT:
        return COLLECTIVES
    shapes = array_shapes(type_)
    stack = [size for size in shapes[0] if size != 1] if len(shapes) == 1 else []
    if len(stack) > 2 and stack[0] == layers:
        return KEPT
    return LOSS if re.search(r"\bloss\b", where) else OTHER


def squeeze_type(type_: str) -> str:
    """An array's type without its layout and its dims of size one."""
    element, _, dims = type_.partition("]")[0].partition("[")
    return f"{element}[{','.join(size for size in dims.split(',') if size != '1')}]"


def name_place(where: str) -> str:
    """The part of a step that an operation belongs to."""
    for place in ("optimizer", "loss", "backward"):
        if re.search(rf"\b{place}\b", where):
            return place
    return "forward" if "layers" in where else "elsewhere"


def _read_places(assignment: str) -> Mapping[str, tuple[int, str]]:
    """Offset and type of every value among the temporaries."""
    places: dict[str, tuple[int, str]] = {}
    is_temporary = is_known = False
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            is_temporary = _TEMPORARY in found[1]
            is_known = is_known or is_temporary
        elif is_temporary and (found := _VALUE.match(line)):
            places[found[1].removesuffix("{}")] = (int(found[3]), found[4])
    if not is_known:
        raise ValueError(f"XLA's dump of the buffers has no allocation {_TEMPORARY}")
    return places


def _read_alive(live_ranges: str) -> tuple[int, dict[str, int]]:
    """The moment of the peak, and the bytes of every buffer that is alive then."""
    opening = re.search(r"^\s*Live ranges at (\d+) \(peak\):$", live_ranges, re.MULTILINE)
    if opening is None:
        raise ValueError("XLA's dump of live ranges has no line 'Live ranges at N (peak)'")
    alive = {}
    for line in live_ranges[opening.end() :].lstrip("\n").splitlines():
        found = _ALIVE.match(line)
        if found is None:
            break
        alive[found[1] + found[2].removesuffix("{}")] = int(found[3])
    return int(opening[1]), alive


class _Intervals:
    """Bytes that are taken, each counted once."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> int:
        """Takes the bytes from `start` to `end`, and returns how many of them were free."""
        free, place = 0, start
        for left, right in sorted(self._taken):
            if right > place and left < end:
                free += max(0, left - place)
                place = max(place, right)
        free += max(0, end - place)
        self._taken.append((start, end))
        return free
