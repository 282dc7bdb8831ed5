"""Attention by the kernels and by jnp: against its meaning in float32, over the shapes of Gemma 2.

The Mosaic kernels run in the interpreter, which checks barriers and races but takes wgmma for synchronous: see
`test_kernels_machine` for what only the compiler can say. Comparisons follow FlashAttention's: an implementation may
miss float32 by no more than a few times what jnp in bfloat16 does.
"""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import backward, reference, tiles
from gemma2_jax.kernels.attention import attention, combine_parts
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.kernels.tile_sizes import TILES
from gemma2_jax.kernels.tiles import Build, Inputs, Settings
from gemma2_jax.model.attention import mosaic as attention_mosaic, xla as attention_xla

INTERPRETED = Build(operand_in="shared memory", tanh="exact", interpret=plgpu.InterpretGPUParams(detect_races=True))
SMALL = Shape(heads=2, kv_heads=1, width=64, scale=0.125)  # For what is the same at any width.
T = 200  # It is no multiple of a tile.
WINDOWS = 1, 63, 64, 65, 100, 10_000
PACKINGS = {
    "one": (T,),
    "many": (70, 1, 57, 64, 8),  # One edge is on a tile's and one beside it; the last segment is padding.
    "single": (1,) * T,
    "edges": (64, 64, 1, 63, 8),
}


def mark_exhaustive(cases, chosen) -> list:
    """Makes parameters of the cases: the chosen ones are in each run of the suite, the rest in the exhaustive one."""
    unchosen = [case if isinstance(case, tuple) else (case,) for case in cases if case not in chosen]
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in unchosen)]


def segments(packing: str, rows: int = 1) -> jax.Array:
    lengths = PACKINGS[packing]
    return jnp.broadcast_to(jnp.repeat(jnp.arange(len(lengths)), np.array(lengths), total_repeat_length=T), (rows, T))


def visible(segments_BT, window) -> np.ndarray:
    """Whether each query sees each key, [B, T, S], pair by pair."""
    segments_BT, position = np.asarray(segments_BT), np.arange(T)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window) & (segments_BT[:, :, None] == segments_BT[:, None])


def draw_arrays(shape: Shape, rows: int = 1, spread: float = 1.0, length: int = T):
    """Draws q, k, v and the gradient of the result; `spread` multiplies q, and with it the scores."""
    rng = np.random.default_rng(0)
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    q, k, v, d = (jnp.array(rng.normal(size=(rows, length, n, shape.width)), jnp.bfloat16) for n in heads)
    return q * jnp.bfloat16(spread), k, v, d


def intervals(segments_BT, window):
    length = segments_BT.shape[1]
    starts = attention_mosaic.segment_starts(segments_BT)
    return attention_mosaic.key_intervals(jnp.arange(length), starts, (0,), length, jnp.int32(window))


def differentiate(function):
    """Makes a function of q, k, v, the results' gradients and more, which returns the results and three gradients."""

    def run(q, k, v, d, *arrays):
        results, pull = jax.vjp(lambda q, k, v: function(q, k, v, *arrays), q, k, v)
        return results, pull(d)

    return jax.jit(run)


def is_race_free() -> bool:
    """Whether the interpreter has noted no race; races raise nothing."""
    return not gpu_callbacks.get_races().races_found


@lru_cache
def kernel(scale: float):
    """The kernels with their gradients, interpreted."""
    return differentiate(partial(attention, scale=scale, softcap=50.0, build=INTERPRETED))


@lru_cache
def reference_results(scale: float, softcap=50.0):
    """The reference with its gradients, in float32."""
    run = differentiate(partial(reference.attention, scale=scale, softcap=softcap))
    return lambda *arrays: run(*(x if x.dtype == jnp.int32 else jax.tree.map(_f32, x) for x in arrays[:3]), *arrays[3:])


@lru_cache
def implementation(name: str, scale: float, softcap=50.0):
    """What a model calls, with its gradients: a function (q, k, v, d, segments, window) -> (out, gradients)."""
    if name == "mosaic":
        attend = partial(attention_mosaic.attend, kernel=partial(attention, build=INTERPRETED))
    else:
        attend = attention_xla.attend
    return differentiate(partial(attend, scale=scale, softcap=softcap))


def _f32(x):
    return x.astype(jnp.float32)


def error(computed, expected) -> float:
    """The relative L2 error."""
    computed, expected = np.asarray(computed, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(computed - expected) / np.linalg.norm(expected))


