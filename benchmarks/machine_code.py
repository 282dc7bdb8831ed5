"""What ptxas made of Mosaic GPU kernels: registers, spills, shared memory, instructions. No GPU is needed.

A library; it prints nothing, and says nothing of time. A function with kernels in it is compiled for one H100 that is
not there (`gemma2_jax.planning`), and what is read is what that very compilation wrote: jaxlib's dump of ptxas's report
and of the binary, disassembled. Nothing is assembled a second time. In a fresh process:

    described_cluster.prepare_jax()
    from benchmarks import machine_code
    for kernel in machine_code.compiled(attention, q, k, v):
        print(kernel.name, kernel.registers, kernel.spill_stores, [loop.instructions for loop in kernel.tiles])

Counts of instructions are of those that stand in the binary, not of those that run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.planning import described_cluster

# Of an H100's multiprocessor; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS_PER_SM = 65_536
SHARED_PER_SM = 233_472
SHARED_PER_BLOCK = 232_448
SHARED_RESERVED = 1024  # of each block, by CUDA
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32

_TARGET = 'custom_call_target="mosaic_gpu_v2"'
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(body|calls|to_apply|(?:true|false)_computation|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


class Opcodes(dict[str, int]):
    """How often each opcode stands there, with its modifiers, such as "HGMMA.64x128x16.F32"."""

    def of(self, name: str) -> int:
        """With any further modifiers: of("MUFU") counts MUFU.EX2 and MUFU.TANH."""
        return sum(count for opcode, count in self.items() if f"{opcode}.".startswith(f"{name}."))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """An innermost loop. What waits for a barrier is not one, and tries after the first one are not counted.

    All branches within it are counted. A loop that was unrolled is none, or does more in a trip: compare its HGMMAs.
    """

    address: int  # of its first instruction
    opcodes: Opcodes

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel as it was compiled."""

    name: str
    isa: str  # of PTX, the newest that the ptxas used knows: 8.8 is that of CUDA 12.9
    registers: int  # of a thread when a block starts
    set_registers: tuple[int, ...]  # those that warpgroups then set for themselves
    spill_stores: int  # bytes
    spill_loads: int
    stack: int
    dynamic_shared: int
    static_shared: int
    threads: int  # of a block
    warnings: tuple[str, ...]  # of ptxas, such as C7510: wgmma serialised
    opcodes: Opcodes
    loops: tuple[Loop, ...]

    @property
    def shared(self) -> int:
        return self.dynamic_shared + self.static_shared

    @property
    def fits(self) -> bool:
        """Whether a block may have so much shared memory. Mosaic refuses before this does."""
        return self.shared <= SHARED_PER_BLOCK

    @property
    def blocks_per_sm(self) -> int:
        registers = -(-self.registers // 8) * 8 * -(-self.threads // 32) * 32
        room = (
            REGISTERS_PER_SM // registers,
            SHARED_PER_SM // (self.shared + SHARED_RESERVED),
            THREADS_PER_SM // self.threads,
            BLOCKS_PER_SM,
        )
        return min(room)

    @property
    def tiles(self) -> tuple[Loop, ...]:
        """Loops with matrix products: over tiles. The masked one has more instructions than the clean one."""
        return tuple(loop for loop in self.loops if loop.opcodes.of("HGMMA"))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A kernel's place in a compiled program."""

    name: str
    where: str  # the operation of the program that it comes from
    computation: str  # of the HLO, in which it stands
    loops: tuple[str, ...]  # operations of the program that the loops around it come from, outermost first
    times: int | None  # how often a run runs it; None where the compiler does not know


def compiled(function: Callable, *arguments: Any) -> list[Kernel]:
    """Every Mosaic GPU kernel of `function`, in the order in which JAX lowers them, compiled for one H100.

    Args:
      function: what `jax.jit` takes.
      arguments: of `function`, trees of anything with a shape and a dtype. Shardings are not looked at.

    Kernels of one name are numbered. One that JAX lowers in two places is compiled twice, and is two. What XLA found
    to be of no use is not compiled.

    Raises ImportError without the extra `plan`. `described_cluster.prepare_jax` comes before JAX.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    everywhere = NamedSharding(Mesh(np.array(described_cluster.describe_cluster(1)), ("device",)), PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
    with _dumps() as folder:
        # A function that JAX has not seen: it would give back what it compiled before, and nothing would be written.
        traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
        assert text is not None
        # jaxlib numbers what it writes, across names, as JAX lowers it.
        stems = sorted((path.stem for path in folder.glob("*.ptxas")), key=lambda stem: int(stem.rpartition("_")[2]))
        names = _numbered(stem.rpartition("_")[0] for stem in stems)
        kernels = [_read(folder, stem, name) for stem, name in zip(stems, names, strict=True)]
    # It compiles kernels of one hash once, which has that number in it.
    wanted = len(set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)))
    if len(kernels) != wanted:
        raise RuntimeError(f"the program has {wanted} kernels and jaxlib wrote of {len(kernels)}: they were in a cache")
    return kernels


def calls(text: str) -> list[Call]:
    """Every place of a compiled program from which it calls a Mosaic GPU kernel.

    Args:
      text: `compiled.as_text()`.
    """
    entry, current = "", ""
    bodies: dict[str, list[str]] = defaultdict(list)
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = opening[2]
            entry = current if opening[1] else entry
        elif current:
            bodies[current].append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no line ENTRY %name (...) -> ... {")
    found: list[Call] = []

    def walk(name: str, loops: tuple[str, ...], times: int | None) -> None:
        for line in bodies[name]:
            if _TARGET in line:
                # In the kernel's bytecode, after the names of dialects, of which one is stable_mosaic_gpu.
                kernel = re.findall(r"\\00([\w.\-]+)_mosaic_gpu(?=\\00)", line)[-1]
                call = Call(name=kernel, where=_operation(line), computation=name, loops=loops, times=times)
                found.append(call)
                continue
            for kind, called in _CALLED.findall(line):
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                trips = (int(known[1]) if known else None) if kind == "body" else 1
                inner = None if trips is None or times is None else times * trips
                for part in re.findall(r"%([\w.\-]+)", called):
                    walk(part, (*loops, _operation(line)) if kind == "body" else loops, inner)

    walk(entry, (), 1)
    return found


def report(text: str) -> dict[str, Any]:
    """Registers, spills, stack, static shared memory and warnings, from what `ptxas -v` says of one kernel."""
    registers = re.findall(r"Used (\d+) registers", text)
    if len(registers) != 1:
        raise ValueError(f"not ptxas's report of one kernel:\n{text}")
    # Functions that were not inlined have lines of their own.
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    static = re.search(r"(\d+) bytes smem", text)
    noted = [line for line in text.splitlines() if re.search(r"\(C\d+\)|^ptxas warning|^ptxas \S+: +warning", line)]
    return {
        "registers": int(registers[0]),
        "stack": max((int(frame[0]) for frame in frames), default=0),
        "spill_stores": sum(int(frame[1]) for frame in frames),
        "spill_loads": sum(int(frame[2]) for frame in frames),
        "static_shared": int(static[1]) if static else 0,
        "warnings": tuple(dict.fromkeys(re.sub(r"^ptxas \w+ *: *", "", line).strip() for line in noted)),
    }


def launch(lines: Iterable[str]) -> dict[str, int]:
    """Threads of a block and bytes of dynamic shared memory, from the MLIR of one kernel before it is outlined."""
    constants: dict[str, int] = {}
    for line in lines:
        if constant := re.search(r"(%\S+) = arith\.constant (\d+) : (?:index|i\d+)", line):
            constants[constant[1]] = int(constant[2])
        elif "gpu.launch " in line:
            block = re.search(r"threads\([^)]*\) in \(([^)]*)\)", line)
            shared = re.search(r"dynamic_shared_memory_size (%[\w#]+)", line)
            assert block is not None
            sizes = [constants[size] for size in re.findall(r"= (%[\w#]+)", block[1])]
            return {"threads": math.prod(sizes), "dynamic_shared": constants[shared[1]] if shared else 0}
    raise ValueError("no gpu.launch in the MLIR of a kernel")


@dataclass(frozen=True)
class _Instruction:
    address: int
    guard: str  # the predicate it is under, or ""
    opcode: str
    operands: str
    labels: tuple[str, ...]  # just before it

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


def disassembled(text: str) -> dict[str, Any]:
    """Opcodes, innermost loops and what warpgroups set as their registers, from what nvdisasm says of one kernel."""
    code = _instructions(text)
    sets = [instruction for instruction in code if instruction.base == "USETMAXREG"]
    return {
        "opcodes": _count(code),
        "loops": tuple(_loops(code)),
        "set_registers": tuple(int(re.findall(r"0x[0-9a-f]+", i.operands)[-1], 16) for i in sets),
    }


def nvdisasm() -> Path:
    """Of its own wheel, of Triton's, or on PATH; raises ImportError where there is none."""
    found = shutil.which("nvdisasm")
    places = [*_under("nvidia", "cu13/bin/nvdisasm"), *_under("triton", "backends/nvidia/bin/nvdisasm")]
    return _first([*places, *([Path(found)] if found else [])], "nvdisasm")


def ptxas() -> Path:
    """Of the extra `plan`, or on PATH; raises ImportError where there is none."""
    found = shutil.which("ptxas")
    return _first([*_under("nvidia", "cuda_nvcc/bin/ptxas"), *([Path(found)] if found else [])], "ptxas")


def _under(package: str, path: str) -> list[Path]:
    """Where a file of an installed package may be, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(home, path) for home in spec.submodule_search_locations or ()] if spec else []


def _first(places: Iterable[Path], name: str) -> Path:
    for path in places:
        if path.is_file():
            return path
    raise ImportError(f"reading machine code needs {name}: pip install 'gemma2-jax[plan]'")


@contextlib.contextmanager
def _dumps() -> Iterator[Path]:
    """A folder into which jaxlib writes of each Mosaic GPU kernel that is compiled in here.

    It reads the environment anew for each kernel, but the ptxas that it first finds it keeps for the process: the first
    on PATH, then one in /usr/local/cuda, and only then that of a wheel. It gives it -arch=sm_90a --warn-on-spills
    --generate-line-info, and in here -v, which changes no code.
    """
    import jax.experimental.mosaic.gpu  # noqa: F401  it sets MOSAIC_GPU_CUDA_ROOT, which is set again below

    disassembler, assembler = nvdisasm(), ptxas()
    with tempfile.TemporaryDirectory() as kept:
        folder, root = Path(kept, "dumps"), Path(kept, "cuda")
        folder.mkdir()
        # jaxlib runs $MOSAIC_GPU_CUDA_ROOT/bin/nvdisasm on a file in a folder of its own, and leaves that behind.
        script = root / "bin" / "nvdisasm"
        script.parent.mkdir(parents=True)
        script.write_text(
            f'#!/bin/sh\n{shlex.quote(str(disassembler))} "$@"\nstatus=$?\n'
            'for last; do case "$last" in */mosaic-gpu-*/kernel.bin) rm "$last"; rmdir "${last%/*}";; esac; done\n'
            "exit $status\n"
        )
        script.chmod(0o755)
        environment = {
            "MOSAIC_GPU_DUMP_TO": str(folder),  # everything, such as ptxas's report
            "MOSAIC_GPU_CUDA_ROOT": str(root),
            "PATH": os.pathsep.join([str(assembler.parent), os.environ.get("PATH", "")]),
        }
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _read(folder: Path, stem: str, name: str) -> Kernel:
    disassembly = folder / f"{stem}.sass_ctrl"
    if not disassembly.is_file():
        raise RuntimeError(f"nvdisasm failed on {stem}: what it said is on standard error")
    with open(folder / f"{stem}.mlir-passes.log") as passes:  # long, but what is sought comes early
        launched = launch(passes)
    version = re.search(r"^\.version (\S+)", (folder / f"{stem}.ptx").read_text(), re.MULTILINE)
    assert version is not None
    return Kernel(
        name=name,
        isa=version[1],
        **launched,
        **report((folder / f"{stem}.ptxas").read_text()),
        **disassembled(disassembly.read_text()),
    )


def _numbered(names: Iterable[str]) -> list[str]:
    """With a number where a name comes more than once."""
    names = list(names)
    total, seen, numbered = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name} {seen[name]}" if total[name] > 1 else name)
    return numbered


def _operation(line: str) -> str:
    """The operation of the program that an instruction of the HLO comes from."""
    found = re.search(r'op_name="([^"]*)"', line) or re.search(r"%([\w.\-]+) =", line)
    return found[1] if found else ""


def _instructions(text: str) -> list[_Instruction]:
    code, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _INSTRUCTION.search(line):
            address, guard, opcode, operands = found.groups()
            code.append(_Instruction(int(address, 16), guard or "", opcode, operands, tuple(labels)))
            labels = []
    # Kernels end in an instruction that branches to itself, and in padding.
    end = max((n for n, i in enumerate(code) if i.base == "BRA" and set(_targets(i)) & set(i.labels)), default=None)
    if end is not None and all(i.opcode == "NOP" for i in code[end + 1 :]):
        del code[end:]
    if not code:
        raise ValueError("no instructions: this is not what nvdisasm says of a kernel")
    return code


def _targets(instruction: _Instruction) -> list[str]:
    """Labels to which an instruction may branch."""
    if instruction.base not in ("BRA", "BRX", "JMP", "JMX", "WARPSYNC"):
        return []
    targets = re.findall(r"\.L_\w+", instruction.operands)
    if not targets and instruction.base != "WARPSYNC":
        raise ValueError(f"a branch to somewhere unknown: {instruction.opcode} {instruction.operands}")
    return targets


def _ends(instruction: _Instruction) -> bool:
    """Whether what follows an instruction is not run after it."""
    if instruction.guard or instruction.base not in ("EXIT", "RET", "BRX", "JMX", "JMP", "BRA", "KILL"):
        return False
    # A condition may also stand before the target: BRA.DIV UR4, `(.L_x_1); BRA.U UP0, `(.L_x_1).
    return instruction.base != "BRA" or instruction.operands.lstrip().startswith("`(")


def _count(code: Iterable[_Instruction]) -> Opcodes:
    return Opcodes(Counter(instruction.opcode for instruction in code).most_common())


def _loops(code: list[_Instruction]) -> list[Loop]:
    """Innermost loops by address: parts of the control flow from each of whose blocks each of them is reached."""
    blocks: list[list[_Instruction]] = []
    for instruction in code:
        if not blocks or instruction.labels or _targets(blocks[-1][-1]) or _ends(blocks[-1][-1]):
            blocks.append([])
        blocks[-1].append(instruction)
    at = {label: number for number, block in enumerate(blocks) for label in block[0].labels}
    after: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        after[number] = {at[label] for label in _targets(block[-1]) if label in at}
        if not _ends(block[-1]) and number + 1 < len(blocks):
            after[number].add(number + 1)

    def waits(loop: set[int]) -> bool:
        """Tries to pass a barrier, or to get registers, until that succeeds."""
        opcodes = _count(instruction for number in loop for instruction in blocks[number])
        tries = any(opcode.endswith(".TRYWAIT") or ".TRY_ALLOC" in opcode for opcode in opcodes)
        works = any(opcodes.of(name) for name in ("HGMMA", "UTMALDG", "UTMASTG", "MUFU", "LDG", "STG", "LDS", "STS"))
        return tries and not works and sum(opcodes.values()) < 16

    found: list[Loop] = []

    def walk(within: set[int], edges: dict[int, set[int]]) -> bool:
        """Adds the innermost loops among these blocks; whether there were any."""
        some = False
        for loop in _cycles(within, edges):
            if waits(loop):
                continue
            some = True
            entries = {b for a in edges if a not in loop for b in after[a]} & loop or {min(loop)}
            inner = {a: (edges[a] & loop) - entries for a in loop}
            if not walk(loop, inner):
                tries = set[int]().union(*(part for part in _cycles(loop, inner) if waits(part)))
                # What comes after them is a branch back to where the first try was.
                backs = {
                    b
                    for b in loop - tries
                    if len(blocks[b]) == 1 and _ends(blocks[b][0]) and all(a in tries for a in loop if b in after[a])
                }
                body = [i for number in sorted(loop - tries - backs) for i in blocks[number]]
                found.append(Loop(address=body[0].address, opcodes=_count(body)))
        return some

    walk(set(after), after)
    return sorted(found, key=lambda loop: loop.address)


def _cycles(within: set[int], edges: dict[int, set[int]]) -> Iterator[set[int]]:
    """Sets of nodes that are reached from each other: strongly connected components."""
    back: dict[int, set[int]] = defaultdict(set)
    for a in within:
        for b in edges[a] & within:
            back[b].add(a)

    def reached(start: int, edges: dict[int, set[int]]) -> set[int]:
        seen, new = {start}, [start]
        while new:
            further = (edges.get(new.pop(), set()) & within) - seen
            seen |= further
            new += further
        return seen

    left = set(within)
    while left:
        start = min(left)
        cycle = reached(start, edges) & reached(start, back)
        left -= cycle
        if len(cycle) > 1 or start in edges[start]:
            yield cycle
