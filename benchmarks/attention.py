"""What of the attention kernels is checked, and how they are timed: what `benchmarks.gpu` does, less its tables.

`gemma2_jax.model.attention.checking` checks a case.

This is a library. It imports JAX, so that `benchmarks.gpu` imports it after choosing the platform.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.options import describe_library
from gemma2_jax.cluster.timing import measure_seconds
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.kernels.tiles import Build
from gemma2_jax.model.attention.cases import Cached, Layer
from gemma2_jax.model.attention.checking import INTERPRETED

L2_BYTES = 50 * 2**20  # The L2 cache of an H100.
_INTERPRETED: dict[str, Any] = {"least": 0.0, "rounds": 1}


def cudnn_attention(layer: Layer) -> Callable:
    """The attention of cuDNN, without the soft cap, which it lacks, and for one segment a row."""
    window = None if layer.window is None else (layer.window - 1, 0)
    settings = dict(scale=layer.shape.scale, is_causal=True, local_window_size=window, implementation="cudnn")
    # Settings of several types, in one dict, are more than pyright follows.
    attend = partial(jax.nn.dot_product_attention, **settings)  # pyright: ignore[reportArgumentType]
    return lambda q, k, v, mask: (attend(q, k, v), None)


def list_builds(interpret: bool) -> list[Build]:
    """The builds of the kernels that are checked."""
    return [INTERPRETED] if interpret else [Build(tanh="approximate"), Build(tanh="exact")]


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


def list_timed_layers(name: str, interpret: bool) -> list[Layer]:
    """The layers of a shape that are timed, of 16384 tokens. Rows of 2048 fit a window, so that layers agree."""
    layer = partial(Layer, name=name, shape=SHAPES[name])
    if interpret:
        return [Layer(name=name, shape=_fewest_heads(SHAPES[name]), rows=1, length=64)]
    return [
        layer(rows=8, length=2048),
        layer(rows=2, length=8192),
        layer(rows=2, length=8192, window=SHAPES[name].window),
        layer(rows=2, length=8192, packed=True),
    ]


def _fewest_heads(shape: Shape) -> Shape:
    return replace(shape, heads=min(shape.heads, 2), kv_heads=1)


def list_timed_caches(name: str, interpret: bool) -> list[Cached]:
    """The caches that are timed, of 1 and 16 rows: of a global and of a local layer, at the last of 8192 positions."""
    shape = SHAPES[name]
    if interpret:
        return [Cached(name=name, shape=_fewest_heads(shape), slots=64, positions=(63,))]
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


def time_passes(attend: Callable, layer: Layer, interpret: bool = False) -> dict[str, float]:
    """Measures the seconds of each pass. What is interpreted runs as rarely as it can."""
    options = _INTERPRETED if interpret else {}
    q, k, v, d = layer.inputs()
    mask = layer.mask()
    run = compile_passes(attend)
    return {
        "forward": measure_seconds(run.forward, q, k, v, mask, **options),
        "backward": measure_seconds(run.backward, run.saved(q, k, v, mask), d, **options),
        "both": measure_seconds(run.both, q, k, v, d, mask, **options),
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


def time_decode(step: Callable, case: Cached, interpret: bool = False) -> float:
    """Measures the seconds of one call. What is interpreted runs as rarely as it can, and by itself."""
    q, k, v, position = case.inputs()
    if interpret:
        return measure_seconds(jax.jit(step), q, k, v, position, **_INTERPRETED)
    kv_caches = [(k, v), *((jnp.copy(k), jnp.copy(v)) for _ in range(count_caches(case) - 1))]
    return measure_seconds(jax.jit(chain_calls(step, case)), q, kv_caches, position) / count_calls(case)


if __name__ == "__main__":
    describe_library("attention", __doc__)
