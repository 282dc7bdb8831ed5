"""The text of a compiled program (HLO) as computations and their instructions. It knows the grammar, and no meaning."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|(?:true|false)_computation|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    is_root: bool
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @cached_property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads, in their order."""
        depth, end = 1, len(self.rest)
        for place, character in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if not depth:
                end = place
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    @property
    def called(self) -> list[str]:
        """The computations that it runs, but for a loop's."""
        return [name for found in _CALLED.findall(self.rest) for name in re.findall(r"%([\w.\-]+)", found)]

    @property
    def body(self) -> str:
        """The computation that a loop repeats."""
        found = re.search(r"\bbody=%([\w.\-]+)", self.rest)
        assert found is not None
        return found[1]

    @property
    def trip_count(self) -> int | None:
        """How often a loop runs, where the compiler knows."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def is_library_product(self) -> bool:
        """Whether it is a matrix product that cuBLAS makes; its result is a tuple with a workspace after it."""
        return self.opcode == "custom-call" and 'custom_call_target="__cublas' in self.rest

    @property
    def where(self) -> str:
        """The operation of the program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else self.name


def parse_program(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry's name, and the instructions of every computation, of `compiled.as_text()`."""
    entry, computations, current = "", {}, []
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = computations[opening[2]] = []
            entry = opening[2] if opening[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(found[1] is not None, *found.groups()[1:]))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no line ENTRY %name (...) -> ... {")
    return entry, computations


def first_array(type_: str) -> str:
    """The type of an array, or of the first of a tuple."""
    found = _ARRAY.search(type_)
    assert found is not None
    return found[0]


def array_shapes(type_: str) -> list[tuple[int, ...]]:
    """The shape of an array, or those of the arrays of a tuple."""
    return [tuple(int(size) for size in shape.split(",") if size) for _, _, shape in _ARRAY.findall(type_)]


def array_bytes(type_: str) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    total = 0.0
    for letters, bits, shape in _ARRAY.findall(type_):
        width = {"pred": 8, "token": 0}.get(letters) if not bits else int(bits)
        assert width is not None, f"unknown element type in {type_}"
        total += width / 8 * math.prod(int(size) for size in shape.split(",") if size)
    return total
