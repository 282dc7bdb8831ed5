"""What a run says of its speed and progress: tokens by the time of steps, and lines that fit where they are read."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from small_runs import ROOT, lines_of, small

from gemma2_jax.cluster import devices
from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training import guard, loop, metrics, progress, speed, startup
from gemma2_jax.training.export import AdapterExports
from gemma2_jax.training.step import Program, group_norms
from gemma2_jax.training.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes of the tiny model name assets/ relative to the repository."""
    monkeypatch.chdir(ROOT)


def test_speed_is_of_real_tokens_by_the_time_of_steps(tmp_path, monkeypatch):
    """On a clock by which a step takes a second, an evaluation 100 and a save 1000; evaluations off the logging grid.

    Each step has ended when the clock has passed its second, so that the line of step 4, written when step 5 is
    dispatched, counts both.
    """
    now, tokens, learned, reads = [0.0], [], [], []
    place_batch, read, step = loop.place_batch, metrics.Metrics._read, metrics.Metrics.step

    def place(program, batch):
        now[0] += 0.25  # the rest of a step's second is computing
        tokens.append(int(np.count_nonzero(batch["segments"])))
        learned.append(int(batch["weights"].sum()))
        return place_batch(program, batch)

    def pass_time(seconds, result=None):
        def function(*_):
            now[0] += seconds
            return result

        return function

    clock = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 1e9 + now[0])
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(metrics, "_is_ready", lambda x: True)
    monkeypatch.setattr(loop, "place_batch", place)
    monkeypatch.setattr(metrics.Metrics, "step", lambda *arguments: pass_time(0.75)() or step(*arguments))
    monkeypatch.setattr(devices, "peak_flops", lambda kind: 1e6)
    monkeypatch.setattr(loop, "mean_loss", pass_time(100, 1.0))
    monkeypatch.setattr(AdapterExports, "save", pass_time(1000))
    monkeypatch.setattr(metrics.Metrics, "_read", lambda self, step: reads.append(step) or read(self, step))
    begun: dict[str, list[int]] = {}
    begin = Watchdog.begin
    monkeypatch.setattr(
        Watchdog, "begin", lambda self, *at: begun.setdefault(at[0], []).append(at[1]) or begin(self, *at)
    )
    config = small("tiny_lora", tmp_path, steps=12)
    result = loop.train(
        replace(config, train=replace(config.train, log_every=4, eval_every=5, checkpoint_every=3, keep_checkpoints=1))
    )
    lines = [line for line in lines_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12] == list(result.losses)
    assert list(result.eval_losses) == [0, 5, 10, 12]
    for line, measured in zip(lines, (range(5), range(5, 9), range(9, 12)), strict=True):
        count = sum(tokens[step] for step in measured)
        assert line["tokens_per_s"] == pytest.approx(count / len(measured), abs=0.06)
        assert line["padding"] == pytest.approx(1 - count / (len(measured) * 8 * 64), abs=1e-4)
        assert line["padding"] > 0.05
        assert line["tokens_per_s_per_device"] == pytest.approx(line["tokens_per_s"] / 8, abs=0.06)
        count = sum(learned[step] for step in measured)
        assert line["learned_tokens_per_s"] == pytest.approx(count / len(measured), abs=0.06)
        assert (line["seconds"], line["wait_seconds"]) == (len(measured), len(measured) / 4)
        flops = line["tokens_per_s"] * config.training_flops / 8
        assert line["tflops_per_device"] == pytest.approx(flops / 1e12, abs=1e-4)
        assert line["mfu"] == pytest.approx(flops / 1e6, rel=1e-3)
    timed = [line for line in lines_of(tmp_path) if "eval_seconds" in line or "checkpoint_seconds" in line]
    assert [(line["step"], line.get("eval_seconds"), line.get("checkpoint_seconds")) for line in timed] == [
        (0, 100, None), (3, None, 1000), (5, 100, None), (6, None, 1000), (9, None, 1000), (10, 100, None),
        (12, 100, None), (12, None, 1000),
    ]  # fmt: skip
    # Steps, evaluations and saves are all the time there is.
    assert lines_of(tmp_path)[-1]["time"] == 1e9 + 12 + 4 * 100 + 4 * 1000
    # The first, and those logged, or saved or evaluated after: the others' metrics stay on the devices until then.
    assert reads == [1, 3, 4, 5, 6, 8, 9, 10, 12]
    # Whatever the loop does, the watchdog knows.
    steps = [*range(1, 13)]
    waits = {"step": reads, "evaluation": [0, 5, 10, 12], "checkpoint": [3, 6, 9, 12]}
    assert begun == {"batch": steps, "dispatch": steps, **waits}