def errors(name: str, shape: Shape, spread: float, segments_BT, window) -> list[float]:
    """The errors of the result and of its gradients by q, k and v."""
    arrays = draw_arrays(shape, len(segments_BT), spread)
    out, gradients = implementation(name, shape.scale)(*arrays, segments_BT, jnp.int32(window))
    expected, expected_gradients = reference_results(shape.scale)(
        *arrays[:3], (_f32(arrays[3]), jnp.zeros((len(out), shape.heads, T))), *intervals(segments_BT, window)
    )
    return [error(*pair) for pair in zip((out, *gradients), (expected[0], *expected_gradients), strict=True)]


def check(kernel_errors: list[float], shape: Shape, spread: float, segments_BT, window) -> None:
    """Checks that the result and each gradient miss by no more than twice what bfloat16 in jnp does."""
    for kernel_error, xla_error in zip(kernel_errors, errors("xla", shape, spread, segments_BT, window), strict=True):
        assert kernel_error <= 2 * xla_error + 1e-4


SHARDED = [name for name in SHAPES if "tensor" in name]
BITING = 30.0  # Scores have a standard deviation near 30: the cap of 50 takes about 1/4 of one that size.


# What multiplies the scores, and the largest error: first without scores near the cap, then with them.
SPREADS = {1.0: 4e-3, BITING: 1.5e-2}
ALWAYS = [("2b, tensor 8", BITING)]


@pytest.mark.parametrize(
    ("name", "spread"), mark_exhaustive([(n, spread) for n in SHARDED for spread in SPREADS], ALWAYS)
)
def test_named_shapes(name, spread):
    """Heads of one device of several; packed, windowed."""
    case = SHAPES[name], spread, segments("many"), 100
    assert max(errors("xla", *case)) <= SPREADS[spread]
    kernel_errors = errors("mosaic", *case)
    assert max(kernel_errors) <= SPREADS[spread]
    check(kernel_errors, *case)
    assert is_race_free()


def test_cap_matters_here():
    """The test above would not notice a missing cap if its scores were small."""
    shape = SHAPES["27b, tensor 8"]
    q, k, v, d = draw_arrays(shape, spread=BITING)
    inputs = q, k, v, (_f32(d), jnp.zeros((1, 4, T))), *intervals(segments("many"), 100)
    (out, _), _ = reference_results(shape.scale)(*inputs)
    for softcap in (None, 60.0):
        assert error(reference_results(shape.scale, softcap)(*inputs)[0][0], out) > 0.03


FEW = [(64, "edges"), (10_000, "many")]


@pytest.mark.parametrize(
    ("window", "packing"), mark_exhaustive([(w, p) for w in WINDOWS[1:] for p in PACKINGS if p != "single"], FEW)
)
def test_windows_and_packings(window, packing):
    case = SMALL, 8.0, segments(packing), window
    assert max(errors("xla", *case)) <= 6e-3
    check(errors("mosaic", *case), *case)
    assert is_race_free()


@pytest.mark.parametrize(("window", "packing"), mark_exhaustive([(1, "one"), (100, "single")], [(100, "single")]))
def test_one_key_each(window, packing):
    """The result is that key's value; the gradients by q and k are 0, but for rounding of what cancels in them."""
    arrays = draw_arrays(SMALL)
    out, (dq, dk, dv) = implementation("mosaic", SMALL.scale)(*arrays, segments(packing), jnp.int32(window))
    _, k, v, d = (np.asarray(x, np.float32) for x in arrays)
    assert error(out, np.repeat(v, 2, axis=2)) <= 4e-3
    assert error(dv, d.sum(2, keepdims=True)) <= 4e-3
    terms = SMALL.scale * np.linalg.norm((d * v).sum(-1, keepdims=True) * k)
    assert max(np.linalg.norm(_f32(dq)), np.linalg.norm(_f32(dk))) <= 2**-7 * terms
    assert is_race_free()


@pytest.mark.exhaustive
def test_log_sum_exp_and_its_gradient():
    q, k, v, d = draw_arrays(SMALL, spread=4.0)
    d_lse = jnp.array(np.random.default_rng(1).normal(size=(1, 2, T)), jnp.float32)
    interval = intervals(segments("many"), 100)
    (_, lse), gradients = kernel(SMALL.scale)(q, k, v, (d, d_lse), *interval)
    (_, expected), expected_gradients = reference_results(SMALL.scale)(q, k, v, (_f32(d), d_lse), *interval)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=2e-5)
    assert max(error(*pair) for pair in zip(gradients, expected_gradients, strict=True)) <= 6e-3


