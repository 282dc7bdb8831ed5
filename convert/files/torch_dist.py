"""Folders of torch.distributed.checkpoint, as Megatron writes them, read and written without torch.

A pickle, `.metadata`, lists the tensors, the chunks of each, and the place of each chunk in the `.distcp` files, where
it is an archive of `torch_files`. Opening reads that pickle. Its entry for a tensor is checked before the tensor is
read, so that tensors which nobody reads may be of any kind. This module does not know what the tensors mean.
"""

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma2_jax.convert.files import memory, pickles, torch_files
from gemma2_jax.convert.files.memory import Index, reserve_disk
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.torch_files import Stored

METADATA = ".metadata"
_METADATA_BYTES = 1 << 28  # a chunk takes some 500 bytes, and 27B with its optimizer at TP 8 has 12,000 chunks
FILE_BYTES = 5_000_000_000  # a writer starts another file after this many

_Sizes = tuple[int, ...]
_METADATA = "torch.distributed.checkpoint.metadata."
_FILESYSTEM = "torch.distributed.checkpoint.filesystem."


@dataclass(frozen=True)
class _Place:
    """The place of the archive of a chunk or of an object, in bytes of a file."""

    file: str
    offset: int
    length: int
    plain: bool  # False: compressed or encrypted by an extension of torch


@dataclass(frozen=True, eq=False)
class _Chunks:
    """The chunks of a tensor: where each starts and ends in it, as arrays [chunk, dim], and its place in the files."""

    starts: np.ndarray
    ends: np.ndarray
    places: list[_Place]


class TorchDist:
    """The tensors of a folder, by name, with their `shapes` and `dtypes`, and the names of its `objects`."""

    def __init__(self, folder: Path):
        """Reads the folder's metadata. Raises ValueError where it is missing, damaged or something else."""
        self.folder = folder
        self.shapes, self.dtypes, self.objects = dict[str, _Sizes](), dict[str, np.dtype](), list[str]()
        self._listed, self._checked = dict[str, list[Any]](), dict[str, _Chunks]()
        path = folder / METADATA
        try:
            data = memory.read_bounded(path, _METADATA_BYTES)
        except (ValueError, FileNotFoundError) as error:
            state = "missing" if isinstance(error, FileNotFoundError) else f"no checkpoint's metadata ({error})"
            raise ValueError(f"{path} is {state}; copy the whole checkpoint again") from error
        match pickles.load_pickle(data, path):
            case Record(state={"state_dict_metadata": dict(entries), "storage_data": dict(storage)}):
                for name, entry in entries.items():
                    self._list(name, entry)
                self._places = dict(_place(key, info, path) for key, info in storage.items())
            case _:
                raise ValueError(f"{path} is not a checkpoint's metadata, or is damaged; copy it again")
        self._check_no_overlap()

    def _list(self, name: Any, entry: Any) -> None:
        match entry:
            case Record(name="torch.distributed.checkpoint.metadata.BytesStorageMetadata") if isinstance(name, str):
                self.objects.append(name)
            case Record(
                state={"properties": Record(state=(np.dtype() as dtype, *_)), "size": size, "chunks": list(chunks)}
            ) if isinstance(name, str) and _is_sizes(size):
                self.shapes[name], self.dtypes[name] = size, dtype
                self._listed[name] = chunks
            case _:
                raise _unknown_entry(self.folder / METADATA)

    def _check_no_overlap(self) -> None:
        """Raises ValueError where two entries share bytes of a file."""
        places = sorted((place.file, place.offset, place.length) for place in self._places.values())
        for (file, offset, length), (next_file, next_offset, _) in pairwise(places):
            if file == next_file and next_offset < offset + length:
                raise ValueError(f"{self.folder / METADATA} has entries that overlap in {file}; copy it again")

    def check(self, name: str) -> None:
        """Raises ValueError unless a tensor's chunks make up the whole tensor and their places lie within files."""
        self._chunks(name)

    def chunk_starts(self, name: str, dim: int) -> list[int]:
        """The places along a dim of a tensor at which chunks start, in order. Raises ValueError as `check` does."""
        return np.unique(self._chunks(name).starts[:, dim]).tolist()

    def read(self, name: str, index: Index) -> np.ndarray:
        """The slices `index` (of step 1) of a tensor as stored. Raises ValueError where chunks are damaged or gone."""
        chunks, dtype = self._chunks(name), self.dtypes[name]
        spans = [range(size)[span] for size, span in zip(self.shapes[name], index, strict=True)]
        assert all(span.step == 1 for span in spans)
        shape = tuple(len(span) for span in spans)
        start, stop = np.array([[span.start, span.stop] for span in spans], np.int64).reshape(-1, 2).T
        (hits,) = np.nonzero(((chunks.starts < stop) & (chunks.ends > start)).all(axis=1))
        if not math.prod(shape):
            return np.empty(shape, dtype)
        whole = None if len(hits) == 1 else np.empty(shape, dtype)
        for hit in hits.tolist():
            begin, end = np.maximum(start, chunks.starts[hit]), np.minimum(stop, chunks.ends[hit])
            part = self._stored(name, chunks, hit).read(_index(begin - chunks.starts[hit], end - chunks.starts[hit]))
            if whole is None:
                return part
            whole[_index(begin - start, end - start)] = part
        assert whole is not None
        return whole

    def object(self, name: str) -> Any:
        """An object's content, as `torch_files.load_torch` gives it."""
        return self._load(self._place(name, None))

    def _stored(self, name: str, chunks: _Chunks, number: int) -> Stored:
        stored = self._load(chunks.places[number])
        shape = tuple((chunks.ends[number] - chunks.starts[number]).tolist())
        if not isinstance(stored, Stored) or (stored.shape, stored.dtype) != (shape, self.dtypes[name]):
            file = self.folder / chunks.places[number].file
            raise ValueError(f"{file} does not hold what {METADATA} says of {name}; copy the checkpoint again")
        return stored

    def _load(self, place: _Place) -> Any:
        return torch_files.load_torch(self.folder / place.file, place.offset, place.length)

    def _place(self, name: str, offset: _Sizes | None) -> _Place:
        place = self._places.get((name, offset))
        if place is None:
            raise ValueError(f"{self.folder / METADATA} does not say where {name} is; copy the checkpoint again")
        path = self.folder / place.file
        if not place.plain:
            raise ValueError(f"{path}: {name} was compressed by an extension; save the checkpoint without extensions")
        try:
            size = os.stat(path).st_size
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing; copy it, or the whole checkpoint, again") from error
        if place.offset + place.length > size:
            raise ValueError(f"{path} is cut short: it lacks {name}; copy it again")
        return place

    def _chunks(self, name: str) -> _Chunks:
        """The chunks of a tensor without empty ones."""
        if name not in self._checked:
            shape = self.shapes[name]
            chunks = [_chunk(chunk, self.folder / METADATA) for chunk in self._listed[name]]
            chunks = [(offsets, sizes) for offsets, sizes in chunks if math.prod(sizes)]
            if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in chunks) or not _tiles(
                [(0, size) for size in shape],
                [[(start, start + size) for start, size in zip(*chunk, strict=True)] for chunk in chunks],
            ):
                raise ValueError(
                    f"{self.folder / METADATA}: the chunks of {name} leave gaps or overlap, or are not cut from "
                    f"{shape}; copy the checkpoint again"
                )
            starts = np.array([offsets for offsets, _ in chunks], np.int64).reshape(len(chunks), len(shape))
            ends = starts + np.array([sizes for _, sizes in chunks], np.int64).reshape(starts.shape)
            self._checked[name] = _Chunks(starts, ends, [self._place(name, offsets) for offsets, _ in chunks])
        return self._checked[name]


