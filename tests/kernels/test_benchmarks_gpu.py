"""`python -m benchmarks.gpu` where no GPU is: its conventions, its checks, and that what it would time compiles.

Run as a program, which is what a test here does once, it lowers what is timed for CUDA and prints what it found as
JSON: JAX must not have been used before `described_cluster.prepare_jax`.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_plugin

from benchmarks import attention, gpu, gpu_report
from gemma2_jax.cluster import gpus, platforms, rates
from gemma2_jax.kernels import reference
from gemma2_jax.kernels.shapes import SHAPES
from gemma2_jax.kernels.tile_sizes import TILES
from gemma2_jax.model.attention import cases, checking
from gemma2_jax.model.attention.cases import Cached, Layer
from gemma2_jax.model.attention.checking import Check
from gemma2_jax.planning import checked_steps, described_cluster
from gemma2_jax.planning.checked_steps import MeasuredSteps

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}


def lower_programs(exhaustive: bool) -> dict[str, list]:
    """Counts the kernels in each program that is timed, for each pass in turn, at its real shapes.

    Unless this is exhaustive, only programs of a local layer and of a ring are lowered for each head width, without the
    program of both passes, and nothing is compiled.
    """
    described_cluster.prepare_jax()
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    # jax asks cuDNN and the GPU, neither of which is there, so that a change of its own checks is not seen here.
    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda _: True
    sharding = NamedSharding(Mesh(np.array(described_cluster.describe_cluster(1)), ("device",)), PartitionSpec())

    def count_kernels(run, *inputs) -> dict[str, int]:
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)
        lowered = run.trace(*inputs).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
        counts = {name: text.count(f"@{target}") for name, target in TARGETS.items()}
        if exhaustive and not counts["cudnn"]:
            lowered.compile()
        return counts

    programs = {}
    for name in ("2b", "9b", "27b") if exhaustive else ("2b", "27b"):
        layers, caches = attention.list_timed_layers(name, False), attention.list_timed_caches(name, False)
        for layer in layers if exhaustive else layers[2:3]:
            q, k, v, d = layer.shapes()
            mask = jax.eval_shape(layer.mask)
            for attend in (
                checking.kernel_attention,
                checking.xla_attention,
                *([] if layer.packed else [attention.cudnn_attention]),
            ):
                run = attention.compile_passes(attend(layer))
                pull = jax.eval_shape(run.saved, q, k, v, mask)
                passes = [count_kernels(run.forward, q, k, v, mask), count_kernels(run.backward, pull, d)]
                if exhaustive:
                    passes.append(count_kernels(run.both, q, k, v, d, mask))
                programs[f"{layer} {attend.__name__}"] = passes
        for case in caches if exhaustive else caches[3:]:
            q, k, v = case.shapes()
            position = jax.ShapeDtypeStruct((len(case.positions),), jnp.int32)
            kv_caches = [(k, v)] * attention.count_caches(case)
            for decode in checking.kernel_decode, checking.xla_decode:
                chain = jax.jit(attention.chain_calls(decode(case), case))
                programs[f"{case} {decode.__name__}"] = [count_kernels(chain, q, kv_caches, position)]
    return programs


TARGETS = {"mosaic": "mosaic_gpu_v2", "cudnn": "__cudnn$fmha"}


@needs_plugin
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("exhaustive", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_what_is_timed_compiles_for_cuda(exhaustive):
    """Kernels are in the programs of the kernels alone; cuDNN itself is not asked whether it takes these shapes."""
    command = [sys.executable, __file__, *(["exhaustive"] if exhaustive else [])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    programs = json.loads(run.stdout)
    assert len(programs) == (3 * (3 * 3 + 2 + 4 * 2) if exhaustive else 2 * (3 + 2))
    for name, passes in programs.items():
        mosaic, cudnn = ([each[kind] for each in passes] for kind in TARGETS)
        match name.rpartition(" ")[2]:
            case "kernel_attention":
                assert mosaic == [1, 2, 3][: len(passes)] and not any(cudnn), name
            case "cudnn_attention":
                assert not any(mosaic) and all(cudnn), name
            case "kernel_decode":
                assert mosaic[0] > 0 and cudnn == [0], name
            case _:
                assert not any(mosaic + cudnn), name


PACKED = Layer(name="2b", shape=SHAPES["2b"], rows=3, length=300, window=70, packed=True)


@pytest.mark.parametrize("layer", [PACKED, replace(PACKED, window=None), replace(PACKED, packed=False, window=299)])
def test_pairs_are_those_that_see_each_other(layer):
    segments = layer.segments_BT
    pairs = 0
    for i in range(layer.length):
        for j in range(i + 1):
            if layer.window is None or i - j < layer.window:
                pairs += int((segments[:, i] == segments[:, j]).sum())
    assert layer.pairs == pairs
    mask = layer.mask()
    assert int((mask.last_BT - mask.first_BT + 1).sum()) == pairs, "the kernel is told to take as many"


def test_convention_of_flops():
    full = Layer(name="27b", shape=SHAPES["27b"], rows=2, length=8192)
    assert full.pairs == 2 * 33_558_528 and replace(full, window=4096).pairs == 2 * 25_167_872
    assert full.flops("forward") == 4 * full.pairs * 32 * 128
    assert full.flops("both") == full.flops("forward") + full.flops("backward") == 3.5 * full.flops("forward")
    short = Layer(name="27b", shape=SHAPES["27b"], rows=1, length=2048)
    assert short.pairs == replace(short, window=4096).pairs, "rows within a window: one kind of layer is timed"


def test_bytes_of_a_cache():
    ring, dense = (
        Cached(name="9b", shape=SHAPES["9b"], slots=4096, positions=(8191, 99)),
        attention.list_timed_caches("2b", False)[0],
    )
    assert ring.bytes == (4096 + 100) * 8 * 256 * 2 * 2
    assert dense.bytes == 2**13 * 4 * 256 * 4 and attention.count_caches(dense) * dense.bytes >= 8 * attention.L2_BYTES


def test_packed_rows_have_segments_of_many_kinds():
    lengths = [np.diff(np.flatnonzero(np.diff(row, prepend=0, append=0))) for row in PACKED.segments_BT]
    assert all(len(row) >= 4 and row.min() == 1 for row in lengths)
    assert all(row[127] != row[128] and (np.diff(row) >= 0).all() for row in PACKED.segments_BT)


def test_a_missing_gpu_is_reported(capsys):
    for arguments in [], ["--check-only"], ["--shapes", "27b"]:
        with pytest.raises(SystemExit) as ended:
            gpu.main(arguments)
        assert ended.value.code == 2
        output = capsys.readouterr()
        assert "need a GPU of compute capability 9.0, such as an H100, and JAX found cpu" in output.err
        assert not output.out


def test_wrong_options_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--shapes", "3b"])
    assert ended.value.code == 2 and "no shape 3b: there are 2b; 9b" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_checks_pass_interpreted(tmp_path):
    """The command itself, and the kernels: what a GPU would do, on CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--check-only", "--interpret", "--shapes", "2b, tensor 8"]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    assert [each["same"] for each in report["checks"]] == [True, True] and "attention" not in report
    assert "2b, tensor 8: 1 x 100, window 33, packed" in run.stdout and [p.name for p in tmp_path.iterdir()] == [
        "found.json"
    ]


