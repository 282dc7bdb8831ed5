"""Writes a job in Megatron's formats: weights or an adapter as `torch_dist`, or weights as a file for each rank.

`formats.megatron_tensors` and `formats.megatron_adapters` say which tensors there are, `formats.megatron_config` what
the small files hold.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.convert.files import safetensors, torch_files
from gemma2_jax.convert.files.memory import reserve_disk
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.torch_dist import TorchDistWriter
from gemma2_jax.convert.formats import megatron, megatron_adapters, megatron_config, megatron_tensors, table
from gemma2_jax.convert.formats.companions import copy_companions
from gemma2_jax.convert.formats.megatron_tensors import Fused
from gemma2_jax.convert.job import Job, Part, Progress, read_ahead
from gemma2_jax.model_config import DType


def write_megatron(folder: Path, target: Path, job: Job, progress: Progress) -> None:
    """Writes a job into `folder`, which is renamed to `target` afterwards; run_config.yaml names the latter."""
    source, model = job.source, job.source.model
    assert model is not None
    iteration = folder / "iter_0000000"
    iteration.mkdir()
    if source.tokenizer or source.generation:  # first, as a tokenizer may be damaged
        (iteration / "tokenizer").mkdir()
        copy_companions(source.tokenizer, source.generation, iteration / "tokenizer")
    dtype = next(iter(job.shapes.values())).dtype.name
    if job.to == "megatron-legacy":
        _write_legacy(iteration, job, dtype, progress)
    else:
        tokenizer = str(target / iteration.name / "tokenizer") if source.tokenizer else None
        adapter, fusings = None, megatron_tensors.MODEL
        if job.to == "megatron-adapter":
            base = source.base
            adapter = megatron_config.SavedAdapter(
                job.adapter,
                pretrained=str(pretrained_checkpoint(base, target)) if base else None,
                hf_model=base if base and _is_hf_model(base) else None,
                canonical=job.separate_a,
                ranks=job.ranks[0],
            )
            fusings = megatron_adapters.written_adapter(job.adapter, canonical=job.separate_a)
        run = megatron_config.run_config(model, dtype, adapter, tokenizer=tokenizer)
        with TorchDistWriter(iteration) as writer:
            _write_chunks(writer, job, fusings, progress)
            for name, content in megatron_tensors.extra_states(model.layers, fusings if adapter else ()):
                writer.object(name, content)
        (iteration / "run_config.yaml").write_text(megatron_config.to_yaml(run))
        safetensors.write_json(iteration / "metadata.json", megatron.BACKEND)
        for path, content in (
            (iteration / "common.pt", megatron_config.common_state()),
            (iteration / "train_state.pt", megatron_config.train_state()),
            (folder / "latest_train_state.pt", megatron_config.train_state()),
        ):
            with path.open("wb") as file:
                torch_files.save_torch(file, content)
    (folder / megatron.TRACKER).write_text("0")


def pretrained_checkpoint(base: str, target: Path) -> Path:
    """The Megatron checkpoint of the base model of an adapter that is written to `target`.

    It is `base` itself if that is a Megatron checkpoint. Otherwise it is a folder beside `target` that the user is told
    to convert `base` to, as Megatron-Bridge 0.3.1 to 0.5.1 refuse a Hugging Face folder.
    """
    folder = Path(base).expanduser()
    is_megatron = folder.is_dir() and megatron.iteration_folder(folder)
    return folder if is_megatron else target.with_name(f"{target.name}-base")


def _is_hf_model(name: str) -> bool:
    """Whether a name is a Hub id or a Hugging Face folder."""
    return (Path(name) / "config.json").is_file() or not Path(name).exists()


def _write_chunks(writer: TorchDistWriter, job: Job, fusings: tuple[Fused, ...], progress: Progress) -> None:
    model = job.source.model
    assert model is not None
    rows = {row.name: row for group in job.groups.values() for row in group}
    # Each fused tensor with the parts of its rows that are read together: a layer of q, of k and of v.
    fused_parts = [
        (fused, parts)
        for fused in fusings
        for parts in zip(*(list(job.parts((rows[name],))) for name in fused.parts), strict=True)
    ]
    stream = _count_bytes(read_ahead(job.tensor_part, [part for _, parts in fused_parts for part in parts]), progress)
    for fused, parts in fused_parts:
        tensors = itertools.islice(stream, len(parts))
        # Gate and up are chunks of their own, as Megatron has them, and so are the halves of every rank. As they are
        # large, each is written before the next one is taken.
        if fused.rows == "halves":
            chunks = tensors
        elif fused.rows == "half_ranks":
            chunks = np.split(fused.fuse(list(tensors), model.kv_heads, job.ranks[0]), 2 * job.ranks[0])
        else:
            chunks = [fused.fuse(list(tensors), model.kv_heads)]
        sizes = [job.tensor_shape(part.row).shape for part in parts]
        height = sizes[0][0] if fused.rows == "shared" else sum(size[0] for size in sizes)
        first, row = parts[0].index[0], 0
        for chunk in chunks:
            if fused.stacked:
                shape = (model.layers, height, *chunk.shape[1:])
                writer.chunk(fused.key, shape, (first.start, row, *(0,) * (chunk.ndim - 1)), chunk[None])
            else:
                writer.chunk(fused.key, sizes[0], (first.start, *(0,) * (chunk.ndim - 1)), chunk)
            row += len(chunk)
            del chunk


def _count_bytes(tensors: Iterator[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    for tensor in tensors:
        progress(tensor.nbytes)
        yield tensor
        del tensor


@dataclass(frozen=True, eq=False)
class _RankShare:
    """The share that one tensor-parallel rank has of a tensor."""

    job: Job
    fused: Fused
    parts: tuple[Part, ...]
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.job.tensor_shape(part.row).shape for part in self.parts]
        shape = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if self.fused.rank_dim is not None:
            shape[self.fused.rank_dim] //= self.job.ranks[0]
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.job.tensor_shape(self.parts[0].row).dtype

    def load(self) -> np.ndarray:
        """Reads the share: an array of this shape and dtype in C order."""
        model, split = self.job.source.model, self.fused.rank_dim
        assert model is not None
        ranks = self.job.ranks[0]
        tensors = [self.job.tensor_part(part) for part in self.parts]
        if split is not None and self.fused.stacked:
            tensors = [np.split(tensor, ranks, split)[self.rank] for tensor in tensors]
        return self.fused.fuse(tensors, model.kv_heads // ranks)


@dataclass(frozen=True, eq=False)
class _QueuedTensor:
    """The next tensor of a queue, read when the file's writer asks for it. The writer takes tensors in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    queue: Iterator[np.ndarray]
    progress: Progress

    def read(self) -> np.ndarray:
        """Takes the tensor off the queue."""
        array = next(self.queue)
        self.progress(array.nbytes)
        return array


