"""Bytes of files, memory for large arrays that come and go, and copies of arrays whose dims lie in another order.

Reusing memory and copying in blocks are for speed alone. The system clears fresh memory page by page, which takes
longer than reading into it; and NumPy transposes a matrix at a quarter of the rate that is possible.
"""

import ctypes
import errno
import itertools
import math
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

Shapes = dict[str, tuple[int, ...]]  # the shapes of tensors, by name
Index = tuple[slice, ...]  # the part of an array at these slices, one for each dim

# A block's rows and columns, and how much longer its rows are in memory: where the length of a row is a multiple of
# 4 KB, a processor's cache has room for a few elements of a column. Of the sizes that were tried the fastest: 3.0 to
# 5.5 GB/s for the matrices of 27B, where copying without a block takes 1.0 (bfloat16, an x86 core).
_ROWS, _COLUMNS, _PADDING = 128, 512, 32
_SMALL_BYTES = 1 << 20  # for arrays smaller than this malloc is as fast
_MOST_KEPT = 8  # arrays whose memory is kept: a part in each of a conversion's steps, and the parts read ahead

_memory: list[np.ndarray] = []
_lock = threading.Lock()


def reuse_memory(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An array as numpy.empty makes it, in the memory of an earlier such array to which nothing refers any more."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL_BYTES:
        return np.empty(shape, dtype)
    with _lock:
        # Every view of an array refers to the owner of its memory. An idle owner has three references: the list's, the
        # variable's and that of the argument of getrefcount.
        idle = [owner for owner in _memory if sys.getrefcount(owner) == 3]
        fitting = [owner for owner in idle if size <= owner.nbytes <= 2 * size]
        if fitting:
            owner = min(fitting, key=lambda owner: owner.nbytes)
        else:
            owner = np.empty(size, np.uint8)
            _memory[:] = [*_memory, owner][-_MOST_KEPT:]
        return owner[:size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Version:
    """By what a file is known to be the one that was opened, as far as a file system says."""

    inode: int
    size: int
    changed: int  # nanoseconds

    @classmethod
    def of(cls, file: Path | int) -> "Version":
        """That of a path or of a descriptor."""
        status = os.stat(file)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


def read_bytes(path: Path, start: int, size: int, version: Version | None = None) -> np.ndarray:
    """`size` bytes of a file from `start` on, as uint8.

    Raises ValueError where the file ends before, or is not of the version that was opened, of which its other bytes
    are, and OSError, with the file's name, where it cannot be read.
    """
    data = reuse_memory((size,), np.uint8)
    with open(path, "rb", buffering=0) as file:
        if version and Version.of(file.fileno()) != version:
            raise ValueError(f"{path} was changed while it was read; once it is whole, give the same command again")
        file.seek(start)
        left = memoryview(data)
        while left:
            try:
                count = file.readinto(left)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            if not count:
                raise ValueError(f"{path} is cut short; copy it again")
            left = left[count:]
    return data


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a small file. Raises ValueError where it has more than `most`, or is a pipe or a device."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return data


def reserve_disk(file: BinaryIO, size: int) -> None:
    """Sets `size` bytes of the disk aside for the next writes, where the file system can do that.

    Raises OSError where the disk has no room. Writing to ext4 then takes a third of the time.
    """
    file.flush()
    keep_size = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h; Python's own posix_fallocate may write instead
    place = ctypes.c_int64(file.tell()), ctypes.c_int64(size)
    if ctypes.CDLL(None, use_errno=True).fallocate(file.fileno(), keep_size, *place):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def contiguous_copy(array: np.ndarray) -> np.ndarray:
    """The array itself if it is in C order, else a copy that is."""
    if array.flags.c_contiguous:
        return array
    copy = reuse_memory(array.shape, array.dtype)
    copy_array(copy, array)
    return copy


def copy_array(target: np.ndarray, source: np.ndarray) -> None:
    """Copies `source` into `target`, which is in C order, cast to its dtype."""
    if source.dtype == target.dtype:  # NumPy lets other threads run while it copies integers
        bits = np.dtype(f"u{source.itemsize}")
        source, target = source.view(bits), target.view(bits)
    while source.ndim > 2 and source.strides[-2] == source.shape[-1] * source.strides[-1]:
        shape = (*source.shape[:-2], source.shape[-2] * source.shape[-1])
        source, target = source.reshape(shape), target.reshape(shape)
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
    elif source.ndim > 2:
        for part, layer in zip(target, source, strict=True):
            copy_array(part, layer)
    else:
        _copy_transposed(target, source.T)


def _copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """Copies the transpose of a matrix, by blocks that stay in the cache until their columns have been read."""
    block = np.empty((_ROWS, _COLUMNS + _PADDING), source.dtype)
    rows, columns = source.shape
    for row, column in itertools.product(range(0, rows, _ROWS), range(0, columns, _COLUMNS)):
        spans = slice(row, row + _ROWS), slice(column, column + _COLUMNS)
        part = source[spans]
        copy = block[: part.shape[0], : part.shape[1]]
        copy[...] = part
        target[spans[::-1]] = copy.T
