"""The choice of an implementation of attention, and the kernels' way over a mesh and through the model."""

from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax import mesh as meshes
from gemma2_jax.config import ComputeConfig, MeshConfig
from gemma2_jax.kernels import reference
from gemma2_jax.kernels.attention import attention as kernel
from gemma2_jax.kernels.decode import decode
from gemma2_jax.kernels.tiles import Build
from gemma2_jax.model.attention import choice as attention, mosaic as attention_mosaic, xla as attention_xla
from gemma2_jax.model.gemma2 import Gemma2, unstack_layers
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_27B, ModelConfig

HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
AMPERE = SimpleNamespace(platform="gpu", compute_capability="8.0")
BLACKWELL = SimpleNamespace(platform="gpu", compute_capability="10.0")
CPU = SimpleNamespace(platform="cpu")
INTERPRETED = Build(operand_in="shared memory", tanh="exact", interpret=plgpu.InterpretGPUParams())


def choose(name, device, model: ModelConfig = GEMMA2_2B, dtype="bfloat16"):
    return attention.choose_attention(model, ComputeConfig(attention=name, dtype=dtype), device)


def test_auto_is_the_fastest_that_can():
    implementation, why = choose("auto", HOPPER)
    assert implementation.attend is attention_mosaic.attend and why == "mosaic (the fastest here)"
    for device, name in ((CPU, "cpu"), (AMPERE, "sm_80"), (BLACKWELL, "sm_100")):
        implementation, why = choose("auto", device)
        assert implementation.attend.func is attention_xla.attend
        assert why == f"xla (the fastest here; mosaic is for sm_90 GPUs, and this is {name})"
    _, why = choose("auto", HOPPER, dtype="float32")
    assert why == "xla (the fastest here; mosaic takes bfloat16, and not float32)"
    assert choose("xla", HOPPER)[1] == "xla (as asked)"


# Implementation x what is asked: what it lacks, or None. Every implementation has any window, any packing, any number
# of query heads to a key head, and both directions: `test_capabilities` runs them.
LACKS = {
    ("mosaic", "bfloat16", 256, 50.0): None,
    ("mosaic", "bfloat16", 128, 50.0): None,
    ("mosaic", "bfloat16", 64, 30.0): None,
    ("mosaic", "bfloat16", 96, 50.0): "has heads of width 64, 128, 256, and not 96",
    ("mosaic", "bfloat16", 256, None): "has no running maximum and so needs a soft cap of at most 60; there is none",
    ("mosaic", "bfloat16", 256, 61.0): "has no running maximum and so needs a soft cap of at most 60; not one of 61",
    ("mosaic", "float32", 256, 50.0): "takes bfloat16, and not float32",
    ("xla", "bfloat16", 96, None): None,
    ("xla", "float32", 256, 50.0): None,
}


@pytest.mark.parametrize(("name", "dtype", "width", "softcap"), LACKS)
def test_named_implementations_say_what_they_lack(name, dtype, width, softcap):
    model = replace(GEMMA2_2B, head_width=width, attn_softcap=softcap)
    lack = LACKS[name, dtype, width, softcap]
    if lack is None:
        assert choose(name, HOPPER, model, dtype)[1] == f"{name} (as asked)"
    else:
        with pytest.raises(ValueError, match=f"^compute.attention {name} {lack}; use auto or xla$"):
            choose(name, HOPPER, model, dtype)


def test_mosaic_is_for_hopper():
    with pytest.raises(ValueError, match="is for sm_90 GPUs, and this is cpu; use auto or xla"):
        choose("mosaic", CPU)


@lru_cache
def run(name: str, softcap):
    """(out, gradients) of q, k, v, the result's gradient, segments and window."""
    attend = attention.IMPLEMENTATIONS[name].attend
    if name == "mosaic":
        attend = partial(attend, kernel=partial(kernel, build=INTERPRETED))
    attend = partial(attend, scale=0.1, softcap=softcap)

    def both(q, k, v, d, segments_BT, window):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT, window), q, k, v)
        return out, *vjp(d)

    return jax.jit(both)


