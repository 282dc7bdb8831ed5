"""Cases that attention is checked and timed on: rows of tokens that see themselves, and new tokens that see a cache.

A case has its inputs, drawn so that scores reach the cap, and what each query of it sees. `checking` holds the kernels
against their meaning on them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.kernels.shapes import Shape
from gemma2_jax.model.attention import mosaic as attention_mosaic

# What multiplies 4 * pairs * heads * width for the FLOPs of a pass: two products forward, five backward
# (FlashAttention-2, arXiv:2307.08691, section 4.1), however many are made.
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}


class Mask(NamedTuple):
    """What each query sees, as segments, and as the first and last key that the kernels take."""

    segments_BT: Any
    first_BT: Any
    last_BT: Any


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Attention of rows of tokens to themselves, in one kind of layer.

    Attributes:
      name: of the shape.
      shape: heads, head width and soft cap.
      rows, length: of the batch.
      window: in tokens; None for a global layer.
      packed: whether a row has several segments.
    """

    name: str
    shape: Shape
    rows: int
    length: int
    window: int | None = None
    packed: bool = False

    def __str__(self) -> str:
        kind = "global" if self.window is None else f"window {self.window}"
        return f"{self.name}: {self.rows} x {self.length}, {kind}{', packed' if self.packed else ''}"

    @property
    def reach(self) -> int:
        """The window, or in a global layer the length of a row."""
        return self.length if self.window is None else self.window

    @cached_property
    def segments_BT(self) -> np.ndarray:
        """The segment of each token, int32: one a row or, packed, several of about 1024 tokens and one of a single one.

        A packed row also has a segment that starts at an edge of a tile.
        """
        segments = np.zeros((self.rows, self.length), np.int32)
        if self.packed:
            rng = np.random.default_rng(self.length)
            for row in segments:
                edges = rng.choice(np.arange(1, self.length), 2 + self.length // 1024, replace=False)
                row[[*edges, max(edges[0] - 1, 1), min(128, self.length - 1)]] = 1
        return 1 + np.cumsum(segments, axis=1, dtype=np.int32)

    @property
    def pairs(self) -> int:
        """The number of pairs of a query and a key that it sees, in one head and all rows."""
        position_T = np.arange(self.length)
        new_BT = np.diff(self.segments_BT, axis=1, prepend=0) != 0
        start_BT = np.maximum.accumulate(np.where(new_BT, position_T, 0), axis=1)
        return int(np.minimum(position_T - start_BT + 1, self.reach).sum(dtype=np.int64))

    def flops(self, pass_name: str) -> float:
        """The FLOPs of a pass, by convention: see PASSES."""
        return PASSES[pass_name] * 4 * self.pairs * self.shape.heads * self.shape.width

    def shapes(self) -> tuple:
        """The shapes and dtypes of `inputs`."""
        shape = self.shape
        q, k = (
            jax.ShapeDtypeStruct((self.rows, self.length, heads, shape.width), jnp.bfloat16)
            for heads in (shape.heads, shape.kv_heads)
        )
        return q, k, k, q

    def inputs(self) -> tuple:
        """Draws queries, keys, values, and a gradient by the output."""
        q, k, v, d = draw_arrays(*self.shapes())
        return scale_to_cap(q, self.shape), k, v, d

    def mask(self) -> Mask:
        """What each query sees, as `attention_mosaic` computes it."""
        segments_BT = jnp.asarray(self.segments_BT)
        start_BT = attention_mosaic.segment_starts(segments_BT)
        position_T = jnp.arange(self.length)
        intervals = attention_mosaic.key_intervals(position_T, start_BT, (0,), self.length, self.reach)
        return Mask(segments_BT, *intervals)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """Attention of one new token of each row to a cache.

    Attributes:
      name: of the shape.
      shape: heads, head width and soft cap.
      slots: of a row's cache.
      positions: of the tokens; with one from `slots` on, the cache is a ring, as local layers have it.
    """

    name: str
    shape: Shape
    slots: int
    positions: tuple[int, ...]

    def __str__(self) -> str:
        kind = "ring" if max(self.positions) >= self.slots else "dense"
        return f"{self.name}: decode, {len(self.positions)} x {self.slots} slots, {kind}"

    @property
    def bytes(self) -> int:
        """The bytes of the keys and values that are seen."""
        seen = sum(min(position + 1, self.slots) for position in self.positions)
        return seen * self.shape.kv_heads * self.shape.width * 2 * 2

    def shapes(self) -> tuple:
        """The shapes and dtypes of queries, keys and values."""
        rows, shape = len(self.positions), self.shape
        k = jax.ShapeDtypeStruct((rows, shape.kv_heads, self.slots, shape.width), jnp.bfloat16)
        return jax.ShapeDtypeStruct((rows, 1, shape.heads, shape.width), jnp.bfloat16), k, k

    def inputs(self) -> tuple:
        """Draws queries, keys and values; and the positions."""
        q, k, v = draw_arrays(*self.shapes())
        return scale_to_cap(q, self.shape), k, v, jnp.array(self.positions, jnp.int32)


def draw_arrays(*shapes) -> tuple:
    """Draws an array from a normal distribution for each shape and dtype."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True))


def scale_to_cap(q_BTNH, shape: Shape):
    """Scales queries so that scores reach the cap.

    The standard deviation of scores goes from half the cap, in the first head, down to 1, in the last.
    """
    spread_N = np.geomspace(shape.softcap / 2, 1, shape.heads) / (shape.scale * shape.width**0.5)
    return q_BTNH * jnp.asarray(spread_N[:, None], q_BTNH.dtype)
