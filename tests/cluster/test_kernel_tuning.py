"""The fastest tiles that are right are found, kept and taken. The interpreter stands for the GPU, with a made-up clock.

Run as a program, with a `Spec`, this file is the process that tries tiles: some of its kernels are broken.
"""

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.cluster import hosts, kernel_records, platforms
from gemma2_jax.cluster.kernel_check import PARTS, Candidate, Finding, Spec, local_shape
from gemma2_jax.cluster.kernel_tuning import choose_tiles, list_candidates, try_candidates
from gemma2_jax.config import ComputeConfig
from gemma2_jax.kernels.tile_sizes import (
    DIRECTIONS,
    REGISTERS,
    SHARED_BYTES,
    TILES,
    Tile,
    Tiles,
    count_places,
    count_registers,
    count_shared,
    list_legal,
    read_tiles,
)
from gemma2_jax.model.attention import choice
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_TINY
from gemma2_jax.planning.checked_attention import describe_tuning

WRONG, BROKEN, ENDLESS = Tile(size=64, stages=3), Tile(size=64, stages=4), Tile(size=64, stages=8)
FASTER = Tile(size=64, stages=2)
# Seconds by candidate; what is broken would be the fastest.
CLOCK = {
    "forward 128 x 2": 3.0,
    "forward 64 x 2": 2.0,
    "forward 64 x 3": 1.0,
    "forward 64 x 4": 1.0,
    "dq 128 x 2+2": 2.0,
    "dq 64 x 2+2": 2.5,
    "dkv 64 x 2": 2.0,
    "decode 64 x 12": 3.0,
    "decode 64 x 8": 1.0,
    "decode 64 x 6": 2.99,
}
TRIED = (
    *(Candidate(direction="forward", tile=tile) for tile in (TILES[64].forward, WRONG, BROKEN, FASTER)),
    *(Candidate(direction="dq", tile=tile) for tile in (TILES[64].dq, Tile(size=64, stages=2, v_stages=2))),
    Candidate(direction="dkv", tile=TILES[64].dkv),
    *(Candidate(direction="decode", tile=tile) for tile in (TILES[64].decode, ENDLESS, Tile(size=64, stages=6))),
)
TINY = Spec(
    shape=replace(local_shape(GEMMA2_TINY, 1), heads=2, kv_heads=1, window=16), interpret=True, candidates=TRIED
)


def stand_in() -> None:
    """Has kernels of this process be their meaning, but for tiles: one is wrong, one fails to compile, one hangs."""
    from gemma2_jax.cluster import kernel_program
    from gemma2_jax.model.attention import trials

    names = {"forward": ("out", "lse"), "dq": ("dq",), "dkv": ("dk", "dv"), "decode": ("out",)}

    def make_program(self, direction, tile):
        def run(*inputs):
            results = {name: jnp.asarray(self.expected[0][name]) for name in names[direction]}
            if tile == ENDLESS:
                start = inputs[-1][0] * 0
                turn = jax.lax.while_loop(lambda turn: turn >= 0, lambda turn: jax.lax.rem(turn + 1, 2), start)
                return {"out": results["out"] + turn}
            if tile == BROKEN:
                raise RuntimeError("Internal error while assembling:\nptxas error   : too much shared data")
            return {name: x * 1.05 if tile == WRONG else x for name, x in results.items()}

        return run

    trials.LayerTrials.make_program = trials.CacheTrials.make_program = make_program
    kernel_program.time_kernel = lambda candidate, run, *, interpret: CLOCK[str(candidate)]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return try_candidates(TINY, run_seconds=5, program=(__file__,))


def test_each_kernel_is_tried_alone():
    """In the interpreter: one of each direction agrees with float32 and is timed, and a tile is what it is given."""
    tried = tuple(Candidate(direction=direction, tile=getattr(TILES[64], direction)) for direction in DIRECTIONS)
    found = try_candidates(replace(TINY, candidates=tried), run_seconds=300)
    assert [(each.case, each.verdict) for each in found] == [(str(each), "was timed") for each in tried]
    assert all(each.kernel_seconds > 0 for each in found)


def test_the_fastest_that_is_right_is_chosen(findings):
    """A wrong one and one that does not compile are faster by the clock; one hangs; one gains less than is noise."""
    found = {finding.case: finding for finding in findings}
    assert list(found) == [str(candidate) for candidate in TRIED], "each is found once, whatever those before it did"
    assert {case: each.kernel_seconds for case, each in found.items() if each.kernel_seconds} == {
        case: seconds for case, seconds in CLOCK.items() if seconds > 1
    }
    assert found["forward 64 x 3"].verdict == "differs" and "out is off by" in found["forward 64 x 3"].detail
    assert found["forward 64 x 4"].verdict == "does not compile"
    assert found["forward 64 x 4"].detail == "ptxas error   : too much shared data"
    assert str(found["decode 64 x 8"]) == "decode 64 x 8 hangs: it did not end within 5 s, and was killed"
    assert choose_tiles(64, findings) == replace(TILES[64], forward=FASTER)


