"""Bytes that a compiled program reads from a device's memory and writes to it, read off its HLO text.

Each instruction reads its operands and writes its result, once: what a fusion keeps to itself costs nothing, and none
is taken to stay in a cache between instructions. Where a fusion looks rows up, or changes some in place, those rows
are counted and not the array. So this is a bound: with enough cache a program reads less, and a kernel that reads an
operand twice reads more.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from gemma2_jax.planning.hlo import Instruction, array_bytes, first_array, parse_program

FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
_LOOKUPS = {"dynamic-slice", "gather"}  # read of their first operand what they give
_CHANGES = {"dynamic-update-slice": 1, "scatter": 2}  # write, into their first operand, what this operand has
_VIEWS = {"bitcast", "convert", "reshape", "copy"}


def read_memory_traffic(text: str, loop: str | None = None) -> Counter[str]:
    """Bytes read and written, by the operation of the program that does it.

    Args:
      text: `compiled.as_text()`.
      loop: the operation of a loop, such as "jit(_add_tokens)/while": one run of its body is counted alone. None: the
        whole program, where loops of unknown length count once.

    Of a conditional, the branch that reads and writes least counts.
    """
    entry, computations = parse_program(text)
    if loop is None:
        return _sum_computation(entry, computations)
    for instructions in computations.values():
        for instruction in instructions:
            if instruction.opcode == "while" and instruction.where == loop:
                return _sum_computation(instruction.body, computations)
    raise ValueError(f"the program has no loop {loop}")


type _Computations = Mapping[str, list[Instruction]]


def _sum_computation(name: str, computations: _Computations) -> Counter[str]:
    total: Counter[str] = Counter()
    types = {instruction.name: instruction.type for instruction in computations[name]}
    for instruction in computations[name]:
        match instruction.opcode:
            case "while":
                inner = _sum_computation(instruction.body, computations)
                total.update({where: size * (instruction.trip_count or 1) for where, size in inner.items()})
            case "conditional":
                total.update(_sum_computation(choose_branch(instruction, computations), computations))
            case "call" | "async-start":
                for part in instruction.called:
                    total.update(_sum_computation(part, computations))
            case opcode if opcode not in FREE and not opcode.endswith("-done"):
                total[instruction.where] += round(sum(count_bytes(instruction, types, computations)))
    return total


def choose_branch(conditional: Instruction, computations: _Computations) -> str:
    """The branch that reads and writes least, which is the one that a step usually takes."""
    return min(conditional.called, key=lambda part: _sum_computation(part, computations).total())


def count_bytes(instruction: Instruction, types: Mapping[str, str], computations: _Computations) -> Iterator[float]:
    """Bytes of each operand that an instruction reads, and of what it writes."""
    inside = list_fused(instruction, computations)
    parameters = dict(enumerate(instruction.operands))
    if inside != [instruction]:
        parameters = {int(part.rest.split(")")[0]): part.name for part in inside if part.opcode == "parameter"}
        types = {**types, **{part.name: part.type for part in inside}}
    for number, operand in enumerate(instruction.operands):
        yield _count_read(parameters[number], array_bytes(types[operand]), inside)
    if inside == [instruction] and instruction.opcode.endswith("-start"):  # its type has the operands too
        yield array_bytes(types[instruction.operands[0]])
        return
    if instruction.is_library_product:
        yield array_bytes(first_array(instruction.type))
        return
    roots = [part for part in inside if part.is_root] or inside
    if roots[0].opcode == "tuple":
        roots = [part for part in inside if part.name in roots[0].operands]
    by_name = {part.name: part for part in inside}
    for root in roots:
        while root.opcode in _VIEWS and root.operands and root.operands[0] in by_name:
            root = by_name[root.operands[0]]
        changed = _CHANGES.get(root.opcode)
        yield array_bytes(root.type if changed is None else types[root.operands[changed]])


def list_fused(instruction: Instruction, computations: Mapping[str, list[Instruction]]) -> list[Instruction]:
    """The instructions of a fusion, launched and waited for at once or not; of any other, itself."""
    is_fusion = instruction.opcode.removesuffix("-start") == "fusion"
    return computations[instruction.called[0]] if is_fusion else [instruction]


def _count_read(name: str, size: float, inside: Sequence[Instruction]) -> float:
    """Bytes of an array of `size` that instructions read: the rows that they look up, or else all."""
    read = 0.0
    for part in inside:
        if name in part.operands:
            is_first = part.operands[0] == name and part.operands.count(name) == 1
            if part.opcode in _VIEWS and len(inside) > 1:
                read += _count_read(part.name, size, inside)
            elif is_first and part.opcode in _LOOKUPS:
                read += array_bytes(part.type)
            elif not (is_first and part.opcode in _CHANGES) and part.opcode != "tuple":
                return size
    return min(read, size)
