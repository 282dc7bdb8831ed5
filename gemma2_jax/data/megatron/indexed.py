"""Megatron's indexed data sets: PREFIX.bin has the tokens of all documents, and PREFIX.idx says where each one lies.

Both files are memory-mapped, so that opening costs a pass over the index and no memory. The layout is that of
Megatron-LM's megatron/core/datasets/indexed_dataset.py: a document is one or more sequences, and almost always one.
What is trained on and in which order is the business of `packing` and `order`.
"""

import itertools
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data.sources import Split

_MAGIC = b"MMIDIDX\x00\x00"
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_SMALL_VOCABULARY = 65_500  # below which tokens are written in 16 bits, as Megatron does
_CHUNK = 1 << 20  # sequences that are checked or written at one time


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """An open data set. Its sequences lie one after another, without a gap."""

    prefix: str
    tokens: np.ndarray  # of the file's integer dtype [tokens]
    lengths: np.ndarray  # int32 [sequences]: tokens of each
    pointers: np.ndarray  # int64 [sequences]: the byte of the .bin file where each begins
    documents: np.ndarray  # int64 [documents + 1]: the first sequence of each, and the number of sequences

    @property
    def begins(self) -> np.ndarray:
        """Where each sequence begins in `tokens`, int64 [sequences]."""
        return self.pointers // self.tokens.itemsize

    @property
    def identity(self) -> list[tuple[str, int, int]]:
        """Where the files are, how large and from when; for JSON."""
        files = [Path(f"{self.prefix}.{ending}") for ending in ("bin", "idx")]
        return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def document_offsets(self) -> np.ndarray:
        """Where each document that has tokens begins, and where the last one ends, int64 [documents + 1]."""
        ends = np.append(self.begins, len(self.tokens))
        return np.unique(ends[self.documents])


def find_prefix(source: str) -> str | None:
    """What the two files' names have in common, given that or either name; None if `source` is no such data set."""
    for ending in (".bin", ".idx"):
        if source.endswith(ending):
            return source.removesuffix(ending)
    return source if Path(f"{source}.idx").is_file() else None


def open_indexed(prefix: str) -> Indexed:
    """Opens PREFIX.bin and PREFIX.idx and checks that they belong together. Raises ValueError where they do not."""
    data_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path, other in ((index_path, data_path), (data_path, index_path)):
        if not path.is_file():
            found = f"and {other} does" if other.is_file() else f"and neither does {other}"
            raise ValueError(f"{path} does not exist, {found}; an indexed data set is two files, .bin and .idx")
    dtype, index = _read_index(index_path)
    if data_path.stat().st_size % dtype.itemsize:
        raise ValueError(
            f"{data_path} is cut in the middle of a token ({data_path.stat().st_size:,} bytes of {dtype}); copy it "
            "again"
        )
    empty = not data_path.stat().st_size  # which no memory map can be
    tokens = np.empty(0, dtype) if empty else np.memmap(data_path, dtype, "r")
    indexed = Indexed(prefix=prefix, tokens=tokens, **index)
    _check_index(indexed, index_path)
    return indexed