def test_a_table_names_what_is_left_out(findings):
    tuning = kernel_records.Tuning(findings=tuple(findings), choice=kernel_records.TileChoice(), record=None)
    rows = {row.subject: row for row in describe_tuning(tuning, 64)}
    assert rows["tiles of forward"].found == "forward 64 x 2 2000.000 ms, forward 128 x 2 3000.000 ms (built in)"
    assert rows["tiles of forward"].reason.startswith("left out: forward 64 x 3 differs: exact tanh: ")
    assert rows["tiles of dkv"].numbers == {"dkv 64 x 2 seconds": 2.0} and rows["tiles of dkv"].judgment == "ok"
    (none, *_) = describe_tuning(replace(tuning, findings=()), 64)[1:]
    assert none.judgment == "skipped (none was timed)"


def test_without_times_the_built_in_ones_stay():
    assert choose_tiles(64, []) == TILES[64]
    timed = partial(Finding, part="attention", verdict="was timed")
    only = [timed(case="forward 64 x 2", kernel_seconds=5.0)]
    assert choose_tiles(64, only).forward == FASTER, "the built-in one gave no time"


def test_candidates_are_all_legal_tiles_and_the_built_in_ones_come_first():
    for width, built_in in TILES.items():
        for direction in DIRECTIONS:
            legal = list_legal(width, direction)
            assert legal[0] == getattr(built_in, direction) and len(set(legal)) == len(legal)
            assert all(count_shared(width, direction, tile) <= SHARED_BYTES for tile in legal)
            assert all(count_registers(width, direction, tile) <= REGISTERS for tile in legal)
        assert len(list_candidates(width)) == sum(len(list_legal(width, direction)) for direction in DIRECTIONS)
    assert Tile(size=128, stages=2) not in list_legal(256, "forward"), "its accumulators leave no registers"
    assert Tile(size=64, stages=3) not in list_legal(256, "forward"), "its rings do not fit"
    assert [count_places(256, Tile(size=64, stages=6), queries) for queries in (8, 64)] == [6, 3]


