"""What `plan` says with which a step would fit: in which order, in which words, and once for real."""

import json
import sys
from dataclasses import dataclass, replace

import jax
import pytest
from compilers import needs_plugin
from rich.console import Console

from gemma2_jax import plan, recipes
from gemma2_jax.config import ComputeConfig, Config, MeshConfig, TrainConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.planning import advice, compiled_step
from gemma2_jax.planning.gpus import H100, Gpu
from gemma2_jax.planning.report import Plan
from gemma2_jax.planning.speed import StepTime
from gemma2_jax.training.smaller_steps import argument_bytes
from gemma2_jax.training.step import Program

CONFIG = replace(
    recipes.load_recipe("tiny_sft"),
    train=TrainConfig(sequence_length=256, global_batch_size=16, micro_batch_size=4),
    mesh=MeshConfig(),
    compute=ComputeConfig(),
)
ACTIVATIONS = 100_000_000
HALF = "--train.micro_batch_size 2"


def make_program(config: Config, gpus: int, *_) -> Program:
    return Program(config, make_mesh(config.mesh, jax.devices()[:gpus]))


def make_plan(config: Config, gpus: int, memory_bytes: int) -> Plan:
    """A plan whose temporaries and seconds follow from the rows of a pass."""
    memory = argument_bytes(make_program(config, gpus))
    rows = config.train.micro_batch_size / 4
    memory |= {"temporaries": round(memory["trained weights"] + ACTIVATIONS * rows / config.mesh.tensor)}
    time = StepTime(total=3 - rows if config.mesh.tensor == 1 else 9, work={}, sent={})
    return Plan(
        config=config,
        device=replace(H100, memory_bytes=memory_bytes),
        gpus=gpus,
        mesh=f"{gpus} of them",
        mesh_sizes={},
        memory=memory,
        total=sum(memory.values()),
        peak="not known",
        lower_seconds=0.0,
        compile_seconds=0.0,
        layers_per_stage=None,
        collectives=(),
        flops={},
        memory_traffic=0,
        bound=time,
        estimate=time,
    )


@dataclass
class Compiled:
    config: Config
    gpus: int
    device: Gpu

    @property
    def text(self) -> str:
        return f"HloModule of {self.gpus}"


@pytest.fixture
def make_advice(monkeypatch):
    """Advice for so much memory of a GPU, and the sentences on the way to it, without compiling anything."""

    def make(memory_bytes: int) -> tuple[tuple[advice.Advice, ...], list[str]]:
        monkeypatch.setattr(advice, "make_program", make_program)
        monkeypatch.setattr(advice, "compile_step", Compiled)
        monkeypatch.setattr(
            advice, "summarize_step", lambda step: make_plan(step.config, step.gpus, step.device.memory_bytes)
        )
        said: list[str] = []
        return advice.advise(make_plan(CONFIG, 2, memory_bytes), said.append), said

    return make


def test_what_fits_is_told_by_its_cost(make_advice):
    found, said = make_advice(150_000_000)
    assert [one.options for one in found] == [
        ("--mesh.fsdp 2",),
        ("--train.micro_batch_size 2",),
        ("--mesh.tensor 2",),
    ]
    assert said[0] == "it does not fit; compiling it with --train.micro_batch_size 2" and len(said) == 3
    assert all(one.plan.fits for one in found)
    console = Console(width=120, record=True)
    plan.print_advice(console, found, price=3600 / 100)  # a cent a second of a GPU
    row = [cell.strip() for cell in console.export_text().splitlines()[4].split("│")]
    assert row == ["", "--train.micro_batch_size 2", "2", "0.10", "2.500 s", "0.14", "$5.00", ""]
    answer = json.loads(json.dumps(found[1].as_json()))
    assert answer["options"] == ["--train.micro_batch_size 2"] and answer["fits"] and answer["gpus"] == 2
    assert answer["estimated_gpu_hours"] == pytest.approx(2.5 * 2 * 100 / 3600)


def test_more_gpus_and_none(make_advice):
    found, said = make_advice(55_000_000)
    assert any(one.options[0].startswith("--gpus ") for one in found), said
    assert make_advice(300_000_000) == ((), []), "it fits"
    nothing, said = make_advice(1_000_000)
    assert (nothing, said) == ((), [])
    console = Console(width=120, record=True)
    plan.print_advice(console, nothing)
    assert console.export_text() == "No change was found with which it fits, on up to 16 GPUs.\n"
    plan.print_advice(console, [advice.Advice(options=("--mesh.fsdp 2",), plan=make_plan(CONFIG, 2, 2**20))])
    assert "16 GPUs: with --mesh.fsdp 2 it needs 0.15 GiB." in console.export_text()


def test_the_command_prints_advice_and_keeps_it(make_advice, tmp_path, monkeypatch, capsys):
    make_advice(150_000_000)
    monkeypatch.setattr(compiled_step, "compile_step", advice.compile_step)
    monkeypatch.setattr(plan, "summarize_step", advice.summarize_step)
    monkeypatch.setattr(plan.described_cluster, "prepare_jax", lambda: None)
    path = tmp_path / "plan.json"
    for memory_bytes, options in ((150_000_000, ["--mesh.fsdp 2", HALF, "--mesh.tensor 2"]), (300_000_000, [])):
        (tmp_path / "gpu.toml").write_text(f'base = "h100"\nmemory_bytes = {memory_bytes}\n')
        command = (
            "plan --config tiny_sft --gpus 2 --train.micro_batch_size 4 --compute.remat block "
            f"--device {tmp_path}/gpu.toml --json {path}"
        )
        monkeypatch.setattr(sys, "argv", [*command.split(), "--hlo", str(tmp_path / "step.hlo")])
        plan.main()
        assert (tmp_path / "step.hlo").read_text() == "HloModule of 2"
        answer, printed = json.loads(path.read_text()), capsys.readouterr()
        assert [" ".join(one["options"]) for one in answer["advice"]] == options
        assert ("it fits with these options, each compiled" in printed.out) == (not answer["fits"]) == bool(options)
        assert printed.err.count("it does not fit; compiling it with --") == len(options)


@needs_plugin
@pytest.mark.exhaustive
@pytest.mark.usefixtures("optimized")
def test_smaller_steps_are_compiled():
    """The real thing, of a plan that says that it is too large."""
    model = replace(CONFIG.model, layers=1, vocab_size=2048)
    config = replace(CONFIG, model=model, train=replace(CONFIG.train, micro_batch_size=2), init="")
    found = advice.advise(make_plan(config, 2, 100_000_000), lambda text: None)
    assert found and all(one.plan.fits == (one.plan.total <= 95_000_000) and one.plan.flops for one in found)