def fake_attention(q, k, v, first, last, *, scale, softcap, build):
    """The reference in the place of the kernel."""
    out, lse = reference.attention(q, k, v, first, last, scale=scale, softcap=softcap)
    return out.astype(jnp.bfloat16), lse


def fake_decode(q, k, v, position, window, *, scale, softcap, build):
    return reference.decode(q, k, v, position, window, scale=scale, softcap=softcap).astype(jnp.bfloat16)


def drop_cap(kernel):
    return lambda *inputs, softcap, **settings: kernel(*inputs, softcap=None, **settings)


def drop_key(kernel):
    return lambda q, k, v, first, last, **settings: kernel(q, k, v, jnp.minimum(first + 1, last), last, **settings)


def drop_slot(kernel):
    return lambda q, k, v, position, window, **settings: kernel(q, k, v, position, window - 1, **settings)


@pytest.mark.parametrize(
    ("break_attention", "break_decode"),
    [pytest.param(None, None, marks=pytest.mark.exhaustive), (drop_cap, drop_cap), (drop_key, drop_slot)],
)
def test_broken_kernels_are_caught(break_attention, break_decode, monkeypatch, capsys):
    """Nothing is timed then, and the exit status is 1."""
    kernels = {"attention": (fake_attention, break_attention), "decode": (fake_decode, break_decode)}
    for name, (kernel, break_kernel) in kernels.items():
        monkeypatch.setattr(checking, name, break_kernel(kernel) if break_kernel else kernel)
    try:
        gpu.main(["--check-only", "--interpret", "--shapes", "27b, tensor 8"])
        status = 0
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr().out
    failed = output.partition("failed:")[2]
    caught = [
        f"27b, tensor 8: 1 x 100, window 33, packed, exact tanh: {name}" for name in ("out", "lse", "dq", "dk", "dv")
    ]
    caught = (caught if break_attention else []) + (
        ["27b, tensor 8: decode, 2 x 128 slots, ring, exact tanh: out"] if break_decode else []
    )
    assert status == (1 if caught else 0), output
    assert all(f"{each} is off by" in failed for each in caught) and failed.count("is off by") == len(caught), failed