@pytest.mark.parametrize(
    ("window", "packing"),
    mark_exhaustive([(w, p) for w in WINDOWS for p in PACKINGS], [(65, "many")]),
)
def test_which_keys_each_query_sees(window, packing):
    """Scores of 0 weigh all keys alike. One-hot values show which keys a query sees, one-hot gradients the reverse."""
    shape = Shape(heads=2, kv_heads=1, width=256, scale=1.0)
    zeros = jnp.zeros((1, T, 2, 256), jnp.bfloat16)
    one_hot = jnp.broadcast_to(jnp.eye(T, 256, dtype=jnp.bfloat16)[None, :, None], zeros.shape)
    segments_BT = segments(packing)
    (out, _), (_, _, dv) = kernel(shape.scale)(
        zeros, zeros[:, :, :1], one_hot[:, :, :1], (one_hot, jnp.zeros((1, 2, T))), *intervals(segments_BT, window)
    )
    expected = visible(segments_BT, window)[0]
    for head in range(2):
        np.testing.assert_array_equal(np.asarray(out, np.float32)[0, :, head, :T] > 0, expected)
    np.testing.assert_array_equal(np.asarray(dv, np.float32)[0, :, 0, :T] > 0, expected.T)


def test_results_repeat_bit_by_bit():
    """They are the same each time, and whatever else is in the row or the batch."""
    arrays, segments_BT = draw_arrays(SMALL, rows=2, spread=8.0, length=128), segments("many", 2)[:, :128]
    run = implementation("mosaic", SMALL.scale)
    result, repeated = (run(*arrays, segments_BT, jnp.int32(100)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, result, repeated)
    # All but the first row's first segment, which has 70 tokens, changes.
    changed_arrays = [x.at[0, 71:].set(1).at[1].set(2) for x in arrays]
    changed = run(*changed_arrays, segments_BT, jnp.int32(100))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0, :70], b[0, :70]), result, changed)
    assert not np.array_equal(result[0], changed[0])


def test_unseen_tiles_are_not_touched():
    """Queries see the second of four tiles of keys, and the last tile of queries sees nothing: all the rest is NaN."""
    q, k, v, d = draw_arrays(SHAPES["9b, tensor 8"], length=256)
    run = kernel(SHAPES["9b, tensor 8"].scale)
    query = jnp.arange(256)[None]
    first = jnp.where(query < 192, 64, 256).astype(jnp.int32)
    last = jnp.where(query < 192, jnp.minimum(64 + query, 127), 255).astype(jnp.int32)
    clean = run(q, k, v, (d, jnp.zeros((1, 2, 256))), first, last)
    k, v = (x.at[:, :64].set(jnp.nan).at[:, 128:].set(jnp.nan) for x in (k, v))
    q, d = (x.at[:, 192:].set(jnp.nan) for x in (q, d))
    (out, lse), gradients = run(q, k, v, (d, jnp.zeros((1, 2, 256))), first, last)
    jax.tree.map(np.testing.assert_array_equal, ((out, lse), gradients), clean)
    assert np.all(np.asarray(out[:, 192:]) == 0) and np.all(np.isneginf(lse[:, :, 192:]))
    assert np.all(np.asarray(gradients[0][:, 192:]) == 0) and np.all(np.asarray(gradients[1][:, 128:]) == 0)


@pytest.mark.parametrize(
    ("window", "packing"),
    mark_exhaustive([(10_000, "one"), (65, "one"), (100, "many"), (1, "edges")], [(100, "many")]),
)
def test_tiles_visited(window, packing, monkeypatch):
    """Each kernel loads the tiles in which something is seen, once, and no other."""
    shape = Shape(heads=2, kv_heads=1, width=256, scale=0.0625)  # All its tiles are 64 by 64.
    loads = []

    def copy(**arguments):
        *_, indexer = jax.tree.leaves(arguments["src_transforms"], is_leaf=lambda x: hasattr(x, "indices"))
        loads.append(tuple(indexer.shape))
        return original(**arguments)

    original = gpu_callbacks.copy_gmem_to_smem
    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", copy)
    run = differentiate(partial(attention, scale=shape.scale, softcap=50.0, build=INTERPRETED))
    q, k, v, d = draw_arrays(shape)
    segments_BT = segments(packing)
    jax.block_until_ready(run(q, k, v, (d, jnp.zeros((1, 2, T))), *intervals(segments_BT, window)))
    pairs = np.zeros((256, 256), bool)
    pairs[:T, :T] = visible(segments_BT, window)[0]
    visits = pairs.reshape(4, 64, 4, 64).any((1, 3)).sum()
    forward = 2 * 4 + 2 * visits  # Q of two heads for each run of queries; K and V of each visit.
    dq = 4 * 4 + 2 * visits  # The same, and dO of each run.
    dkv = 2 * 4 + 2 * 4 * visits  # K and V of each run of keys; Q, dO, log-sum-exp and delta of both heads.
    assert len(loads) == forward + dq + dkv


