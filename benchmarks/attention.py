"""The attention kernels, checked against their meaning and timed: what `benchmarks.gpu` does, less its tables.

This is a library. It imports JAX, so that `benchmarks.gpu` imports it after choosing the platform.
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

from benchmarks.options import describe_library
from gemma2_jax.kernels import reference
from gemma2_jax.kernels.attention import attention
from gemma2_jax.kernels.decode import decode
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.kernels.tiles import GPU, Build
from gemma2_jax.model.attention import mosaic as attention_mosaic, xla as attention_xla

L2_BYTES = 50 * 2**20  # The L2 cache of an H100.
# An error may be so many times that of XLA's bfloat16, as in FlashAttention's tests of its soft cap, and so much more.
# NVIDIA documents a relative error of 2^-11 for the GPU's own tanh: in XLA's place, that alone would need the 2e-3.
ERROR_FACTOR, ERROR_MARGIN = 3, {"exact": 5e-4, "approximate": 2e-3}
XLA_LIMIT = 0.03  # With a larger error XLA is wrong too, and no measure.
LSE_LIMIT = {"exact": 2e-4, "approximate": 50 * 2**-11}  # These are absolute: the cap multiplies the error of tanh.
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


# Each attention below is (q, k, v, mask) -> [B, T, N, H] and the log-sum-exp, or None for it.


def kernel_attention(layer: Layer, build: Build = GPU) -> Callable:
    """The attention of the kernels."""
    run = partial(attention, scale=layer.shape.scale, softcap=layer.shape.softcap, build=build)
    return lambda q, k, v, mask: run(q, k, v, mask.first_BT, mask.last_BT)


def xla_attention(layer: Layer) -> Callable:
    """The attention that is used where the kernels cannot be: jnp in bfloat16."""
    block = attention_xla.BLOCKS["gpu"]
    run = partial(attention_xla.attend, scale=layer.shape.scale, softcap=layer.shape.softcap, block=block)
    return lambda q, k, v, mask: (run(q, k, v, mask.segments_BT, layer.reach), None)


def cudnn_attention(layer: Layer) -> Callable:
    """The attention of cuDNN, without the soft cap, which it lacks, and for one segment a row."""
    window = None if layer.window is None else (layer.window - 1, 0)
    settings = dict(scale=layer.shape.scale, is_causal=True, local_window_size=window, implementation="cudnn")
    # Settings of several types, in one dict, are more than pyright follows.
    attend = partial(jax.nn.dot_product_attention, **settings)  # pyright: ignore[reportArgumentType]
    return lambda q, k, v, mask: (attend(q, k, v), None)


def reference_attention(layer: Layer) -> Callable:
    """The attention of `kernels.reference`; it does not take the intervals that the kernels get, but finds its own."""
    position_BT = jnp.broadcast_to(jnp.arange(layer.length), (layer.rows, layer.length))
    start_BT = np.array([np.searchsorted(row, row) for row in layer.segments_BT], np.int32)
    intervals = reference.visible_mask(position_BT, position_BT, start_BT, layer.reach)
    settings = dict(scale=layer.shape.scale, softcap=layer.shape.softcap)
    return lambda q, k, v, mask: reference.attention(q, k, v, *intervals, **settings)


def run_both_passes(attend: Callable, q, k, v, d, mask: Mask) -> dict[str, Any]:
    """Returns results and gradients by their names: "out", "lse", "dq", "dk", "dv"."""
    out, pull, lse = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v, has_aux=True)
    dq, dk, dv = pull(d.astype(out.dtype))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def compute_reference(layer: Layer, inputs: tuple) -> dict[str, np.ndarray]:
    """Returns `run_both_passes` of the reference in float32, one key head at a time to hold only its scores."""
    q, k, v, d, mask = inputs
    groups = layer.shape.heads // layer.shape.kv_heads
    run = jax.jit(partial(run_both_passes, reference_attention(layer)))
    parts = []
    for head in range(layer.shape.kv_heads):
        q_heads, kv_heads = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
        arrays = q[:, :, q_heads], k[:, :, kv_heads], v[:, :, kv_heads], d[:, :, q_heads]
        parts.append(jax.device_get(run(*(x.astype(jnp.float32) for x in arrays), mask)))
    return {name: np.concatenate([part[name] for part in parts], 1 if name == "lse" else 2) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The check of one case with one build.

    Attributes:
      case, tanh: which case and which build.
      errors: of each result, against float32.
      xla: the errors of XLA's bfloat16, which has no log-sum-exp.
      same: whether the kernel gave the same bits twice.
    """

    case: str
    tanh: str
    errors: dict[str, float]
    xla: dict[str, float]
    same: bool

    @property
    def failures(self) -> list[str]:
        failures = [] if self.same else ["not the same bits twice"]
        for name, error in self.errors.items():
            xla_error = self.xla.get(name)
            limit = LSE_LIMIT[self.tanh] if xla_error is None else ERROR_FACTOR * xla_error + ERROR_MARGIN[self.tanh]
            if not error <= limit:  # NaN is not either.
                failures.append(f"{name} is off by {error:.1e}, of {limit:.1e} allowed")
            if xla_error is not None and not xla_error <= XLA_LIMIT:
                failures.append(f"{name} of XLA, the measure of it, is off by {xla_error:.1e}")
        return [f"{self.case}, {self.tanh} tanh: {failure}" for failure in failures]


