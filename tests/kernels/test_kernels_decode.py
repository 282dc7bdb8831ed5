"""The decoding kernel: interpreted on CPU against its meaning in float32, and compiled for an H100 not at hand."""

import json
import subprocess
import sys
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_plugin
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import reference
from gemma2_jax.kernels.decode import TILE, decode

BEYOND = 2**31 - 1


def draw_arrays(B: int, T: int, N: int, K: int, H: int, S: int, spread: float = 1.0):
    """Draws q, k and v; `spread` multiplies q, and with it the scores."""
    rng = np.random.default_rng(0)
    scales = {(B, T, N, H): spread, (B, K, S, H): 1.0}
    shapes = (B, T, N, H), (B, K, S, H), (B, K, S, H)
    return tuple(jnp.array(rng.normal(size=shape) * scales[shape], jnp.bfloat16) for shape in shapes)


@lru_cache
def kernel(**settings):
    return jax.jit(partial(decode, softcap=50.0, **settings))


def interpret(q, k, v, position, window, races: bool = True, splits: int | None = None):
    run = kernel(scale=q.shape[-1] ** -0.5, splits=splits)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races)):
        out = run(q, k, v, jnp.array(position, jnp.int32), jnp.int32(window))
        out = np.asarray(jax.block_until_ready(out), np.float32)
    # The interpreter prints and notes races, and raises nothing.
    assert not races or not gpu_callbacks.get_races().races_found
    return out


@partial(jax.jit, static_argnames="scale")
def run_reference(q, k, v, position, window, scale: float):
    return reference.decode(q, k, v, position, jnp.minimum(window, 2**30), scale=scale, softcap=50.0)


def seen_slots(position: int, T: int, S: int, window: int) -> list[set[int]]:
    """The slots that each query of a row sees, one position at a time."""
    return [
        {p % S for p in range(max(0, i - window + 1, position - S + 1), i + 1)}
        for i in range(position - T + 1, position + 1)
    ]


def check(q, k, v, position, window, **settings):
    computed = interpret(q, k, v, position, window, **settings)
    expected = run_reference(q, k, v, jnp.array(position, jnp.int32), jnp.int32(window), scale=q.shape[-1] ** -0.5)
    for row in range(len(position)):
        error = np.linalg.norm(computed[row] - expected[row]) / np.linalg.norm(expected[row])
        assert error <= 4e-3, f"row {row}: {error:.1e}"


# The positions of a row of length 1, of rows that end within the first tile and at its end, and of the longest row.
LENGTHS = 0, 37, TILE - 1, 199


@pytest.mark.parametrize(
    "window", [TILE - 1, BEYOND, *(pytest.param(w, marks=pytest.mark.exhaustive) for w in (1, TILE, TILE + 1))]
)
def test_dense_cache(window):
    check(*draw_arrays(B=4, T=1, N=4, K=2, H=256, S=200), LENGTHS, window, splits=1)


