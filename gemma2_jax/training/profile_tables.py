"""Where the time of traced steps went, read from a trace: by named scope, by operation, and how much of it only waited.

A trace has the operations of the compiled step by the names that XLA gave them, such as fusion.12, and when each ran.
The program has the `jax.named_scope`s around each. `profiling` writes them beside the trace as scopes.json, when the
program is at hand; nothing here needs a device, the run, or another package than JAX.

Every moment between the first operation and the last is counted once. While operations compute, it is theirs, in equal
shares where several run at a time. Else, while collectives run, it is communication that nothing hides; else it is that
of copies; else the device is idle. So the parts add up to the step.
"""

import itertools
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SCOPES_FILE = "scopes.json"
# Names in the paths of scopes, in the order of tables. What else a path has is JAX's: loops, and transformations.
SCOPES = (
    "embedding", "layers", "attention", "mlp", "norm", "qkv", "attend", "o", "gate_up", "down", "final_norm", "loss",
    "optimizer", "metrics",
)  # fmt: skip
KINDS = ("computing", "communication", "copies")  # the earlier hides the later
TOP_OPERATIONS = 10

_CONTAINERS = re.compile(r"(while|conditional|call)(\.|$)")  # whose operations have events of their own
_COLLECTIVES = re.compile(r"(ragged-)?(all-(gather|reduce|to-all)|reduce-scatter|collective-(permute|broadcast))")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")

Scope = tuple[str, ...]  # of SCOPES, from the outermost; "backward" comes first where it is of the backward pass


@dataclass(frozen=True)
class Operation:
    """What ran on a device under one name."""

    name: str
    scope: Scope
    kind: str  # of KINDS


@dataclass(frozen=True)
class Event:
    """An operation that ran once; times are in ns."""

    start: float
    end: float
    operation: Operation


@dataclass(frozen=True)
class DeviceTimes:
    """How one device spent the steps of a trace; times are in ns, of all steps."""

    device: str
    total: float
    spent: dict[Operation, float]  # the time that is counted as the operation's; with `idle` it adds up to `total`
    counts: Counter[Operation]  # how often it ran
    idle: float
    communication: float  # the time in which any collective ran, whether or not something else did

    def sum_kind(self, kind: str) -> float:
        """The time that is counted as that of operations of a kind; of communication, what nothing hides."""
        return sum(time for operation, time in self.spent.items() if operation.kind == kind)


@dataclass(frozen=True)
class Profile:
    """The times of a trace."""

    folder: Path  # where the trace is
    first_step: int
    steps: int
    devices: list[DeviceTimes]  # of the process that was traced


def scopes_json(program: str, first_step: int, steps: int) -> str:
    """What is kept of a compiled program, its HLO as text, to read a trace of so many steps by."""
    module = re.match(r"HloModule ([\w.\-]+)", program)
    scopes = {name: "/".join(scope) for name, scope in read_scopes(program).items()}
    fields = {"module": module[1] if module else "", "first_step": first_step, "steps": steps, "scopes": scopes}
    return json.dumps(fields, indent=0)


def read_scopes(program: str) -> dict[str, Scope]:
    """The scope of each instruction of a program, its HLO as text.

    One that XLA made itself has none of its own. It gets what the scopes of the instructions inside it, or else of
    those around it in its computation, have in common.
    """
    scopes: dict[str, Scope] = {}
    called: dict[str, list[str]] = {}
    members: dict[str, list[str]] = defaultdict(list)
    computation, homes = "", {}
    for line in program.splitlines():
        if found := _INSTRUCTION.match(line):
            name, op_name = found[1], re.search(r'op_name="([^"]*)"', line)
            scopes[name] = parse_scope(op_name[1]) if op_name else ()
            called[name] = re.findall(r"calls=%?([\w.\-]+)", line)
            members[computation].append(name)
            homes[name] = computation
        elif found := _COMPUTATION.match(line):
            computation = found[1]
    shared = {name: _common_scope(scopes[member] for member in inside) for name, inside in members.items()}
    return {
        name: scope or _common_scope(shared.get(inner, ()) for inner in called[name]) or shared[homes[name]]
        for name, scope in scopes.items()
    }


