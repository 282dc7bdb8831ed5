"""The GPUs of this host as nvidia-smi tells of them: kinds, clocks, errors of memory, what others take, peer access.

It is asked before JAX has taken the memory. What it does not know it writes in many ways, all of which are None here.
"""

import csv
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence

from gemma2_jax.cluster.findings import Row, skip

_SECONDS = 20  # that nvidia-smi may take; it hangs where a driver does
_FIELDS = (
    *("index", "name", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm", "compute_mode"),
    *("ecc.mode.current", "ecc.errors.uncorrected.volatile.total"),
)
_MANY_BYTES = 0.05  # of a GPU's memory that others may take: what a run leaves free

type Gpu = dict[str, str | None]  # by field


def run_smi(arguments: Sequence[str]) -> str:
    """What nvidia-smi prints. Raises OSError with a sentence where it is not there, fails or does not answer."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise OSError("there is no nvidia-smi") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"nvidia-smi did not answer within {_SECONDS} s; the driver may hang: see dmesg") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(f"nvidia-smi failed: {said[-1] if said else f'status {done.returncode}'}")
    return done.stdout


def parse_gpus(text: str, fields: Sequence[str] = _FIELDS) -> list[Gpu]:
    """The GPUs of nvidia-smi's comma-separated lines; of a line of other fields, those that it has."""
    gpus = []
    for values in csv.reader(text.strip().splitlines(), skipinitialspace=True):
        gpus.append({name: _clean(value) for name, value in zip(fields, values, strict=False)})
    return [gpu for gpu in gpus if gpu.get("name")]


def _clean(value: str) -> str | None:
    """A value, or None where it says that there is none, as [N/A] and [Not Supported] do."""
    value = value.strip()
    return None if re.fullmatch(r"\[?(N/A|Not Supported|Unknown|Not Found|)\]?", value, re.IGNORECASE) else value


def parse_peers(text: str) -> list[tuple[str, str, str]]:
    """Pairs of GPUs without peer access, as nvidia-smi's matrix (topo -p2p r) marks them: ("GPU0", "GPU1", "NS")."""
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    header = next((row for row in rows if row[:2] == ["GPU0", "GPU1"] or row == ["GPU0"]), [])
    lines = [row for row in rows if row and row[0] in header and len(row) == len(header) + 1]
    return [
        (row[0], name, mark)
        for row in lines
        for name, mark in zip(header, row[1:], strict=True)
        if mark not in ("OK", "X") and row[0] < name
    ]


def check_gpus(run: Callable[[Sequence[str]], str] = run_smi) -> list[Row]:
    """Rows of the GPUs; skipped where there are none."""
    try:
        gpus = parse_gpus(run([f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]))
    except OSError as error:
        text = str(error)
        if text == "there is no nvidia-smi":
            return [skip("GPUs", text)]
        return [
            Row(subject="GPUs", found="", verdict="wrong", reason=text, advice="mend the driver, or take another host")
        ]
    if not gpus:
        return [skip("GPUs", "nvidia-smi lists none")]
    return [_check_kinds(gpus), _check_clocks(gpus), _check_errors(gpus), _check_memory(gpus), _check_peers(gpus, run)]


def _check_kinds(gpus: list[Gpu]) -> Row:
    kinds = Counter(str(gpu["name"]) for gpu in gpus)
    found = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    modes = {mode for gpu in gpus if (mode := gpu.get("compute_mode")) and mode != "Default"}
    if modes:
        return Row(
            subject="GPUs",
            found=found,
            verdict="wrong",
            reason=f"their compute mode is {', '.join(sorted(modes))}, so that kernels cannot be checked beside a run",
            advice="nvidia-smi -c DEFAULT, as root",
        )
    if len(kinds) > 1:
        return Row(
            subject="GPUs",
            found=found,
            verdict="slow",
            reason="they are of several kinds, and the slowest sets the pace",
            advice="CUDA_VISIBLE_DEVICES chooses those of one kind",
        )
    return Row(subject="GPUs", found=found)


def _check_clocks(gpus: list[Gpu]) -> Row:
    most = [_number(gpu.get("clocks.max.sm")) for gpu in gpus]
    known = [clock for clock in most if clock is not None]
    if not known:
        return skip("clocks", "nvidia-smi does not tell")
    now = [str(gpu.get("clocks.sm")) for gpu in gpus]
    found = f"up to {max(known):g} MHz; now, at rest, {', '.join(dict.fromkeys(now))}"
    if min(known) < max(known):
        share = min(known) / max(known)
        return Row(
            subject="clocks",
            found=found,
            verdict="slow",
            reason=f"one may reach {min(known):g} MHz only, {share:.0%} of the others",
            advice="nvidia-smi -q -d CLOCK shows which; nvidia-smi -rgc, as root, lifts a limit",
        )
    return Row(subject="clocks", found=found)


def _check_errors(gpus: list[Gpu]) -> Row:
    name = "ecc.errors.uncorrected.volatile.total"
    broken = [f"GPU {gpu['index']}: {gpu[name]}" for gpu in gpus if gpu.get(name) not in (None, "0")]
    modes = {str(gpu.get("ecc.mode.current") or "not told") for gpu in gpus}
    found = f"ECC {', '.join(sorted(modes))}"
    if broken:
        return Row(
            subject="memory errors",
            found=found,
            verdict="wrong",
            reason=f"errors that were not corrected since the driver was loaded: {'; '.join(broken)}",
            advice="have the GPU reset or replaced, or leave it out with CUDA_VISIBLE_DEVICES",
        )
    if modes == {"Disabled"}:
        advice = "nvidia-smi -e 1, as root, and a restart turn it on"
        return Row(subject="memory errors", found=f"{found}, so that none is noticed", advice=advice)
    return Row(subject="memory errors", found=found)


def _check_memory(gpus: list[Gpu]) -> Row:
    sizes = [(_number(gpu.get("memory.total")), _number(gpu.get("memory.used")), gpu["index"]) for gpu in gpus]
    known = [(total, used, index) for total, used, index in sizes if total and used is not None]
    if not known:
        return skip("GPU memory", "nvidia-smi does not tell")
    found = f"{min(total - used for total, used, _ in known):,.0f} of {min(known)[0]:,.0f} MiB free, of the fullest"
    taken = [f"GPU {index}: {used:,.0f} MiB" for total, used, index in known if used > _MANY_BYTES * total]
    if taken:
        return Row(
            subject="GPU memory",
            found=found,
            verdict="wrong",
            reason=f"others take some of it: {'; '.join(taken)}",
            advice="nvidia-smi lists the processes; end them, or take other GPUs",
        )
    return Row(subject="GPU memory", found=found)


def _check_peers(gpus: list[Gpu], run: Callable[[Sequence[str]], str]) -> Row:
    if len(gpus) == 1:
        return skip("peer access", "there is one GPU")
    try:
        text = run(["topo", "-p2p", "r"])
    except OSError as error:
        return skip("peer access", str(error))
    if not re.search(r"^\s*GPU0\s", text, re.MULTILINE):
        return skip("peer access", "nvidia-smi topo prints no matrix that is known")
    if without := parse_peers(text):
        pairs = ", ".join(f"{one} and {other} ({mark})" for one, other, mark in without[:4])
        return Row(
            subject="peer access",
            found=f"{len(without)} pair(s) without it",
            verdict="slow",
            reason=f"{pairs}: what they exchange goes through the host's memory",
            advice="keep tensor and fsdp within GPUs that have it; nvidia-smi topo -m shows the links",
        )
    return Row(subject="peer access", found="each GPU reads the memory of every other")


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