def measure_errors(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Measures the relative L2 error of the worst head, and the largest error of log-sum-exps."""
    measured = {}
    for name, array in expected.items():
        if (x := results.get(name)) is None:
            continue
        off = np.asarray(x, np.float32) - array
        if name == "lse":
            measured[name] = float(np.abs(off).max())
        else:
            squares = [np.square(part).sum(axis=(1, 3), dtype=np.float64) for part in (off, array)]
            measured[name] = float(np.sqrt(squares[0] / squares[1]).max())
    return measured


def have_same_bits(left: Any, right: Any) -> bool:
    """Whether two trees of arrays are the same bit by bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def list_builds(interpret: bool) -> list[Build]:
    """The builds of the kernels that are checked."""
    if interpret:
        return [Build(operand_in="shared memory", tanh="exact", interpret=plgpu.InterpretGPUParams())]
    return [Build(tanh="approximate"), Build(tanh="exact")]


def check_case(case: Layer | Cached, interpret: bool) -> Iterator[Check]:
    """Checks a case with each build."""
    inputs = case.inputs()
    if isinstance(case, Layer):
        inputs = *inputs, case.mask()
        expected = compute_reference(case, inputs)
        xla = partial(run_both_passes, xla_attention(case))
    else:
        settings = dict(scale=case.shape.scale, softcap=case.shape.softcap)
        expected = {"out": np.asarray(jax.jit(partial(reference.decode, window=case.slots, **settings))(*inputs))}
        xla = name_output(xla_decode(case))
    xla_errors = measure_errors(jax.device_get(jax.jit(xla)(*inputs)), expected)
    for build in list_builds(interpret):
        if isinstance(case, Layer):
            program = jax.jit(partial(run_both_passes, kernel_attention(case, build)))
        else:
            program = jax.jit(name_output(kernel_decode(case, build)))
        results, repeated = (jax.device_get(program(*inputs)) for _ in range(2))
        kernel_errors, same = measure_errors(results, expected), have_same_bits(results, repeated)
        yield Check(case=str(case), tanh=build.tanh, errors=kernel_errors, xla=xla_errors, same=same)


def name_output(step: Callable) -> Callable:
    """Makes a function that returns its result by the name "out"."""
    return lambda *inputs: {"out": step(*inputs)}


def kernel_decode(case: Cached, build: Build = GPU) -> Callable:
    """The decoding of the kernel: a function (q, k, v, position) -> [B, 1, N, H]."""
    return partial(decode, window=case.slots, scale=case.shape.scale, softcap=case.shape.softcap, build=build)


def xla_decode(case: Cached) -> Callable:
    """The decoding of jnp in bfloat16, as a function like that of the kernel."""
    run = partial(attention_xla.attend_cached, scale=case.shape.scale, softcap=case.shape.softcap)
    return lambda q, k, v, position: run(q[:, 0], k, v, position)[:, None]


def list_checked(name: str, interpret: bool) -> list[Layer | Cached]:
    """The cases of a shape that are checked; where they are interpreted, they are tiny and have few heads."""
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


def list_timed_layers(name: str) -> list[Layer]:
    """The layers of a shape that are timed, of 16384 tokens. Rows of 2048 fit a window, so that layers agree."""
    layer = partial(Layer, name=name, shape=SHAPES[name])
    return [
        layer(rows=8, length=2048),
        layer(rows=2, length=8192),
        layer(rows=2, length=8192, window=SHAPES[name].window),
        layer(rows=2, length=8192, packed=True),
    ]


def list_timed_caches(name: str) -> list[Cached]:
    """The caches that are timed, of 1 and 16 rows: of a global and of a local layer, at the last of 8192 positions."""
    shape = SHAPES[name]
    return [
        Cached(name=name, shape=shape, slots=slots, positions=rows * (8191,))
        for rows in (1, 16)
        for slots in (8192, shape.window)
    ]


class Programs(NamedTuple):
    """The passes of an attention, each a program of its own.

    Attributes:
      forward: (q, k, v, mask) -> out.
      saved: (q, k, v, mask) -> pull, which is what the backward pass needs of the forward one.
      backward: (pull, d) -> dq, dk, dv.
      both: (q, k, v, d, mask) -> out, dq, dk, dv.
    """

    forward: Callable
    saved: Callable
    backward: Callable
    both: Callable


def compile_passes(attend: Callable) -> Programs:
    """Makes the programs of an attention."""

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
    """Measures the seconds of each pass."""
    q, k, v, d = layer.inputs()
    mask = layer.mask()
    run = compile_passes(attend)
    return {
        "forward": measure_seconds(run.forward, q, k, v, mask),
        "backward": measure_seconds(run.backward, run.saved(q, k, v, mask), d),
        "both": measure_seconds(run.both, q, k, v, d, mask),
    }


def count_caches(case: Cached) -> int:
    """The number of caches that are read in turn: so many that each is out of L2 when it is read again."""
    return math.ceil(8 * L2_BYTES / case.bytes)


def count_calls(case: Cached) -> int:
    """The number of calls in one program."""
    return max(8, count_caches(case))


def chain_calls(step: Callable, case: Cached) -> Callable:
    """Makes a program (q, caches, position) -> q of many calls, each to the next cache, as the layers of a model are.

    The result of a call is the queries of the next one, so that no two run at a time.
    """

    step = jax.jit(step)  # It is lowered once.

    def run(q, kv_caches, position):
        for call in range(count_calls(case)):
            k, v = kv_caches[call % len(kv_caches)]
            q = step(q, k, v, position)
        return q

    return run


def time_decode(step: Callable, case: Cached) -> float:
    """Measures the seconds of one call."""
    q, k, v, position = case.inputs()
    kv_caches = [(k, v), *((jnp.copy(k), jnp.copy(v)) for _ in range(count_caches(case) - 1))]
    return measure_seconds(jax.jit(chain_calls(step, case)), q, kv_caches, position) / count_calls(case)


def measure_seconds(run: Callable, *inputs: Any, least: float = 0.1, rounds: int = 5) -> float:
    """Measures the device time of a call: that of the fastest round, which is many calls, waited for once at its end.

    While the device computes one call the host enqueues the next, so that this is the device's time where a call takes
    it longer than it takes the host to enqueue one.

    Args:
      run: a function of `inputs`.
      least: the seconds that a round takes, or more.
      rounds: how many there are.
    """
    jax.block_until_ready(run(*inputs))  # This call compiles.
    began = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    times = max(1, math.ceil(least / (time.perf_counter() - began)))

    def time_round() -> float:
        result, began = None, time.perf_counter()
        for _ in range(times):
            result = run(*inputs)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / times

    return min(time_round() for _ in range(rounds))


if __name__ == "__main__":
    describe_library("attention", __doc__)
