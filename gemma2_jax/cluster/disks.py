"""The disk of a run's folder: its room, and how fast it is written to; and how fast files are read."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gemma2_jax.cluster.findings import Row

_MOST_BYTES = 256 << 20  # that are written to see how fast it goes
_READ_BYTES, _READ_SECONDS = 2 << 30, 20.0  # that are read at most
_BLOCK = 8 << 20
_LONG_SECONDS = 600  # that a checkpoint may take to be written


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def measure_writing(folder: Path, size: int = _MOST_BYTES) -> float:
    """Bytes a second that a file there is written with, to the disk itself; it is deleted again."""
    block = os.urandom(min(_BLOCK, size))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".gemma2_jax-check-") as file:
        began = time.perf_counter()
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(1, size // len(block)) * len(block) / (time.perf_counter() - began)


def measure_reading(files: Sequence[Path]) -> float:
    """Bytes a second that files are read with: so many of their bytes, for so long at most."""
    read, began = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                read += len(block)
                if read >= _READ_BYTES or time.perf_counter() - began > _READ_SECONDS:
                    return read / (time.perf_counter() - began)
    return read / max(time.perf_counter() - began, 1e-9)


def check_disk(workdir: Path, checkpoint_bytes: int, kept: int) -> Row:
    """Whether the folder's disk has room for as many checkpoints, and how long one takes to be written."""
    folder = existing_folder(workdir)
    free = shutil.disk_usage(folder).free
    needed = checkpoint_bytes * (kept + 1)  # one more is whole before the oldest is deleted
    found = f"{folder}: {free / 1e9:,.1f} GB free; {kept} + 1 checkpoints take {needed / 1e9:,.2f} GB"
    if free < needed:
        return Row(
            subject="disk",
            found=found,
            verdict="wrong",
            reason=f"{(needed - free) / 1e9:,.1f} GB too little",
            advice="make room, give another --workdir, or a smaller --train.keep_checkpoints",
        )
    try:
        rate = measure_writing(folder, min(_MOST_BYTES, free // 10))
    except OSError as error:
        reason = f"it cannot be written to: {error.strerror}"
        return Row(subject="disk", found=found, verdict="wrong", reason=reason, advice="give another --workdir")
    seconds = checkpoint_bytes / rate
    found += f"; written at {rate / 1e9:.2f} GB/s, a checkpoint in {seconds:,.0f} s"
    numbers = {"write_bytes_per_second": rate, "checkpoint_bytes": float(checkpoint_bytes)}
    if seconds > _LONG_SECONDS:
        return Row(
            subject="disk",
            found=found,
            verdict="slow",
            reason=f"{seconds / _LONG_SECONDS:.1f} times the {_LONG_SECONDS} s that are still fine",
            advice="give a --workdir on a faster disk, or a larger --train.checkpoint_every",
            numbers=numbers,
        )
    return Row(subject="disk", found=found, numbers=numbers)


def check_reading(files: Sequence[Path]) -> Row:
    """How long these files, which are weights, take to be read."""
    size = sum(path.stat().st_size for path in files)
    rate = measure_reading(files)
    found = (
        f"{len(files)} file(s) of {size / 1e9:,.2f} GB at {rate / 1e9:.2f} GB/s: {size / rate:,.1f} s for all, less "
        "where they are in memory already"
    )
    return Row(subject="reading the weights", found=found, numbers={"read_bytes_per_second": rate})