def _read_index(path: Path) -> tuple[np.dtype, dict[str, np.ndarray]]:
    """The dtype of the tokens, and the arrays of an index as maps of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header.startswith(_LEGACY_MAGIC):
        raise ValueError(
            f"{path} is of the format TNTIDX, which Megatron-LM no longer reads; tokenize the text again, as with "
            "python -m gemma2_jax.data build"
        )
    if not _MAGIC.startswith(header[: len(_MAGIC)]):
        raise ValueError(f"{path} is no Megatron index: it begins with {header[:9]!r} and not with {_MAGIC!r}")
    if len(header) < _HEADER.size:
        raise ValueError(f"{path} is cut: it has {size} bytes, and its header alone {_HEADER.size}; copy it again")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1:
        raise ValueError(f"{path} is of version {version}; the one that Megatron-LM writes is 1")
    if code not in _DTYPES:
        raise ValueError(f"{path} is damaged: {code} is not the code of a dtype (1 to 8); copy it again")
    dtype = np.dtype(_DTYPES[code])
    if dtype.kind == "f":
        raise ValueError(f"{path} says that {path.stem}.bin holds {dtype.name} values; tokens are whole numbers")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):
        raise ValueError(
            f"{path} is {'cut' if size < expected else 'damaged'}: for the {sequences:,} sequences and "
            f"{documents - 1:,} documents of its header it would have {expected:,} bytes, and it has {size:,}; copy it "
            "again"
        )
    content = np.memmap(path, np.uint8, "r")
    arrays, start = {}, _HEADER.size
    for name, kind, count in (
        ("lengths", "<i4", sequences),
        ("pointers", "<i8", sequences),
        ("documents", "<i8", documents),
    ):
        stop = start + count * np.dtype(kind).itemsize
        arrays[name], start = content[start:stop].view(kind), stop
    if (modes := content[start:]).any():
        first = int(np.flatnonzero(modes)[0])
        raise ValueError(
            f"{path} is of a multimodal data set: sequence {first} is of mode {modes[first]}, and text of mode 0; "
            "Gemma 2 takes text alone"
        )
    return dtype, arrays


def _check_index(indexed: Indexed, path: Path) -> None:
    """Raises ValueError unless the index covers the .bin file, sequence after sequence and document after document."""
    itemsize, end = indexed.tokens.itemsize, 0
    for start in range(0, len(indexed.lengths), _CHUNK):
        lengths = indexed.lengths[start : start + _CHUNK].astype(np.int64)
        ends = end + np.cumsum(lengths) * itemsize
        wrong = np.flatnonzero((lengths < 0) | (indexed.pointers[start : start + _CHUNK] != ends - lengths * itemsize))
        if len(wrong):
            raise ValueError(
                f"{path} is damaged: its sequence {start + wrong[0]:,} does not begin where the one before it ends; "
                "copy it again"
            )
        end = int(ends[-1])
    size = indexed.tokens.nbytes
    if size != end:
        raise ValueError(
            f"{path} describes {end:,} bytes of tokens, and {path.stem}.bin has {size:,}: one of them is "
            f"{'cut' if size < end else 'of another data set'}; copy both again"
        )
    documents = indexed.documents
    if not len(documents) or documents[0] != 0 or documents[-1] != len(indexed.lengths) or _descends(documents):
        raise ValueError(
            f"{path} is damaged: the documents it lists do not run from sequence 0 to its {len(indexed.lengths):,} "
            "sequences; copy it again"
        )


def _descends(values: np.ndarray) -> bool:
    return any((np.diff(values[start : start + _CHUNK + 1]) < 0).any() for start in range(0, len(values), _CHUNK))


def split_bounds(split: Sequence[float], count: int) -> list[tuple[int, int]]:
    """Where training, validation and test sequences begin and end, of so many, in shares of `split`."""
    total = float(np.sum(np.array(split, np.float64)))
    shares = [float(share) / total for share in split]
    edges = [round(edge * float(count)) for edge in itertools.accumulate(shares, initial=0.0)]
    return list(itertools.pairwise(edges))


def choose_part(data: DataConfig, split: Split, prefix: str, count: int) -> tuple[int, int]:
    """Where the documents of a split begin and end, of so many. Raises ValueError if there are none."""
    if data.kind != "text":
        raise ValueError(
            f"{prefix}.bin has tokens and not which of them answer a prompt; --data.kind text trains on all of them"
        )
    first, last = split_bounds(data.shares, count)[split == "eval" and not data.eval]
    if first == last:
        shares = ", ".join(f"{share:g}" for share in data.shares)
        purpose = "to train on" if split == "train" else "held out"
        raise ValueError(
            f"shares of {shares} leave none of the {count:,} documents of {prefix} {purpose}; give others as "
            "--data.split_shares, or as --data.eval_fraction"
        )
    return first, last


def check_tokens(tokens: np.ndarray, vocabulary: int, prefix: str) -> np.ndarray:
    """The tokens as int32. Raises ValueError for one that a tokenizer with so many does not have."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        token = tokens.max() if tokens.min() >= 0 else tokens.min()
        raise ValueError(
            f"{prefix}.bin has token {token}, and the tokenizer has {vocabulary:,}; it was written with another one"
        )
    return tokens.astype(np.int32)


