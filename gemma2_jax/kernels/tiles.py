"""What the attention kernels have in common: sizes of tiles, which tiles are visited, and how a kernel is built."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a warpgroup's matrix product


@dataclass(frozen=True, kw_only=True)
class Tile:
    keys: int
    stages: int
    queries: int = ROWS


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a kernel is built."""

    operand_in: Literal["registers", "shared"] = "registers"
    tanh: Literal["approximate", "exact"] = "approximate"
    interpret: Any = None

    @property
    def shared(self):
        return self.operand_in == "shared"

    def operand(self, x, smem):
        """`x` as the left operand of a matrix product."""
        if not self.shared:
            return x
        smem[...] = x
        plgpu.commit_smem()
        return smem

    @property
    def compiler(self):
        return plgpu.CompilerParams(approx_math=self.tanh == "approximate")


def spread(x, n, axis=0):
    return jax.lax.broadcast_in_dim(x, (x.shape[0], n), [0])


def ring(*a):
    pass


def bounds(first_BT, last_BT, rows: int, size: int):
    """Of each run of `rows`: which tiles of `size` it visits, and which of them whole: [B, I, 4]."""
    first, last = (x.reshape(x.shape[0], -1, rows) for x in (first_BT, last_BT))
    none = first > last
    start = jnp.where(none, jnp.iinfo(jnp.int32).max, first).min(-1) // size
    end = jnp.where(none, -1, last).max(-1) // size + 1
    start = jnp.minimum(start, end)
    clean = jnp.clip(-(-first.max(-1) // size), start, end)
    masked = jnp.clip((last.min(-1) + 1) // size, clean, end)
    return jnp.stack([start, clean, masked, end], axis=-1).astype(jnp.int32)
