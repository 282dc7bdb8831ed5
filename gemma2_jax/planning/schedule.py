"""What a compiled step does on each GPU, in its order: work, collectives that begin and are waited for, and loops.

It is read off the HLO text, whose instructions are in the order in which they are launched. The FLOPs of matrix
products are those of the program, recomputed ones too, and those that several GPUs do alike; those of attention kernels
are counted for rows of one document, within each layer's window, as the text does not say how long documents are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gemma2_jax.planning.hlo import Instruction, array_bytes, array_shapes, parse_program
from gemma2_jax.planning.memory_traffic import FREE, choose_branch, count_bytes, list_fused
from gemma2_jax.planning.traffic import SENT, find_groups, name_axes
from gemma2_jax.training.profile_tables import parse_scope

if TYPE_CHECKING:
    from gemma2_jax.model_config import ModelConfig

type Pass = Literal["forward", "backward", "recomputed", "update"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "recomputed", "update")

# Matrix products of each attention kernel, of which the forward kernel has two: backward computes the scores again, and
# so does each of its two kernels.
_ATTENTION_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
_ATTENTION_KERNEL = re.compile(r"gemma2_attention_(forward|dq|dkv)\b")


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product of [rows, depth] and [depth, columns], or a batch of such.

    Sizes are fractions where a step that is only described has shards that do not divide: they are means.
    """

    batch: float = 1
    rows: float
    columns: float
    depth: float

    @property
    def flops(self) -> float:
        """Two for each element of the result and of the depth."""
        return 2.0 * self.batch * self.rows * self.columns * self.depth


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kernel's work. An instruction inside a loop is one `Work`, however often it runs."""

    part: str  # such as "mlp/down"
    pass_name: Pass
    products: tuple[Product, ...] = ()
    attention: float = 0.0  # FLOPs of an attention kernel
    memory: float = 0.0  # bytes that it reads and writes, each operand once
    where: str = ""  # the operation of the program that it comes from


@dataclass(frozen=True, kw_only=True)
class Send:
    """A collective begins. One that is not asynchronous is waited for at once."""

    name: str
    kind: str
    axes: str
    sent: float  # bytes that a GPU sends
    is_async: bool


@dataclass(frozen=True)
class Wait:
    """What a collective brings is needed."""

    name: str


@dataclass(frozen=True)
class Loop:
    """Items that are repeated."""

    times: int
    items: tuple[Item, ...]


type Item = Work | Send | Wait | Loop
type AttentionFlops = Callable[[int, int, int, int], float]


def count_attention(model: ModelConfig, length: int) -> AttentionFlops:
    """FLOPs of one product of scores in an average layer, for B rows of T queries, N heads and width H on a device.

    Rows are `length` tokens of one document. A context shard has T of them, and its share of the pairs.
    """

    def count(B: int, T: int, N: int, H: int) -> float:
        pairs = model.attention_flops(length) * length / (4 * model.heads * model.head_width * model.layers)
        return 2 * B * N * H * pairs * T / length

    return count


def read_schedule(
    text: str, mesh: Mapping[str, int], attention: AttentionFlops, layers_per_stage: int | None = None
) -> tuple[Item, ...]:
    """What one GPU does in a step, from `compiled.as_text()`.

    Args:
      text: the compiled HLO.
      mesh: sizes of the mesh's axes in their order.
      attention: FLOPs of a product of scores, from `count_attention`.
      layers_per_stage: trips assumed for an outermost loop whose count the compiler does not know; others count once.
    """
    entry, computations = parse_program(text)
    return tuple(_Reader(computations, mesh, attention, layers_per_stage).read(entry, is_outermost=True))


def list_work(items: Sequence[Item], times: int = 1) -> Iterator[tuple[Work, int]]:
    """Every work of a schedule, with how often a step does it."""
    for item in items:
        if isinstance(item, Loop):
            yield from list_work(item.items, times * item.times)
        elif isinstance(item, Work):
            yield item, times


def sum_flops(items: Sequence[Item]) -> Counter[tuple[str, Pass]]:
    """FLOPs of matrix products and attention in a step, by part and pass."""
    total: Counter[tuple[str, Pass]] = Counter()
    for work, times in list_work(items):
        if flops := sum(product.flops for product in work.products) + work.attention:
            total[work.part, work.pass_name] += round(flops) * times
    return total


