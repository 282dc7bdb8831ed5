"""Tensors that an adapter of PEFT's stands for and does not hold, read in parts like those of a file.

`peft` says which they are.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.files.tensors import Tensor

_ROWS_AT_ONCE = 4096  # of matrices that are compared


def read_whole(tensor: Tensor) -> np.ndarray:
    """A tensor in float32."""
    return tensor.read((slice(None),) * len(tensor.shape)).astype(np.float32)


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices have the same values, compared a block of rows at a time."""
    if first is second:
        return True
    if first.shape != second.shape:
        return False
    blocks = [(slice(row, row + _ROWS_AT_ONCE), slice(None)) for row in range(0, first.shape[0], _ROWS_AT_ONCE)]
    dtype = jnp.result_type(first.dtype, second.dtype)
    return all(np.array_equal(first.read(block).astype(dtype), second.read(block).astype(dtype)) for block in blocks)


@dataclass(frozen=True, eq=False)
class ZeroTensor:
    """What a layer without an adapter has."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index) -> np.ndarray:
        return np.zeros([len(range(size)[span]) for size, span in zip(self.shape, index, strict=True)], self.dtype)


@dataclass(frozen=True, eq=False)
class PaddedTensor:
    """A tensor with zeros up to a shape that is larger in the adapter's rank."""

    stored: Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def read(self, index: Index) -> np.ndarray:
        whole = np.zeros(self.shape, self.dtype)
        part = self.stored.read((slice(None),) * len(self.shape))
        whole[tuple(map(slice, part.shape))] = part
        return whole[index]


@dataclass(frozen=True, eq=False)
class ReplacedRows:
    """A matrix of which some rows are other ones, in the dtype that holds the values of both."""

    matrix: Tensor
    indices: list[int]
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(jnp.result_type(self.matrix.dtype, self.rows.dtype))

    def read(self, index: Index) -> np.ndarray:
        span = range(self.shape[0])[index[0]]
        part = self.matrix.read(index).astype(self.dtype)  # a copy
        for token, row in zip(self.indices, self.rows, strict=True):
            if token in span:
                part[token - span.start] = row[index[1]].astype(self.dtype)
        return part


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """A matrix plus a low-rank product, in float32."""

    matrix: Tensor
    left: np.ndarray  # [rows, rank]
    right: np.ndarray  # [rank, columns]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index) -> np.ndarray:
        product = self.left[index[0]] @ self.right[:, index[1]]
        return self.matrix.read(index).astype(np.float32) + np.float32(self.scale) * product
