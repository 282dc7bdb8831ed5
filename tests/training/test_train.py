"""Runs from end to end: killed and resumed, evaluated, refused; every one the real command or the real loop."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import ROOT, command, lines_of, small

from gemma2_jax import config as configs, config_text, recipes
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.convert.checkpoints import read_array
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training import loop
from gemma2_jax.training.checkpoint import Checkpoints
from gemma2_jax.training.step import Program

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes of the tiny model name assets/ relative to the repository."""
    monkeypatch.chdir(ROOT)


SUMS = "tests/fixtures/sums.jsonl"


def divide_sums(folder: Path) -> list[Path]:
    """Two files in the folder, few.jsonl and many.jsonl, of the documents of SUMS."""
    lines = (ROOT / SUMS).read_text().splitlines(keepends=True)
    paths = [folder / "few.jsonl", folder / "many.jsonl"]
    for path, part in zip(paths, (lines[:40], lines[40:]), strict=True):
        path.write_text("".join(part))
    return paths


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, by name."""
    config = config_text.from_text((workdir / "config.txt").read_text())
    program = Program(config, make_mesh(config.mesh))
    with Checkpoints(workdir, keep=9) as checkpoints:
        params, optimizer, state = checkpoints.restore(step, program.params, program.state.optimizer)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(optimizer)}
    return {**params, **leaves, "loop": json.dumps(state, sort_keys=True)}


@pytest.mark.parametrize(
    "kind",
    [pytest.param("sft", marks=pytest.mark.exhaustive), "lora", pytest.param("dora", marks=pytest.mark.exhaustive)],
)
def test_killed_and_resumed_equals_straight(kind, tmp_path):
    """Five steps, kill -9, resumed to ten: weights, optimizer and data position are those of ten straight.

    The adapter of LoRA is trained on a mixture by weight, and with dropout.
    """
    few, many = divide_sums(tmp_path)
    source = f"0.3*{few},0.7*{many}" if kind == "lora" else SUMS
    straight, broken = (
        replace(
            config,
            data=replace(config.data, train=source),
            adapter=replace(config.adapter, dropout=0.1 if kind == "lora" else 0.0),
        )
        for config in (small(f"tiny_{kind}", tmp_path / name) for name in ("straight", "broken"))
    )
    loop.train(straight)
    process = subprocess.Popen(
        command(f"tiny_{kind}", broken),
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    complete = tmp_path / "broken" / "checkpoints" / "5"
    while not complete.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    assert complete.exists(), output
    assert not (complete.parent / "10").exists(), "it was over before it was killed"
    assert f"training data      {source}: {'2 sources by weight' if kind == 'lora' else '144 documents'}" in output
    assert not [line for line in output.splitlines() if line != line.rstrip() or "\x1b" in line or "━" in line]
    loop.train(broken)
    expected, got = saved(tmp_path / "straight", 10), saved(tmp_path / "broken", 10)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    losses = [
        {line["step"]: [line[name] for name in line if "loss" in name] for line in lines_of(folder) if "loss" in line}
        for folder in (tmp_path / "straight", tmp_path / "broken")
    ]
    assert losses[0] == losses[1]
    assert list(losses[1]) == list(range(1, 11)), "a step is missing, or logged twice"


@pytest.mark.exhaustive
def test_a_finished_run_is_left_alone(tmp_path, capsys):
    config = small("tiny_lora", tmp_path, steps=2)
    loop.train(config)
    before = lines_of(tmp_path)
    loop.train(config)
    assert lines_of(tmp_path) == before
    assert "python -m gemma2_jax.generate --checkpoint" in capsys.readouterr().out


def test_what_a_run_writes(tmp_path):
    config = small("tiny_lora", tmp_path, steps=3)
    config = replace(config, train=replace(config.train, eval_every=1))
    result = loop.train(config)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.txt", "environment.json", "metrics.jsonl", "checkpoints", "tokenizer", "run.lock",
    }  # fmt: skip
    assert config_text.from_text((tmp_path / "config.txt").read_text()) == config
    lines = lines_of(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"step", "loss", "grad_norm", "lr", "tokens_per_s"} <= steps[0].keys()
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 1, 2, 3]
    assert (result.folder, result.step, int(result.state.step)) == (tmp_path, 3, 3)
    assert result.losses == {line["step"]: line["loss"] for line in steps}
    assert result.eval_losses == {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert result.state.params.keys() == result.program.params.keys()
    # Only what was trained is kept.
    program = Program(config, make_mesh(config.mesh))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        params, _, _ = checkpoints.restore(3, program.params, program.state.optimizer)
    assert params
    assert all("/adapter/" in path for path in params)


def test_each_source_of_a_mixture_has_a_loss(tmp_path, capsys):
    """Over stages and shards, its held-out loss is that of a run on it alone, on the same weights."""
    divide_sums(tmp_path)
    config = small("tiny_lora", tmp_path / "mixed", steps=2, mesh=MeshConfig(data=2, stage=2, fsdp=2))
    text = f"0.25*{tmp_path}/few.jsonl,0.75*{tmp_path}/many.jsonl"
    loop.train(replace(config, data=replace(config.data, train=text)))
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"few 0.25 of the rows, [\d.]+ epochs in 2 steps; 3\d documents", said)
    assert re.search(
        r"step 2: held-out loss [\d.]+ \(perplexity [\d,.]+\), few \d+.\d{4} \([\d,.]+\), many \d+.\d{4} \(", said
    )
    logged = lines_of(tmp_path / "mixed")
    alone = small("tiny_lora", tmp_path / "alone", steps=1)
    result = loop.train(replace(alone, data=replace(alone.data, train=f"{tmp_path}/few.jsonl")))
    assert logged[0]["eval_loss/few"] == pytest.approx(result.eval_losses[0], rel=1e-5)
    assert logged[0]["eval_loss/many"] != pytest.approx(result.eval_losses[0], rel=1e-4)
    first, second = (line for line in logged if "loss" in line)
    assert min(first["loss/few"], first["loss/many"]) < first["loss"] < max(first["loss/few"], first["loss/many"])
    assert second["epochs/many"] == 2 * first["epochs/many"] and second["epochs/few"] > first["epochs/few"] > 0
    assert not any("/" in name for line in lines_of(tmp_path / "alone") for name in line)


def test_a_stream_goes_on_where_it_was(tmp_path, capsys):
    """Four steps, and two and two more: the same losses, on documents in the order of their file."""
    straight, broken = (small("tiny_lora", tmp_path / name, steps=4) for name in ("straight", "broken"))
    straight, broken = (replace(run, data=replace(run.data, stream=True)) for run in (straight, broken))
    losses = loop.train(straight).losses
    said = capsys.readouterr()
    assert (
        "training data      tests/fixtures/sums.jsonl: a stream: documents in their own order, not shuffled" in said.out
    )
    assert re.search(r"example +<bos><start_of_turn>user\\nThere are 51 bears", said.out)
    assert re.search(r"held-out data +tests/fixtures/sums.jsonl: a share of 0.05 by hash, .*: \d documents", said.out)
    first = loop.train(replace(broken, steps=2)).losses
    second = loop.train(broken).losses
    assert first | second == losses and len(second) == 2
    said = capsys.readouterr()
    assert "reading tests/fixtures/sums.jsonl again, up to row 16, the last that the run has taken" in said.err
    state = [json.loads(saved(tmp_path / name, 4)["loop"]) for name in ("straight", "broken")]
    assert state[0] == state[1] and state[0]["data"]["batches"]["rows"] == 32
    with pytest.raises(ValueError, match=r"holds another run: data.stream was True and is False"):
        loop.train(small("tiny_lora", tmp_path / "broken", steps=6))


def test_another_run_in_the_same_workdir_is_refused(tmp_path, capsys, monkeypatch):
    once = small("tiny_lora", tmp_path, steps=1)
    loop.train(once)
    with pytest.raises(ValueError, match=r"holds another run: optim.lr was 0.005 and is 1.0"):
        loop.train(replace(once, steps=20, optim=replace(once.optim, lr=1.0)))
    capsys.readouterr()
    # As a version wrote it that had not got a field yet; and with a decay over the run's steps, which is the same
    # program when they are 20.
    text = (tmp_path / "config.txt").read_text().replace("init_adapter = ''\n", "")
    (tmp_path / "config.txt").write_text(text.replace("decay_steps = 20", "decay_steps = None"))
    monkeypatch.setattr(loop, "take_steps", lambda run, state, *rest: (state, 20))
    loop.train(replace(once, steps=20, optim=replace(once.optim, decay_steps=None)))
    assert "changed steps was 1 and is 20, which the learning rate follows" in " ".join(capsys.readouterr().out.split())


def test_accumulated_steps_equal_whole_steps(tmp_path):
    """Four passes of two rows give the gradient of one pass of eight."""
    for name, rows in (("whole", 8), ("passes", 2)):
        config = small("tiny_sft", tmp_path / name, steps=2)
        config = replace(config, train=replace(config.train, micro_batch_size=rows), mesh=MeshConfig(data=1))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        program = Program(config, mesh)
        with jax.set_mesh(mesh):
            state = program.initial_state(program.random_base())
            rng = np.random.default_rng(0)
            batch = {key: rng.integers(0, 2, leaf.shape).astype(leaf.dtype) for key, leaf in program.batch.items()}
            batch["tokens"] = rng.integers(0, 4096, batch["tokens"].shape, np.int32)
            batch["targets"] = np.roll(batch["tokens"], -1, axis=1)
            batch["segments"] = np.sort(batch["segments"], axis=1)
            state, metrics = jax.jit(program.train_step)(state, loop.place_batch(program, batch))
        if name == "whole":
            expected = metrics, state.params
    np.testing.assert_allclose(metrics["loss"], expected[0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected[0]["grad_norm"], rtol=1e-5)
    assert metrics["target_tokens"] == batch["weights"].sum()


def test_profile_writes_a_trace(tmp_path, capsys):
    config = small("tiny_lora", tmp_path, steps=3)
    loop.train(replace(config, profile=configs.ProfileConfig(start=1, steps=1)))
    assert f"Trace:     {tmp_path}/profile (XProf" in capsys.readouterr().out
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    text = traces[0].read_bytes()
    parts = ("norm", "attention/qkv", "attention/attend", "attention/o", "mlp/gate_up", "mlp/down", "embedding")
    for scope in (*parts, "loss", "optimizer"):
        assert f"/{scope}/".encode() in text, f"no scope {scope}"


def refused(*arguments: str) -> str:
    """What the command prints when it ends with an error; never a traceback."""
    result = subprocess.run(
        [sys.executable, "-m", "gemma2_jax.train", *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    return " ".join((result.stdout + result.stderr).replace("│", " ").split())


def test_a_batch_that_does_not_divide(tmp_path):
    sizes = "train.global_batch_size=60", "train.micro_batch_size=16"
    message = refused("--config", "tiny_lora", "--workdir", str(tmp_path / "w"), *sizes)
    assert "train.global_batch_size 60 does not divide over micro batch 16 x data 1 x fsdp 1 = 16" in message
    assert "use 64" in message
    assert not (tmp_path / "w").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    """Nothing half-written, the last whole step kept, and a sentence that says what to do."""
    config = small("tiny_lora", tmp_path)
    usage = shutil.disk_usage(tmp_path)

    def shrinking(path):
        return usage._replace(free=0 if (tmp_path / "checkpoints" / "5").exists() else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    said = (
        r"step 10 was not saved: it needs .* has 0 bytes free\. The newest weights saved are .*/5/params; once that is "
    )
    with pytest.raises(OSError, match=said + "mended, the same command resumes after step 5$"):
        loop.train(config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]
    monkeypatch.undo()
    loop.train(config)
    assert (tmp_path / "checkpoints" / "10").exists()


@pytest.mark.exhaustive
def test_a_write_that_fails(tmp_path):
    """A disk that fills up while Orbax writes: one sentence, no step, and the same command goes on."""
    config = small("tiny_sft", tmp_path, steps=1)
    limited = f"ulimit -f 400; exec {shlex.join(command('tiny_sft', config))}"
    result = subprocess.run(
        ["bash", "-c", limited], env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "error: the checkpoint of step 1 was not saved: " in result.stderr
    assert "the same command starts from the beginning" in result.stderr
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest is None


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    config = small("tiny_lora", tmp_path, steps=2000)
    process = subprocess.Popen(
        # Shells have what they start in the background ignore SIGINT, and so would this.
        ["env", "--default-signal=INT", *command("tiny_lora", config)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "checkpoints" / "5").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1].decode()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    [message] = [line for line in error.splitlines() if line.startswith("interrupted by Ctrl-C after step ")]
    assert int(message.split()[5].rstrip(";")) == newest >= 5
    kept = f"the checkpoint of step {newest} is kept in {tmp_path}/checkpoints, and the same command resumes after it"
    assert message.endswith(f"; {kept}")


def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny-gemma2", folder)
    return folder


def from_checkpoint(init: Path, workdir: Path, **data) -> Config:
    """The tiny recipe as it is, but for where it starts and what it reads."""
    recipe = recipes.load_recipe("tiny_lora")
    train = replace(recipe.train, micro_batch_size=2)
    data_config = replace(recipe.data, **data)
    return replace(recipe, init=str(init), workdir=str(workdir), steps=1, train=train, data=data_config)


def test_weights_that_cannot_be_used(tmp_path):
    """Each a sentence that names the file or the field, before anything is written."""
    workdir, folder = tmp_path / "run", copied(tmp_path)
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        loop.train(from_checkpoint(tmp_path / "nowhere", workdir))
    config = from_checkpoint(folder, workdir)
    said = r"its layers is 6, and model.layers is 2; choose the recipe of that model, or give --model.layers 6$"
    with pytest.raises(ValueError, match=said):
        loop.train(replace(config, model=replace(config.model, layers=2)))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors.*(truncated|cut|shorter|incomplete)"):
        loop.train(config)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has config\.json and no weights"):
        loop.train(config)
    assert not workdir.exists()


def test_data_that_cannot_be_used(tmp_path):
    workdir, path = tmp_path / "run", tmp_path / "data.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    for bad, message in (
        (f"{good}\n{good[:-3]}\n", r"data.jsonl:2: .*JSON"),
        (f"{good}\n\n{good}\n", r"data.jsonl:2: the line is blank; remove it"),
        (f'{good}\n{good}\n{{"question": "a"}}\n', r"data.jsonl:3: .*question"),
        ('{"text": "a"}\n', r"data.jsonl:1: .* plain text, give --data.kind text"),
        ("", r"data.jsonl.*(empty|no documents)"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message):
            loop.train(from_checkpoint(ROOT / "assets" / "tiny-gemma2", workdir, train=str(path)))
    with pytest.raises(ValueError, match=r"missing.jsonl"):
        loop.train(from_checkpoint(ROOT / "assets" / "tiny-gemma2", workdir, train=str(tmp_path / "missing.jsonl")))


@pytest.mark.exhaustive
def test_resumes_on_other_meshes(tmp_path):
    """Stages with a layer too few, then context shards, then one device: weights and losses are those of one mesh."""

    def run(name: str, steps: int, **mesh: int) -> Config:
        config = small("tiny_sft", tmp_path / name, steps=steps, mesh=MeshConfig(**mesh))
        return replace(
            config,
            model=replace(config.model, layers=3),
            optim=replace(config.optim, decay_steps=6, eps=1e-2),
            train=replace(config.train, eval_every=6, checkpoint_every=2),
        )

    straight = run("straight", 6)
    loop.train(straight)
    for steps, mesh in (2, dict(data=1, stage=2, fsdp=2, tensor=2)), (4, dict(data=4, context=2)):
        moved = run("moved", steps, **mesh)
        loop.train(moved)
        stored = open_checkpoint(tmp_path / "moved")
        assert stored.shapes["blocks/attn/q/w"].shape[0] == 3, "the layer that is none is not part of the model"
        assert read_array(stored, "blocks/attn/q/w", (slice(None),) * 4).shape[0] == 3
    loop.train(run("moved", 6))
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("straight", "moved")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    expected, got = saved(tmp_path / "straight", 6), saved(tmp_path / "moved", 6)
    assert got.pop("loop") == expected.pop("loop"), "the data goes on from another position"
    for name, value in expected.items():
        error = np.linalg.norm(got[name] - value) / max(np.linalg.norm(value), 1e-30)
        assert error < 1e-5, f"{name}: relative L2 error {error:.2e}"
