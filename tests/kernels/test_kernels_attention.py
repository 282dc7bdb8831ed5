"""Attention by the kernels and by jnp: against its meaning in float32, over the shapes of Gemma 2.

The Mosaic kernels run in the interpreter, which checks barriers and races but takes wgmma for synchronous: see
`test_kernels_machine` for what only the compiler can say. Comparisons follow FlashAttention's: an implementation may
miss float32 by no more than a few times what jnp in bfloat16 does.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import reference, tiles
from gemma2_jax.kernels.attention import attention, combine_parts
from gemma2_jax.kernels.shapes import SHAPES, Shape
from gemma2_jax.kernels.tiles import TILES, Build
from gemma2_jax.model.attention import mosaic as attention_mosaic, xla as attention_xla

INTERPRETED = Build(operand_in="shared memory", tanh="exact", interpret=plgpu.InterpretGPUParams(detect_races=True))
SMALL = Shape(heads=2, kv_heads=1, width=64, scale=0.125)  # for what no width changes
T = 200  # no multiple of a tile
WINDOWS = 1, 63, 64, 65, 100, 10_000
PACKINGS = {
    "one": (T,),
    "many": (70, 1, 57, 64, 8),  # an edge on a tile's, and one beside; the last is padding
    "single": (1,) * T,
    "edges": (64, 64, 1, 63, 8),
}


def some(cases, few) -> list:
    """The cases as parameters: the few are in each run of the suite, the rest in the marked one."""
    rest = [case if isinstance(case, tuple) else (case,) for case in cases if case not in few]
    return [*few, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in rest)]


def segments(packing: str, rows: int = 1) -> jax.Array:
    lengths = PACKINGS[packing]
    return jnp.broadcast_to(jnp.repeat(jnp.arange(len(lengths)), np.array(lengths), total_repeat_length=T), (rows, T))


def visible(segments_BT, window) -> np.ndarray:
    """[B, T, S], pair by pair."""
    segments_BT, at = np.asarray(segments_BT), np.arange(T)
    distance = at[:, None] - at
    return (distance >= 0) & (distance < window) & (segments_BT[:, :, None] == segments_BT[:, None])


def drawn(shape: Shape, rows: int = 1, large: float = 1.0, length: int = T):
    """q, k, v and the gradient of the result; `large` multiplies q, and with it the scores."""
    rng = np.random.default_rng(0)
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    q, k, v, d = (jnp.array(rng.normal(size=(rows, length, n, shape.width)), jnp.bfloat16) for n in heads)
    return q * jnp.bfloat16(large), k, v, d


def intervals(segments_BT, window):
    length = segments_BT.shape[1]
    starts = attention_mosaic.segment_starts(segments_BT)
    return attention_mosaic.key_intervals(jnp.arange(length), starts, (0,), length, jnp.int32(window))


def with_gradients(function):
    """(results, gradients by q, k and v for that of the results)."""

    def run(q, k, v, d, *others):
        results, vjp = jax.vjp(lambda q, k, v: function(q, k, v, *others), q, k, v)
        return results, vjp(d)

    return jax.jit(run)


def no_races():
    # Races are printed and noted, and raise nothing.
    return not gpu_callbacks.get_races().races_found


@lru_cache
def kernel(scale: float):
    return with_gradients(partial(attention, scale=scale, softcap=50.0, build=INTERPRETED))


@lru_cache
def meant(scale: float, softcap=50.0):
    run = with_gradients(partial(reference.attention, scale=scale, softcap=softcap))
    return lambda *arrays: run(*(x if x.dtype == jnp.int32 else jax.tree.map(_f32, x) for x in arrays[:3]), *arrays[3:])


@lru_cache
def implementation(name: str, scale: float, softcap=50.0):
    """(out, gradients) of (q, k, v, d, segments, window)."""
    if name == "mosaic":
        attend = partial(attention_mosaic.attend, kernel=partial(attention, build=INTERPRETED))
    else:
        attend = attention_xla.attend
    return with_gradients(partial(attend, scale=scale, softcap=softcap))


def _f32(x):
    return x.astype(jnp.float32)


def error(got, want) -> float:
    """Relative, L2."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def errors(name: str, shape: Shape, large: float, segments_BT, window) -> list[float]:
    """Of the result and of its gradients by q, k and v."""
    arrays = drawn(shape, len(segments_BT), large)
    out, by = implementation(name, shape.scale)(*arrays, segments_BT, jnp.int32(window))
    want, wanted = meant(shape.scale)(
        *arrays[:3], (_f32(arrays[3]), jnp.zeros((len(out), shape.heads, T))), *intervals(segments_BT, window)
    )
    return [error(*pair) for pair in zip((out, *by), (want[0], *wanted), strict=True)]


