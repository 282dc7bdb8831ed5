"""Bytes of files, memory for large arrays that come and go, and copies of arrays whose dims lie in another order.

The latter two are for speed alone. Fresh memory has to be cleared by the system, page by page, which takes longer than
reading into it; and NumPy copies a matrix across at a quarter of the rate it could.
"""

import ctypes
import errno
import math
import os
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
Index = tuple[slice, ...]  # a part of an array

_BLOCK = 64  # elements: of 16, 32, 64, 128 and 256 the fastest, 3.9 GB/s against 1.0 unblocked (bfloat16, one x86 core)
_SMALL = 1 << 20  # bytes, below which malloc does as well
_KEPT = 8  # arrays: a part in each of a conversion's steps, and those read ahead

_memory: list[np.ndarray] = []
_lock = threading.Lock()


def reuse_memory(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An array as numpy.empty makes it, in memory that an earlier one of these had, if nothing refers to that one."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        return np.empty(shape, dtype)
    with _lock:
        # Every view of an array refers to what owns its memory. Three references are the list, `owner` and the count's.
        idle = [owner for owner in _memory if sys.getrefcount(owner) == 3]
        fitting = [owner for owner in idle if size <= owner.nbytes <= 2 * size]
        if fitting:
            owner = min(fitting, key=lambda owner: owner.nbytes)
        else:
            owner = np.empty(size, np.uint8)
            _memory[:] = [*_memory, owner][-_KEPT:]
        return owner[:size].view(dtype).reshape(shape)


def read_bytes(path: Path, start: int, size: int) -> np.ndarray:
    """Bytes of a file. Raises ValueError where it ends before them."""
    found = reuse_memory((size,), np.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = memoryview(found)
        while left:
            count = file.readinto(left)
            if not count:
                raise ValueError(f"{path} is cut short; copy it again")
            left = left[count:]
    return found


def read_bounded(path: Path, most: int) -> bytes:
    """A small file's bytes. Raises ValueError where it has more than `most`, or may be waited for, as a pipe is."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return data


def reserve_disk(file: BinaryIO, size: int) -> None:
    """Has the disk set `size` bytes aside for what is written next, where its file system can.

    Raises OSError where it has no room. Writing to ext4 then takes a third of the time.
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
    if source.dtype == target.dtype:  # of integers NumPy lets other threads run meanwhile
        bits = np.dtype(f"u{source.itemsize}")
        source, target = source.view(bits), target.view(bits)
    if source.ndim < 2:
        target[...] = source
        return
    while source.ndim > 2 and source.strides[-2] == source.shape[-1] * source.strides[-1]:
        shape = (*source.shape[:-2], source.shape[-2] * source.shape[-1])
        source, target = source.reshape(shape), target.reshape(shape)
    # Of a matrix read across, as many rows at a time as stay in the cache until their next elements are wanted.
    step = _BLOCK if source.strides[-1] != source.itemsize else source.shape[-1] or 1
    for at in range(0, source.shape[-1], step):
        target[..., at : at + step] = source[..., at : at + step]
