"""The attention kernels run against their meaning in a process of its own, which may hang or break without harm.

`check_kernels` starts `kernel_program` and reads its JSON lines, each within a deadline:

    {"part": "attention", "case": "width 256: ...", "phase": "run"}      as each phase of a case begins
    {"part": "attention", "case": "width 256: ...", "failures": []}      at its end: what disagrees
    {"part": "attention", "case": "width 256: ...", "kernel": 1e-3, "xla": 2e-3}      the seconds of a call

A process that is silent for longer is killed. What it was doing then is named. Nothing here imports JAX.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from gemma2_jax.kernels.shapes import Shape
from gemma2_jax.kernels.tile_sizes import Direction, Tile, Tiles
from gemma2_jax.model_config import ModelConfig

type Part = Literal["attention", "decode"]  # of a sequence to itself, forward and backward; of new tokens to a cache
type Verdict = Literal[
    "agrees", "differs", "hangs", "does not compile", "fails", "not checked", "was timed", "was not timed"
]
PARTS: tuple[Part, ...] = ("attention", "decode")
PATIENCE_SECONDS = 300  # for which the process may be silent: it starts, or compiles, in seconds
RUN_SECONDS = 60  # for which kernels may run, which takes them milliseconds
_REAP_SECONDS = 30  # for which a process that was killed may take to end, while a driver cleans up after it
_REASON_CHARACTERS = 300
_WITHOUT_FAULT: dict[str, Verdict] = {"timing": "was not timed"}  # by phase, of a process that ended there


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kernel with a tile that may be the fastest."""

    direction: Direction
    tile: Tile

    @property
    def part(self) -> Part:
        return "decode" if self.direction == "decode" else "attention"

    def __str__(self) -> str:
        return f"{self.direction} {self.tile}"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is checked.

    Attributes:
      shape: the attention of one device.
      device: which of the host's GPUs, as CUDA_VISIBLE_DEVICES names one; empty: JAX's first.
      interpret: small cases in Pallas's interpreter on CPU, in place of a GPU.
      timed: also time the kernels beside XLA's attention.
      tiles: what the kernels loop over; None for the built-in ones.
      candidates: kernels that are checked and timed in their place, each with a tile of its own: see `kernel_tuning`.
    """

    shape: Shape
    device: str = ""
    interpret: bool = False
    timed: bool = False
    tiles: Tiles | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the check of one case has found."""

    part: Part
    case: str
    verdict: Verdict
    detail: str = ""  # what was off, the compiler's line, or why it was not checked
    kernel_seconds: float | None = None  # of a call, forward and backward; None where it was not timed
    xla_seconds: float | None = None

    @property
    def is_fault(self) -> bool:
        """Whether the kernel must not be used for it."""
        return self.verdict in ("differs", "hangs", "does not compile", "fails")

    def __str__(self) -> str:
        return f"{self.case} {self.verdict}" + (f": {self.detail}" if self.detail else "")