def test_one_key_of_a_long_window_is_caught(monkeypatch):
    """Where a key weighs little: scores are far from the cap, and a row sees 512."""
    shape = replace(SHAPES["2b"], heads=1, kv_heads=1)
    monkeypatch.setattr(cases, "scale_to_cap", lambda q, shape: q)
    monkeypatch.setattr(checking, "attention", drop_key(fake_attention))
    layer = Layer(name="2b", shape=shape, rows=1, length=768, window=512)
    (check,) = checking.check_case(layer, [checking.INTERPRETED])
    assert any("out is off" in failure for failure in check.failures)


GOOD = Check(case="c", tanh="exact", errors={"out": 3e-3, "lse": 1e-5}, xla={"out": 2e-3}, same=True)


@pytest.mark.parametrize(
    ("check", "failures"),
    [
        (GOOD, []),
        (replace(GOOD, same=False), ["c, exact tanh: not the same bits twice"]),
        (replace(GOOD, errors={"out": 7e-3}), ["c, exact tanh: out is off by 7.0e-03, of 6.5e-03 allowed"]),
        (replace(GOOD, errors={"out": 7e-3}, tanh="approximate"), []),
        (replace(GOOD, errors={"lse": 3e-4}), ["c, exact tanh: lse is off by 3.0e-04, of 2.0e-04 allowed"]),
        (replace(GOOD, errors={"out": float("nan")}), ["c, exact tanh: out is off by nan, of 6.5e-03 allowed"]),
        (replace(GOOD, xla={"out": 0.1}), ["c, exact tanh: out of XLA, the measure of it, is off by 1.0e-01"]),
    ],
)
def test_criterion(check, failures):
    assert check.failures == failures


def test_errors_are_of_the_worst_head():
    expected = {"out": np.ones((1, 8, 4, 2), np.float32), "lse": np.zeros((1, 4, 8), np.float32)}
    off = {name: x.copy() for name, x in expected.items()}
    off["out"][:, :, 3] *= 1.5
    off["lse"][0, 1, 2] = -0.25
    assert checking.measure_errors(off, expected) == {"out": 0.5, "lse": 0.25}
    assert np.isnan(checking.measure_errors({"out": np.full((1, 8, 4, 2), np.nan)}, expected)["out"])


def test_measured_time_is_that_of_a_call():
    """More work takes longer, and about what one call takes that is waited for."""
    product = jax.jit(lambda x: x @ x @ x @ x)
    sizes = [jnp.ones((size, size)) for size in (16, 256, 1024)]
    times = [attention.measure_seconds(product, x, least=0.02, rounds=3) for x in sizes]
    assert all(small < large for small, large in pairwise(times)), times
    waited = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(sizes[-1]))
        waited.append(time.perf_counter() - began)
    assert times[-1] / 4 < min(waited) < 4 * times[-1]


def test_rounds_are_as_long_as_asked():
    calls = []

    def sleep(x):
        calls.append(x)
        time.sleep(0.002)
        return x

    seconds = attention.measure_seconds(sleep, jnp.zeros(()), least=0.02, rounds=2)
    assert 0.002 <= seconds < 0.02 and 2 + 2 <= len(calls) <= 2 + 2 * 10