def _is_sizes(x: Any) -> bool:
    # Numpy has at most 64 dims, and counts elements in 64 bits.
    sizes = isinstance(x, tuple) and len(x) <= 64 and all(type(size) is int and 0 <= size < 1 << 48 for size in x)
    return sizes and math.prod(max(size, 1) for size in x) < 1 << 56


def _unknown_entry(path: Path) -> ValueError:
    return ValueError(f"{path} has an entry of an unknown kind, or is damaged; copy it again")


def _chunk(chunk: Any, path: Path) -> tuple[_Sizes, _Sizes]:
    match chunk:
        case Record(state={"offsets": offsets, "sizes": sizes}) if _is_sizes(sizes) and _is_sizes(offsets):
            return offsets, sizes
    raise _unknown_entry(path)


def _place(key: Any, info: Any, path: Path) -> tuple[tuple[str, _Sizes | None], _Place]:
    match key, info:
        case (
            Record(state={"fqn": str(name)} as index),
            Record(state={"relative_path": str(file), "offset": int(offset), "length": int(length)} as place),
        ):
            if len(file) > 255 or file in ("", ".", "..") or "/" in file or not file.isprintable():
                raise ValueError(f"{path} lists {file[:200]!r}; it may only name files in its own folder")
            chunk_offsets = index.get("offset")
            if offset >= 0 and length >= 0 and (chunk_offsets is None or _is_sizes(chunk_offsets)):
                return (name, chunk_offsets), _Place(file, offset, length, not place.get("transform_descriptors"))
    raise _unknown_entry(path)


def _index(start: np.ndarray, stop: np.ndarray) -> Index:
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


_Box = list[tuple[int, int]]  # the start and the end in each dim


