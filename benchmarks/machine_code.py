"""What ptxas made of Mosaic GPU kernels: registers, spills, shared memory, instructions. No GPU is needed.

This is a library, which `benchmarks.kernels` uses; it prints nothing, and says nothing of time. A function with
kernels in it is compiled for one H100 that is not there (`gemma2_jax.planning`), and what is read is what that very
compilation wrote: jaxlib's dump of ptxas's report and of the binary, disassembled. Nothing is assembled a second time.
In a fresh process:

    described_cluster.prepare_jax()
    from benchmarks import machine_code
    for kernel in machine_code.compile_kernels(attention, q, k, v):
        print(kernel.name, kernel.registers, kernel.spill_stores, [loop.instructions for loop in kernel.tiles])

Instructions are counted where they stand in the binary, not each time that they run.
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

from benchmarks.options import describe_library
from gemma2_jax.planning import described_cluster

# The limits of an H100's multiprocessor; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS_PER_SM = 65_536
SHARED_PER_SM = 233_472
SHARED_PER_BLOCK = 232_448
SHARED_RESERVED = 1024  # CUDA takes so many bytes for each block.
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
    """How often each opcode stands in some code, with its modifiers, such as "HGMMA.64x128x16.F32"."""

    def total(self, name: str) -> int:
        """Counts an opcode with any further modifiers: total("MUFU") counts MUFU.EX2 and MUFU.TANH."""
        return sum(count for opcode, count in self.items() if f"{opcode}.".startswith(f"{name}."))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """An innermost loop. A loop that waits for a barrier is not one, and tries after the first are not counted.

    All branches within it are counted. A loop that was unrolled is none, or does more in a trip: compare its HGMMAs.

    Attributes:
      address: of its first instruction.
      opcodes: of all its instructions.
    """

    address: int
    opcodes: Opcodes

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel as it was compiled.

    Attributes:
      name: of the kernel, with a number where several have the same name.
      isa: the version of PTX, which is the newest that the ptxas used knows: 8.8 is that of CUDA 12.9.
      registers: of a thread when a block starts.
      set_registers: the registers of a thread that warpgroups then set for themselves.
      spill_stores, spill_loads, stack: bytes.
      dynamic_shared, static_shared: shared memory of a block, in bytes.
      threads: of a block.
      warnings: what ptxas warns of, such as C7510: wgmma serialized.
      opcodes: of all its instructions.
      loops: its innermost loops, by address.
    """

    name: str
    isa: str
    registers: int
    set_registers: tuple[int, ...]
    spill_stores: int
    spill_loads: int
    stack: int
    dynamic_shared: int
    static_shared: int
    threads: int
    warnings: tuple[str, ...]
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
        return tuple(loop for loop in self.loops if loop.opcodes.total("HGMMA"))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A kernel's place in a compiled program.

    Attributes:
      name: of the kernel.
      where: the operation of the program that the call comes from.
      computation: the computation of the HLO in which the call stands.
      loops: the operations of the program that the loops around it come from, outermost first.
      times: how often one run of the program calls it; None where the compiler does not know.
    """

    name: str
    where: str
    computation: str
    loops: tuple[str, ...]
    times: int | None


def compile_kernels(function: Callable, *arguments: Any) -> list[Kernel]:
    """Compiles every Mosaic GPU kernel of a function for one H100.

    `described_cluster.prepare_jax` must be called before JAX is imported.

    Args:
      function: what `jax.jit` takes.
      arguments: of `function`, trees of anything with a shape and a dtype. Shardings are not looked at.

    Returns:
      The kernels in the order in which JAX lowers them. Kernels of one name are numbered. A kernel that JAX lowers in
      two places is compiled twice, and is two. A kernel whose result XLA found to be of no use is not compiled.

    Raises:
      ImportError: without the extra `plan`.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array(described_cluster.describe_cluster(1)), ("device",)), PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    with _dump_kernels() as folder:
        # JAX has not seen the lambda. A function that it knows would come from its cache, and nothing would be written.
        traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
        assert text is not None
        # jaxlib numbers what it writes, across names, as JAX lowers it.
        stems = sorted((path.stem for path in folder.glob("*.ptxas")), key=lambda stem: int(stem.rpartition("_")[2]))
        names = _number_names(stem.rpartition("_")[0] for stem in stems)
        kernels = [_read_kernel(folder, stem, name) for stem, name in zip(stems, names, strict=True)]
    # jaxlib compiles kernels of one hash once, and the hash has that number in it.
    called = len(set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)))
    if len(kernels) != called:
        raise RuntimeError(
            f"the program has {called} kernels and jaxlib dumped {len(kernels)}: the others came from a cache; compile "
            "them in a fresh process"
        )
    return kernels


