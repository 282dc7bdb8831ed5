"""What `python -m gemma2_jax.check` looks at before a run is paid for, from the driver to three steps of the program.

Each part returns rows of one table (`cluster.findings`). What needs the GPUs' memory comes last: a process of its own
checks the kernels before this one has taken it. Of several processes each looks at its own host and devices,
and process 0 gathers what is not as it should be.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma2_jax import command_line
from gemma2_jax.cluster import disks, gpus, hosts, kernel_records, rates, software
from gemma2_jax.cluster.findings import Row, skip
from gemma2_jax.cluster.kernel_check import Finding, Spec, check_kernels, local_shape
from gemma2_jax.config import Config
from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.mesh import check_mesh, make_mesh
from gemma2_jax.model.attention.choice import device_architecture
from gemma2_jax.training.loop import compile_step, place_batch
from gemma2_jax.training.step import BATCH_DTYPES, Program
from gemma2_jax.training.tokenizer import without_texts

_HUB_SECONDS = 30  # for which the Hub may not answer
_PART_SECONDS = 1800  # that one part of the checks may take, after which this process ends
_STEPS = 3
_CPU_PARAMETERS = 100_000_000  # of the largest model whose steps a CPU takes in a time that one waits for
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".distcp")


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What the parts look at: a run, its mesh, and its program, of which nothing is in memory yet."""

    config: Config
    mesh: Mesh
    program: Program

    @property
    def device(self) -> Any:
        return jax.local_devices()[0]


def run_checks(config: Config) -> list[Row]:
    """All rows, of all processes: of those but process 0 what is not ok.

    Raises ValueError where the run cannot be carried out on these devices at all.
    """
    rows = [*software.check_software(software.find_versions()), *gpus.check_gpus()]
    rows += [check_hub(config.init)]
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh)
    kernel_rows = _time_part("the attention kernels", lambda: check_attention(config, mesh))
    if any(row.verdict == "wrong" for row in kernel_rows):  # by name they would end it here, without a table
        config = replace(config, compute=replace(config.compute, attention="auto"))
    checkup = Checkup(config=config, mesh=mesh, program=Program(without_texts(config), mesh))
    sizes = rates.choose_sizes(checkup.device.platform)
    parts: dict[str, Callable[[], list[Row]]] = {
        "the disk": lambda: [check_workdir(checkup), check_weights(config.init)],
        "the devices": lambda: rates.check_devices(sizes),
        "collectives": lambda: rates.check_collectives(mesh, sizes),
        "steps": lambda: [check_steps(checkup)],
    }
    disk, *measured = [_time_part(name, part) for name, part in parts.items()]
    return _gather_rows([*rows, *disk, *kernel_rows, *(row for part in measured for row in part)])


