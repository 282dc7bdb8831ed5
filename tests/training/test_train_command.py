"""The training command as a process: what it asks for, and how it ends when it is interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import ROOT, command, lines_of, small

from gemma2_jax import train
from gemma2_jax.cluster import hosts, platforms

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.mark.parametrize("module", ["train", "plan"])
@pytest.mark.parametrize("arguments", [[], ["--config"], ["--steps", "3"]], ids=str)
def test_a_command_without_a_recipe(module, arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"gemma2_jax.{module}", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    asked = f"error: a recipe is needed, as in python -m gemma2_jax.{module} --config tiny_lora. There are 27b_dora, "
    assert done.stderr.startswith(asked) and done.stderr.count("\n") == 1 and not done.stdout
    assert "tiny_pretrain" in done.stderr


@pytest.mark.parametrize(
    ("environment", "arguments", "workdir"),
    [
        ({}, [], "runs/9b_lora"),
        ({"SAVE_DIR": ""}, [], "runs/9b_lora"),
        ({"SAVE_DIR": "/scratch/me"}, [], "/scratch/me/9b_lora"),
        ({"SAVE_DIR": "/scratch/me"}, ["--workdir", "here"], "here"),
    ],
)
def test_where_a_run_goes(environment, arguments, workdir):
    printed = subprocess.check_output(
        [sys.executable, "-m", "gemma2_jax.train", "--config", "9b_lora", *arguments, "--print"],
        env=os.environ | environment, text=True, cwd=ROOT,
    )  # fmt: skip
    assert f"workdir = {workdir!r}" in printed.splitlines()


def test_standard_output_that_takes_nothing():
    """A pipe that nobody reads ends a command quietly, and a full disk with a sentence."""
    show = [sys.executable, "-m", "gemma2_jax.train", "--config", "9b_lora", "--print"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(show, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the config could not be written to standard output: No space left")
    reader, writer = os.pipe()
    os.close(reader)
    inspect = [sys.executable, "-m", "gemma2_jax.convert", "verify", "assets/tiny-gemma2", "assets/tiny-gemma2"]
    for arguments in (show, inspect):
        done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writer)


def has_begun(workdir: Path, moment: str) -> bool:
    """Whether a run has come to the moment at which it is to be interrupted."""
    if moment == "compilation":
        return (workdir / "config.txt").exists()
    if moment == "evaluation":
        return (workdir / "metrics.jsonl").exists() and any("loss" in line for line in lines_of(workdir))
    return any((workdir / "checkpoints").glob("*tmp*"))


KEPT = "the checkpoint of step {step} is kept in {folder}/checkpoints, and the same command resumes after it"


@pytest.mark.parametrize(
    ("moment", "number", "message"),
    [
        (
            "compilation",
            signal.SIGINT,
            "interrupted before the first step; no checkpoint is kept in {folder}, and the same command starts from "
            "the beginning",
        ),
        pytest.param(
            "compilation",
            signal.SIGUSR1,
            "interrupted by SIGUSR1 before the first step; no checkpoint is kept in {folder}, and the same command "
            "starts from the beginning",
            marks=pytest.mark.exhaustive,
        ),
        ("evaluation", signal.SIGTERM, f"interrupted by SIGTERM after step {{step}}; {KEPT}"),
        pytest.param(
            "save",
            signal.SIGINT,
            f"interrupted by Ctrl-C after step {{step}}; {KEPT}",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_signal_ends_the_run_after_its_step(moment, number, message, tmp_path):
    """Before the first step it ends at once; later the step under way is taken, and saved."""
    config = small("tiny_lora", tmp_path, steps=2000)
    if moment == "evaluation":  # most of the time goes into it
        config = replace(config, train=replace(config.train, eval_every=1, eval_batches=9, checkpoint_every=2000))
    process = subprocess.Popen(
        # A shell has what it starts in the background ignore SIGINT, and this process may have been started so.
        ["env", "--default-signal=INT", *command("tiny_lora", config)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "WANDB_API_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    while not has_begun(tmp_path, moment) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    output, error = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 75), error
    assert "Traceback" not in error and "Error" not in error and "terminate called" not in error
    reached = [line["step"] for line in lines_of(tmp_path) if "loss" in line] if moment != "compilation" else []
    step = reached[-1] if reached else None
    assert error.splitlines()[-1] == message.format(step=step, folder=tmp_path)
    whole = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert max(whole, default=None) == step
    if moment != "compilation":  # which the start-up block comes after
        output = " ".join(output.split())
        assert "WANDB_API_KEY is set; --train.wandb PROJECT sends the metrics there" in output
        assert "compiled programs kept in " in output and "secret" not in output


def test_what_an_interrupted_run_has(tmp_path):
    """A checkpoint that was not whole does not count, nor does the evaluation before the first step."""
    assert train.describe_interruption(tmp_path).startswith("interrupted before the first step; no checkpoint is kept")
    for name in ("30", "9", "40.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 0, "eval_loss": 8.0}\n{"step": 36, "grad_norm": 1.0, "loss": 7.0}\n{"step": 37, "loss": 7.0}\n'
        b'{"step": 37, "eval_loss": 7.5}\n\xff\x00\n{"step": 3'
    )
    assert train.describe_interruption(tmp_path) == (
        f"interrupted after step 37; the checkpoint of step 30 is kept in {tmp_path}/checkpoints, and the same command "
        "resumes after it"
    )
    (tmp_path / "checkpoints" / "39").mkdir()  # the last step, which train.log_every 2 gives no line
    assert train.describe_interruption(tmp_path, "SIGTERM").startswith(
        "interrupted by SIGTERM after step 39; the checkpoint of step 39 is kept in "
    )


@pytest.mark.parametrize("is_told", [True, False])
def test_a_signal_within_an_import(is_told, tmp_path, monkeypatch):
    """A module in C that is interrupted while it is imported says that it cannot be, and not by what."""

    def fail() -> None:
        if is_told:
            with contextlib.suppress(hosts.Terminated):
                signal.raise_signal(signal.SIGUSR1)
        raise ImportError("an error while initializing the extension")

    ends = []
    monkeypatch.setattr(platforms, "prepare_process", fail)
    monkeypatch.setattr(train, "_end_process", lambda *end: ends.append(end))
    with hosts.end_when_told(), contextlib.nullcontext() if is_told else pytest.raises(ImportError):
        train._train(small("tiny_lora", tmp_path))
    message = f"interrupted by SIGUSR1 before the first step; no checkpoint is kept in {tmp_path}"
    assert [(status, text.partition(",")[0]) for status, text in ends] == [(75, message)] * is_told


@pytest.mark.exhaustive
def test_losses_with_a_cold_and_a_warm_cache(tmp_path):
    """Programs that were kept compute what they computed when they were compiled."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_NUM_CPU_DEVICES": "1"}
    losses = []
    for name in ("cold", "warm"):
        config = small("tiny_lora", tmp_path / name, steps=5)
        config = replace(config, train=replace(config.train, micro_batch_size=8))
        subprocess.run(command("tiny_lora", config), env=environment, cwd=ROOT, check=True, capture_output=True)
        losses.append([(line["loss"], line["grad_norm"]) for line in lines_of(tmp_path / name) if "loss" in line])
        assert any("train_step" in path.name for path in (tmp_path / "cache").iterdir())
    assert len(losses[0]) == 5 and losses[0] == losses[1]
