"""Safetensors files, read in parts of tensors; written as one, or as several with an index.

This module knows bytes only; `formats.table` has the names and the layouts. Opening reads headers, which the
safetensors library checks. The bytes are read and written here, as the library's memory map of a file counts towards
this process's memory, and its writer wants a whole file's tensors at once.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma2_jax.convert.files import memory
from gemma2_jax.convert.files.memory import Index, Shapes

MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
SHARD_BYTES = 5_000_000_000  # the size at which Hugging Face's own writer begins another file

_DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}
# Dtypes of buffers, heads and quantized weights, which may lie beside what is read.
_OTHER_DTYPES = {
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{"F64": np.float64, "BOOL": np.bool_, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
}
_JSON_BYTES = 32 << 20  # the index of a 27B model has 50 kB


def check_dtype(dtype: np.dtype, source: object) -> None:
    """Raises ValueError, naming `source`, unless weights may be stored in `dtype`."""
    if dtype not in [np.dtype(known) for known in _DTYPES.values()]:
        fix = "use the checkpoint before it was quantized" if dtype.itemsize == 1 else "save the checkpoint as one"
        raise ValueError(f"{source} is stored as {dtype}; this program reads {', '.join(_DTYPES)}, so {fix}")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, whose rows `read` reads."""

    path: Path
    start: int  # of its bytes in the file
    shape: tuple[int, ...]
    dtype: np.dtype
    version: memory.Version

    def read(self, index: Index) -> np.ndarray:
        """The slices `index`, as stored. Reads the rows that they are in, and no others."""
        rows = range(self.shape[0])[index[0]]
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        start, size = self.start + rows.start * row_bytes, len(rows) * row_bytes
        data = memory.read_bytes(self.path, start, size, self.version)
        return data.view(self.dtype).reshape(len(rows), *self.shape[1:])[(slice(None), *index[1:])]


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, from its header.

    Raises ValueError where the file is damaged, or a tensor is of a dtype that has no name here.
    """
    version = memory.Version.of(path)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error
    header_bytes, starts = _tensor_starts(path, dtypes, shapes)
    tensors = {}
    for name, shape in shapes.items():
        dtype = (_DTYPES | _OTHER_DTYPES).get(dtypes[name])
        if dtype is None:
            raise ValueError(
                f"{path}: {name} is stored as {dtypes[name]}; this program reads {', '.join(_DTYPES)}, "
                "so use the checkpoint before it was quantized"
            )
        tensors[name] = StoredTensor(path, 8 + header_bytes + starts[name], shape, np.dtype(dtype), version)
    return tensors


def _tensor_starts(path: Path, dtypes: dict[str, str], shapes: Shapes) -> tuple[int, dict[str, int]]:
    """The size of a header, and where the tensors start after it. The library has checked both and tells neither."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
    try:
        # Where a name has two entries, the library may have checked the other one.
        header_entries = json.loads(header, object_pairs_hook=_unique_keys)
        entries = {name: header_entries[name] for name in shapes}
        agree = all(
            (entry["dtype"], tuple(entry["shape"])) == (dtypes[name], shapes[name]) for name, entry in entries.items()
        )
        starts = {name: entry["data_offsets"][0] for name, entry in entries.items()}
    except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: its header is no safetensors header ({error}); get it again") from error
    if not agree:
        raise ValueError(f"{path} is damaged: its header says two things of one tensor; get it again")
    return size, starts


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file when it is missing or something else."""
    try:
        content = json.loads(memory.read_bounded(path, _JSON_BYTES).decode())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy it beside the weights") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object as Hugging Face's libraries do: sorted, two spaces."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class ShardedFiles:
    """Where tensors are written: into one file `stem`, or into numbered files and an index.

    One file is written unless it would have more than `shard_bytes`.
    """

    folder: Path
    stem: str
    shard_bytes: int = SHARD_BYTES


def write_safetensors(
    files: ShardedFiles,
    wanted: dict[str, jax.ShapeDtypeStruct],
    parts: Iterable[np.ndarray],
    progress: Callable[[float], None],
) -> None:
    """Writes the tensors of `wanted`, in its order.

    Args:
      wanted: the shape and the dtype of each tensor.
      parts: the tensors, in the order of `wanted`, each whole or as several blocks of its rows.
      progress: is told how many more bytes have been written.
    """
    sizes = {name: math.prod(want.shape) * want.dtype.itemsize for name, want in wanted.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[earlier] for earlier in shards[-1]) + size > files.shard_bytes:
            shards.append([])
        shards[-1].append(name)
    base = files.stem.removesuffix(".safetensors")
    numbered = [f"{base}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    stream = iter(parts)
    for file, names in zip(numbered if len(shards) > 1 else [files.stem], shards, strict=True):
        _write_file(files.folder / file, {name: wanted[name] for name in names}, stream, progress)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(numbered, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        write_json(files.folder / f"{files.stem}.index.json", {"metadata": total, "weight_map": weight_map})


def _write_file(
    path: Path,
    wanted: dict[str, jax.ShapeDtypeStruct],
    stream: Iterator[np.ndarray],
    progress: Callable[[float], None],
) -> None:
    # The file has the header's length in 8 bytes, the header as JSON, and the tensors one after another. Transformers 4
    # refuses a file whose header does not say that the tensors are torch's.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}, 0
    for name, want in wanted.items():
        start, end = end, end + math.prod(want.shape) * want.dtype.itemsize
        header[name] = {"dtype": names[want.dtype], "shape": list(want.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        memory.reserve_disk(file, 8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        for name, want in wanted.items():
            left = math.prod(want.shape) * want.dtype.itemsize
            while left:
                part = memory.contiguous_copy(next(stream))
                assert part.dtype == want.dtype and part.shape[1:] == want.shape[1:] and part.nbytes <= left, name
                file.write(part.reshape(-1).view(np.uint8))
                left -= part.nbytes
                progress(part.nbytes)
                del part  # before the next one is asked for, whose memory it may be