def _time_part(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a part. The process ends where it does not come back."""
    if jax.process_index() == 0:
        command_line.notify(f"checking {name}")
    try:
        with _end_after(name, _PART_SECONDS):
            return part()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:  # the others would wait for this one
            raise
        text = (str(error).splitlines() or [""])[0][:300]
        advice = "python -m gemma2_jax.plan says what fits" if "RESOURCE_EXHAUSTED" in text else ""
        return [Row(subject=name, found="an error of XLA", verdict="wrong", reason=text, advice=advice)]


@contextlib.contextmanager
def _end_after(name: str, seconds: float) -> Iterator[None]:
    """Ends this process where the block takes longer than that, as a collective that hangs cannot be interrupted."""

    def end() -> None:
        host = socket.gethostname()
        command_line.notify(f"error: the check of {name} did not end within {seconds:g} s on {host}, and was given up")
        os._exit(command_line.EXIT_STUCK)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _gather_rows(rows: list[Row]) -> list[Row]:
    """This process's rows, and of other processes those that are slow or wrong, with their host's name."""
    host = socket.gethostname()
    own = json.dumps([asdict(row) | {"subject": f"{host}: {row.subject}"} for row in rows if row.verdict in _ODD])
    answers = hosts.gather_answers("check_rows", own)
    others = [Row(**row) for answer in answers[1:] for row in json.loads(answer)]
    return [*rows, *others]


_ODD = ("slow", "wrong")


def check_hub(init: str) -> Row:
    """Whether this account may download the weights that the run starts from."""
    subject = "Hugging Face Hub"
    if not init or Path(init).exists():
        return skip(subject, f"the weights are in {init}" if init else "the run starts from random weights")
    from huggingface_hub import HfApi, constants, errors, get_token
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's

    if constants.is_offline_mode():
        return skip(subject, f"HF_HUB_OFFLINE is set, so that nobody asks whether {init} may be downloaded")
    account = "with a token" if get_token() else "without a token"
    failures: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().auth_check(init)
            failures.append(None)
        except (OSError, ValueError, HTTPError) as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    if not failures:
        return skip(subject, f"{constants.ENDPOINT} did not answer within {_HUB_SECONDS} s", "copy the model here")
    match failures[0]:
        case None:
            return Row(subject=subject, found=f"{init} may be downloaded, {account}")
        case errors.GatedRepoError():
            reason, advice = "it is gated", f"accept its license at {constants.ENDPOINT}/{init}, and run hf auth login"
        case errors.RepositoryNotFoundError():
            reason = "there is no folder or model of that name for this account"
            advice = "check the spelling; for a private one run hf auth login, or set HF_TOKEN"
        case error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            return skip(subject, f"{constants.ENDPOINT} cannot be reached ({text})", "copy the model here")
    return Row(subject=subject, found=f"{init}, {account}", verdict="wrong", reason=reason, advice=advice)


def find_weights(init: str) -> list[Path]:
    """The files of the weights that a run starts from, as far as they are here."""
    folder = Path(init)
    if init and not folder.exists():
        from huggingface_hub import errors, snapshot_download

        try:
            folder = Path(snapshot_download(init, local_files_only=True))
        except (OSError, ValueError, errors.LocalEntryNotFoundError):
            return []
    if not init or folder.is_file():
        return [folder] if init else []
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if path.suffix in _WEIGHT_FILES] or found


def check_weights(init: str) -> Row:
    """How fast the weights that the run starts from are read."""
    subject = "reading the weights"
    if not init:
        return skip(subject, "the run starts from random weights")
    files = find_weights(init)
    if not files:
        advice = f"hf download {init}, before GPUs wait for it"
        return skip(subject, f"{init} is not on this host yet", advice)
    return disks.check_reading(files)


def check_workdir(checkup: Checkup) -> Row:
    """The disk of the run's folder."""
    state = checkup.program.state
    arrays = jax.tree.leaves((state.params, state.optimizer))
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)
    return disks.check_disk(checkup.config.output, size, checkup.config.train.keep_checkpoints)


def check_attention(config: Config, mesh: Mesh) -> list[Row]:
    """The attention kernels against float32, and timed where they are for the devices; kept for runs to read."""
    device = jax.local_devices()[0]
    find_lack = partial(
        MOSAIC.find_lack, dtype="bfloat16", width=config.model.head_width, softcap=config.model.attn_softcap
    )
    lack = find_lack(architecture=device_architecture(device))
    is_interpreted = device.platform == "cpu" and not find_lack()
    if lack and not is_interpreted:
        return [skip("attention kernels", f"mosaic {lack}")]
    shape = local_shape(config.model, mesh.shape["tensor"])
    if is_interpreted:
        findings = check_kernels(Spec(shape=shape, interpret=True), run_seconds=_PART_SECONDS / 4)
        where = "in Pallas's interpreter, in place of a GPU"
        return [
            *(_describe_finding(finding, where) for finding in findings),
            skip("times of kernels", f"mosaic {lack}"),
        ]
    spec = Spec(shape=shape, device=kernel_records.name_device(device), timed=True)
    record = kernel_records.run_check(spec, device)
    return [_describe_finding(finding, "") for finding in record.findings]