@pytest.mark.exhaustive
@pytest.mark.parametrize(("groups", "kv_heads"), [(4, 1), *((groups, 2) for groups in (1, 2, 4, 8))])
def test_query_heads_to_a_key_head(groups, kv_heads):
    """Two of each of two key heads are in `test_named_shapes`."""
    case = Shape(heads=groups * kv_heads, kv_heads=kv_heads, width=64, scale=0.125), 4.0, segments("many"), 100
    check(errors("mosaic", *case), *case)


def test_parts_add_up():
    """Attention to each half of the keys, of which some see nothing, combines to that to all, as do gradients."""
    q, k, v, d = draw_arrays(SMALL, spread=8.0)
    half = T // 2
    position, start = jnp.arange(T), attention_mosaic.segment_starts(segments("many"))

    def run(attend, q, k, v):
        parts = [
            attend(
                q, k[:, begin : begin + half], v[:, begin : begin + half],
                *attention_mosaic.key_intervals(position, start, (begin,), half, jnp.int32(100)),
            )
            for begin in (0, half)
        ]  # fmt: skip
        return combine_parts(*zip(*parts, strict=True))[0]

    attend = partial(attention, scale=SMALL.scale, softcap=50.0, build=INTERPRETED)
    out, gradients = differentiate(partial(run, attend))(q, k, v, d)
    (expected, _), expected_gradients = reference_results(SMALL.scale)(
        q, k, v, (_f32(d), jnp.zeros((1, 2, T))), *intervals(segments("many"), 100)
    )
    part_errors = [error(*pair) for pair in zip((out, *gradients), (expected, *expected_gradients), strict=True)]
    check(part_errors, SMALL, 8.0, segments("many"), 100)


@pytest.mark.parametrize("ring", mark_exhaustive(["q_ring", "lse_ring", "d_ring", "delta_ring"], ["delta_ring"]))
def test_a_missing_wait_is_noticed(ring, monkeypatch):
    """The interpreter notices that dK/dV does not wait for the tiles of one of its rings."""

    class HastyRing(tiles.Ring):
        def wait(self, number):
            return self.tiles.at[self.slot(number)]

    def make_hasty(scratch):
        hasty = getattr(scratch, ring)
        return replace(scratch, **{ring: HastyRing(hasty.tiles, hasty.arrived, hasty.released)})

    q, k, v, d = draw_arrays(SMALL, length=128)
    sums = jnp.zeros((1, 2, 128))
    first, last = jnp.zeros((1, 128), jnp.int32), jnp.arange(128, dtype=jnp.int32)[None]
    inputs = Inputs(q_BTNH=q, k_BSKH=k, v_BSKH=v, first_BT=first, last_BT=last)
    cotangents = backward.Cotangents(d_BTNH=d, lse_BNT=sums, delta_BNT=sums)
    settings = Settings(scale=1.0, softcap=50.0, build=INTERPRETED)
    jax.block_until_ready(backward.run_dkv(inputs, cotangents, settings, TILES[64].dkv))
    assert is_race_free()
    block = backward._DKVBlock
    monkeypatch.setattr(
        backward, "_DKVBlock", lambda refs, dkv, scratch, *rest: block(refs, dkv, make_hasty(scratch), *rest)
    )
    try:
        jax.block_until_ready(backward.run_dkv(inputs, cotangents, settings, TILES[64].dkv))
        noticed = not is_race_free()
    except jax.errors.JaxRuntimeError as error:
        noticed = "arrier" in str(error)
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()  # Otherwise the next test finds what this one left.
    assert noticed


@pytest.mark.parametrize(
    ("changes", "lack"),
    [
        (dict(dtype=jnp.float32), "takes bfloat16, and not float32"),
        (dict(width=96), "has heads of width 64, 128, 256, and not 96"),
        (dict(softcap=None), "has no running maximum and so needs a soft cap of at most 60; there is none"),
        (dict(softcap=61.0), "a soft cap of at most 60; not one of 61"),
        (dict(kv_heads=3), "do not go together"),
    ],
)
def test_what_the_kernels_lack(changes, lack):
    asked = dict(dtype=jnp.bfloat16, width=64, softcap=50.0, kv_heads=2) | changes
    q, k = (jnp.zeros((1, 64, heads, asked["width"]), asked["dtype"]) for heads in (4, asked["kv_heads"]))
    seen = jnp.zeros((1, 64), jnp.int32)
    with pytest.raises(ValueError, match=lack):
        attention(q, k, k, seen, seen, scale=1.0, softcap=asked["softcap"], build=INTERPRETED)