def check(found: list[float], shape: Shape, large: float, segments_BT, window) -> None:
    """No more than twice what bfloat16 in jnp misses, of the result and of each gradient."""
    for mine, theirs in zip(found, errors("xla", shape, large, segments_BT, window), strict=True):
        assert mine <= 2 * theirs + 1e-4


SHARDED = [name for name in SHAPES if "tensor" in name]
BITING = 30.0  # scores with a standard deviation near 30: the cap of 50 takes about 1/4 of one that size


# Scores that are multiplied by so much, and the largest error: without scores near the cap, and with.
SPREADS = {1.0: 4e-3, BITING: 1.5e-2}
ALWAYS = [("27b, tensor 8", 1.0), ("2b, tensor 2", BITING)]


@pytest.mark.parametrize(("name", "large"), some([(n, large) for n in SHARDED for large in SPREADS], ALWAYS))
def test_named_shapes(name, large):
    """Heads of one device of some; packed, windowed."""
    asked = SHAPES[name], large, segments("many"), 100
    assert max(errors("xla", *asked)) <= SPREADS[large]
    found = errors("mosaic", *asked)
    assert max(found) <= SPREADS[large]
    check(found, *asked)
    assert no_races()


def test_cap_matters_here():
    """What the test above would miss were its scores small."""
    shape = SHAPES["27b, tensor 8"]
    q, k, v, d = drawn(shape, large=BITING)
    inputs = q, k, v, (_f32(d), jnp.zeros((1, 4, T))), *intervals(segments("many"), 100)
    (out, _), _ = meant(shape.scale)(*inputs)
    for softcap in (None, 60.0):
        assert error(meant(shape.scale, softcap)(*inputs)[0][0], out) > 0.03


FEW = [(64, "edges"), (65, "many"), (10_000, "many")]


@pytest.mark.parametrize(
    ("window", "packing"), some([(w, p) for w in WINDOWS[1:] for p in PACKINGS if p != "single"], FEW)
)
def test_windows_and_packings(window, packing):
    asked = SMALL, 8.0, segments(packing), window
    assert max(errors("xla", *asked)) <= 6e-3
    check(errors("mosaic", *asked), *asked)
    assert no_races()


@pytest.mark.parametrize(("window", "packing"), some([(1, "one"), (100, "single")], [(100, "single")]))
def test_one_key_each(window, packing):
    """The result is that key's value; the gradients by q and k are 0, but for rounding of what cancels in them."""
    arrays = drawn(SMALL)
    out, (dq, dk, dv) = implementation("mosaic", SMALL.scale)(*arrays, segments(packing), jnp.int32(window))
    _, k, v, d = (np.asarray(x, np.float32) for x in arrays)
    assert error(out, np.repeat(v, 2, axis=2)) <= 4e-3
    assert error(dv, d.sum(2, keepdims=True)) <= 4e-3
    terms = SMALL.scale * np.linalg.norm((d * v).sum(-1, keepdims=True) * k)
    assert max(np.linalg.norm(_f32(dq)), np.linalg.norm(_f32(dk))) <= 2**-7 * terms
    assert no_races()


def test_log_sum_exp_and_its_gradient():
    q, k, v, d = drawn(SMALL, large=4.0)
    d_lse = jnp.array(np.random.default_rng(1).normal(size=(1, 2, T)), jnp.float32)
    seen = intervals(segments("many"), 100)
    (_, lse), by = kernel(SMALL.scale)(q, k, v, (d, d_lse), *seen)
    (_, want), wanted = meant(SMALL.scale)(q, k, v, (_f32(d), d_lse), *seen)
    np.testing.assert_allclose(lse, want, rtol=0, atol=2e-5)
    assert max(error(*pair) for pair in zip(by, wanted, strict=True)) <= 6e-3


