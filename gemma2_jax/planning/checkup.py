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
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np

from gemma2_jax import command_line
from gemma2_jax.cluster import disks, gpus, hosts, rates, software
from gemma2_jax.cluster.findings import Row, skip
from gemma2_jax.config import Config
from gemma2_jax.mesh import check_mesh, make_mesh
from gemma2_jax.planning.checked_attention import check_attention
from gemma2_jax.planning.checked_steps import Checkup, check_steps
from gemma2_jax.training.step import Program
from gemma2_jax.training.tokenizer import without_texts

_HUB_SECONDS = 30  # for which the Hub may not answer
_PART_SECONDS = 1800  # that one part of the checks may take, after which this process ends
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".distcp")


def run_checks(config: Config, *, tunes: bool = False) -> list[Row]:
    """All rows of this process, and of the others what is slow or wrong. `tunes` has the tiles of kernels timed.

    Raises ValueError where the run cannot be carried out on these devices at all.
    """
    rows = [*software.check_software(software.find_versions()), *gpus.check_gpus()]
    rows += [check_hub(config.init)]
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh)
    kernel_rows = _time_part("the attention kernels", lambda: check_attention(config, mesh, tunes=tunes))
    if any(row.verdict == "wrong" for row in kernel_rows):  # by name they would end it here, without a table
        config = replace(config, compute=replace(config.compute, attention="auto"))
    checkup = Checkup(config=config, mesh=mesh, program=Program(without_texts(config), mesh))
    sizes = rates.choose_sizes(checkup.device.platform)
    parts: dict[str, Callable[[], list[Row]]] = {
        "the disk": lambda: [check_workdir(checkup), check_weights(config.init)],
        "the devices": lambda: rates.check_devices(sizes),
        "collectives": lambda: rates.check_collectives(mesh, sizes),
        "steps": lambda: check_steps(checkup),
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
    """This process's rows, and of other processes those that are slow or wrong, with their host's name.

    So that each knows of all that is wrong, and all end with the same status.
    """
    host = socket.gethostname()
    own = json.dumps([asdict(row) | {"subject": f"{host}: {row.subject}"} for row in rows if row.verdict in _ODD])
    answers = hosts.gather_answers("check_rows", own)
    del answers[jax.process_index()]
    others = [Row(**row) for answer in answers for row in json.loads(answer)]
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