def find_calls(text: str) -> list[Call]:
    """Finds every place of a compiled program from which it calls a Mosaic GPU kernel.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: if the text is not that of a compiled program.
    """
    entry, bodies = _split_computations(text)
    calls: list[Call] = []

    def walk(name: str, loops: tuple[str, ...], times: int | None) -> None:
        for line in bodies[name]:
            if _TARGET in line:
                # In the kernel's bytecode, after the names of dialects, of which one is stable_mosaic_gpu.
                kernel = re.findall(r"\\00([\w.\-]+)_mosaic_gpu(?=\\00)", line)[-1]
                where = _find_operation(line)
                calls.append(Call(name=kernel, where=where, computation=name, loops=loops, times=times))
                continue
            for kind, called in _CALLED.findall(line):
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                trips = (int(known[1]) if known else None) if kind == "body" else 1
                inner = None if trips is None or times is None else times * trips
                for part in re.findall(r"%([\w.\-]+)", called):
                    walk(part, (*loops, _find_operation(line)) if kind == "body" else loops, inner)

    walk(entry, (), 1)
    return calls


def _split_computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of a program's entry computation, and the lines of every computation by its name."""
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
    return entry, bodies


def read_report(text: str) -> dict[str, Any]:
    """Reads registers, spills, stack, static shared memory and warnings from what `ptxas -v` says of one kernel."""
    registers = re.findall(r"Used (\d+) registers", text)
    if len(registers) != 1:
        raise ValueError(f"not ptxas's report of one kernel:\n{text}")
    # Functions that were not inlined have lines of their own.
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    static = re.search(r"(\d+) bytes smem", text)
    warnings = [line for line in text.splitlines() if re.search(r"\(C\d+\)|^ptxas warning|^ptxas \S+: +warning", line)]
    return {
        "registers": int(registers[0]),
        "stack": max((int(frame[0]) for frame in frames), default=0),
        "spill_stores": sum(int(frame[1]) for frame in frames),
        "spill_loads": sum(int(frame[2]) for frame in frames),
        "static_shared": int(static[1]) if static else 0,
        "warnings": tuple(dict.fromkeys(re.sub(r"^ptxas \w+ *: *", "", line).strip() for line in warnings)),
    }


def read_launch(lines: Iterable[str]) -> dict[str, int]:
    """Reads threads of a block and bytes of dynamic shared memory from the MLIR of a kernel before it is outlined."""
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
    """An instruction; `guard` is its predicate or "", and `labels` stand just before it."""

    address: int
    guard: str
    opcode: str
    operands: str
    labels: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


def read_disassembly(text: str) -> dict[str, Any]:
    """Reads opcodes, innermost loops and the registers that warpgroups set from what nvdisasm says of one kernel."""
    code = _read_instructions(text)
    sets = [instruction for instruction in code if instruction.base == "USETMAXREG"]
    return {
        "opcodes": _count_opcodes(code),
        "loops": tuple(_find_loops(code)),
        "set_registers": tuple(int(re.findall(r"0x[0-9a-f]+", i.operands)[-1], 16) for i in sets),
    }


def find_nvdisasm() -> Path:
    """Finds nvdisasm in its own wheel, in Triton's, or on PATH; raises ImportError where there is none."""
    on_path = shutil.which("nvdisasm")
    places = [
        *_installed_files("nvidia", "cu13/bin/nvdisasm"),
        *_installed_files("triton", "backends/nvidia/bin/nvdisasm"),
    ]
    return _select_file([*places, *([Path(on_path)] if on_path else [])], "nvdisasm")


def find_ptxas() -> Path:
    """Finds ptxas in the extra `plan`, or on PATH; raises ImportError where there is none."""
    on_path = shutil.which("ptxas")
    return _select_file(
        [*_installed_files("nvidia", "cuda_nvcc/bin/ptxas"), *([Path(on_path)] if on_path else [])], "ptxas"
    )