@pytest.mark.parametrize(
    ("T", "N", "K", "H"),
    [
        (3, 4, 2, 256),
        (16, 4, 1, 64),
        pytest.param(1, 8, 2, 64, marks=pytest.mark.exhaustive),
        pytest.param(3, 8, 2, 128, marks=pytest.mark.exhaustive),
        pytest.param(1, 2, 2, 256, marks=pytest.mark.exhaustive),
        pytest.param(3, 2, 2, 64, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("window", [TILE + 1, pytest.param(BEYOND, marks=pytest.mark.exhaustive)])
def test_tokens_groups_and_widths(T, N, K, H, window):
    check(*draw_arrays(B=2, T=T, N=N, K=K, H=H, S=2 * TILE), (T - 1, 2 * TILE - 1), window)


@pytest.mark.parametrize(
    ("S", "T"),
    [(2 * TILE + 12, 3), *(pytest.param(*c, marks=pytest.mark.exhaustive) for c in ((45, 1), (2 * TILE, 3)))],
)
def test_ring(S, T):
    """Before the wrap, at the last slot, at the first again, in the middle of a later turn, and at its end."""
    check(*draw_arrays(B=5, T=T, N=4, K=2, H=64, S=S), (S // 2, S - 1, S, 3 * S + 20, 4 * S - 1), S - T + 1, splits=3)


@pytest.mark.parametrize("spread", [pytest.param(20.0, marks=pytest.mark.exhaustive), 200.0])
def test_cap_bites(spread):
    """Scores of a standard deviation of 20 and of 200, under a cap of 50."""
    q, k, v = draw_arrays(B=2, T=1, N=4, K=2, H=128, S=TILE + 8, spread=spread)
    check(q, k, v, (TILE + 7, 20), BEYOND)


def test_same_inputs_same_bits():
    q, k, v = draw_arrays(B=2, T=1, N=4, K=2, H=128, S=200)
    result, repeated = (interpret(q, k, v, (199, 70), BEYOND, races=False, splits=3) for _ in range(2))
    np.testing.assert_array_equal(result, repeated)


def test_a_row_with_nothing_to_see():
    q, k, v = draw_arrays(B=2, T=3, N=4, K=2, H=64, S=2 * TILE)
    out = interpret(q, k, v, (-1, 1), BEYOND)
    assert np.all(out[0] == 0) and np.all(out[1, 0] == 0) and np.all(np.any(out[1, 1:], axis=-1))


@pytest.mark.parametrize(
    ("S", "T", "window", "position"),
    [
        (200, 1, BEYOND, 199),
        pytest.param(200, 1, TILE, 150, marks=pytest.mark.exhaustive),
        pytest.param(200, 3, 7, 130, marks=pytest.mark.exhaustive),
        (200, 3, 198, 1000),
        pytest.param(200, 1, 3, 401, marks=pytest.mark.exhaustive),
        pytest.param(128, 2, 127, 190, marks=pytest.mark.exhaustive),
    ],
)
def test_each_query_sees_its_slots(S, T, window, position):
    """With scores of 0 every slot that a query sees has the same weight, and one-hot values show which these are."""
    _, k, _ = draw_arrays(B=1, T=T, N=2, K=2, H=256, S=S)
    v = jnp.broadcast_to(jnp.eye(S, 256, dtype=jnp.bfloat16), k.shape)
    out = interpret(jnp.zeros((1, T, 2, 256), jnp.bfloat16), k, v, (position,), window, splits=2)
    for t, slots in enumerate(seen_slots(position, T, S, window)):
        for head in range(2):
            assert set(np.flatnonzero(out[0, t, head])) == slots
            np.testing.assert_allclose(out[0, t, head, sorted(slots)], 1 / len(slots), rtol=4e-3)


@pytest.mark.parametrize(
    ("S", "T", "window", "positions"),
    [
        (200, 3, 70, (2, 1023)),
        pytest.param(200, 3, 20, (2, 191), marks=pytest.mark.exhaustive),
        pytest.param(200, 3, 70, (100, 1023), marks=pytest.mark.exhaustive),
        pytest.param(200, 1, BEYOND, (5, 130), marks=pytest.mark.exhaustive),
        pytest.param(128, 1, 128, (3, 129), marks=pytest.mark.exhaustive),
    ],
)
def test_unseen_slots_have_no_effect(S, T, window, positions):
    """Every slot that no query sees has NaN: in tiles not visited, and in those at the ends of what is seen."""
    q, k, v = draw_arrays(B=2, T=T, N=4, K=2, H=64, S=S)
    clean = interpret(q, k, v, positions, window)
    visible = [set.union(*seen_slots(position, T, S, window)) for position in positions]
    unseen = np.array([[slot not in row for slot in range(S)] for row in visible])[:, None, :, None]
    poisoned = interpret(q, jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.nan, v), positions, window)
    np.testing.assert_array_equal(poisoned, clean)


@pytest.mark.parametrize(
    ("S", "T", "window", "positions", "splits"),
    [
        pytest.param(520, 1, BEYOND, (0, 300), 1, marks=pytest.mark.exhaustive),
        pytest.param(520, 1, 100, (3, 64, 511), 3, marks=pytest.mark.exhaustive),
        (520, 3, 2, (65, 519), 8),
        pytest.param(512, 1, 512, (17, 511, 700), 8, marks=pytest.mark.exhaustive),
        (512, 1, 100, (512, 540, 1023), 1),
        pytest.param(520, 2, 519, (17, 525, 1300), 3, marks=pytest.mark.exhaustive),
    ],
)
def test_tiles_visited(S, T, window, positions, splits, monkeypatch):
    """Each tile with a slot that is seen is loaded once, its K and its V, and no other."""
    loads = []

    def copy(**arguments):
        (indexer,) = jax.tree.map(int, arguments["src_transforms"])
        if indexer.shape[2] == S:
            loads.append((indexer.indices[0], indexer.indices[2].start))
        return original(**arguments)

    original = gpu_callbacks.copy_gmem_to_smem
    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", copy)
    kernel.cache_clear()
    interpret(*draw_arrays(B=len(positions), T=T, N=1, K=1, H=64, S=S), positions, window, races=False, splits=splits)
    for row, position in enumerate(positions):
        slots = set.union(*seen_slots(position, T, S, window))
        tiles = {slot // TILE * TILE for slot in slots}
        assert sorted(start for loaded_row, start in loads if loaded_row == row) == sorted(2 * list(tiles))


def test_impossible_requests_are_refused():
    def ask(B=2, T=1, N=4, K=2, H=128, S=64, dtype=jnp.bfloat16, softcap=50.0):
        q, k = jnp.zeros((B, T, N, H), dtype), jnp.zeros((B, K, S, H), dtype)
        return decode(q, k, k, jnp.zeros(B, jnp.int32), 64, scale=1.0, softcap=softcap)

    with pytest.raises(ValueError, match="takes bfloat16, and not float32"):
        ask(dtype=jnp.float32)
    with pytest.raises(ValueError, match="has heads of width 64, 128, 256, and not 96"):
        ask(H=96)
    with pytest.raises(ValueError, match=r"lacks 33 tokens of 2 .* 66 rows: it takes 1 to 64; give at most 32 tokens"):
        ask(T=33)
    with pytest.raises(ValueError, match="needs a soft cap of at most 60; there is none"):
        ask(softcap=None)
    with pytest.raises(ValueError, match=r"at most 60; not one of 60\.5"):
        ask(softcap=60.5)
    with pytest.raises(ValueError, match="with K a divisor of N"):
        ask(N=3)


COMPILE = """
import json, os, pathlib, re, sys, tempfile
from gemma2_jax.planning import described_cluster
described_cluster.prepare_jax()
import jax, jax.numpy as jnp, numpy as np
import jax.experimental.mosaic
from functools import partial
from gemma2_jax.kernels.decode import decode

os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_PTX="1")
mesh = jax.sharding.Mesh(np.array(described_cluster.describe_cluster(1)).reshape(1), "x")
sharding = jax.NamedSharding(mesh, jax.P())
found = []
for B, T, N, K, H, S in json.loads(sys.argv[1]):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        describe = partial(jax.ShapeDtypeStruct, sharding=sharding)
        q, k = describe((B, T, N, H), jnp.bfloat16), describe((B, K, S, H), jnp.bfloat16)
        position, window = describe((B,), jnp.int32), describe((), jnp.int32)
        run = jax.jit(partial(decode, scale=H**-0.5, softcap=50.0))
        compiled = run.trace(q, k, k, position, window).lower(lowering_platforms=("cuda",)).compile()
        (report,) = (path.read_text() for path in pathlib.Path(folder).glob("*.ptxas"))
        (ptx,) = (path.read_text() for path in pathlib.Path(folder).glob("*.ptx"))
        (shared,) = (path.read_text() for path in pathlib.Path(folder).glob("*.resources.txt"))
    found.append(dict(
        report=report, shared=int(re.search(r"smem_scratch_bytes=(\\d+)", shared)[1]),
        kernels=compiled.as_text().count('custom_call_target="mosaic_gpu_v2"'),
        fenced="fence.proxy.async" in re.split(r"\\n\\$L", ptx[: ptx.index(", 1, 1, 1, 0;")])[-1],
        products=ptx.count("wgmma.mma_async"), loads=ptx.count("cp.async.bulk.tensor"), tanh=ptx.count("tanh.approx"),
    ))
print(json.dumps(found))
"""
COMPILED = [(8, 1, 8, 4, 256, 8192), (8, 3, 32, 16, 128, 4096), (8, 1, 8, 4, 256, 4096), (8, 1, 32, 16, 128, 8192)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(40))
def test_random_requests(seed):
    rng = np.random.default_rng(seed)
    T, G, K = (int(rng.integers(1, high)) for high in (6, 9, 3))
    S, window = int(rng.integers(T, 400)), int(rng.integers(1, 450))
    turns = 3 if window + T - 1 <= S else 1
    positions = tuple(int(p) for p in rng.integers(T - 1, turns * S, size=3))
    splits = int(rng.integers(1, 6))
    q, k, v = draw_arrays(
        B=3, T=T, N=K * G, K=K, H=int(rng.choice([64, 128, 256])), S=S, spread=float(rng.choice([1, 20]))
    )
    check(q, k, v, positions, window, splits=splits)


@needs_plugin
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("shapes", [COMPILED[:2], pytest.param(COMPILED[2:], marks=pytest.mark.exhaustive)])
def test_compiles_for_h100(shapes):
    """Of 2B and 27B, the whole row and the ring, and with three tokens: nothing spilled, two blocks on a processor."""
    done = subprocess.run([sys.executable, "-c", COMPILE, json.dumps(shapes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for shape, kernel in zip(shapes, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert "0 bytes spill stores, 0 bytes spill loads" in kernel["report"] and "C75" not in kernel["report"], shape
        assert kernel["fenced"], (
            "weights written to shared memory are not there yet for wgmma; not seen by the interpreter"
        )
        assert kernel["kernels"] == 1 and kernel["loads"] and kernel["tanh"], shape
        assert kernel["products"] == 2 * shape[4] // 16, shape
        # What a multiprocessor has, less 1 KiB that each block takes; one block may have 227 KiB.
        assert 2 * (kernel["shared"] + 1024) <= 228 * 1024, (shape, kernel["shared"])
