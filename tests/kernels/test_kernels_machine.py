"""The attention kernels as compiled for an H100 that is not there, and the tiles that they visit, with nothing run.

Run as a program with the name of a case and of a file, which is what the tests here do, it compiles the kernels of that
case: JAX must not have been used before `described_cluster.prepare_jax`.
"""

import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from compilers import need
from filelock import FileLock

from benchmarks import kernels as table
from benchmarks.kernels import CASES, DIRECTIONS, LAYERS, PRODUCTS
from benchmarks.machine_code import REGISTERS_PER_SM, SHARED_PER_BLOCK, Kernel
from gemma2_jax.planning import described_cluster

ROOT = Path(__file__).parents[2]
KERNELS = [
    pytest.param((name, direction), marks=pytest.mark.exhaustive if name in ("64", "256, one head") else ())
    for name in CASES
    for direction in DIRECTIONS
]


def compile_case(name: str, path: str) -> None:
    described_cluster.prepare_jax()
    kernels = {**table.compile_attention(CASES[name]), "decode": table.compile_decode(CASES[name])}
    Path(path).write_bytes(pickle.dumps(kernels))


@pytest.fixture(scope="module")
def compiled(request, of_all_workers, optimized) -> dict[str, dict[str, Kernel]]:
    """The kernels of the cases that tests of this run ask for, compiled side by side, once for all workers."""
    need()
    tests = [item for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())]
    names = list(dict.fromkeys(test.callspec.params["case"][0] for test in tests))
    folder = of_all_workers / "kernels"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        _compile([name for name in names if not (folder / name).exists()], folder)
    return {name: pickle.loads((folder / name).read_bytes()) for name in names}


