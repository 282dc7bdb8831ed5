"""Writes a checkpoint in one of three formats, an array at a time, as a folder that appears whole or not at all.

What the source is and how its arrays are read is `checkpoints`'; merging is `lora`'s arithmetic. In memory at one time
are one stacked array, and what the format writes together: a safetensors file, or nothing more.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from orbax.checkpoint.experimental import v1 as ocp

from gemma2_jax import lora
from gemma2_jax.config import AdapterConfig, ComputeConfig, DType, ModelConfig
from gemma2_jax.convert import folder, table, tensors
from gemma2_jax.convert.checkpoints import Abstract, Checkpoint, read
from gemma2_jax.convert.hf_config import hf_config
from gemma2_jax.convert.peft_config import peft_config
from gemma2_jax.convert.table import Row
from gemma2_jax.model import Gemma2

Format = Literal["orbax", "hf", "peft"]
# Of an Orbax array's compressed pieces: small enough for a device to read little more than its slice.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, decided before a byte is."""

    source: Checkpoint
    to: Format
    merge: bool = False  # add the adapter into the weights
    dtype: DType | None = None  # None: as stored, or as the weights were that a full training run started from

    def __post_init__(self) -> None:
        adapted = self.source.adapter.kind != "none"
        if self.source.model is None:
            raise ValueError(
                f"{self.source.path} is an adapter to {self.source.base or 'a model it does not name'}, which is not a "
                "folder here; give that model as SRC, and this as --adapter"
            )
        if (self.merge or self.to == "peft") and not adapted:
            raise ValueError(f"{self.source.path} has no adapter; leave out --merge, or use --to hf or --to orbax")
        if self.to == "peft" and self.merge:
            raise ValueError("--to peft writes the adapter alone and --merge dissolves it; choose one of the two")
        if self.merge or self.to == "hf":
            lora.check_mergeable(self.source.adapter.apart)
        if self.to == "hf" and adapted and not self.merge:
            raise ValueError(
                f"{self.source.path} has an adapter, which a Hugging Face model has no place for; "
                "choose --merge for one model, or --to peft for the adapter alone"
            )

    @property
    def warning(self) -> str:
        """What the reader of the format will get wrong; empty where there is nothing."""
        apart = self.adapter.apart if self.to == "peft" else []
        if not apart:
            return ""
        return (
            f"warning: the adapter of {' and '.join(apart)} was trained to be added after the post-norm "
            "(adapter.after_norm), and PEFT adds it before: the tensors are the same, the logits are not. Run it with "
            "python -m gemma2_jax.generate, or train one without after_norm for PEFT"
        )

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter that is still one when written."""
        return AdapterConfig() if self.merge else self.source.adapter

    @cached_property
    def groups(self) -> dict[str, tuple[Row, ...]]:
        """The rows that are written together."""
        adapter = {"adapter": table.rows(self.adapter)}
        return adapter if self.to == "peft" else {"weights": table.MODEL} | (adapter if adapter["adapter"] else {})

    @cached_property
    def shapes(self) -> Abstract:
        """Every array in the dtype it is written in."""
        stored = self.source.shapes
        hf = self.source.hf or {}
        started = hf.get("dtype") or hf.get("torch_dtype")
        trained_whole = self.source.format == "run" and self.source.adapter.kind == "none"
        dtype = self.dtype or (started if trained_whole else None)
        paths = [row.path for rows in self.groups.values() for row in rows]
        return {path: jax.ShapeDtypeStruct(stored[path].shape, dtype or stored[path].dtype) for path in paths}

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(_bytes(shape) for shape in self.shapes.values())

    def array(self, row: Row) -> np.ndarray:
        """One array as it is written, merged if that is asked for."""
        want = self.shapes[row.path]
        projection = row.path.removeprefix("blocks/").removesuffix("/w")
        if self.merge and projection in table.targets(self.source.adapter):
            return self._merged(projection, row.path, want)
        return read(self.source, row.path, want.dtype)

    def _merged(self, projection: str, path: str, want: jax.ShapeDtypeStruct) -> np.ndarray:
        parts = {part: row.path for part, row in table.adapter_rows(projection).items()}
        paths = {part: at for part, at in {"w": path, **parts}.items() if at in self.source.shapes}
        held = {part: read(self.source, at, self.source.shapes[at].dtype) for part, at in paths.items()}
        merged = np.empty(want.shape, want.dtype)
        for layer in range(len(merged)):  # float32 copies of a whole stack would be many times its size
            merged[layer] = self._merge(
                projection, want.dtype, **{part: x[layer : layer + 1] for part, x in held.items()}
            )[0]
        return merged

    @cached_property
    def _merge(self) -> Callable:
        """lora's merge of one projection, on arrays: `merge(name, dtype, w=, a=, b=, m=)`."""
        assert self.source.model is not None
        skeleton = nnx.eval_shape(partial(_adapted, self.source.model, self.source.adapter))
        found = {name: base.adapter for name, base in lora.projections(skeleton).items()}

        @partial(jax.jit, static_argnums=(0, 1))
        def merge(name: str, dtype: np.dtype, w: jax.Array, **variables: jax.Array) -> jax.Array:
            adapter = found[name]
            assert isinstance(adapter, lora.Adapter)
            graph, _ = nnx.split(adapter)
            return nnx.merge(graph, nnx.State(variables)).merged(w, dtype)

        return merge