def local_shape(model: ModelConfig, tensor: int) -> Shape:
    """The attention of one of `tensor` shards, with at most two key/value heads, which compile like any number."""
    kv_heads = max(1, model.kv_heads // tensor)
    groups = max(1, model.heads // tensor // kv_heads)
    assert model.attn_softcap is not None, "the kernels' limits ask for a soft cap"
    return Shape(
        heads=groups * min(kv_heads, 2),
        kv_heads=min(kv_heads, 2),
        width=model.head_width,
        scale=model.query_pre_attn_scalar**-0.5,
        softcap=model.attn_softcap,
        window=model.window,
    )


def check_kernels(
    spec: Spec,
    parts: Sequence[Part] = PARTS,
    *,
    run_seconds: float = RUN_SECONDS,
    program: Sequence[str] = ("-m", "gemma2_jax.cluster.kernel_program"),
) -> list[Finding]:
    """Checks the kernels of these parts, each in its cases; the first fault that ends the process ends its part.

    Args:
      spec: what is checked.
      parts: what of it.
      run_seconds: for which a kernel may run before it counts as hanging.
      program: what Python is to run; tests have one whose kernels are broken.
    """
    findings: list[Finding] = []
    left = list(parts)
    while left:
        found = list(follow_process(spec, left, run_seconds, program))
        findings += found
        ended = found[-1] if found and found[-1].verdict in ("hangs", "does not compile", "fails") else None
        # A part that broke the process is over, and those after it get a process of their own.
        left = left[left.index(ended.part) + 1 :] if ended else []
    return findings


def follow_process(spec: Spec, parts: Sequence[Part], run_seconds: float, program: Sequence[str]) -> Iterator[Finding]:
    """Runs the process once; yields what it finds of each case, and at last what ended it early."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, *program, json.dumps(asdict(spec) | {"parts": [*parts]})],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(spec),
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which then kills that one
        )
        last: dict[str, Any] = {"part": parts[0], "case": "the process that checks kernels", "phase": "start"}
        lines = _read_lines(process)
        try:
            while True:
                patience = run_seconds if last.get("phase") == "run" else PATIENCE_SECONDS
                try:
                    line = lines.get(timeout=patience)
                except queue.Empty:
                    yield _describe_silence(last, patience)
                    return
                if not line:
                    break
                message = json.loads(line)
                last = message
                if finding := _read_finding(message):
                    yield finding
        finally:
            _end(process)
        if process.returncode:
            yield _describe_failure(last, process.returncode, errors)


def _read_finding(message: dict[str, Any]) -> Finding | None:
    """What a line of the process has found; None where it says what begins."""
    if "failures" in message:
        detail = "; ".join(message["failures"])
        verdict = "differs" if detail else "agrees"
        return Finding(part=message["part"], case=message["case"], verdict=verdict, detail=detail)
    if "kernel" in message:
        times = {"kernel_seconds": message["kernel"], "xla_seconds": message.get("xla")}
        return Finding(part=message["part"], case=message["case"], verdict="was timed", **times)
    return None


def _environment(spec: Spec) -> dict[str, str]:
    """The variables of the process: it takes one GPU and as little of its memory as it needs, beside a run's."""
    changes = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
    if spec.interpret:
        changes["JAX_PLATFORMS"] = "cpu"
    if spec.device:
        changes["CUDA_VISIBLE_DEVICES"] = spec.device
    return os.environ | changes


def _read_lines(process: subprocess.Popen) -> queue.Queue[bytes]:
    """The lines of the process that are JSON, as they come, and an empty one at its end."""
    lines: queue.Queue[bytes] = queue.Queue()
    stream = process.stdout
    assert stream is not None

    def read() -> None:
        for line in stream:
            if line.startswith(b'{"part"'):  # libraries print too
                lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _end(process: subprocess.Popen) -> None:
    """Waits for a process that has closed its output, and kills one that has not."""
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_REAP_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


def _describe_silence(last: dict[str, Any], patience: float) -> Finding:
    """What a process that was killed has found: a kernel that hangs, unless it was not at a kernel."""
    phase = last.get("phase", "the end")
    doing = {"run": "it did not end", "compilation": "its compilation did not end"}.get(phase)
    if doing is None:
        verdict = _WITHOUT_FAULT.get(phase, "not checked")
        reason = f"its {phase} took longer than {patience:g} s"
        return Finding(part=last["part"], case=last["case"], verdict=verdict, detail=reason)
    detail = f"{doing} within {patience:g} s, and was killed"
    return Finding(part=last["part"], case=last["case"], verdict="hangs", detail=detail)


def _describe_failure(last: dict[str, Any], status: int, errors: IO[bytes]) -> Finding:
    """What a process that broke has found: by its phase and what it wrote last."""
    errors.seek(0)
    reason = find_reason(errors.read().decode(errors="replace"))
    if status < 0:
        reason = f"the process was ended by {signal.Signals(-status).name}" + (f" ({reason})" if reason else "")
    phase = last.get("phase", "the end")
    faults: dict[str, Verdict] = {"compilation": "does not compile", "run": "fails"}
    verdict = faults.get(phase, _WITHOUT_FAULT.get(phase, "not checked"))
    if verdict in faults.values() and re.search("RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", reason):
        verdict, reason = "not checked", f"no memory was left for it on the GPU ({reason})"
    return Finding(part=last["part"], case=last["case"], verdict=verdict, detail=reason)


def find_reason(text: str) -> str:
    """The line of standard error that says why a process ended: the assembler's, else the last exception's."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assembler = [line for line in lines if re.match(r"ptxas\b.*\b(error|fatal)", line)]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Fault)\w*:", line)]
    found = next(iter(assembler or raised[-1:] or lines[-1:]), "")
    return found[:_REASON_CHARACTERS]
