"""What is known of the attention kernels on the devices at hand: a file for each kind of device and all that compiles.

A kernel that was never run on a GPU, with this driver and these packages, is not trusted: `examine` has it run once
(`kernel_check`), before the first step, and keeps what was found as kernels/KEY.json in the package's cache folder,
which hosts may share. The key is of the device's kind, its driver, the versions of what compiles, the kernels' own
source and the shape of attention: where one of them changes, the kernels are run again. Processes of one run agree by
the worst of what they found.

The tiles that are the fastest on a device are kept beside it, once they were timed there (`tune`): `find_tiles` answers
which tiles the kernels take.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax import command_line, kernels
from gemma2_jax.cluster import hosts, platforms
from gemma2_jax.cluster.kernel_check import PARTS, Finding, Part, Spec, check_kernels, local_shape
from gemma2_jax.cluster.kernel_tuning import choose_tiles, list_candidates, try_candidates
from gemma2_jax.kernels.tile_sizes import TILES, Tiles, read_tiles
from gemma2_jax.model import attention
from gemma2_jax.model.attention.choice import Experience
from gemma2_jax.model_config import ModelConfig

TRAINING: tuple[Part, ...] = ("attention",)
INFERENCE: tuple[Part, ...] = PARTS
# Packages that make machine code of a kernel, or run it.
_COMPILERS = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime"),
)
CHECK = "python -m gemma2_jax.check"
TUNE = f"{CHECK} --tune"
_known: dict[tuple, Experience] = {}  # of this process, which asks for each model it makes


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was found on one kind of device.

    Attributes:
      environment: what the key is of, in words.
      time: when it was found.
      findings: of each case.
    """

    environment: dict[str, Any]
    time: str
    findings: tuple[Finding, ...]

    def describe_fault(self, parts: Sequence[Part]) -> str:
        """Why the kernels must not be used for these parts, as a verb and its object; empty where they may be."""
        faults = [finding for finding in self.findings if finding.part in parts and finding.is_fault]
        if not faults:
            return ""
        more = f" and in {len(faults) - 1} more" if len(faults) > 1 else ""
        return f"failed on this device on {self.time[:10]} ({faults[0]}{more}; {CHECK} runs it again)"

    def describe_gap(self, parts: Sequence[Part]) -> str | None:
        """Why some of these parts were not checked, for a reason that is not the kernels'; None where all were."""
        reasons = [finding for finding in self.findings if finding.verdict == "not checked"]
        checked = {finding.part for finding in self.findings} - {finding.part for finding in reasons}
        if {*parts} <= checked:
            return None
        return reasons[0].detail if reasons else "the check ended early"

    def time_ratio(self, parts: Sequence[Part]) -> float | None:
        """The kernels' time over that of XLA's attention, in all that was timed; None where nothing was."""
        timed = [finding for finding in self.findings if finding.part in parts and finding.verdict == "was timed"]
        kernel, xla = (sum(getattr(finding, name) for finding in timed) for name in ("kernel_seconds", "xla_seconds"))
        return kernel / xla if timed else None


@dataclass(frozen=True, kw_only=True)
class TileRecord:
    """The tiles that were the fastest on one kind of device.

    Attributes:
      environment: what the key is of, in words.
      time: when they were timed.
      tiles: the fastest that agree with float32.
      findings: of each candidate.
    """

    environment: dict[str, Any]
    time: str
    tiles: Tiles
    findings: tuple[Finding, ...]