def smallest_dtype(vocabulary: int) -> np.dtype:
    """What Megatron writes the tokens of such a vocabulary in: uint16 if it is under 65,500, else int32."""
    return np.dtype("<u2" if vocabulary < _SMALL_VOCABULARY else "<i4")


def check_target(prefix: str) -> None:
    """Raises ValueError where a data set of that prefix could not be written."""
    for ending in (".bin", ".idx"):
        if Path(prefix + ending).exists():
            raise ValueError(f"{prefix}{ending} exists already; delete it, or give another prefix")
    if Path(prefix).name in ("", "..") or Path(prefix).is_dir():
        raise ValueError(f"{prefix!r} is a folder; give the beginning of two files' names, such as {prefix}/corpus")


def take_back(prefix: str, folder: Path) -> None:
    """Moves PREFIX.bin back to an IndexedWriter's folder where a kill came before PREFIX.idx, its last file, was moved.

    A .bin file of other origin is left alone: the writer's folder would have one too, or no index.
    """
    is_cut = (folder / "idx").exists() and not (folder / "bin").exists() and not Path(f"{prefix}.idx").exists()
    if is_cut and Path(f"{prefix}.bin").is_file():
        Path(f"{prefix}.bin").rename(folder / "bin")


class IndexedWriter:
    """Writes a data set, whose two files get their names when the `with` block ends without an error.

    Until then they are in `folder`, which is made where it is missing and stays. Memory does not grow with what is
    written.
    """

    def __init__(self, prefix: str, dtype: np.dtype, folder: Path) -> None:
        """Raises ValueError if the files exist."""
        check_target(prefix)
        if dtype.str not in {np.dtype(kind).str for kind in _DTYPES.values()} or dtype.kind == "f":
            raise ValueError(f"tokens are not written as {dtype}")
        folder.mkdir(parents=True, exist_ok=True)
        self._prefix, self._dtype, self._folder = prefix, dtype, folder
        self._tokens: BinaryIO = (folder / "bin").open("wb")
        self._lengths: BinaryIO = (folder / "lengths").open("w+b")

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds documents of these lengths, whose tokens lie one after another; ValueError for one that does not fit."""
        assert tokens.size == lengths.sum()
        limits = np.iinfo(self._dtype)
        if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise ValueError(f"token {max(tokens.max(), -tokens.min())} does not fit {self._dtype}")
        tokens.astype(self._dtype, copy=False).tofile(self._tokens)
        lengths.astype("<i4").tofile(self._lengths)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._tokens, self._lengths:
            if kind is None:
                self._write_index(self._folder / "idx")
        if kind is None:
            # A reader takes the index for the sign that there is a data set, so that it gets its name last.
            for name in ("bin", "idx"):
                (self._folder / name).rename(f"{self._prefix}.{name}")
        for name in ("idx", "bin", "lengths"):  # an index alone would be the sign of a kill for `take_back`
            (self._folder / name).unlink(missing_ok=True)

    def _write_index(self, path: Path) -> None:
        documents = self._lengths.tell() // 4
        code = next(code for code, kind in _DTYPES.items() if np.dtype(kind) == self._dtype)
        with path.open("wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index, 1 << 20)
            end = 0
            for lengths in self._read_lengths():
                ends = end + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
                (ends - lengths * np.int64(self._dtype.itemsize)).astype("<i8").tofile(index)
                end = int(ends[-1])
            for start in range(0, documents + 1, _CHUNK):
                np.arange(start, min(start + _CHUNK, documents + 1), dtype="<i8").tofile(index)

    def _read_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while len(lengths := np.fromfile(self._lengths, "<i4", _CHUNK)):
            yield lengths