def _installed_files(package: str, path: str) -> list[Path]:
    """The places where a file of an installed package may be; the package is not imported."""
    spec = importlib.util.find_spec(package)
    return [Path(home, path) for home in spec.submodule_search_locations or ()] if spec else []


def _select_file(places: Iterable[Path], name: str) -> Path:
    for path in places:
        if path.is_file():
            return path
    raise ImportError(f"reading machine code needs {name}: pip install 'gemma2-jax[plan]'")


@contextlib.contextmanager
def _dump_kernels() -> Iterator[Path]:
    """Gives a folder into which jaxlib dumps each Mosaic GPU kernel that is compiled in this context.

    jaxlib reads the environment again for each kernel, but keeps the ptxas that it found first for the whole process:
    the first on PATH, then one in /usr/local/cuda, and only then that of a wheel. It runs ptxas with -arch=sm_90a
    --warn-on-spills --generate-line-info, and in this context with -v, which changes no code.
    """
    import jax.experimental.mosaic.gpu  # noqa: F401  (it sets MOSAIC_GPU_CUDA_ROOT, which is set again below)

    disassembler, assembler = find_nvdisasm(), find_ptxas()
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = Path(temporary, "dumps"), Path(temporary, "cuda")
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
            "MOSAIC_GPU_DUMP_TO": str(folder),  # All that there is to dump, ptxas's report too.
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


def _read_kernel(folder: Path, stem: str, name: str) -> Kernel:
    """Reads one kernel from jaxlib's dumps, whose names begin with `stem`."""
    disassembly = folder / f"{stem}.sass_ctrl"
    if not disassembly.is_file():
        raise RuntimeError(f"nvdisasm failed on {stem}: what it said is on standard error")
    with open(folder / f"{stem}.mlir-passes.log") as passes:  # It is long, but the launch comes early.
        launched = read_launch(passes)
    version = re.search(r"^\.version (\S+)", (folder / f"{stem}.ptx").read_text(), re.MULTILINE)
    assert version is not None
    return Kernel(
        name=name,
        isa=version[1],
        **launched,
        **read_report((folder / f"{stem}.ptxas").read_text()),
        **read_disassembly(disassembly.read_text()),
    )


def _number_names(names: Iterable[str]) -> list[str]:
    """Numbers the names that come more than once."""
    names = list(names)
    total, counts, numbered = Counter(names), Counter[str](), []
    for name in names:
        counts[name] += 1
        numbered.append(f"{name} {counts[name]}" if total[name] > 1 else name)
    return numbered


def _find_operation(line: str) -> str:
    """The operation of the program that an instruction of the HLO comes from."""
    match = re.search(r'op_name="([^"]*)"', line) or re.search(r"%([\w.\-]+) =", line)
    return match[1] if match else ""


def _read_instructions(text: str) -> list[_Instruction]:
    """Reads the instructions of a kernel, less the padding at its end."""
    code, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif match := _INSTRUCTION.search(line):
            address, guard, opcode, operands = match.groups()
            code.append(_Instruction(int(address, 16), guard or "", opcode, operands, tuple(labels)))
            labels = []
    # Kernels end in an instruction that branches to itself, and in padding.
    end = max(
        (n for n, i in enumerate(code) if i.base == "BRA" and set(_branch_targets(i)) & set(i.labels)), default=None
    )
    if end is not None and all(i.opcode == "NOP" for i in code[end + 1 :]):
        del code[end:]
    if not code:
        raise ValueError("no instructions: this is not what nvdisasm says of a kernel")
    return code


def _branch_targets(instruction: _Instruction) -> list[str]:
    """Labels to which an instruction may branch."""
    if instruction.base not in ("BRA", "BRX", "JMP", "JMX", "WARPSYNC"):
        return []
    targets = re.findall(r"\.L_\w+", instruction.operands)
    if not targets and instruction.base != "WARPSYNC":
        raise ValueError(f"a branch to somewhere unknown: {instruction.opcode} {instruction.operands}")
    return targets


def _ends_block(instruction: _Instruction) -> bool:
    """Whether control never goes on from an instruction to the one that follows it."""
    if instruction.guard or instruction.base not in ("EXIT", "RET", "BRX", "JMX", "JMP", "BRA", "KILL"):
        return False
    # A condition may also stand before the target: BRA.DIV UR4, `(.L_x_1); BRA.U UP0, `(.L_x_1).
    return instruction.base != "BRA" or instruction.operands.lstrip().startswith("`(")