def parse_scope(op_name: str) -> Scope:
    """The scope in the name that JAX gives an operation, such as jit(train_step)/while/body/jvp(mlp)/down/dot."""
    parts = re.split(r"[/()]+", op_name)
    scope = tuple(part for part in parts if part in SCOPES)
    is_backward = "transpose(" in op_name or "backward" in parts
    return ("backward", *scope) if scope and is_backward else scope


def _common_scope(scopes: Iterable[Scope]) -> Scope:
    columns = zip(*filter(None, scopes), strict=False)
    common = tuple(names[0] for names in itertools.takewhile(lambda names: len({*names}) == 1, columns))
    return () if common == ("backward",) else common


def find_trace(folder: Path) -> Path:
    """The folder of the newest trace of a run, by its working directory, or in a folder.

    Raises ValueError where there is none that can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the working directory of a run")
    root = folder / "profile" if (folder / "profile").is_dir() else folder
    root = root / "process-0" if (root / "process-0").is_dir() else root
    found = sorted(root.rglob(SCOPES_FILE), key=lambda path: path.parent.name)
    if not found:
        raise ValueError(
            f"there is no trace with {SCOPES_FILE} in {root}; train with --profile.steps 3, or create the file "
            f"profile.request in the working directory of a run under way"
        )
    return found[-1].parent


def read_profile(folder: Path) -> Profile:
    """The times of the trace in a folder, as `find_trace` returns it.

    Raises ValueError where it has no operations, or is damaged.
    """
    file = next(folder.glob("*.xplane.pb"), None)
    if file is None:
        raise ValueError(f"{folder} has no trace, which is called NAME.xplane.pb; trace the run again")
    try:
        fields = json.loads((folder / SCOPES_FILE).read_text())
        scopes = {name: tuple(scope.split("/")) if scope else () for name, scope in fields["scopes"].items()}
        module, first_step, steps = str(fields["module"]), int(fields["first_step"]), int(fields["steps"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / SCOPES_FILE} is not as it was written; trace the run again") from error
    from jax.profiler import ProfileData  # here, as a planner reads scopes before JAX may be imported

    try:
        data = ProfileData.from_file(str(file))
    except RuntimeError as error:
        raise ValueError(f"{file} is not as it was written ({error}); trace the run again") from error
    events = read_events(data, module, scopes)
    if not events:
        raise ValueError(
            f"{file} has no operations of a device; on GPUs, CUPTI may lack the right to count "
            f"(https://developer.nvidia.com/ERR_NVGPUCTRPERM)"
        )
    devices = [divide_time(device, events[device]) for device in sorted(events)]
    return Profile(folder=folder, first_step=first_step, steps=steps, devices=devices)


def read_events(data: Any, module: str, scopes: Mapping[str, Scope]) -> dict[str, list[Event]]:
    """The events of each device in a `ProfileData`. `scopes` are those of the operations of the program `module`."""
    # XLA names the kernel of fusion.12 fusion_12. In a CUDA graph that may be all that tells which operation it is of.
    scopes_of_kernels = {name.replace(".", "_").replace("-", "_"): scope for name, scope in scopes.items()}
    events: dict[str, list[Event]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jaxlib's types; as an error it would abort the process
        listed = list(_list_events(data))
    for device, event, stats in listed:
        name = str(stats.get("hlo_op", event.name))
        if _CONTAINERS.match(name):
            continue
        program = str(stats.get("hlo_module", module))
        scope = scopes.get(name, scopes_of_kernels.get(event.name, ())) if program == module else (program,)
        operation = Operation(name, scope, _find_kind(name, event.name))
        events[device].append(Event(event.start_ns, event.end_ns, operation))
    return events


def _list_events(data: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Device, event and what the trace tells of it: of GPUs what ran on their streams, else operations of the CPU."""
    planes = list(data.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU:")]
    for plane in gpus:
        device = plane.name.removeprefix("/device:").replace(":", " ")
        for line in plane.lines:
            if line.name.startswith("Stream #"):
                yield from ((device, event, dict(event.stats)) for event in line.events)
    for plane in planes:
        if gpus or plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            if line.name != "python":
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" in stats:
                        yield f"CPU {stats.get('device_ordinal', 0)}", event, stats


def _find_kind(name: str, kernel: str) -> str:
    if _COLLECTIVES.match(name) or "nccl" in kernel.lower():
        return "communication"
    return "copies" if kernel.startswith(("Memcpy", "Memset")) else "computing"


def divide_time(device: str, events: list[Event]) -> DeviceTimes:
    """Divides the time from the first event to the last among operations, as the module's description says."""
    bounds = sorted([(e.start, 1, i) for i, e in enumerate(events)] + [(e.end, 0, i) for i, e in enumerate(events)])
    running: dict[str, set[int]] = {kind: set() for kind in KINDS}
    spent: dict[Operation, float] = defaultdict(float)
    idle = communication = 0.0
    before = bounds[0][0]
    for time, starts, index in bounds:
        length = time - before
        if length > 0:
            counted = next((running[kind] for kind in KINDS if running[kind]), set())
            for member in counted:
                spent[events[member].operation] += length / len(counted)
            idle += 0 if counted else length
            communication += length if running["communication"] else 0
        before = time
        group = running[events[index].operation.kind]
        group.add(index) if starts and events[index].end > time else group.discard(index)
    return DeviceTimes(
        device=device,
        total=bounds[-1][0] - bounds[0][0],
        spent=spent,
        counts=Counter(event.operation for event in events),
        idle=idle,
        communication=communication,
    )


def list_scopes(times: DeviceTimes) -> dict[str, tuple[float, float]]:
    """The time (ns) of each scope forward and backward, and of what has none; these add up to the total."""
    sums: dict[Scope, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for operation, time in times.spent.items():
        if operation.kind == "computing":
            is_backward = operation.scope[:1] == ("backward",)
            sums[operation.scope[is_backward:]][is_backward] += time
    order = {name: number for number, name in enumerate(SCOPES)}
    named = sorted(filter(None, sums), key=lambda scope: [order.get(name, len(order)) for name in scope])
    rows = {"/".join(scope): (sums[scope][0], sums[scope][1]) for scope in named}
    rows["(no scope)"] = (sums[()][0] + sums[()][1], 0.0)
    rows["communication that nothing hides"] = (times.sum_kind("communication"), 0.0)
    rows["copies that nothing hides"] = (times.sum_kind("copies"), 0.0)
    rows["idle"] = (times.idle, 0.0)
    return {name: row for name, row in rows.items() if any(row)}


def print_tables(profile: Profile) -> None:
    """Prints the times of the first device by scope and by operation, and the sums of each device."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    times, last = profile.devices[0], profile.first_step + profile.steps - 1
    steps = f"Step {last}" if profile.steps == 1 else f"Steps {profile.first_step} to {last}"
    title = f"\n{steps} of {profile.folder}, on {times.device}; ms are those of one step."
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    for table in (_scope_table(times, profile.steps), _operation_table(times, profile.steps), _device_table(profile)):
        console.print(table, highlight=False, markup=False)


def _scope_table(times: DeviceTimes, steps: int) -> Table:
    table = _table("scope", "forward", "backward", "ms", "share")
    for name, (forward, backward) in list_scopes(times).items():
        parts = (_format_ms(forward, steps), _format_ms(backward, steps)) if backward else ("", "")
        whole = forward + backward
        table.add_row(name, *parts, _format_ms(whole, steps), f"{whole / times.total:.1%}")
    table.add_section()
    table.add_row("step", "", "", _format_ms(times.total, steps), "100.0%")
    return table


def _operation_table(times: DeviceTimes, steps: int) -> Table:
    table = _table("operation", "times", "ms", "share", "scope")
    table.columns[-1].justify = "left"
    for operation, time in sorted(times.spent.items(), key=lambda item: -item[1])[:TOP_OPERATIONS]:
        count = f"{times.counts[operation] / steps:,.0f}"
        scope = "/".join(operation.scope)
        table.add_row(operation.name, count, _format_ms(time, steps), f"{time / times.total:.1%}", scope)
    return table


def _device_table(profile: Profile) -> Table:
    table = _table("device", "ms", "computing", "communication", "that nothing hides", "copies", "idle")
    for times in profile.devices:
        exposed, copies = times.sum_kind("communication"), times.sum_kind("copies")
        parts = times.total, times.sum_kind("computing"), times.communication, exposed, copies, times.idle
        table.add_row(times.device, *(_format_ms(part, profile.steps) for part in parts))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _format_ms(time: float, steps: int) -> str:
    return f"{time / steps / 1e6:,.2f}"