def log_steps(tmp_path, console: Console) -> None:
    """Has a long run log two steps around an evaluation."""
    config = small("tiny_lora", tmp_path, steps=300_000)
    watch = guard.Guard(config, describe=lambda values: "", list_documents=lambda step: [])
    with metrics.Metrics(config, console, start_step=0, guard=watch, watchdog=Watchdog(config)) as log:
        for step in (1, 2):
            values = {"loss": 2.0, "grad_norm": 1.0, "tokens": 400, "target_tokens": 300, "taken": True}
            log.step(step, {name: jnp.asarray(value) for name, value in values.items()})
            with log.pause():
                log.log_evaluation(step, 3.0 + step)
        shown = next(tracker for tracker in log._trackers if isinstance(tracker, progress.ConsoleLines))
        shown._bar.update(shown._task, completed=150_000, text="loss 2.9616  123,456 tokens/s", refresh=True)


def test_the_bar_keeps_its_times_in_80_columns(tmp_path):
    written = io.StringIO()
    log_steps(tmp_path, Console(file=written, width=80, force_terminal=True, color_system=None, legacy_windows=False))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())  # without what moves the cursor
    bars = [line for line in re.split(r"[\r\n]", text) if "elapsed" in line]
    assert "150000/300000" in bars[-1] and "123,456 tokens/s" in bars[-1]
    assert bars[-1].rstrip().endswith(" left") and " elapsed " in bars[-1]
    # Two columns are left for the ^C that a terminal writes after the bar.
    assert all(len(line) == 78 and "held-out" not in line for line in bars)


def test_lines_without_a_terminal_are_plain(tmp_path):
    written = io.StringIO()
    log_steps(tmp_path, Console(file=written, width=20))
    said = written.getvalue().splitlines()
    assert said[0].startswith("step 1/300000  loss 2.0000  ") and said[0].endswith(" tokens/s  21.9% padding")
    assert said[1:] == [f"step {step}: held-out loss {3 + step}.0000 (perplexity {text})" for step, text in
                        ((1, "54.60"), (2, "148.41"))]  # fmt: skip
    assert {"step": 2, "eval_loss": 5.0}.items() <= lines_of(tmp_path)[-1].items()


def test_waiting_counts_only_when_the_devices_are_idle(monkeypatch, tmp_path):
    """A batch that comes while the step before is still computed has cost nothing."""
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    measured = speed.Speed(small("tiny_sft", tmp_path))
    measured.start()
    for is_idle, seconds in ((True, 2.0), (False, 4.0), (True, 8.0)):
        with measured.wait(lambda is_idle=is_idle: is_idle):
            now[0] += seconds
    now[0] += 16
    measured.add_step(tokens=30, learned_tokens=15)
    numbers = measured.measure()
    assert (numbers["seconds"], numbers["wait_seconds"], numbers["learned_tokens_per_s"]) == (30, 10, 0.5)
    assert measured.measure() == numbers, "no step has ended since"


def test_norms_of_gradients_by_group(tmp_path):
    """Of the parts that the startup block counts parameters by; an adapter is one part, which is the whole."""
    config = small("tiny_sft", tmp_path, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    mesh = make_mesh(config.mesh)
    program = Program(config, mesh)
    rng = np.random.default_rng(0)
    gradients = {path: rng.normal(size=leaf.shape).astype("float32") for path, leaf in program.params.items()}
    with jax.set_mesh(mesh):
        placed = {path: jax.device_put(g, program.params[path].sharding) for path, g in gradients.items()}
        norms = jax.jit(group_norms)(placed)
    assert norms.keys() == {"attn", "mlp", "norms", "embedding"}
    for group, parts in {
        "attn": ["blocks/attn/"], "mlp": ["blocks/mlp/"], "embedding": ["embedding"],
        "norms": ["blocks/pre_", "blocks/post_", "final_norm"],
    }.items():  # fmt: skip
        members = [g.ravel() for path, g in gradients.items() if path.startswith(tuple(parts))]
        np.testing.assert_allclose(norms[group], np.linalg.norm(np.concatenate(members)), rtol=1e-5)
    adapted = Program(small("tiny_lora", tmp_path), make_mesh(MeshConfig()))
    assert group_norms(adapted.params) == {}


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5), ("NVIDIA GH200 480GB", 989.5), ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100 80GB PCIe", 312.0), ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA L40S", 362.05), ("NVIDIA L40", 181.05), ("NVIDIA L4", 121.0), ("NVIDIA A10", 125.0),
        ("NVIDIA B200", 2250.0), ("NVIDIA GB200", 2500.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A10G", None), ("Tesla V100-SXM2-16GB", None),
    ],
)  # fmt: skip
def test_peaks_of_devices(device_kind, tflops):
    """By the names that drivers give; a slice of a device, and one that the table lacks, have none."""
    assert devices.peak_flops(device_kind) == (tflops and pytest.approx(tflops * 1e12))
    said = startup.describe_peak(device_kind)
    assert (f"MFU is by {tflops:g} TFLOP/s" if tflops else f"no MFU, as the peak of {device_kind} is not in") in said


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9, "num_allocs": 3}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}]
    fake = [SimpleNamespace(memory_stats=lambda counts=counts: counts) for counts in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: fake)
    assert devices.measure_memory() == {"memory_bytes": 7, "memory_peak_bytes": 9}
    fake[1].memory_stats = lambda: None
    assert devices.measure_memory() == {}