def _count_opcodes(code: Iterable[_Instruction]) -> Opcodes:
    return Opcodes(Counter(instruction.opcode for instruction in code).most_common())


def _find_loops(code: list[_Instruction]) -> list[Loop]:
    """Finds the innermost loops, by address."""
    flow = _ControlFlow(code)
    loops: list[Loop] = []

    def walk(nodes: set[int], edges: dict[int, set[int]]) -> bool:
        """Adds the innermost loops among these blocks, and says whether there were any."""
        looped = False
        for loop in _find_cycles(nodes, edges):
            if flow.is_wait(loop):
                continue
            looped = True
            entries = {b for a in edges if a not in loop for b in flow.successors[a]} & loop or {min(loop)}
            inner = {a: (edges[a] & loop) - entries for a in loop}
            if not walk(loop, inner):
                body = flow.loop_body(loop, inner)
                loops.append(Loop(address=body[0].address, opcodes=_count_opcodes(body)))
        return looped

    walk(set(flow.successors), flow.successors)
    return sorted(loops, key=lambda loop: loop.address)


class _ControlFlow:
    """The basic blocks of some code, numbered by address, and the blocks that may run after each.

    A loop is a set of blocks from each of which each of them is reached.
    """

    def __init__(self, code: list[_Instruction]):
        blocks: list[list[_Instruction]] = []
        for instruction in code:
            if not blocks or instruction.labels or _branch_targets(blocks[-1][-1]) or _ends_block(blocks[-1][-1]):
                blocks.append([])
            blocks[-1].append(instruction)
        numbers = {label: number for number, block in enumerate(blocks) for label in block[0].labels}
        self.blocks = blocks
        self.successors: dict[int, set[int]] = {}
        for number, block in enumerate(blocks):
            self.successors[number] = {numbers[label] for label in _branch_targets(block[-1]) if label in numbers}
            if not _ends_block(block[-1]) and number + 1 < len(blocks):
                self.successors[number].add(number + 1)

    def is_wait(self, loop: set[int]) -> bool:
        """Whether a loop only tries to pass a barrier, or to get registers, until that succeeds."""
        opcodes = _count_opcodes(instruction for number in loop for instruction in self.blocks[number])
        tries = any(opcode.endswith(".TRYWAIT") or ".TRY_ALLOC" in opcode for opcode in opcodes)
        works = any(opcodes.total(name) for name in ("HGMMA", "UTMALDG", "UTMASTG", "MUFU", "LDG", "STG", "LDS", "STS"))
        return tries and not works and sum(opcodes.values()) < 16

    def loop_body(self, loop: set[int], inner: dict[int, set[int]]) -> list[_Instruction]:
        """The instructions of an innermost loop, less waits that follow a first try.

        `inner` has its edges, less those back to where it is entered.
        """
        tries = set[int]().union(*(part for part in _find_cycles(loop, inner) if self.is_wait(part)))
        # After the tries comes a branch back to where the first one was.
        returns = {
            b
            for b in loop - tries
            if len(self.blocks[b]) == 1
            and _ends_block(self.blocks[b][0])
            and all(a in tries for a in loop if b in self.successors[a])
        }
        return [instruction for number in sorted(loop - tries - returns) for instruction in self.blocks[number]]


def _find_cycles(nodes: set[int], edges: dict[int, set[int]]) -> Iterator[set[int]]:
    """Finds the sets of nodes that are reached from each other: strongly connected components with an edge."""
    back: dict[int, set[int]] = defaultdict(set)
    for a in nodes:
        for b in edges[a] & nodes:
            back[b].add(a)

    def reach(start: int, edges: dict[int, set[int]]) -> set[int]:
        reached, frontier = {start}, [start]
        while frontier:
            further = (edges.get(frontier.pop(), set()) & nodes) - reached
            reached |= further
            frontier += further
        return reached

    remaining = set(nodes)
    while remaining:
        start = min(remaining)
        cycle = reach(start, edges) & reach(start, back)
        remaining -= cycle
        if len(cycle) > 1 or start in edges[start]:
            yield cycle


if __name__ == "__main__":
    describe_library("machine_code", __doc__)
