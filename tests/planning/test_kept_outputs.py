"""Outputs that may be kept of a block: bytes and FLOPs by hand, and the best that fit."""

from dataclasses import replace

import pytest

from gemma2_jax import recipes
from gemma2_jax.planning.kept_outputs import choose_kept_outputs, list_candidates

ONE = dict.fromkeys(("data", "stage", "fsdp", "context", "tensor"), 1)
CONFIG = recipes.load_recipe("2b_sft")
LAYERS, ROWS, T, D, N, K, H, F = 26, 128, 2048, 2304, 8, 4, 256, 9216


def test_bytes_and_flops_by_hand():
    """In bfloat16, of one row at a time: as in docs/parallelism.md, where they are read off the compiled step."""
    found = {one.name: (one.size, one.flops) for one in list_candidates(CONFIG, ONE)}
    tokens = LAYERS * T
    assert found["down"] == (tokens * D * 2, 2 * ROWS * tokens * F * D)
    assert found["o"] == (tokens * D * 2, 2 * ROWS * tokens * N * H * D)
    assert found["gate"] == found["up"] == (tokens * F * 2, 2 * ROWS * tokens * F * D)
    assert found["k"] == found["v"] == (tokens * K * H * 2, 2 * ROWS * tokens * D * K * H)
    pairs = T * (T + 1) / 2  # the window is longer
    assert found["attention"] == (tokens * N * (H * 2 + 4), 4 * ROWS * LAYERS * pairs * N * H)
    order = [one.name for one in list_candidates(CONFIG, ONE)]
    assert order[0] == "down" and order[-1] == "attention"


def test_shards_keep_and_compute_their_part():
    found = {one.name: one for one in list_candidates(CONFIG, ONE | {"tensor": 4})}
    whole = {one.name: one for one in list_candidates(CONFIG, ONE)}
    for name in whole:
        assert found[name].size * 4 == whole[name].size
        assert found[name].flops * 4 == whole[name].flops
    two = {one.name: one for one in list_candidates(CONFIG, ONE | {"stage": 2})}
    assert two["down"].size == 3 * 13 * T * D * 2, "three passes are live in the first of two stages"
    assert two["down"].flops == whole["down"].flops / ROWS * (ROWS + 1) / 2, "of 128 passes, and one tick to wait"


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (0.1, ()),
        (0.23, ("down",)),
        (0.46, ("q", "down")),
        (100, ("q", "k", "v", "attention", "o", "gate", "up", "down")),
    ],
)
def test_the_best_that_fit(gib, expected):
    assert choose_kept_outputs(CONFIG, ONE, int(gib * 2**30)) == expected
    kept = replace(CONFIG, compute=replace(CONFIG.compute, kept_outputs=("q",)))
    assert choose_kept_outputs(kept, ONE, int(gib * 2**30)) == expected