def inputs(B: int, T: int, N: int, K: int, H: int):
    rng = np.random.default_rng(0)
    q, k, v, d = (jnp.array(rng.normal(size=(B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K, N))
    return 4 * q, k, v, d


def meant(q, k, v, d, segments_BT, window, softcap):
    """The same in float32, from the definition, pair by pair."""
    length = q.shape[1]
    at = jnp.broadcast_to(jnp.arange(length), segments_BT.shape)
    start = jnp.argmax(segments_BT[:, :, None] == segments_BT[:, None], axis=2)
    seen = reference.visible_mask(at, at, start, window)

    def attend(q, k, v):
        return reference.attention(q, k, v, *seen, scale=0.1, softcap=softcap)[0]

    out, vjp = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, *vjp(d.astype(jnp.float32))


def worst(got, want) -> float:
    got, want = ([np.asarray(x, np.float32) for x in xs] for xs in (got, want))
    return max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(got, want, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 5.0, 50.0])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_capabilities(name, softcap, width, groups):
    """Both directions, with and without a window and packing: right, or refused with what is lacking."""
    arrays = inputs(1, 160, groups, 1, width)
    lack = attention.IMPLEMENTATIONS[name].limits.find_lack(dtype="bfloat16", width=width, softcap=softcap)
    for window in (160, 70):
        for segments_BT in (jnp.zeros((1, 160), jnp.int32), jnp.arange(160)[None] // 50):
            asked = *arrays, segments_BT, jnp.int32(window)
            if lack:
                with pytest.raises(ValueError, match=lack):
                    run(name, softcap)(*asked)
            else:
                assert worst(run(name, softcap)(*asked), meant(*asked, softcap)) <= 8e-3


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (dict(data=1, tensor=8), (2, 130, 8, 2, 64)),  # fewer key heads than shards
        (dict(data=2, fsdp=2, context=2), (4, 256, 2, 1, 64)),
        (dict(data=1, context=4, tensor=2), (1, 256, 4, 2, 64)),
        pytest.param(dict(data=1, context=2, tensor=4), (1, 256, 4, 2, 64), marks=pytest.mark.exhaustive),
        pytest.param(dict(data=2, tensor=4), (2, 130, 8, 4, 64), marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("window", [40, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_over_a_mesh(mesh, shape, window):
    """Each device attends with its rows and heads, and context shards pass keys around: all as on one device.

    The kernel is its own definition here: the interpreter knows one device.
    """
    B, T = shape[:2]
    q, k, v, d = inputs(*shape)
    segments_BT = jnp.broadcast_to(jnp.searchsorted(jnp.array([70, 71, 128]), jnp.arange(T), side="right"), (B, T))

    def as_defined(q, *arrays, **settings):
        out, lse = reference.attention(q, *arrays, **settings)
        return out.astype(q.dtype), lse

    def both(q, k, v, d, segments_BT):
        def attend(q, k, v):
            return attention_mosaic.attend(q, k, v, segments_BT, window, scale=0.1, softcap=5.0, kernel=as_defined)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d)

    order = meshes.balance_context(np.arange(T), mesh.get("context", 1))
    with jax.set_mesh(meshes.make_mesh(MeshConfig(**mesh))):
        got = jax.jit(both)(*(x[:, order] for x in (q, k, v, d, segments_BT)))
    got = [np.asarray(x, np.float32)[:, np.argsort(order)] for x in got]
    assert worst(got, meant(q, k, v, d, segments_BT, window, 5.0)) <= 5e-3


def test_a_cache_is_read_some_slots_at_a_time(monkeypatch):
    """A cache of 40 slots in blocks of 16, the last of which begins within the one before: as in one block.

    Rows are at the beginning, in the last block, and twice around the ring.
    """
    rng = np.random.default_rng(0)
    B, N, K, S, H, T = 3, 4, 2, 40, 8, 6
    cache = [jnp.array(rng.normal(size=(B, K, S, H)), jnp.float32) for _ in range(2)]
    q, k, v = (jnp.array(3 * rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    settings = dict(scale=0.5, softcap=5.0)

    def attend_in_blocks(size: int) -> list[jax.Array]:
        monkeypatch.setattr(attention_xla, "CACHE_BLOCK", size)

        @jax.jit
        def attend(position_B):
            return [
                attention_xla.attend_cached(q[:, 0], *cache, position_B, **settings),
                attention_xla.attend_cached(q[:, 0], *cache, position_B, 30, **settings),
                attention_xla.attend_extended(q, k, v, *cache, position_B, 40, **settings),
                attention_xla.attend_extended(q, k, v, *cache, position_B, 5, **settings),
            ]

        return [out for position in ([3, 14, 2], [3, 38, 95]) for out in attend(jnp.array(position))]

    for one, several in zip(attend_in_blocks(1000), attend_in_blocks(16), strict=True):
        np.testing.assert_allclose(one, several, atol=2e-6)


def test_cached_over_a_mesh():
    rng = np.random.default_rng(0)
    B, N, K, S, H = 2, 8, 4, 32, 64
    q, k, v = (jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in ((B, N, H), (B, K, S, H), (B, K, S, H)))
    position = jnp.array([5, 40])  # in a ring, before it is full and after
    want = attention_xla.attend_cached(q, k, v, position, scale=0.5, softcap=5.0)
    for mesh in (dict(data=2, tensor=4), dict(data=1, tensor=8)):
        with jax.set_mesh(meshes.make_mesh(MeshConfig(**mesh))):
            attend = partial(attention_mosaic.attend_cached, scale=0.5, softcap=5.0, kernel=reference.decode)
            got = jax.jit(attend)(q, k, v, position)
        np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=0, atol=0.02)


def test_model_by_the_kernels():
    """Hidden states of a whole sequence, and of prefilling and one more token: as by jnp, in bfloat16."""
    config = replace(
        GEMMA2_27B, layers=2, width=64, mlp_width=128, heads=4, kv_heads=2, vocab_size=64, window=70, head_width=64
    )
    implementations = {
        "xla": attention.IMPLEMENTATIONS["xla"],
        "mosaic": attention.Implementation(
            attend=partial(attention_mosaic.attend, kernel=partial(kernel, build=INTERPRETED)),
            attend_cached=partial(attention_mosaic.attend_cached, kernel=partial(decode, build=INTERPRETED)),
        ),
    }
    tokens = jnp.array(np.random.default_rng(0).integers(0, 64, (1, 130)))
    found = {}
    for name, implementation in implementations.items():
        graph, state = nnx.split(Gemma2(config, attention=implementation, dtype="bfloat16", rngs=nnx.Rngs(0)))

        @jax.jit
        def both(state, tokens, graph=graph):
            whole = nnx.merge(graph, state)
            logits = whole(tokens)
            unstacked = unstack_layers(whole)
            _, cache = unstacked.extend(
                tokens[:, :129], jnp.array([0]), jnp.array([129]), unstacked.empty_cache(1, 136)
            )
            last, _ = unstacked.decode_step(tokens[:, 129], jnp.array([129]), cache)
            return logits, whole.logits(last)

        found[name] = [np.asarray(x, np.float32) for x in both(state, tokens)]
    for got, want in zip(found["mosaic"], found["xla"], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())
    np.testing.assert_allclose(found["mosaic"][1], found["mosaic"][0][:, -1], rtol=0, atol=0.02 * np.abs(want).max())
