"""`python -m gemma2_jax.check` as a whole, on CPU, and what it says of the Hub and of weights."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants, errors
from small_runs import small

from gemma2_jax import check, train
from gemma2_jax.cluster import disks, hosts, rates
from gemma2_jax.cluster.kernel_check import Finding
from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.planning import checked_attention, checked_steps, checkup, gpus
from gemma2_jax.planning.checked_steps import Checkup, MeasuredSteps
from gemma2_jax.training.step import Program

AGREES = Finding(part="attention", case="c", verdict="agrees")
STEPS = MeasuredSteps(seconds=1.0, compile_seconds=1.0, loss=2.0, text="")
DIFFERS = Finding(part="decode", case="d", verdict="differs", detail="out is off by 1e-1")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command on a small run, with kernels of which a check finds that; its status, output and JSON.

    A run whose kernels are wrong asks for them by name.
    """

    def end(*findings: Finding) -> tuple[int, str]:
        config = small("tiny_lora", tmp_path / "run")
        if any(finding.is_fault for finding in findings):
            config = replace(config, compute=replace(config.compute, attention="mosaic"))
        monkeypatch.setattr(check, "parse", lambda arguments, command, program: command(
            config="tiny_lora", run=config, json=tmp_path / "table.json"
        ))  # fmt: skip
        monkeypatch.setattr(checked_attention, "check_kernels", lambda spec, **options: [*findings])
        monkeypatch.setattr(rates, "CPU", rates.Sizes(product=16, copied=1 << 12, sent=1 << 10, least=0.001, rounds=1))
        monkeypatch.setattr(disks, "_MOST_BYTES", 1 << 20)
        monkeypatch.setattr(sys, "argv", ["check"])
        status = 0
        try:
            check.main()
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().out

    def run(*findings: Finding) -> tuple[int, str, list[dict]]:
        return *end(*findings), json.loads((tmp_path / "table.json").read_text())

    run.end = end
    return run


@pytest.mark.usefixtures("compiled_once")
def test_a_table_of_all_parts(run):
    status, output, rows = run(AGREES)
    found = {row["subject"]: row for row in rows}
    assert status == 0, output
    subjects = [row["subject"] for row in rows if row["verdict"] != "skipped"]
    assert subjects[-5:] == [
        "attention kernels, attention",
        "product of 16 x 16 in float32",
        "copy of 0 MiB",
        "collectives over data (8)",
        "3 steps",
    ]
    assert found["Hugging Face Hub"]["reason"] == "the run starts from random weights"
    assert found["times of kernels"]["reason"] == "mosaic is for sm_90 GPUs, and this is cpu"
    numbers = found["3 steps"]["numbers"]
    assert numbers["tokens_per_second"] == pytest.approx(8 * 64 / numbers["step_seconds"])
    assert "attention xla (the fastest here" in found["3 steps"]["found"]
    assert found["steps against the plan"]["reason"].startswith("the plan does not know cpu; it knows H100 80GB, ")
    assert found["compute.gpu_flags"]["reason"] == "they are for GPUs, and this is cpu"
    assert "skipped" in output and "disk" in output


def test_a_wrong_kernel_ends_it_with_1(run, monkeypatch):
    monkeypatch.setattr(checked_steps, "take_steps", lambda program: STEPS)
    status, output, rows = run(AGREES, DIFFERS)
    (wrong,) = [row for row in rows if row["verdict"] == "wrong"]
    assert status == 1 and wrong["subject"] == "attention kernels, decode" and "1 wrong" in output
    assert wrong["reason"] == "differs: out is off by 1e-1" and "compute.attention auto" in wrong["advice"]


def test_what_one_process_found_wrong_ends_all(run, monkeypatch):
    """Process 1 sees nothing wrong, and hears of what process 0 found."""
    wrong = {"subject": "host0: driver", "found": "", "verdict": "wrong"}
    monkeypatch.setattr(checked_steps, "take_steps", lambda program: STEPS)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "gather_answers", lambda question, answer: [json.dumps([wrong]), answer])
    monkeypatch.setattr(check, "write_rows", lambda path, rows: pytest.fail("only process 0 writes"))
    status, output = run.end(AGREES)
    assert status == 1 and not output, "process 0 prints"


@pytest.mark.parametrize(
    ("seconds", "judgment"),
    [
        (0.9, "wrong (faster than the data sheet allows, so that the step, the clock or the plan is mistaken)"),
        (1.5, "ok (faster than the 0.9 times that is to be expected)"),
        (2.0, "ok"),
        (3.5, "ok"),
        (5.0, "slow (2.50 times the estimate, and 0.9 to 1.8 times is to be expected)"),
    ],
)
def test_steps_beside_bound_and_estimate(seconds, judgment):
    row = checked_steps.judge_step(seconds, 1.0, 2.0, gpus.H100)
    assert row.judgment == judgment
    assert row.numbers == {"step_seconds": seconds, "bound_seconds": 1.0, "estimate_seconds": 2.0}
    assert f"{seconds:.3f} s a step is {seconds / 2:.2f} times the estimate of 2.000 s" in row.found