def _tiles(whole: _Box, boxes: list[_Box], depth: int = 16) -> bool:
    """Whether boxes make up the whole with no gap and no overlap.

    The whole is cut into slabs along one dim, and each slab along another dim. The chunks of every way of sharding can
    be found by such cuts; `depth` bounds the time that a hostile list can take.
    """
    if len(boxes) == 1:
        return boxes[0] == whole
    if not boxes:
        return not math.prod(stop - start for start, stop in whole)
    if not depth:
        return False
    for dim in range(len(whole)):
        slabs, end = list[list[_Box]](), whole[dim][0]
        for box in sorted(boxes, key=lambda box: box[dim]):
            if not slabs or box[dim][0] >= end:
                slabs.append([])
            slabs[-1].append(box)
            end = max(end, box[dim][1])
        if len(slabs) > 1:
            cuts = [min(box[dim][0] for box in slab) for slab in slabs] + [whole[dim][1]]
            return cuts[0] == whole[dim][0] and all(
                _tiles([*whole[:dim], span, *whole[dim + 1 :]], slab, depth - 1)
                for slab, span in zip(slabs, pairwise(cuts), strict=True)
            )
    return False


class TorchDistWriter:
    """Writes a folder, a chunk or an object at a time, and the metadata last, when its `with` block ends.

    After an error there is no metadata.
    """

    def __init__(self, folder: Path):
        """Writes into `folder`, which exists and may have other files."""
        self.folder = folder
        self._tensors = dict[str, tuple[_Sizes, np.dtype, dict[_Sizes, _Sizes]]]()
        self._objects, self._storage = list[str](), dict[Record, Record]()
        self._file: BinaryIO | None = None
        self._files = 0

    def __enter__(self) -> "TorchDistWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file:
            self._file.close()
        if kind is None:
            (self.folder / METADATA).write_bytes(pickles.dump_pickle(self._metadata()))

    def chunk(self, name: str, shape: _Sizes, offsets: _Sizes, array: Any) -> None:
        """Writes the part of a tensor of `shape` that starts at `offsets`: a tensor as `save_torch` takes them."""
        _, dtype, chunks = self._tensors.setdefault(name, (shape, array.dtype, {}))
        assert self._tensors[name][0] == shape and dtype == array.dtype and offsets not in chunks
        chunks[offsets] = tuple(array.shape)
        self._write({"fqn": name, "offset": _size_record(offsets), "index": None}, array)

    def object(self, name: str, content: Any) -> None:
        """Writes an object, whose arrays become tensors."""
        self._objects.append(name)
        self._write({"fqn": name, "index": None}, content)

    def _write(self, index: dict[str, Any], content: Any) -> None:
        if self._file is None or self._file.tell() >= FILE_BYTES:
            if self._file:
                self._file.close()
            self._file = open(self.folder / f"__0_{self._files}.distcp", "wb")  # noqa: SIM115  # __exit__ closes it
            self._files += 1
        start = self._file.tell()
        if hasattr(content, "nbytes"):
            reserve_disk(self._file, content.nbytes)
        torch_files.save_torch(self._file, content)
        info = {"relative_path": Path(self._file.name).name, "offset": start, "length": self._file.tell() - start}
        key = _record(_METADATA + "MetadataIndex", index)
        self._storage[key] = _record(_FILESYSTEM + "_StorageInfo", info)

    def _metadata(self) -> Record:
        entries = dict[str, Record]()
        for name, (shape, dtype, chunks) in self._tensors.items():
            assert _tiles(
                [(0, size) for size in shape],
                [
                    [(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
                    for offsets, sizes in chunks.items()
                ],
            ), name
            entries[name] = _record(
                _METADATA + "TensorStorageMetadata",
                {
                    "properties": _properties(dtype),
                    "size": _size_record(shape),
                    "chunks": [_chunk_record(offsets, sizes) for offsets, sizes in chunks.items()],
                },
            )
        for name in self._objects:
            entries[name] = Record(_METADATA + "BytesStorageMetadata", new=True)
        meta = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
        return _record(
            _METADATA + "Metadata",
            {
                "state_dict_metadata": entries,
                "planner_data": None,
                "storage_data": self._storage,
                "storage_meta": _record(_METADATA + "StorageMeta", meta),
                "version": "1.0.0",
            },
        )


def _record(name: str, state: Any) -> Record:
    return Record(name, state=state, new=True)


def _size_record(sizes: _Sizes) -> Record:
    return Record("torch.Size", (tuple(int(size) for size in sizes),))


def _chunk_record(offsets: _Sizes, sizes: _Sizes) -> Record:
    state = {"offsets": _size_record(offsets), "sizes": _size_record(sizes)}
    return _record(_METADATA + "ChunkStorageMetadata", state)


def _properties(dtype: np.dtype) -> Record:
    layout = Record("torch.serialization._get_layout", ("torch.strided",))
    contiguous = Record(_METADATA + "_MEM_FORMAT_ENCODING", (0,))
    return _record(_METADATA + "TensorProperties", (dtype, layout, False, contiguous, False))