@pytest.mark.parametrize(
    ("window", "packing"),
    some([(w, p) for w in WINDOWS for p in PACKINGS], [(65, "many")]),
)
def test_which_keys_each_query_sees(window, packing):
    """Scores of 0 weigh all keys alike; with one-hot values (output gradients), each query (key) names what it sees."""
    shape = Shape(heads=2, kv_heads=1, width=256, scale=1.0)
    zeros = jnp.zeros((1, T, 2, 256), jnp.bfloat16)
    names = jnp.broadcast_to(jnp.eye(T, 256, dtype=jnp.bfloat16)[None, :, None], zeros.shape)
    segments_BT = segments(packing)
    (out, _), (_, _, dv) = kernel(shape.scale)(
        zeros, zeros[:, :, :1], names[:, :, :1], (names, jnp.zeros((1, 2, T))), *intervals(segments_BT, window)
    )
    seen = visible(segments_BT, window)[0]
    for head in range(2):
        np.testing.assert_array_equal(np.asarray(out, np.float32)[0, :, head, :T] > 0, seen)
    np.testing.assert_array_equal(np.asarray(dv, np.float32)[0, :, 0, :T] > 0, seen.T)


def test_the_same_bit_by_bit():
    """Each time, and whatever else is in the row or the batch."""
    arrays, segments_BT = drawn(SMALL, rows=2, large=8.0, length=128), segments("many", 2)[:, :128]
    run = implementation("mosaic", SMALL.scale)
    first, again = (run(*arrays, segments_BT, jnp.int32(100)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = [x.at[0, 71:].set(1).at[1].set(2) for x in arrays]  # beside the first segment, of 70, of the first row
    changed = run(*other, segments_BT, jnp.int32(100))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0, :70], b[0, :70]), first, changed)
    assert not np.array_equal(first[0], changed[0])


def test_what_nobody_sees_is_not_touched():
    """Queries see the second of four tiles of keys alone, and the last tile of queries nothing: elsewhere is NaN."""
    q, k, v, d = drawn(SHAPES["9b, tensor 8"], length=256)
    run = kernel(SHAPES["9b, tensor 8"].scale)
    at = jnp.arange(256)[None]
    first = jnp.where(at < 192, 64, 256).astype(jnp.int32)
    last = jnp.where(at < 192, jnp.minimum(64 + at, 127), 255).astype(jnp.int32)
    clean = run(q, k, v, (d, jnp.zeros((1, 2, 256))), first, last)
    k, v = (x.at[:, :64].set(jnp.nan).at[:, 128:].set(jnp.nan) for x in (k, v))
    q, d = (x.at[:, 192:].set(jnp.nan) for x in (q, d))
    (out, lse), by = run(q, k, v, (d, jnp.zeros((1, 2, 256))), first, last)
    jax.tree.map(np.testing.assert_array_equal, ((out, lse), by), clean)
    assert np.all(np.asarray(out[:, 192:]) == 0) and np.all(np.isneginf(lse[:, :, 192:]))
    assert np.all(np.asarray(by[0][:, 192:]) == 0) and np.all(np.asarray(by[1][:, 128:]) == 0)


@pytest.mark.parametrize(
    ("window", "packing"),
    some([(10_000, "one"), (65, "one"), (100, "many"), (1, "edges")], [(100, "many")]),
)
def test_tiles_visited(window, packing, monkeypatch):
    """Each kernel loads the tiles in which something is seen, once, and no other."""
    shape = Shape(heads=2, kv_heads=1, width=256, scale=0.0625)  # whose tiles are 64 by 64 throughout
    loads = []

    def copy(**how):
        *_, where = jax.tree.leaves(how["src_transforms"], is_leaf=lambda x: hasattr(x, "indices"))
        loads.append(tuple(where.shape))
        return original(**how)

    original = gpu_callbacks.copy_gmem_to_smem
    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", copy)
    run = with_gradients(partial(attention, scale=shape.scale, softcap=50.0, build=INTERPRETED))
    q, k, v, d = drawn(shape)
    segments_BT = segments(packing)
    jax.block_until_ready(run(q, k, v, (d, jnp.zeros((1, 2, T))), *intervals(segments_BT, window)))
    seen = np.zeros((256, 256), bool)
    seen[:T, :T] = visible(segments_BT, window)[0]
    visits = seen.reshape(4, 64, 4, 64).any((1, 3)).sum()
    forward = 2 * 4 + 2 * visits  # Q of two heads for each run of queries; K and V of each visit
    dq = 4 * 4 + 2 * visits  # and dO
    dkv = 2 * 4 + 2 * 4 * visits  # K and V of each run of keys; Q, dO, log-sum-exp and delta of both heads
    assert len(loads) == forward + dq + dkv