@pytest.mark.usefixtures("compiled_once")
def test_the_plan_of_a_step_is_read_off_its_own_program(monkeypatch, tmp_path):
    """This CPU stands for an H100, whose data sheet it cannot beat."""
    config = small("tiny_lora", tmp_path)
    mesh = make_mesh(MeshConfig(data=-1))
    found = Checkup(config=config, mesh=mesh, program=Program(config, mesh))
    monkeypatch.setattr(checked_steps, "find_kind", lambda kind: gpus.H100)
    steps, plan, flags = checked_steps.check_steps(found)
    assert plan.verdict == "slow" and flags.verdict == "skipped"
    assert plan.numbers["step_seconds"] == steps.numbers["step_seconds"] > plan.numbers["bound_seconds"] > 0
    flops = config.training_flops * config.train.global_batch_size * config.train.sequence_length / mesh.size
    assert plan.numbers["bound_seconds"] > 0.9 * flops / (gpus.H100.tflops * 1e12), "all products are counted"
    monkeypatch.setattr(checked_steps, "read_schedule", lambda *given: ())
    row = checked_steps.compare_with_plan(found, STEPS)
    assert row.judgment == "skipped (the text of the compiled step has no products that the plan can count)"


def test_the_faster_of_both_flags_is_named(monkeypatch, tmp_path):
    taken = []

    def take_steps(program) -> MeasuredSteps:
        taken.append(program.config.compute.gpu_flags)
        return replace(STEPS, seconds=0.5)

    monkeypatch.setattr(checked_steps, "take_steps", take_steps)
    config = small("tiny_lora", tmp_path)
    mesh = make_mesh(MeshConfig(data=-1))
    found = Checkup(config=config, mesh=mesh, program=Program(config, mesh))
    monkeypatch.setattr(Checkup, "device", SimpleNamespace(platform="gpu"))
    row = checked_steps.check_flags(found, 1.0)
    assert taken == ["overlap"] and row.found == "none 1.000 s a step, overlap 0.500 s a step"
    assert row.judgment == "slow (none takes 2.00 of the time of overlap)"
    assert row.advice == "--compute.gpu_flags overlap"
    assert checked_steps.judge_flags({"none": 1.0, "overlap": 0.99}, "none").judgment == "ok"


def test_errors_of_xla_are_a_row(monkeypatch):
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    (row,) = checkup._time_part("steps", fail)
    assert row.judgment == "wrong (RESOURCE_EXHAUSTED: Out of memory)" and "gemma2_jax.plan" in row.advice


def test_times_of_kernels_are_rows():
    timed = Finding(part="decode", case="c", verdict="was timed", kernel_seconds=1e-3, xla_seconds=2e-3)
    row = checked_attention._describe_finding(timed, "")
    assert row.judgment == "ok" and row.found == "c: 1.000 ms, XLA's attention 2.000 ms"
    slow = checked_attention._describe_finding(replace(timed, kernel_seconds=3e-3), "")
    assert slow.judgment == "slow (1.50 of XLA's time)"
    unchecked = Finding(part="decode", case="c", verdict="not checked", detail="no memory")
    assert checked_attention._describe_finding(unchecked, "").judgment == "skipped (c not checked: no memory)"


def http_error(kind):
    request = SimpleNamespace(url="https://huggingface.co", method="GET")
    response = SimpleNamespace(headers={}, request=request, status_code=403)
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("failure", "judgment"),
    [
        (None, "ok"),
        (lambda: http_error(errors.GatedRepoError), "wrong (it is gated)"),
        (
            lambda: http_error(errors.RepositoryNotFoundError),
            "wrong (there is no folder or model of that name for this",
        ),
        (lambda: OSError("no route to host"), "skipped (https://huggingface.co cannot be reached (no route to host))"),
    ],
)
def test_the_hub_is_asked(failure, judgment, monkeypatch):
    def ask(self, name):
        if failure:
            raise failure()

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", ask)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    assert checkup.check_hub("google/gemma-2-2b").judgment.startswith(judgment)


def test_a_hub_that_is_offline_or_silent_is_skipped(monkeypatch, tmp_path):
    assert checkup.check_hub("google/gemma-2-2b").judgment.startswith("skipped (HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(checkup, "_HUB_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda self, name: time.sleep(1))
    assert "did not answer within 0.1 s" in checkup.check_hub("google/gemma-2-2b").reason
    assert checkup.check_hub(str(tmp_path)).judgment == f"skipped (the weights are in {tmp_path})"


def test_weights_that_are_here_are_read(tmp_path):
    assert checkup.check_weights("").reason == "the run starts from random weights"
    assert checkup.check_weights("google/gemma-2-2b").reason == "google/gemma-2-2b is not on this host yet"
    assert checkup.find_weights("assets/tiny-gemma2") and checkup.check_weights("assets/tiny-gemma2").verdict == "ok"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"123")
    assert checkup.find_weights(str(tmp_path)) == [tmp_path / "a.safetensors"]


def test_batches_are_those_of_the_program(tmp_path):
    config = small("tiny_lora", tmp_path)
    program = Program(config, make_mesh(MeshConfig(data=-1)))
    batch = checked_steps.make_batch(program)
    assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in program.batch.items()}
    assert all(x.dtype == program.batch[name].dtype for name, x in batch.items())
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["tokens"].min() >= 3 and batch["tokens"].max() < config.model.vocab_size


def test_without_a_recipe_it_takes_a_tiny_one(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "parse", lambda arguments, command, program: seen.append(arguments) or sys.exit(0))
    for given in ([], ["--config=2b_lora"]):
        monkeypatch.setattr(sys, "argv", ["check", *given])
        with pytest.raises(SystemExit):
            check.main()
    assert seen == [["--config", train.HELP_RECIPE], ["--config=2b_lora"]]
