"""What a compiled step sends over each axis of the mesh, read off its HLO text: kinds, sizes, and how often.

It counts bytes, and says nothing about how long they take. Bytes are those that each GPU sends with ring algorithms, by
which NCCL's "bus bandwidth" is defined (NVIDIA/nccl-tests, doc/PERFORMANCE.md): each of n GPUs sends (n - 1) / n of the
whole array in an all-gather, a reduce-scatter and an all-to-all, twice that in an all-reduce, all of it in a
permutation.

All branches of a conditional are counted. Sends and receives, into which an option of XLA turns permutations, are not.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gemma2_jax.planning.hlo import array_bytes, parse_program

# Bytes sent by each of n GPUs, for each byte of the instruction's result.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # the result is a shard
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,  # at most
    "collective-broadcast": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction of a step."""

    kind: str  # all-gather, reduce-scatter, ...
    axes: str  # mesh axes along which its groups lie, such as "fsdp" or "data+fsdp"
    sent: float  # bytes that a GPU sends each time it runs
    times: int | None  # how often a step runs it; None if the compiler does not know
    loop: str  # the enclosing loop whose trip count the compiler does not know; empty if there is none
    where: str  # the operation of the program that it comes from


def read_traffic(text: str, mesh: Mapping[str, int], layers_per_stage: int | None = None) -> list[Collective]:
    """Every collective that a step runs, from its compiled HLO.

    Args:
      text: `compiled.as_text()`.
      mesh: sizes of the mesh's axes in their order, `mesh.shape`.
      layers_per_stage: the trip count that is assumed for an outermost loop whose count the compiler does not know,
        such as the loop of a pipeline stage over its layers; None assumes nothing.
    """
    entry, computations = parse_program(text)
    found: list[Collective] = []

    def walk(name: str, times: int | None, loop: str) -> None:
        done = {i.operands[0]: i.type for i in computations[name] if i.opcode.endswith("-done")}
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in SENT:
                groups = find_groups(instruction.rest, math.prod(mesh.values()))
                size = array_bytes(done[instruction.name] if kind != instruction.opcode else instruction.type)
                if axes := name_axes(groups, mesh):
                    sent = size * SENT[kind](groups.shape[1])
                    found.append(
                        Collective(kind=kind, axes=axes, sent=sent, times=times, loop=loop, where=instruction.where)
                    )
            elif kind == "while":
                known = instruction.trip_count
                trips = known or (None if loop else layers_per_stage)
                inner = None if trips is None or times is None else times * trips
                walk(instruction.body, inner, loop if known else instruction.where)
            else:
                for part in instruction.called:
                    walk(part, times, loop)

    walk(entry, 1, "")
    return found


def sum_traffic(collectives: Iterable[Collective]) -> dict[str, Counter[str]]:
    """Bytes that a GPU sends in a step, by mesh axes and kind; without collectives whose `times` is unknown."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for c in collectives:
        if c.times is not None:
            total[c.axes][c.kind] += round(c.sent * c.times)
    return dict(total)


def find_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, members] of device positions, from any of the ways in which HLO writes them.

    A permutation's pairs are groups of two.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}", attributes):
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(groups or [range(devices)])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(found[2], found[3]).reshape(_ints(found[1]))
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^}]*)\}",
        attributes,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        ids = _iota(found[2], found[3]) if found[2] else np.array(_ints(found[4]) if found[4] else range(devices))
        return _mesh_axes(ids, sizes, re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found[5]))
    raise ValueError(f"the groups of this collective are written in a way that is not known here: {attributes[:300]}")


def _mesh_axes(ids: np.ndarray, sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along some axes of XLA's own mesh, or along parts of them: (name, product of parts before, size)."""
    split = {name: [1, size, 1] for name, size in sizes.items()}
    for name, before, size in axes:
        if before:
            split[name] = [int(before), int(size), sizes[name] // int(before) // int(size)]
    ids = ids.reshape([part for parts in split.values() for part in parts])
    grouped = [3 * list(sizes).index(name) + 1 for name, *_ in axes]
    members = math.prod(ids.shape[dim] for dim in grouped)
    return np.moveaxis(ids, grouped, range(-len(grouped), 0)).reshape(-1, members)


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _ints(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_ints(order) if order else None).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def name_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The axes along which members of a group differ; empty if every group is one device."""
    place = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)
    differs = (place != place[:, :1]).any(axis=(0, 1))
    return "+".join(name for name, differ in zip(mesh, differs, strict=True) if differ)