def _compile(names: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    processes = []
    try:
        for name in names:
            command = [sys.executable, __file__, name, str(folder / name)]
            processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        for process in processes:
            _, said = process.communicate()
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()


@pytest.fixture(params=KERNELS, ids=lambda case: " ".join(case))
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def kernel(compiled, case) -> Kernel:
    name, direction = case
    return compiled[name][direction]


def test_no_register_is_spilled(kernel):
    assert (kernel.spill_stores, kernel.spill_loads, kernel.stack) == (0, 0, 0)
    assert kernel.opcodes.total("LDL") == kernel.opcodes.total("STL") == 0


def test_ptxas_warns_of_nothing(kernel):
    assert kernel.warnings == ()


def test_hopper_multiplies_and_loads(kernel):
    assert kernel.opcodes.total("HGMMA") > 0 and kernel.opcodes.total("HMMA") == 0
    assert kernel.opcodes.total("UTMALDG") > 0 and kernel.opcodes.total("UTMASTG") > 0


def test_a_block_fits_a_multiprocessor(kernel):
    assert 0 < kernel.shared <= SHARED_PER_BLOCK and kernel.blocks_per_sm >= 1
    registers = kernel.set_registers
    assert kernel.threads == 3 * 128
    if len(registers) == 2:  # The two computing warpgroups run the same code.
        registers = (registers[0], *registers)
    assert len(registers) == 3 and 128 * sum(registers) <= REGISTERS_PER_SM


@pytest.mark.parametrize("case", [("256", "decode"), ("128", "decode")], ids=lambda case: " ".join(case))
def test_decode(compiled, case):
    """It passes the tests above, and two blocks run at a time, one of which loads while the other computes."""
    kernel = compiled[case[0]]["decode"]
    test_no_register_is_spilled(kernel)
    test_ptxas_warns_of_nothing(kernel)
    test_hopper_multiplies_and_loads(kernel)
    assert kernel.threads == 2 * 128 and kernel.blocks_per_sm == 2


def test_loops_do_what_a_tile_needs_and_no_more(kernel, case):
    name, direction = case
    shape = CASES[name]
    size = table.select_tile(shape, direction).size
    works = table.measure_work(kernel, PRODUCTS[direction], shape.width)
    assert [work.columns for work in works] == [size] * (2 if direction == "dkv" else 1), "multiplied twice, or not"
    assert [len(work.masked) for work in works] == ([2, 0] if direction == "dkv" else [2])
    for loop in kernel.tiles:
        for function in "MUFU.TANH", "MUFU.EX2":
            assert loop.opcodes.total(function) <= 64 * size / 128, f"{function} more than once for each score"
        assert loop.opcodes.total("MUFU.RCP") == 0, "a division, as in an exact tanh"


def test_masked_tiles_are_not_twice_as_long(kernel, case):
    name, direction = case
    scores, *unmasked = table.measure_work(kernel, PRODUCTS[direction], CASES[name].width)
    assert all(scores.clean < masked <= 1.9 * scores.clean for masked in scores.masked)
    assert not any(work.masked for work in unmasked)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_that_do_not_fit_are_found_on_a_cpu(direction):
    """So that sizes can be chosen with neither a GPU nor a compiler for one."""
    import jax

    from gemma2_jax.kernels.tile_sizes import Tile
    from gemma2_jax.kernels.tiles import GPU, Settings

    shape = CASES["256"]
    inputs, cotangents = table.describe_operands(shape, 256)
    settings = Settings(scale=shape.scale, softcap=shape.softcap, build=GPU)

    def lower(tile):
        def run(inputs, cotangents):
            return table.run_kernel(direction, inputs, cotangents, settings, tile)

        jax.jit(run).trace(inputs, cotangents).lower(lowering_platforms=("cuda",))

    lower(table.select_tile(shape, direction))
    with pytest.raises(ValueError, match=f"shared memory.*{SHARED_PER_BLOCK}"):
        lower(Tile(size=128, stages=2, v_stages=2))


def pairs(segments_BT, window) -> np.ndarray:
    """Whether each query sees each key, [B, T, T]: those in its segment and window that are not later."""
    position = np.arange(segments_BT.shape[1])
    distance = position[:, None] - position
    return (segments_BT[:, :, None] == segments_BT[:, None]) & (distance >= 0) & (distance < np.asarray(window))


def reduce_tiles(visible, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Says for each tile of [..., rows, columns] whether any pair in it is seen, and whether all are."""
    *batch, T, S = visible.shape
    tiles = visible.reshape(*batch, T // rows, rows, S // columns, columns)
    return tiles.any(-1).any(-2), tiles.all(-1).all(-2)


def check_bounds(bounds, any_visible, all_visible) -> None:
    """Checks that tiles are visited if and only if a pair in them is seen, and masked if and only if not all are."""
    bounds = np.asarray(bounds)
    start, clean, masked, end = np.moveaxis(bounds[..., None], -2, 0)
    assert (np.diff(bounds, axis=-1) >= 0).all() and (start >= 0).all()
    tile = np.arange(any_visible.shape[-1])
    np.testing.assert_array_equal((start <= tile) & (tile < end), any_visible)
    np.testing.assert_array_equal((clean <= tile) & (tile < masked), all_visible)


@cache
def layer_pairs(name: str) -> np.ndarray:
    """Whether each query sees each key in a layer of `LAYERS`."""
    documents, window = LAYERS[name]
    segments = np.searchsorted(documents, np.arange(table.LENGTH), side="right")
    return pairs(segments[None], window)


# Of tiles of a block's rows x columns, scores visited over those that are needed, at 8,192 tokens.
RATIOS = {
    (64, 64): {"global": 1.00769, "local": 1.01554, "packed": 1.17609},
    (64, 128): {"global": 1.01550, "local": 1.03117, "packed": 1.30746},
    (128, 64): {"global": 1.01550, "local": 1.03117, "packed": 1.30541},
}


@pytest.mark.parametrize("name", LAYERS)
def test_visits_of_a_long_row(name, case):
    visible, shape, direction = layer_pairs(name), CASES[case[0]], case[1]
    first, last = table.layer_intervals(*LAYERS[name])
    visits = table.count_visits(shape, direction, first, last)
    assert visits.exact == np.count_nonzero(visible)
    any_visible, all_visible = reduce_tiles(
        visible.swapaxes(1, 2) if direction == "dkv" else visible, visits.rows, visits.columns
    )
    check_bounds(table.read_bounds(shape, direction, first, last), any_visible, all_visible)
    assert visits.tiles == np.count_nonzero(any_visible) and visits.masked == visits.tiles - np.count_nonzero(
        all_visible
    )
    assert visits.ratio == pytest.approx(RATIOS[visits.rows, visits.columns][name], abs=1e-5)
    if name != "packed":
        # Tiles of twice that size, at both edges of a window, are the only ones to pass 1.03.
        large = name == "local" and visits.rows * visits.columns > 64 * 64
        assert (visits.ratio > 1.03) == large


LENGTH = 384
WINDOWS = (1, 63, 64, 65, 100, 127, 128, 129, LENGTH, 1000)


def draw_segments(seed: int, count: int) -> np.ndarray:
    """Draws rows of segments, [count, LENGTH]: one, many, of length 1, starting at edges of tiles and beside them."""
    random = np.random.default_rng(seed)
    edges = np.arange(64, LENGTH, 64)

    def draw_single_tokens():
        position = random.integers(1, LENGTH - 1, 4)
        return np.concatenate([position, position + 1])

    kinds = (
        lambda: [],
        lambda: range(LENGTH),
        lambda: random.choice(edges, random.integers(1, 5), replace=False),
        lambda: np.append(random.choice(edges, 3) + random.integers(-1, 2, 3), random.choice(edges)),
        draw_single_tokens,
        lambda: random.integers(1, LENGTH, random.integers(1, 40)),
    )
    starts = np.zeros((count, LENGTH), np.int32)
    for number in range(count):
        starts[number, np.array(kinds[number % len(kinds)](), int)] = 1
    return starts.cumsum(1)


@pytest.fixture(scope="module")
def cases():
    """Segments and windows, what queries see, and their intervals; in some rows the last queries see nothing."""
    import jax.numpy as jnp

    from gemma2_jax.model.attention import mosaic as attention_mosaic

    segments = np.concatenate([draw_segments(seed, 36) for seed in range(len(WINDOWS))])
    window = np.repeat(WINDOWS, 36)[:, None]
    visible = pairs(segments, window[:, :, None])
    starts = attention_mosaic.segment_starts(jnp.asarray(segments))
    ends = attention_mosaic.key_intervals(jnp.arange(LENGTH), starts, (0,), LENGTH, jnp.asarray(window))
    first, last = map(np.array, ends)
    # `kernels.attention` pads rows in the same way.
    blind = np.arange(LENGTH) >= np.random.default_rng(0).choice([1, 63, 64, 200, LENGTH], len(segments))[:, None]
    visible[blind] = False
    first[blind], last[blind] = LENGTH, LENGTH - 1
    return visible, jnp.asarray(first), jnp.asarray(last)


def test_intervals_are_what_queries_see(cases):
    visible, first, last = cases
    key = np.arange(LENGTH)
    np.testing.assert_array_equal((first[..., None] <= key) & (key <= last[..., None]), visible)
    assert len(visible) >= 300 and (np.diff(first) >= 0).all() and (np.diff(last) >= 0).all()


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_bounds_are_those_of_a_search(cases, rows, size):
    from gemma2_jax.kernels import tiles

    visible, first, last = cases
    check_bounds(tiles.tile_bounds(first, last, rows, size), *reduce_tiles(visible, rows, size))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_bounds_by_keys_are_those_of_a_search(cases, size):
    from gemma2_jax.kernels import backward, tiles

    visible, first, last = cases
    q_first, q_last = backward.query_intervals(first, last, LENGTH)
    query = np.arange(LENGTH)
    by_key = visible.swapaxes(1, 2)
    np.testing.assert_array_equal((q_first[..., None] <= query) & (query <= q_last[..., None]), by_key)
    check_bounds(tiles.tile_bounds(q_first, q_last, 64, size), *reduce_tiles(by_key, 64, size))


@pytest.mark.parametrize("shards", [2, 3])
def test_bounds_of_a_ring(shards):
    """Queries of a context shard, at two places of the row (`mesh.balance_context`), and the keys of another."""
    import jax.numpy as jnp

    from gemma2_jax.kernels import backward, tiles
    from gemma2_jax.model.attention import mosaic as attention_mosaic

    piece = 64
    length = 2 * shards * piece
    segments = np.concatenate([draw_segments(seed, 12)[:, :length] for seed in range(len(WINDOWS))])
    window = np.repeat(WINDOWS, 12)[:, None]
    visible_in_row = pairs(segments, window[:, :, None])
    starts = attention_mosaic.segment_starts(jnp.asarray(segments))
    for q_shard in range(shards):
        for k_shard in range(shards):
            places = [(shard * piece, (2 * shards - 1 - shard) * piece) for shard in (q_shard, k_shard)]
            query, key = (np.concatenate([start + np.arange(piece) for start in pair]) for pair in places)
            visible = visible_in_row[:, query][:, :, key]
            first, last = attention_mosaic.key_intervals(query, starts[:, query], places[1], piece, jnp.asarray(window))
            check_bounds(tiles.tile_bounds(first, last, 64, 64), *reduce_tiles(visible, 64, 64))
            by_key = backward.query_intervals(first, last, 2 * piece)
            check_bounds(tiles.tile_bounds(*by_key, 64, 64), *reduce_tiles(visible.swapaxes(1, 2), 64, 64))


if __name__ == "__main__":
    compile_case(*sys.argv[1:])
