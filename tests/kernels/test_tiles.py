"""Legal tiles compile for sm_90 with no spills, in the shared memory that the rule says: all of them, or a sample.

Run as a program with a file, which is what the tests here do, it compiles the candidates that it reads on standard
input: JAX must not have been used before `described_cluster.prepare_jax`.
"""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from compilers import need

from benchmarks import tiles as table
from benchmarks.machine_code import Kernel
from gemma2_jax.kernels.tile_sizes import DIRECTIONS, SHARED_BYTES, TILES, Tile, count_shared, list_legal
from gemma2_jax.planning import described_cluster

ROOT = Path(__file__).parents[2]
SAMPLE = (128, "forward", (Tile(size=64, stages=4),))
CASES = [
    SAMPLE,
    *(
        pytest.param((width, direction, list_legal(width, direction)), marks=pytest.mark.exhaustive)
        for width in TILES
        for direction in DIRECTIONS
    ),
]


def compile_tiles(width: int, direction: str, tiles: list[Tile], path: Path) -> list[Kernel]:
    given = json.dumps([width, direction, [asdict(tile) for tile in tiles]])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], input=given, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads(path.read_bytes())


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} of {len(case[2])}")
def test_legal_tiles_compile_without_spills(case, tmp_path):
    need()
    width, direction, tiles = case
    for tile, kernel in zip(tiles, compile_tiles(*case, tmp_path / "kernels"), strict=True):
        assert (kernel.spill_stores, kernel.spill_loads, kernel.stack, kernel.warnings) == (0, 0, 0, ()), str(tile)
        assert kernel.opcodes.total("HGMMA") > 0, str(tile)
        assert 0 <= count_shared(width, direction, tile) - kernel.shared < 1024, str(tile)
        assert kernel.shared <= SHARED_BYTES and kernel.blocks_per_sm >= 1, str(tile)


if __name__ == "__main__":
    width, direction, tiles = json.load(sys.stdin)
    described_cluster.prepare_jax()
    kernels = [table.compile_tile(width, direction, Tile(**tile)) for tile in tiles]
    Path(sys.argv[1]).write_bytes(pickle.dumps(kernels))