def _describe_finding(finding: Finding, where: str) -> Row:
    subject = f"attention kernels, {finding.part}"
    found = finding.case + (f", {where}" if where else "")
    if finding.kernel_seconds is not None and finding.xla_seconds is not None:
        ratio = finding.kernel_seconds / finding.xla_seconds
        found += f": {finding.kernel_seconds * 1e3:.3f} ms, XLA's attention {finding.xla_seconds * 1e3:.3f} ms"
        numbers = {"kernel_seconds": finding.kernel_seconds, "xla_seconds": finding.xla_seconds}
        if ratio <= 1:
            return Row(subject=subject, found=found, numbers=numbers)
        advice = "compute.attention auto takes XLA's then"
        reason = f"{ratio:.2f} of XLA's time"
        return Row(subject=subject, found=found, verdict="slow", reason=reason, advice=advice, numbers=numbers)
    if finding.verdict in ("not checked", "was not timed"):
        return skip(subject, str(finding))
    if not finding.is_fault:
        return Row(subject=subject, found=f"{found}: agrees with float32, the same bits twice")
    reason = f"{finding.verdict}: {finding.detail}"
    advice = "compute.attention auto takes XLA's instead; update the driver and CUDA, or report it with this table"
    return Row(subject=subject, found=found, verdict="wrong", reason=reason, advice=advice)


def check_steps(checkup: Checkup) -> Row:
    """Three steps of the run's own program, on random weights and random tokens."""
    program, config = checkup.program, checkup.config
    count, subject = config.model.parameter_count(), f"{_STEPS} steps"
    if checkup.device.platform == "cpu" and count > _CPU_PARAMETERS:
        return skip(subject, f"{count / 1e9:.1f} billion parameters are many for a CPU")
    with jax.set_mesh(program.mesh):
        seconds, compile_seconds, loss = _take_steps(program)
    tokens = config.train.global_batch_size * config.train.sequence_length
    found = (
        f"{seconds:.3f} s a step, {tokens / seconds:,.0f} tokens/s, compiled in {compile_seconds:.1f} s; attention "
        f"{program.attention_reason}"
    )
    numbers = {"step_seconds": seconds, "tokens_per_second": tokens / seconds, "compile_seconds": compile_seconds}
    if not math.isfinite(loss):
        reason = f"the loss of random weights is {loss}"
        return Row(subject=subject, found=found, verdict="wrong", reason=reason, numbers=numbers)
    return Row(subject=subject, found=found, numbers=numbers)


def _take_steps(program: Program) -> tuple[float, float, float]:
    """The seconds of a step, of the fastest; of compiling it; and the last loss."""
    began = time.perf_counter()
    step = compile_step(program, program.train_step, program.batch, donate_argnums=0)
    compile_seconds = time.perf_counter() - began
    state = program.initial_state(program.random_base())
    batch = place_batch(program, make_batch(program))
    hosts.wait_for_processes("check_steps")
    loss, times = math.nan, []
    for _ in range(_STEPS + 1):  # the first is a warm-up
        began = time.perf_counter()
        state, values = step(state, batch)
        loss = float(values["loss"])
        times.append(time.perf_counter() - began)
    return min(times[1:]), compile_seconds, loss


def make_batch(program: Program) -> dict[str, np.ndarray]:
    """This process's rows of a batch of random tokens, each row one document."""
    rows, length = len(program.process_rows), program.config.train.sequence_length
    drawn = np.random.default_rng(0).integers(3, program.config.model.vocab_size, (rows, length + 1), dtype=np.int32)
    batch = {
        "tokens": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": np.ones((rows, length), np.float32),
    }
    assert batch.keys() == BATCH_DTYPES.keys()
    if "sources" in program.batch:
        batch["sources"] = np.zeros(rows, np.int32)
    return batch