HOPPER = SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", process_index=0, local_hardware_id=0
)
AGREES = [Finding(part=part, case=part, verdict="agrees") for part in PARTS]
OTHER = replace(TILES[256], decode=Tile(size=64, stages=6))
SPEC = Spec(shape=local_shape(GEMMA2_2B, 1))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that JAX is made to see, on which one tile of decoding is faster; what it was asked; records of its own."""
    checked: list[Tiles | None] = []

    def check(spec: Spec, **options) -> list[Finding]:
        checked.append(spec.tiles)
        return [*AGREES]

    def attempt(spec: Spec, **options) -> list[Finding]:
        timed = partial(Finding, part="decode", verdict="was timed")
        return [timed(case="decode 64 x 3", kernel_seconds=2.0), timed(case="decode 64 x 6", kernel_seconds=1.0)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_records, "_known", {})
    monkeypatch.setattr(kernel_records, "check_kernels", check)
    monkeypatch.setattr(kernel_records, "try_candidates", attempt)
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    monkeypatch.setattr(platforms, "find_driver", lambda: "580.65.06")
    mesh = SimpleNamespace(devices=np.array([HOPPER]), local_devices=[HOPPER], shape={"tensor": 1})

    def examine(**options) -> choice.Experience:
        kernel_records._known.clear()
        return kernel_records.examine(GEMMA2_2B, mesh, kernel_records.TRAINING, **options)

    return SimpleNamespace(examine=examine, checked=checked, mesh=mesh, folder=tmp_path / "gemma2_jax" / "kernels")


def describe_choice(experience: choice.Experience) -> tuple[choice.Implementation, str]:
    return choice.choose_attention(GEMMA2_2B, ComputeConfig(), HOPPER, lambda: experience)


def test_what_was_timed_is_kept_and_taken(gpu, monkeypatch):
    before = gpu.examine()
    assert before.tiles is None and describe_choice(before)[1].endswith(
        "; tiles built in, none timed on this device, which python -m gemma2_jax.check --tune does)"
    )
    assert describe_choice(before)[0] is choice.IMPLEMENTATIONS["mosaic"]
    tuning = kernel_records.tune(SPEC, HOPPER)
    assert tuning.choice.tiles == OTHER and gpu.checked == [None, OTHER], "the whole check runs with them"
    after = gpu.examine()
    assert after.tiles == OTHER and len(gpu.checked) == 2, "both records are read"
    implementation, reason = describe_choice(after)
    assert "; tiles timed on this device on 20" in reason
    assert reason.endswith(": forward 64 x 2, dq 64 x 2+1, dkv 64 x 2, decode 64 x 6)")
    for attend in (implementation.attend, implementation.attend_cached):
        assert attend.keywords["kernel"].keywords["build"].select_tiles(256) == OTHER
    assert describe_choice(after)[0] is implementation, "one object, so that one compiled program serves each model"
    monkeypatch.setattr(platforms, "find_driver", lambda: "590.1")
    assert gpu.examine().tiles is None, "another driver was not timed"


def test_a_run_times_them_once_where_it_is_asked_to(gpu, capsys):
    assert gpu.examine(tunes=True).tiles == OTHER
    said = capsys.readouterr().err
    assert "the attention kernels are timed on NVIDIA H100 80GB HBM3 with each of" in said and "decode 64 x 6" in said
    assert gpu.examine(tunes=True).tiles == OTHER and not capsys.readouterr().err


def test_a_damaged_record_leaves_the_built_in_tiles_and_says_so(gpu):
    kernel_records.tune(SPEC, HOPPER)
    (path,) = [
        path for path in gpu.folder.iterdir() if "findings" in path.read_text() and "measured" in path.read_text()
    ]
    content = json.loads(path.read_text())
    illegal = content | {"tiles": content["tiles"] | {"dq": {"size": 128, "stages": 4, "v_stages": 4}}}
    for text in ("", "[]", "{}", path.read_text()[:-30], json.dumps(illegal)):
        path.write_text(text)
        experience = gpu.examine()
        assert experience.tiles is None and experience.was_run and not experience.fault
        said = f"; tiles built in, as the record of tiles {path} cannot be read; {kernel_records.TUNE} makes it again)"
        assert describe_choice(experience)[1].endswith(said)
    assert gpu.examine(tunes=True).tiles == OTHER, "it is made again"


def test_tiles_that_fail_the_whole_check_are_not_kept(gpu, monkeypatch):
    hangs = Finding(part="decode", case="c", verdict="hangs", detail="d")
    monkeypatch.setattr(
        kernel_records, "check_kernels", lambda spec, **options: [AGREES[0], hangs if spec.tiles else AGREES[1]]
    )
    tuning = kernel_records.tune(SPEC, HOPPER)
    assert tuning.choice.tiles is None and "c hangs: d" in tuning.choice.source
    assert kernel_records.read_tile_record(SPEC, HOPPER) is None and not tuning.record.describe_fault(PARTS)


def test_where_nothing_could_be_timed_nothing_is_kept(gpu, monkeypatch):
    unable = Finding(part="attention", case="attention", verdict="not checked", detail="no memory was left")
    monkeypatch.setattr(kernel_records, "try_candidates", lambda spec, **options: [unable])
    tuning = kernel_records.tune(SPEC, HOPPER)
    assert tuning.choice.source == (
        "built in, as none could be timed on this device (attention not checked: no memory was left)"
    )
    assert kernel_records.read_tile_record(SPEC, HOPPER) is None


def test_all_processes_take_the_tiles_of_the_first(gpu, monkeypatch):
    """Where devices differ, nobody takes any but the built-in ones, as the programs must be the same."""
    other = {"device": HOPPER.device_kind, "driver": "580.65.06"}

    def gather(question: str, answer: str) -> list[str]:
        if question.startswith("attention_tiles"):
            first = {"alike": other, "tiles": asdict(OTHER), "source": "timed there"}
            return [json.dumps(first), answer]
        return [answer, answer]

    monkeypatch.setattr(hosts, "gather_answers", gather)
    gpu.mesh.devices = np.array([HOPPER, SimpleNamespace(**vars(HOPPER) | {"process_index": 1})])
    found = gpu.examine()
    assert found.tiles == OTHER and found.tiles_source == "timed there" and gpu.checked == [OTHER]
    other["device"] = "NVIDIA H200"
    assert gpu.examine().tiles_source == "built in, as the devices of the processes differ"


def test_tiles_are_read_only_if_they_are_legal():
    assert read_tiles(asdict(TILES[128]), 128) == TILES[128]
    for content in (asdict(TILES[128]), {**asdict(OTHER), "forward": {"size": 1, "stages": 1, "v_stages": 0}}):
        with pytest.raises(ValueError, match=r"^(forward|decode) has no tiles"):
            read_tiles(content, 256)


if __name__ == "__main__":
    from gemma2_jax.cluster import kernel_program

    stand_in()
    kernel_program.main(sys.argv[1])