def describe_environment(spec: Spec, device: Any) -> dict[str, Any]:
    """All that a record depends on."""
    shape = asdict(spec.shape)
    return {
        "device": device.device_kind,
        "driver": platforms.find_driver() or "none",
        "versions": {name: version for name in _COMPILERS if (version := _find_version(name))},
        "sources": _digest_sources(),
        "shape": shape | {"groups": spec.shape.heads // spec.shape.kv_heads},
        "interpreted": spec.interpret,
        "tiles": asdict(spec.tiles) if spec.tiles else None,
    }


def _describe_tuning(spec: Spec, device: Any) -> dict[str, Any]:
    """All that a record of tiles depends on."""
    return describe_environment(replace(spec, tiles=None), device) | {"tiles": "measured"}


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest_sources() -> str:
    """A digest of the kernels' source, and of what holds them against their meaning."""
    folders = [Path(package.__file__ or "").parent for package in (kernels, attention)]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def record_path(environment: dict[str, Any]) -> Path:
    """Where the record of such an environment is kept."""
    key = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()
    kind = re.sub(r"\W+", "-", environment["device"]).strip("-")
    return platforms.cache_root() / "kernels" / f"{kind}-{key[:16]}.json"


def read_record(environment: dict[str, Any]) -> Record | None:
    """The record of an environment; None where there is none that can be read."""
    try:
        content = json.loads(record_path(environment).read_text())
        findings = _read_findings(content["findings"])
        return Record(environment=content["environment"], time=content["time"], findings=findings)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_findings(content: list[dict[str, Any]]) -> tuple[Finding, ...]:
    names = {field.name for field in fields(Finding)}
    return tuple(Finding(**{name: value for name, value in finding.items() if name in names}) for finding in content)


def read_tile_record(spec: Spec, device: Any) -> TileRecord | None:
    """The record of the fastest tiles on a device; None where there is none. Raises ValueError where it is damaged."""
    path = record_path(_describe_tuning(spec, device))
    try:
        content = json.loads(path.read_text())
        return TileRecord(
            environment=content["environment"],
            time=str(content["time"]),
            tiles=read_tiles(content["tiles"], spec.shape.width),
            findings=_read_findings(content["findings"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the record of tiles {path} cannot be read; {TUNE} makes it again") from error


def write_record(record: Record | TileRecord) -> None:
    """Keeps a record, which appears whole. Where there is no room for it, the next run checks again."""
    path = record_path(record.environment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(asdict(record), file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        command_line.notify(f"what was found of the kernels is not kept: {command_line.describe_error(error)}")


@dataclass(frozen=True, kw_only=True)
class TileChoice:
    """Which tiles the kernels take.

    Attributes:
      tiles: those that a device was timed with; None for the built-in ones.
      source: where they come from, to follow "tiles".
    """

    tiles: Tiles | None = None
    source: str = f"built in, none timed on this device, which {TUNE} does"


def find_tiles(spec: Spec, device: Any) -> TileChoice:
    """Which tiles the kernels take on a device: those that were the fastest there, else the built-in ones."""
    try:
        record = read_tile_record(spec, device)
    except ValueError as error:
        return TileChoice(source=f"built in, as {error}")
    return TileChoice() if record is None else _choose_recorded(record, spec.shape.width)


def _choose_recorded(record: TileRecord, width: int) -> TileChoice:
    source = f"timed on this device on {record.time[:10]}: "
    if record.tiles == TILES[width]:
        return TileChoice(source=f"{source}the built-in ones are the fastest")
    return TileChoice(tiles=record.tiles, source=f"{source}{record.tiles}")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What timing the tiles has found.

    Attributes:
      findings: of each candidate.
      choice: the tiles that the kernels take from now on.
      record: what the check of the kernels with them has found, which is kept too.
    """

    findings: tuple[Finding, ...]
    choice: TileChoice
    record: Record


def tune(spec: Spec, device: Any, **options: Any) -> Tuning:
    """Times the kernels with every legal tile, and keeps the fastest if the kernels with them pass the whole check.

    `options` are those of `check_kernels`.
    """
    width = spec.shape.width
    candidates = spec.candidates or list_candidates(width)
    findings = tuple(try_candidates(replace(spec, candidates=candidates, tiles=None), **options))
    spec = replace(spec, candidates=(), tiles=None)
    if not any(finding.verdict == "was timed" for finding in findings):
        reason = f" ({findings[0]})" if findings else ""
        choice = TileChoice(source=f"built in, as none could be timed on this device{reason}")
        return Tuning(findings=findings, choice=choice, record=run_check(spec, device, **options))
    record = TileRecord(
        environment=_describe_tuning(spec, device),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        tiles=choose_tiles(width, findings),
        findings=findings,
    )
    choice = _choose_recorded(record, width)
    check = run_check(replace(spec, tiles=choice.tiles), device, **options)
    if choice.tiles and (fault := check.describe_fault(PARTS) or check.describe_gap(PARTS)):
        choice = TileChoice(source=f"built in, as the kernels with the fastest ones, {choice.tiles}, {fault}")
        return Tuning(findings=findings, choice=choice, record=run_check(spec, device, **options))
    write_record(record)
    return Tuning(findings=findings, choice=choice, record=check)


def run_check(spec: Spec, device: Any, **options: Any) -> Record:
    """Checks the kernels on a device and keeps what was found, unless something else stood in the way of it.

    Times that are known are kept where the kernels are not timed now. `options` are those of `check_kernels`.
    """
    environment = describe_environment(spec, device)
    findings = check_kernels(spec, **options)
    before = read_record(environment)
    if before and not spec.timed:
        findings += [finding for finding in before.findings if "timed" in finding.verdict]
    time = datetime.now(UTC).isoformat(timespec="seconds")
    record = Record(environment=environment, time=time, findings=tuple(findings))
    if record.describe_gap(PARTS) is None:
        write_record(record)
    return record


def examine(
    model: ModelConfig, mesh: Mesh, parts: tuple[Part, ...], *, tunes: bool = False, **options: Any
) -> Experience:
    """What is known of the kernels on the devices of a mesh. They are run where nothing is.

    Every process of the mesh calls it, as they agree by the worst of what they know; the first call may take minutes.
    Of devices that are only described nothing is known. `tunes` has tiles timed where none were. `options` are those of
    `check_kernels`.
    """
    if mesh.devices.flat[0] not in jax.devices():
        return Experience()
    device = _local_device(mesh)
    spec = Spec(shape=local_shape(model, mesh.shape["tensor"]), device=name_device(device))
    spec_key = (spec.shape, parts, device.process_index, mesh.devices.size)
    if spec_key not in _known:
        if tunes:
            _tune_first(spec, mesh, options)
        choice = _agree_on_tiles(spec, mesh)
        _known[spec_key] = _examine_together(replace(spec, tiles=choice.tiles), mesh, parts, choice, options)
    return _known[spec_key]


def _list_processes(mesh: Mesh) -> list[int]:
    return sorted({each.process_index for each in mesh.devices.flat})


def _tune_first(spec: Spec, mesh: Mesh, options: dict[str, Any]) -> None:
    """Has the first process of the mesh time tiles where it knows of none; the others take what it finds."""
    device = _local_device(mesh)
    if jax.process_index() != _list_processes(mesh)[0]:
        return
    with contextlib.suppress(ValueError):  # a record that is damaged is made again
        if read_tile_record(spec, device) is not None:
            return
    count = len(list_candidates(spec.shape.width))
    command_line.notify(
        f"the attention kernels are timed on {device.device_kind} with each of {count} tiles, which takes some minutes"
    )
    choice = tune(spec, device, **options).choice
    command_line.notify(f"tiles {choice.source}")


def _agree_on_tiles(spec: Spec, mesh: Mesh) -> TileChoice:
    """Which tiles all processes of the mesh take: what its first one knows, where their devices are alike.

    Programs of one step must be the same in all of them.
    """
    device = _local_device(mesh)
    own = find_tiles(spec, device)
    processes = _list_processes(mesh)
    if len(processes) == 1:
        return own
    alike = {"device": device.device_kind, "driver": platforms.find_driver()}
    answer = json.dumps({"alike": alike, "tiles": asdict(own.tiles) if own.tiles else None, "source": own.source})
    given = [json.loads(each) for each in hosts.gather_answers(f"attention_tiles/{len(_known)}", answer)]
    answers = [given[index] for index in processes]
    if any(each["alike"] != answers[0]["alike"] for each in answers):
        return TileChoice(source="built in, as the devices of the processes differ")
    tiles = answers[0]["tiles"]
    return TileChoice(tiles=read_tiles(tiles, spec.shape.width) if tiles else None, source=answers[0]["source"])


def _examine_together(
    spec: Spec, mesh: Mesh, parts: tuple[Part, ...], choice: TileChoice, options: dict[str, Any]
) -> Experience:
    device = _local_device(mesh)
    record = read_record(describe_environment(spec, device))
    if record is None:
        if jax.process_index() == 0:
            command_line.notify(
                f"the attention kernels were never run on {device.device_kind} with this driver and these versions: "
                "they are checked first, which takes a minute or more"
            )
        record = run_check(spec, device, **options)
    own = _judge(record, parts)
    answers = [json.dumps(asdict(own))]
    if len(_list_processes(mesh)) > 1:
        answers = hosts.gather_answers(f"attention_kernels/{len(_known)}", answers[0])
    worst = _find_worst(Experience(**json.loads(answer)) for answer in answers)
    return replace(worst, tiles=choice.tiles, tiles_source=choice.source)


def _local_device(mesh: Mesh) -> Any:
    """The first device of this process, of those of the mesh if it has one there."""
    return (mesh.local_devices or jax.local_devices())[0]


def _judge(record: Record, parts: tuple[Part, ...]) -> Experience:
    """What a record says of these parts."""
    fault = record.describe_fault(parts)
    if not fault and (gap := record.describe_gap(parts)) is not None:
        fault = f"could not be checked on this device ({gap}; run {CHECK} while nothing else uses the device)"
    return Experience(was_run=True, fault=fault, time_ratio=record.time_ratio(parts))


def _find_worst(experiences: Iterable[Experience]) -> Experience:
    """That of the process with a fault; else of the one where the kernels are slowest, or were not timed."""

    def badness(experience: Experience) -> tuple[bool, bool, float]:
        ratio = experience.time_ratio
        return bool(experience.fault), ratio is None, ratio or 0.0

    return max(experiences, key=badness)


def name_device(device: Any) -> str:
    """A device of this process as CUDA_VISIBLE_DEVICES names it; empty on platforms that do not know it."""
    return platforms.name_gpu(device.local_hardware_id) if device.platform == "gpu" else ""