def _write_legacy(folder: Path, job: Job, dtype: DType, progress: Progress) -> None:
    model, (ranks, stages) = job.source.model, job.ranks
    assert model is not None
    args = megatron_config.megatron_args(model, dtype)
    args |= {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    for stage, rank in itertools.product(range(stages), range(ranks)):
        shares = {
            name: _RankShare(job, fused, _rank_parts(job, fused, layer, rank), rank)
            for fused, layer, name in megatron_tensors.rank_tensors(model, stages, stage)
        }
        queue = read_ahead(_RankShare.load, shares.values())
        state: dict[str, Any] = {
            name: _QueuedTensor(share.shape, share.dtype, queue, progress) for name, share in shares.items()
        }
        state |= megatron_tensors.rank_extra_states(model, stages, stage)
        content = {
            "args": Record("argparse.Namespace", state=args, new=True),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "model": state,
            "num_floating_point_operations_so_far": 0,
        }
        folder_name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if stages > 1 else "")
        (folder / folder_name).mkdir()
        with (folder / folder_name / megatron.RANK_FILE).open("wb") as file:
            reserve_disk(file, sum(math.prod(share.shape) * share.dtype.itemsize for share in shares.values()))
            torch_files.save_torch(file, content)


def _rank_parts(job: Job, fused: Fused, layer: int, rank: int) -> tuple[Part, ...]:
    """The parts to read for one rank's share: the rank's own rows of the embedding, or a layer's whole tensors."""
    rows, parts = {row.name: row for row in table.MODEL}, []
    for name in fused.parts:
        size, *rest = job.shapes[rows[name].path].shape
        if fused.stacked:
            span = slice(layer, layer + 1)
        elif fused.rank_dim == 0:
            span = slice(rank * size // job.ranks[0], (rank + 1) * size // job.ranks[0])
        else:
            span = slice(0, size)
        parts.append(Part(rows[name], (span, *[slice(None)] * len(rest))))
    return tuple(parts)