@pytest.mark.parametrize("groups", some([1, 2, 4, 8], [4]))
def test_query_heads_to_a_key_head(groups):
    asked = Shape(heads=2 * groups, kv_heads=2, width=64, scale=0.125), 4.0, segments("many"), 100
    check(errors("mosaic", *asked), *asked)


def test_parts_add_up():
    """Attention to all keys from that to each half, where some queries see nothing of one; and its gradients."""
    q, k, v, d = drawn(SMALL, large=8.0)
    half = T // 2
    position, start = jnp.arange(T), attention_mosaic.segment_starts(segments("many"))

    def run(attend, q, k, v):
        parts = [
            attend(
                q, k[:, at : at + half], v[:, at : at + half],
                *attention_mosaic.key_intervals(position, start, (at,), half, jnp.int32(100)),
            )
            for at in (0, half)
        ]  # fmt: skip
        return combine_parts(*zip(*parts, strict=True))[0]

    attend = partial(attention, scale=SMALL.scale, softcap=50.0, build=INTERPRETED)
    out, by = with_gradients(partial(run, attend))(q, k, v, d)
    (want, _), wanted = meant(SMALL.scale)(q, k, v, (_f32(d), jnp.zeros((1, 2, T))), *intervals(segments("many"), 100))
    found = [error(*pair) for pair in zip((out, *by), (want, *wanted), strict=True)]
    check(found, SMALL, 8.0, segments("many"), 100)


@pytest.mark.parametrize("ring", some(range(4), [0, 3]))
def test_a_wait_left_out_is_noticed(ring, monkeypatch):
    """Of the loads of dK/dV, whose rings are Q, log-sum-exp, dO, delta."""
    q, k, v, d = drawn(SMALL, length=128)
    wait, rings = tiles.Ring.wait, []

    def hasty(self, number):
        if id(self.came) not in rings:
            rings.append(id(self.came))
        if rings.index(id(self.came)) == ring:
            return self.tiles.at[self.place(number)]
        return wait(self, number)

    from gemma2_jax.kernels.backward import dkv

    lse, delta = jnp.zeros((1, 2, 128)), jnp.zeros((1, 2, 128))
    seen = jnp.zeros((1, 128), jnp.int32), jnp.arange(128, dtype=jnp.int32)[None]
    how = dict(scale=1.0, softcap=50.0, tile=TILES[64].dkv, build=INTERPRETED)
    jax.block_until_ready(dkv(q, k, v, d, lse, delta, *seen, **how))
    assert no_races()
    monkeypatch.setattr(tiles.Ring, "wait", hasty)
    try:
        jax.block_until_ready(dkv(q, k, v, d, lse, delta, *seen, **how))
        noticed = not no_races()
    except jax.errors.JaxRuntimeError as stopped:
        noticed = "arrier" in str(stopped)
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()  # or what comes next finds what this left
    assert noticed


@pytest.mark.parametrize(
    ("changes", "lack"),
    [
        (dict(dtype=jnp.float32), "lacks float32: it takes bfloat16"),
        (dict(width=96), "lacks heads of width 96: it has 64, 128, 256"),
        (dict(softcap=None), "lacks scores without a soft cap: having no running maximum, it needs one, up to 60"),
        (dict(softcap=61.0), "lacks a soft cap of 61"),
        (dict(kv_heads=3), "do not go together"),
    ],
)
def test_what_the_kernels_lack(changes, lack):
    asked = dict(dtype=jnp.bfloat16, width=64, softcap=50.0, kv_heads=2) | changes
    q, k = (jnp.zeros((1, 64, heads, asked["width"]), asked["dtype"]) for heads in (4, asked["kv_heads"]))
    seen = jnp.zeros((1, 64), jnp.int32)
    with pytest.raises(ValueError, match=lack):
        attention(q, k, k, seen, seen, scale=1.0, softcap=asked["softcap"], build=INTERPRETED)
