"""Writes a checkpoint in any of the formats, a layer's matrix at a time; the folder appears whole or not at all.

`job` says what is written and reads it. `writing_megatron` has Megatron's formats.
"""

import sys
from pathlib import Path

import numpy as np

from gemma2_jax.convert import writing_megatron
from gemma2_jax.convert.files import gguf as gguf_files, orbax, safetensors
from gemma2_jax.convert.files.folder import atomic_folder, atomic_path, check_place
from gemma2_jax.convert.formats import gguf
from gemma2_jax.convert.formats.companions import copy_companions
from gemma2_jax.convert.formats.hf_config import hf_config
from gemma2_jax.convert.formats.peft_config import peft_config
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.convert.job import Format, Job, Part, Progress, read_ahead


def write_checkpoint(job: Job, target: Path, progress: Progress = lambda size: None) -> None:
    """Writes what a job says into `target`, a folder or a .gguf file, which appears whole or not at all.

    Raises ValueError if `target` already holds something or the disk has no room, and OSError if writing fails.
    """
    check_target(target, job.to)
    target = target.absolute()
    with (atomic_path if job.to.startswith("gguf") else atomic_folder)(target, job.size) as partial_target:
        try:
            _write(partial_target, target, job, progress)
        except OSError as error:
            if error.filename and not any(str(partial_target) in str(x) for x in (error.filename, error.filename2)):
                raise  # of the source
            # An error while writing does not name its file.
            raise OSError(
                f"{target} could not be written ({error.strerror or error}); make room there, or write somewhere else"
            ) from error


def check_target(target: Path, to: Format) -> None:
    """Raises ValueError where `target` is no place for a checkpoint in this format."""
    if to.startswith("gguf") != (target.suffix == ".gguf"):
        raise ValueError(f"{target}: --to gguf and gguf-adapter write a file whose name ends in .gguf, others a folder")
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(target)!r} has bytes that are not UTF-8; give another name") from error
    check_place(target)


def _write(folder: Path, target: Path, job: Job, progress: Progress) -> None:
    """Writes a job into `folder`, which is renamed to `target` afterwards."""
    source, model = job.source, job.source.model
    assert model is not None
    if job.to.startswith("gguf"):
        _write_gguf(folder, job, progress)
        return
    if job.to.startswith("megatron"):
        writing_megatron.write_megatron(folder, target, job, progress)
        return
    copy_companions(source.tokenizer, source.generation, folder)  # first, as a tokenizer may be damaged
    if job.to != "peft":
        dtype = job.shapes["embedding"].dtype.name
        safetensors.write_json(folder / "config.json", hf_config(model, dtype, source.hf))
    if job.adapter.kind != "none":
        layers = None if job.to == "orbax" else job.adapted_layers
        config = peft_config(job.adapter, source.base, model.layers, layers)
        safetensors.write_json(folder / "adapter_config.json", config)
    for name, rows in job.groups.items():
        if job.to == "orbax":
            _write_orbax(folder / name, job, rows, progress)
        else:
            _write_safetensors(folder, job, rows, progress)


def _write_safetensors(folder: Path, job: Job, rows: tuple[Row, ...], progress: Progress) -> None:
    wanted = {
        part.row.name.format(L=part.index[0].start) if part.row.stacked else part.row.name: job.part_shape(part)
        for part in job.parts(rows)
    }
    parts = read_ahead(job.tensor_part, job.parts(rows))
    if job.to == "peft":  # PEFT reads one file only
        files = safetensors.ShardedFiles(folder, safetensors.ADAPTER, shard_bytes=sys.maxsize)
    else:
        files = safetensors.ShardedFiles(folder, safetensors.MODEL)
    safetensors.write_safetensors(files, wanted, parts, progress)


def _write_gguf(path: Path, job: Job, progress: Progress) -> None:
    source, (rows,) = job.source, job.groups.values()
    assert source.model is not None
    wanted = {}
    for row in gguf.rename_rows(rows):
        want = gguf_files.Wanted(job.tensor_shape(row).shape, job.written_dtype(row.path))
        wanted |= dict.fromkeys(row.names(source.model.layers), want)
    if job.to == "gguf":
        metadata = gguf.model_metadata(source.model, source.path.stem, job.written_dtype("embedding"))
        metadata |= job.tokenizer_metadata
    else:
        metadata = gguf.adapter_metadata(job.adapter, source.base)

    def read_part(part: Part) -> np.ndarray:
        return gguf.stored_tensor(job.tensor_part(part), part.row.path)

    gguf_files.write_gguf(path, metadata, wanted, read_ahead(read_part, job.parts(rows)), progress)


def _write_orbax(folder: Path, job: Job, rows: tuple[Row, ...], progress: Progress) -> None:
    arrays = read_ahead(job.ordered_part, job.parts(rows))
    ready = [next(arrays)]  # so that others are read while Orbax is imported and writes what it keeps beside them
    writer = orbax.Writer(folder, {row.path: job.shapes[row.path] for row in rows})
    for part in job.parts(rows):
        array = ready.pop() if ready else next(arrays)
        writer.write(part.row.path, part.index, array)
        progress(array.nbytes)
        del array  # before the next one is asked for, whose memory it may be
