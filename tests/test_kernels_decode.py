"""The decoding kernel, interpreted on CPU against its meaning in float32, and compiled for an H100 that is not there."""

import importlib.util
import json
import subprocess
import sys
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import reference
from gemma2_jax.kernels.decode import TILE, decode

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="no CUDA plugin: pip install 'gemma2-jax[plan]'"
)
BEYOND = 2**31 - 1


def drawn(B: int, T: int, N: int, K: int, H: int, S: int, large: float = 1.0):
    """q, k and v; `large` multiplies q, and with it the scores."""
    keys = jax.random.split(jax.random.key(S + T), 3)
    shapes = (B, T, N, H), (B, K, S, H), (B, K, S, H)
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    return tuple(x.astype(jnp.bfloat16) for x in (q * large, k, v))


@lru_cache
def kernel(**how):
    return jax.jit(partial(decode, softcap=50.0, **how))


def interpreted(q, k, v, position, window, races: bool = True, splits: int | None = None):
    run = kernel(scale=q.shape[-1] ** -0.5, splits=splits)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races)):
        out = run(q, k, v, jnp.array(position, jnp.int32), jnp.int32(window))
        return np.asarray(jax.block_until_ready(out), np.float32)


def meant(q, k, v, position, window):
    return reference.decode(
        q, k, v, jnp.array(position, jnp.int32), min(window, 2**30), scale=q.shape[-1] ** -0.5, softcap=50.0
    )


def seen_slots(position: int, T: int, S: int, window: int) -> list[set[int]]:
    """The slots that each query of a row sees, one position at a time."""
    return [
        {p % S for p in range(max(0, i - window + 1, position - S + 1), i + 1)}
        for i in range(position - T + 1, position + 1)
    ]


def check(q, k, v, position, window, **how):
    got, want = interpreted(q, k, v, position, window, **how), meant(q, k, v, position, window)
    for row in range(len(position)):
        error = np.linalg.norm(got[row] - want[row]) / np.linalg.norm(want[row])
        assert error <= 4e-3, f"row {row}: {error:.1e}"


# A row of length 1, one that ends in the first tile, at the end of one, and the longest.
LENGTHS = 0, 37, TILE - 1, 199


@pytest.mark.parametrize("window", [1, TILE - 1, TILE, TILE + 1, BEYOND])
def test_dense_cache(window):
    check(*drawn(B=4, T=1, N=4, K=2, H=128, S=200), LENGTHS, window, splits=2)


@pytest.mark.parametrize(
    ("T", "N", "K", "H"), [(1, 2, 2, 256), (1, 8, 2, 64), (3, 2, 2, 64), (3, 4, 2, 256), (3, 8, 2, 128), (16, 8, 2, 64)]
)
@pytest.mark.parametrize("window", [TILE + 1, BEYOND])
def test_tokens_groups_and_widths(T, N, K, H, window):
    check(*drawn(B=2, T=T, N=N, K=K, H=H, S=2 * TILE), (T - 1, 2 * TILE - 1), window)


@pytest.mark.parametrize("S", [2 * TILE, 2 * TILE + 12, 45])
@pytest.mark.parametrize("T", [1, 3])
def test_ring(S, T):
    """Before the wrap, at the last slot, at the first again, in the middle of a later turn, and at its end."""
    check(*drawn(B=5, T=T, N=4, K=2, H=64, S=S), (S // 2, S - 1, S, 3 * S + 20, 4 * S - 1), S - T + 1, splits=3)


@pytest.mark.parametrize(("T", "N"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("large", [8.0, 60.0])
def test_cap_bites(T, N, large):
    q, k, v = drawn(B=2, T=T, N=N, K=2, H=128, S=TILE + 8, large=large)
    assert jnp.std(jnp.einsum("btnh,bksh->", q.astype(jnp.float32)[:, :, :2], k.astype(jnp.float32))) >= 0
    check(q, k, v, (TILE + 7, 20), BEYOND)


@pytest.mark.parametrize(
    ("S", "T", "window", "position"),
    [(200, 1, BEYOND, 199), (200, 1, TILE, 150), (200, 3, 7, 130), (200, 3, 198, 1000), (200, 1, 3, 401), (128, 2, 127, 190)],
)
def test_which_slots_are_seen(S, T, window, position):
    """With no scores, all that a query sees has one weight, and V says which slot is which."""
    _, k, _ = drawn(B=1, T=T, N=2, K=2, H=256, S=S)
    v = jnp.broadcast_to(jnp.eye(S, 256, dtype=jnp.bfloat16), k.shape)
    out = interpreted(jnp.zeros((1, T, 2, 256), jnp.bfloat16), k, v, (position,), window, splits=2)
    for t, seen in enumerate(seen_slots(position, T, S, window)):
        for head in range(2):
            assert set(np.flatnonzero(out[0, t, head])) == seen
            np.testing.assert_allclose(out[0, t, head, sorted(seen)], 1 / len(seen), rtol=4e-3)


@pytest.mark.parametrize(
    ("S", "T", "window", "positions"),
    [(200, 1, BEYOND, (5, 130)), (200, 3, 20, (2, 191)), (200, 3, 70, (100, 1023)), (128, 1, 128, (3, 129))],
)
def test_what_is_not_seen_has_no_effect(S, T, window, positions):
    """NaN in every slot that no query sees: of tiles not visited, and of those at the ends of what is seen."""
    q, k, v = drawn(B=2, T=T, N=4, K=2, H=64, S=S)
    clean = interpreted(q, k, v, positions, window)
    seen = [set.union(*seen_slots(position, T, S, window)) for position in positions]
    unseen = np.array([[slot not in row for slot in range(S)] for row in seen])[:, None, :, None]
    poisoned = interpreted(q, jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.nan, v), positions, window)
    np.testing.assert_array_equal(poisoned, clean)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(
    ("S", "T", "window", "positions"),
    [
        (520, 1, BEYOND, (0, 300, 519)),
        (520, 1, 100, (3, 64, 511)),
        (520, 3, 2, (64, 65, 519)),
        (512, 1, 512, (17, 511, 700)),
        (512, 1, 100, (512, 540, 1023)),
        (520, 2, 519, (17, 525, 1300)),
    ],
)
def test_tiles_visited(S, T, window, positions, splits, monkeypatch):
    """Each tile with a slot that is seen is loaded once, its K and its V, and no other."""
    loads = []

    def copy(**how):
        loads.append(jax.tree.map(int, how["src_transforms"]))
        return original(**how)

    original = gpu_callbacks.copy_gmem_to_smem
    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", copy)
    interpreted(*drawn(B=3, T=T, N=1, K=1, H=64, S=S), positions, window, races=False, splits=splits)
    print(loads[:5])
    assert 0
