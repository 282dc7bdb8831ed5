"""What a run says of its speed and progress: tokens by the time of steps, and lines that fit where they are read."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from small_runs import ROOT, lines_of, small

from gemma2_jax.cluster import devices
from gemma2_jax.training import guard, loop, metrics, progress, speed
from gemma2_jax.training.export import AdapterExports

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
    # Logged, or saved or evaluated after: the metrics of the other steps stay on the devices until then.
    assert reads == [3, 4, 5, 6, 8, 9, 10, 12]


def log_steps(tmp_path, console: Console) -> None:
    """Has a long run log two steps around an evaluation."""
    config = small("tiny_lora", tmp_path, steps=300_000)
    watch = guard.Guard(config, describe=lambda values: "", list_documents=lambda step: [])
    with metrics.Metrics(config, console, start_step=0, guard=watch) as log:
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