@dataclass(frozen=True)
class _Reader:
    computations: Mapping[str, list[Instruction]]
    mesh: Mapping[str, int]
    attention: AttentionFlops
    layers_per_stage: int | None

    def read(self, name: str, *, is_outermost: bool) -> Iterator[Item]:
        """The items of a computation."""
        instructions = self.computations[name]
        types = {instruction.name: instruction.type for instruction in instructions}
        done = {i.operands[0]: i.type for i in instructions if i.opcode.endswith("-done")}
        sends: set[str] = set()
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in SENT:
                if send := self._read_send(instruction, kind, done):
                    sends.add(send.name)
                    yield send
            elif instruction.opcode.endswith("-done"):
                if instruction.operands[0] in sends:
                    yield Wait(instruction.operands[0])
            elif instruction.opcode == "while":
                known = instruction.trip_count
                times = known or (self.layers_per_stage if is_outermost else None) or 1
                inner = tuple(self.read(instruction.body, is_outermost=is_outermost and bool(known)))
                yield Loop(times, inner)
            elif instruction.opcode == "conditional":
                yield from self.read(choose_branch(instruction, self.computations), is_outermost=is_outermost)
            elif instruction.opcode in ("call", "async-start"):
                for part in instruction.called:
                    yield from self.read(part, is_outermost=is_outermost)
            elif instruction.opcode not in FREE:
                yield self._read_work(instruction, types)

    def _read_send(self, instruction: Instruction, kind: str, done: Mapping[str, str]) -> Send | None:
        groups = find_groups(instruction.rest, math.prod(self.mesh.values()))
        is_async = kind != instruction.opcode
        size = array_bytes(done[instruction.name] if is_async else instruction.type)
        axes = name_axes(groups, self.mesh)
        sent = size * SENT[kind](groups.shape[1])
        return Send(name=instruction.name, kind=kind, axes=axes, sent=sent, is_async=is_async) if axes else None

    def _read_work(self, instruction: Instruction, types: Mapping[str, str]) -> Work:
        inside = list_fused(instruction, self.computations)
        inner_types = {**types, **{part.name: part.type for part in inside}}
        dots = [part for part in inside if part.opcode == "dot" or part.is_library_product]
        products = [read_product(part, inner_types) for part in dots]
        flops = {part.where: product.flops for part, product in zip(dots, products, strict=True)}
        attention = 0.0
        for part in inside:
            if kernel := _ATTENTION_KERNEL.search(part.where) if part.opcode == "custom-call" else None:
                B, T, N, H = array_shapes(inner_types[part.operands[0]])[0]
                attention += _ATTENTION_PRODUCTS[kernel[1]] * self.attention(B, T, N, H)
                flops[part.where] = attention
        where = max(flops, key=lambda name: flops[name], default=instruction.where)
        return Work(
            part=name_part(where),
            pass_name=name_pass(where, is_product=bool(products)),
            products=tuple(products),
            attention=attention,
            memory=sum(count_bytes(instruction, types, self.computations)),
            where=where,
        )


def read_product(dot: Instruction, types: Mapping[str, str]) -> Product:
    """The sizes of a product, from its first operand's shape and its result's."""
    left = array_shapes(types[dot.operands[0]])[0]

    def multiply(dims: str) -> int:
        found = re.search(rf'lhs_{dims}_dims=\{{([\d,]*)\}}|"lhs_{dims}_dimensions":\[([\d,"]*)\]', dot.rest)
        return math.prod(left[int(dim)] for dim in re.findall(r"\d+", found[1] or found[2] or "")) if found else 1

    batch, depth = multiply("batch"), multiply("contracting")
    rows = math.prod(left) // (batch * depth)
    columns = math.prod(array_shapes(dot.type)[0]) // (batch * rows)
    return Product(batch=batch, rows=rows, columns=columns, depth=depth)


def name_part(where: str) -> str:
    """The part of the model that an operation belongs to, such as mlp/down; "other" where it has no scope."""
    scope = [name for name in parse_scope(where) if name not in ("backward", "layers")]
    return "/".join(scope) or "other"


def name_pass(where: str, *, is_product: bool = False) -> Pass:
    """Whether an operation is of the forward pass, of the backward pass, forward once more in it, or of the update."""
    scope = parse_scope(where)
    if "rematted_computation" in where:
        return "recomputed"
    if "optimizer" in scope or "metrics" in scope:
        return "update"
    if is_product and "loss" in scope and "BTD,VD->BTV" not in where:  # it makes gradients beside the logits
        return "backward"
    return "backward" if "backward" in scope else "forward"
