"""The attention kernels against their meaning, and against time: what `python -m benchmarks.gpu` does, less its tables.

A library, imported once it is settled what JAX computes on.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import reference
from gemma2_jax.kernels.attention import attention
from gemma2_jax.kernels.decode import decode
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.kernels.tiles import GPU, Build
from gemma2_jax.model.attention import mosaic as attention_mosaic, xla as attention_xla

L2_BYTES = 50 * 2**20  # of an H100
# An error may be so many times that of XLA's bfloat16, as in FlashAttention's tests of its soft cap, and so much more.
# NVIDIA documents a relative error of 2^-11 for the GPU's own tanh: in XLA's place, that alone would need the 2e-3.
TIMES, MORE = 3, {"exact": 5e-4, "approximate": 2e-3}
XLA_MOST = 0.03  # above which XLA is wrong too, and no measure
LSE_MOST = {"exact": 2e-4, "approximate": 50 * 2**-11}  # absolute: the cap multiplies the error of tanh
# Of what multiplies 4 * pairs * heads * width: two products forward, five backward (FlashAttention-2,
# arXiv:2307.08691, section 4.1), however many are made.
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}


class Mask(NamedTuple):
    """What each query sees, as segments, and as the first and last key that the kernels take."""

    segments_BT: Any
    first_BT: Any
    last_BT: Any


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Attention of rows of tokens to themselves, in one kind of layer."""

    name: str  # of the shape
    shape: Shape
    rows: int
    length: int
    window: int | None = None  # None: a global layer
    packed: bool = False  # several segments a row

    def __str__(self) -> str:
        kind = "global" if self.window is None else f"window {self.window}"
        return f"{self.name}: {self.rows} x {self.length}, {kind}{', packed' if self.packed else ''}"

    @property
    def reach(self) -> int:
        return self.length if self.window is None else self.window

    @cached_property
    def segments_BT(self) -> np.ndarray:
        """One segment a row; packed, some of about 1024 tokens, one of a single token, and an edge of a tile."""
        segments = np.zeros((self.rows, self.length), np.int32)
        if self.packed:
            rng = np.random.default_rng(self.length)
            for row in segments:
                edges = rng.choice(np.arange(1, self.length), 2 + self.length // 1024, replace=False)
                row[[*edges, max(edges[0] - 1, 1), min(128, self.length - 1)]] = 1
        return 1 + np.cumsum(segments, axis=1, dtype=np.int32)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, of one head, over all rows."""
        at_T = np.arange(self.length)
        new_BT = np.diff(self.segments_BT, axis=1, prepend=0) != 0
        start_BT = np.maximum.accumulate(np.where(new_BT, at_T, 0), axis=1)
        return int(np.minimum(at_T - start_BT + 1, self.reach).sum(dtype=np.int64))

    def flops(self, which: str) -> float:
        """Of a pass, by convention: see PASSES."""
        return PASSES[which] * 4 * self.pairs * self.shape.heads * self.shape.width

    def shapes(self) -> tuple:
        """Of `inputs`."""
        shape = self.shape
        q, k = (
            jax.ShapeDtypeStruct((self.rows, self.length, heads, shape.width), jnp.bfloat16)
            for heads in (shape.heads, shape.kv_heads)
        )
        return q, k, k, q

    def inputs(self) -> tuple:
        """Queries, keys, values, and a gradient by the output."""
        q, k, v, d = drawn(*self.shapes())
        return reaching_the_cap(q, self.shape), k, v, d

    def mask(self) -> Mask:
        """As `attention_mosaic` makes it."""
        segments_BT = jnp.asarray(self.segments_BT)
        start_BT = attention_mosaic.segment_starts(segments_BT)
        seen = attention_mosaic.key_intervals(jnp.arange(self.length), start_BT, (0,), self.length, self.reach)
        return Mask(segments_BT, *seen)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """Attention of one new token of each row to a cache."""

    name: str  # of the shape
    shape: Shape
    slots: int
    positions: tuple[int, ...]  # of the tokens; from `slots` on the cache is a ring, which a local layer has

    def __str__(self) -> str:
        kind = "ring" if max(self.positions) >= self.slots else "dense"
        return f"{self.name}: decode, {len(self.positions)} x {self.slots} slots, {kind}"

    @property
    def bytes(self) -> int:
        """Of the keys and values seen."""
        seen = sum(min(position + 1, self.slots) for position in self.positions)
        return seen * self.shape.kv_heads * self.shape.width * 2 * 2

    def shapes(self) -> tuple:
        rows, shape = len(self.positions), self.shape
        k = jax.ShapeDtypeStruct((rows, shape.kv_heads, self.slots, shape.width), jnp.bfloat16)
        return jax.ShapeDtypeStruct((rows, 1, shape.heads, shape.width), jnp.bfloat16), k, k

    def inputs(self) -> tuple:
        """Queries, the cache, and positions."""
        q, k, v = drawn(*self.shapes())
        return reaching_the_cap(q, self.shape), k, v, jnp.array(self.positions, jnp.int32)


def drawn(*shapes) -> tuple:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True))


def reaching_the_cap(q_BTNH, shape: Shape):
    """Scaled: the standard deviation of scores goes from half the cap, of the first head, down to 1, of the last."""
    spread_N = np.geomspace(shape.softcap / 2, 1, shape.heads) / (shape.scale * shape.width**0.5)
    return q_BTNH * jnp.asarray(spread_N[:, None], q_BTNH.dtype)


# Each attention below is (q, k, v, mask) -> [B, T, N, H] and the log-sum-exp, or None for it.


def by_kernel(layer: Layer, build: Build = GPU) -> Callable:
    run = partial(attention, scale=layer.shape.scale, softcap=layer.shape.softcap, build=build)
    return lambda q, k, v, mask: run(q, k, v, mask.first_BT, mask.last_BT)


def by_xla(layer: Layer) -> Callable:
    block = attention_xla.BLOCKS["gpu"]
    run = partial(attention_xla.attend, scale=layer.shape.scale, softcap=layer.shape.softcap, block=block)
    return lambda q, k, v, mask: (run(q, k, v, mask.segments_BT, layer.reach), None)


def by_cudnn(layer: Layer) -> Callable:
    """Without the soft cap, which it lacks, and of one segment a row."""
    window = None if layer.window is None else (layer.window - 1, 0)
    settings = dict(scale=layer.shape.scale, is_causal=True, local_window_size=window, implementation="cudnn")
    # Settings of several types, in one dict, are more than pyright follows.
    attend = partial(jax.nn.dot_product_attention, **settings)  # pyright: ignore[reportArgumentType]
    return lambda q, k, v, mask: (attend(q, k, v), None)


def by_reference(layer: Layer) -> Callable:
    """The meaning: what is seen does not come from what the kernels get."""
    at_BT = jnp.broadcast_to(jnp.arange(layer.length), (layer.rows, layer.length))
    start_BT = np.array([np.searchsorted(row, row) for row in layer.segments_BT], np.int32)
    seen = reference.visible_mask(at_BT, at_BT, start_BT, layer.reach)
    settings = dict(scale=layer.shape.scale, softcap=layer.shape.softcap)
    return lambda q, k, v, mask: reference.attention(q, k, v, *seen, **settings)


def everything(attend: Callable, q, k, v, d, mask: Mask) -> dict[str, Any]:
    """Results and gradients."""
    out, pull, lse = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v, has_aux=True)
    dq, dk, dv = pull(d.astype(out.dtype))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def meaning(layer: Layer, inputs: tuple) -> dict[str, np.ndarray]:
    """`everything` of the reference in float32, one key head at a time: it holds all scores of these."""
    q, k, v, d, mask = inputs
    groups = layer.shape.heads // layer.shape.kv_heads
    run = jax.jit(partial(everything, by_reference(layer)))
    parts = []
    for head in range(layer.shape.kv_heads):
        mine = slice(head * groups, (head + 1) * groups)
        some = q[:, :, mine], k[:, :, head : head + 1], v[:, :, head : head + 1], d[:, :, mine]
        parts.append(jax.device_get(run(*(x.astype(jnp.float32) for x in some), mask)))
    return {name: np.concatenate([part[name] for part in parts], 1 if name == "lse" else 2) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found of one case and one build: errors against float32."""

    case: str
    tanh: str
    errors: dict[str, float]
    xla: dict[str, float]  # of XLA's bfloat16; it has no log-sum-exp
    same: bool  # whether it gave the same bits twice

    @property
    def failures(self) -> list[str]:
        found = [] if self.same else ["not the same bits twice"]
        for name, error in self.errors.items():
            by_xla = self.xla.get(name)
            most = LSE_MOST[self.tanh] if by_xla is None else TIMES * by_xla + MORE[self.tanh]
            if not error <= most:  # which NaN is not
                found.append(f"{name} is off by {error:.1e}, of {most:.1e} allowed")
            if by_xla is not None and not by_xla <= XLA_MOST:
                found.append(f"{name} of XLA, the measure of it, is off by {by_xla:.1e}")
        return [f"{self.case}, {self.tanh} tanh: {each}" for each in found]


def errors(found: dict[str, np.ndarray], meant: dict[str, np.ndarray]) -> dict[str, float]:
    """Of heads, the relative L2 error of the worst; of log-sum-exps, the largest error."""
    result = {}
    for name, wanted in meant.items():
        if (x := found.get(name)) is None:
            continue
        off = np.asarray(x, np.float32) - wanted
        if name == "lse":
            result[name] = float(np.abs(off).max())
        else:
            squares = [np.square(part).sum(axis=(1, 3), dtype=np.float64) for part in (off, wanted)]
            result[name] = float(np.sqrt(squares[0] / squares[1]).max())
    return result


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def builds(interpret: bool) -> list[Build]:
    if interpret:
        return [Build(operand_in="shared memory", tanh="exact", interpret=plgpu.InterpretGPUParams())]
    return [Build(tanh="approximate"), Build(tanh="exact")]


def check(case: Layer | Cached, interpret: bool) -> Iterator[Check]:
    """A case, with each build."""
    inputs = case.inputs()
    if isinstance(case, Layer):
        inputs = *inputs, case.mask()
        meant = meaning(case, inputs)
        xla = partial(everything, by_xla(case))
    else:
        settings = dict(scale=case.shape.scale, softcap=case.shape.softcap)
        meant = {"out": np.asarray(jax.jit(partial(reference.decode, window=case.slots, **settings))(*inputs))}
        xla = named(decode_by_xla(case))
    by = errors(jax.device_get(jax.jit(xla)(*inputs)), meant)
    for build in builds(interpret):
        if isinstance(case, Layer):
            program = jax.jit(partial(everything, by_kernel(case, build)))
        else:
            program = jax.jit(named(decode_by_kernel(case, build)))
        found, again = (jax.device_get(program(*inputs)) for _ in range(2))
        same = same_bits(found, again)
        yield Check(case=str(case), tanh=build.tanh, errors=errors(found, meant), xla=by, same=same)


def named(step: Callable) -> Callable:
    return lambda *inputs: {"out": step(*inputs)}


def decode_by_kernel(case: Cached, build: Build = GPU) -> Callable:
    """(q, k, v, position) -> [B, 1, N, H]"""
    return partial(decode, window=case.slots, scale=case.shape.scale, softcap=case.shape.softcap, build=build)


def decode_by_xla(case: Cached) -> Callable:
    run = partial(attention_xla.attend_cached, scale=case.shape.scale, softcap=case.shape.softcap)
    return lambda q, k, v, position: run(q[:, 0], k, v, position)[:, None]


def checked(name: str, interpret: bool) -> list[Layer | Cached]:
    """The cases of a shape that are checked: tiny ones of few heads where they are interpreted."""
    shape = SHAPES[name]
    if interpret:
        shape = replace(shape, heads=min(shape.heads, 4), kv_heads=min(shape.kv_heads, 2))
    layer, cached = partial(Layer, name=name, shape=shape), partial(Cached, name=name, shape=shape)
    if interpret:
        return [
            layer(rows=1, length=100, window=33, packed=True),
            cached(slots=128, positions=(60, 300)),
        ]
    return [
        layer(rows=2, length=1024),
        layer(rows=2, length=1024, packed=True),
        layer(rows=2, length=1000, window=129, packed=True),
        layer(rows=1, length=777, window=64),
        layer(rows=1, length=8192, window=shape.window),
        layer(rows=1, length=8192, window=shape.window, packed=True),
        cached(slots=1000, positions=(0, 63, 500, 999)),
        cached(slots=8192, positions=(8191, 4000)),
        cached(slots=shape.window, positions=(8191, 100, shape.window)),
    ]


def timed(name: str) -> list[Layer]:
    """The layers of a shape that are timed, of 16384 tokens. Rows of 2048 are within a window: both kinds are alike."""
    layer = partial(Layer, name=name, shape=SHAPES[name])
    return [
        layer(rows=8, length=2048),
        layer(rows=2, length=8192),
        layer(rows=2, length=8192, window=SHAPES[name].window),
        layer(rows=2, length=8192, packed=True),
    ]


def timed_caches(name: str) -> list[Cached]:
    """A whole cache of a global layer and a ring of a local one, at the last of 8192 positions, of 1 and of 16 rows."""
    shape = SHAPES[name]
    return [
        Cached(name=name, shape=shape, slots=slots, positions=rows * (8191,))
        for rows in (1, 16)
        for slots in (8192, shape.window)
    ]


class Programs(NamedTuple):
    """The passes of an attention, each a program of its own; what the backward pass needs is a program's output."""

    forward: Callable  # (q, k, v, mask) -> out
    saved: Callable  # (q, k, v, mask) -> pull
    backward: Callable  # (pull, d) -> dq, dk, dv
    both: Callable  # (q, k, v, d, mask) -> out, dq, dk, dv


def programs(attend: Callable) -> Programs:
    def differentiated(q, k, v, mask):
        return jax.vjp(lambda q, k, v: attend(q, k, v, mask)[0], q, k, v)

    def both(q, k, v, d, mask):
        out, pull = differentiated(q, k, v, mask)
        return out, *pull(d)

    return Programs(
        forward=jax.jit(lambda q, k, v, mask: attend(q, k, v, mask)[0]),
        saved=jax.jit(lambda q, k, v, mask: differentiated(q, k, v, mask)[1]),
        backward=jax.jit(lambda pull, d: pull(d)),
        both=jax.jit(both),
    )


def time_passes(attend: Callable, layer: Layer) -> dict[str, float]:
    """Seconds of each pass."""
    q, k, v, d = layer.inputs()
    mask = layer.mask()
    run = programs(attend)
    result = {"forward": seconds(run.forward, q, k, v, mask)}
    result["backward"] = seconds(run.backward, run.saved(q, k, v, mask), d)
    return {**result, "both": seconds(run.both, q, k, v, d, mask)}


def caches(case: Cached) -> int:
    """So many that one is out of L2 when it is read again."""
    return math.ceil(8 * L2_BYTES / case.bytes)


def calls(case: Cached) -> int:
    return max(8, caches(case))


def chained(step: Callable, case: Cached) -> Callable:
    """(q, caches, position) -> q: a program of `calls`, each to the next cache, as the layers of a model are.

    A result is the next one's queries, so that none runs beside another.
    """

    step = jax.jit(step)  # which is lowered once

    def run(q, kept, position):
        for call in range(calls(case)):
            k, v = kept[call % len(kept)]
            q = step(q, k, v, position)
        return q

    return run


def time_decode(step: Callable, case: Cached) -> float:
    """Seconds of one call."""
    q, k, v, position = case.inputs()
    kept = [(k, v), *((jnp.copy(k), jnp.copy(v)) for _ in range(caches(case) - 1))]
    return seconds(jax.jit(chained(step, case)), q, kept, position) / calls(case)


def seconds(run: Callable, *inputs: Any, least: float = 0.1, rounds: int = 5) -> float:
    """Device time of a call: of `rounds`, the fastest; a round is calls one after another, waited for once at its end.

    While the device computes one call the host enqueues the next, so that this is the device's time where a call takes
    it longer than it takes the host to enqueue one.

    Args:
      run: of `inputs`.
      least: so many seconds a round takes, or more.
    """
    jax.block_until_ready(run(*inputs))  # compiles
    began = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    times = max(1, math.ceil(least / (time.perf_counter() - began)))

    def one_round() -> float:
        result, began = None, time.perf_counter()
        for _ in range(times):
            result = run(*inputs)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / times

    return min(one_round() for _ in range(rounds))