STEPS = MeasuredSteps(seconds=0.5, compile_seconds=1.0, loss=2.0, text="")


def test_timing_loop(monkeypatch, capsys, tmp_path):
    """All of the command, with stand-ins for the kernels and tiny cases: cuDNN is not there, and a note says so."""
    shape = replace(SHAPES["27b"], heads=2, kv_heads=1, window=32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checking, "attention", fake_attention)
    monkeypatch.setattr(checking, "decode", fake_decode)
    monkeypatch.setattr(attention, "L2_BYTES", 2**12)
    monkeypatch.setattr(attention, "measure_seconds", partial(attention.measure_seconds, least=0.001, rounds=1))
    layer, cached = partial(Layer, name="27b", shape=shape), partial(Cached, name="27b", shape=shape)
    monkeypatch.setattr(attention, "list_timed_layers", lambda *_: [layer(rows=2, length=64, window=32)])
    monkeypatch.setattr(attention, "list_timed_caches", lambda *_: [cached(slots=32, positions=(40, 7))])
    monkeypatch.setattr(attention, "list_checked", lambda *_: [cached(slots=32, positions=(40, 7))])
    monkeypatch.setattr(gpu, "describe_device", lambda _: {"kind": "none"})
    monkeypatch.setattr(rates, "CPU", rates.Sizes(product=16, copied=1 << 12, sent=1 << 10, least=0.001, rounds=1))
    monkeypatch.setattr(checked_steps, "take_steps", lambda program: STEPS)
    monkeypatch.setattr(gpus, "run_smi", lambda arguments: SMI)
    monkeypatch.setattr(platforms, "find_driver", lambda: "580.65.06")
    gpu.main(["--shapes", "27b", "--json", str(tmp_path / "found.json")])
    output = capsys.readouterr().out
    assert "cuDNN gave no times, width 128: " in output and "Dao-AILab" in output and gpu_report.OF_A_CPU in output
    report = json.loads((tmp_path / "found.json").read_text())
    assert [each["tanh"] for each in report["checks"]] == ["approximate", "exact"]
    assert [each["pass"] for each in report["attention"]] == ["forward", "backward", "both"]
    for each in report["attention"] + report["decode"]:
        assert 0 < each["seconds"]["kernel"] < 1 and 0 < each["seconds"]["xla"] < 1
    assert all(each["seconds"]["cudnn"] is None and each["tflops"]["cudnn"] is None for each in report["attention"])
    for each in report["attention"]:
        assert each["tflops"]["kernel"] == pytest.approx(each["flops"] / each["seconds"]["kernel"] / 1e12)
        assert each["tiles"] == str(TILES[128])
    check_comparable(report)


SMI = (
    "0, NVIDIA H100 80GB HBM3, 580.65.06, 96.00, 81559, Enabled, 345, 2619, 1980, 2619, 1980, 700.00, 700.00, 31, "
    "Enabled, Disabled"
)


def check_comparable(report: dict) -> None:
    """A report has all that is needed to compare it with that of another machine."""
    assert report["format"] == gpu_report.FORMAT and report["note"] == gpu_report.OF_A_CPU
    assert report["devices"] == {"kind": "cpu", "count": jax.device_count(), "platform": "cpu"}
    assert report["driver"] == "580.65.06" and {"jax", "jaxlib"} <= report["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", report["commit"])
    (found,) = report["gpus"]
    assert (found["power.limit"], found["ecc.mode.current"], found["clocks.max.sm"]) == ("700.00", "Enabled", "1980")
    assert report["tiles"]["27b"]["tiles"] == asdict(TILES[128]) and "built in" in report["tiles"]["27b"]["source"]
    measured = report["rates"]
    assert all(rate > 0 for rate in measured["product"]["flops"] + measured["copy"]["bytes_per_second"])
    assert measured["collectives"]["bus_bytes_per_second"].keys() == rates.COLLECTIVES.keys()
    steps, plan, flags = report["steps"]
    assert steps["recipe"] == "2b_lora" and steps["numbers"]["step_seconds"] == 0.5
    assert plan["subject"] == "steps against the plan" and flags["subject"] == "compute.gpu_flags"


if __name__ == "__main__":
    print(json.dumps(lower_programs("exhaustive" in sys.argv)))