def _adapted(model: ModelConfig, adapter: AdapterConfig) -> Gemma2:
    rngs = nnx.Rngs(0)
    gemma = Gemma2(model, ComputeConfig(), rngs=rngs)
    lora.attach(gemma, adapter, rngs=rngs)
    return gemma


def write(job: Job, target: Path, moved: Callable[[float], None] = lambda size: None) -> None:
    """Carries out a job; `moved` is told of bytes: half of them as they are read, half as they reach the disk.

    Raises ValueError where `target` holds something already, or the disk has no room.
    """
    source, model, target = job.source, job.source.model, target.absolute()
    assert model is not None
    with folder.appearing(target, job.size) as partial_target:
        if job.to != "peft":
            dtype = job.shapes["embedding"].dtype.name
            tensors.write_json(partial_target / "config.json", hf_config(model, dtype, source.hf))
        if job.adapter.kind != "none":
            config = peft_config(job.adapter, source.base, ours=job.to == "orbax")
            tensors.write_json(partial_target / "adapter_config.json", config)
        for name, rows in job.groups.items():
            if job.to == "orbax":
                _write_orbax(partial_target / name, job, rows, moved)
            else:
                _write_safetensors(partial_target, job, rows, moved)
        for beside in source.beside:
            folder.carry(beside, partial_target)


def _write_safetensors(target: Path, job: Job, rows: tuple[Row, ...], moved: Callable[[float], None]) -> None:
    assert job.source.model is not None
    sizes = {
        name: _bytes(job.shapes[row.path]) // (job.source.model.layers if row.stacked else 1)
        for row in rows
        for name in row.names(job.source.model.layers)
    }
    stream = (pair for row in rows for pair in row.split(job.array(row)))
    if job.to == "peft":  # which reads one file only
        tensors.write(target, tensors.ADAPTER, sizes, stream, moved, shard_bytes=sys.maxsize)
    else:
        tensors.write(target, tensors.MODEL, sizes, stream, moved)


def _write_orbax(target: Path, job: Job, rows: tuple[Row, ...], moved: Callable[[float], None]) -> None:
    # Orbax's stable API writes whole trees only; what its next one writes in parts, both read.
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False  # nothing changes them while they are written
    with context:
        for row in rows:
            array = job.array(row)
            moved(array.nbytes / 2)
            ocp.partial.save(str(target), unflatten_dict({row.path: array}, sep="/"))
            moved(array.nbytes / 2)
            del array  # before the next one is read
        ocp.partial.finalize(str(target))


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
