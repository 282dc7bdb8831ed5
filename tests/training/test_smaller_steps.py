"""Changes that make a step smaller: which there are, and which of them are compiled, with sizes that are made up."""

from collections.abc import Callable
from dataclasses import replace

import jax
import pytest

from gemma2_jax import recipes
from gemma2_jax.config import ComputeConfig, Config, MeshConfig, TrainConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training.smaller_steps import LargeStep, argument_bytes, find_changes, list_changes
from gemma2_jax.training.step import Program

TEMPORARIES = 100_000_000
HALF, QUARTER = "--train.micro_batch_size 2", "--train.micro_batch_size 1"
BLOCK, OFFLOAD = "--compute.remat block", "--compute.remat offload"
FSDP, TENSOR = "--mesh.fsdp 2", "--mesh.tensor 2"


def make(config: Config, devices: int) -> Program:
    return Program(config, make_mesh(config.mesh, jax.devices()[:devices]))


def large_step(spare: int, devices: int = 2, **groups) -> LargeStep:
    """A step of the tiny model whose devices have so many million bytes beside its state."""
    train = TrainConfig(sequence_length=256, global_batch_size=16, micro_batch_size=4)
    usual = {"train": train, "mesh": MeshConfig(), "compute": ComputeConfig()}
    config = replace(recipes.load_recipe("tiny_sft"), **(usual | groups))
    program = make(config, devices)
    limit = sum(argument_bytes(program).values()) + spare * 1_000_000
    return LargeStep(program=program, temporaries=TEMPORARIES, limit=limit, devices_per_host=8)


def search(step: LargeStep, share: Callable[[Config], float], most: int = 4) -> dict[str, bool]:
    """The options of what was compiled, in order, with whether it fits.

    A step has its state, its gradients, and a share of the first one's activations.
    """
    compiled = {}
    activations = TEMPORARIES - argument_bytes(step.program)["trained weights"]

    def measure(change):
        sizes = argument_bytes(make(change.config, change.devices))
        size = round(sum(sizes.values()) + sizes["trained weights"] + activations * share(change.config))
        options = change.list_options(step.program.config)
        gpus = [f"--gpus {change.devices}"] if change.devices > step.program.mesh.size else []
        compiled[" ".join([*gpus, *options])] = size <= step.limit
        return size

    find_changes(step, list_changes(step, ("fsdp", "tensor"), most), make, measure)
    return compiled


def by_tokens(config: Config) -> float:
    return config.train.micro_batch_size / 4 / config.mesh.tensor


def test_single_changes_come_first():
    """What a half of the micro batch does is not done by a quarter; three that fit are enough."""
    assert search(large_step(95), by_tokens) == {HALF: True, FSDP: True, TENSOR: True}
    assert search(large_step(70), by_tokens) == {HALF: True, TENSOR: True, "--gpus 4 --mesh.fsdp 4": True}


def test_larger_changes_where_small_ones_do_not_suffice():
    """A quarter where a half does not do; two kinds of changes where one alone does not."""
    found = search(large_step(50), by_tokens)
    assert found == {QUARTER: True, TENSOR: True, f"{HALF} {FSDP}": True}
    found = search(large_step(25), by_tokens)
    assert found == {f"{QUARTER} {FSDP}": True, f"{HALF} {TENSOR}": True, f"--gpus 4 {HALF} --mesh.fsdp 4": True}


def test_what_was_compiled_corrects_the_guesses():
    """Recomputing saves nothing here, and is not asked for more of once that is known; the micro batch still is."""
    found = search(large_step(80, compute=ComputeConfig(remat="none")), by_tokens)
    assert [*found][:2] == [BLOCK, HALF] and not found[BLOCK] and found[HALF], found
    assert sum(found.values()) == 3 and len(found) == 4
    saves = search(
        large_step(80, compute=ComputeConfig(remat="dots")),
        lambda config: 0.1 if config.compute.remat == "block" else 1,
    )
    assert saves[BLOCK] and not saves[HALF] and not any(BLOCK in options and options != BLOCK for options in saves)


def test_where_nothing_can_fit():
    """The state and the gradients alone are too much on every mesh; or all that is compiled is too large."""
    assert search(large_step(-30), by_tokens, most=2) == {}
    found = search(large_step(25, devices=1), lambda config: 1.0, most=1)
    assert found and not any(found.values()), found


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        (MeshConfig(), 8, {"--mesh.fsdp 8", "--mesh.tensor 8"}),
        (MeshConfig(data=4, tensor=2), 8, {"--mesh.data 1 --mesh.fsdp 4", "--mesh.data 1 --mesh.tensor 8"}),
        (MeshConfig(data=1, fsdp=-1), 4, {"8: --mesh.fsdp 8"}),
        (MeshConfig(), 1, {"2: --mesh.fsdp 2", "4: --mesh.fsdp 4", "8: --mesh.fsdp 8"}),
    ],
)
def test_meshes(mesh, devices, expected):
    """Options say no more than they must, and the sizes that an axis of -1 had are kept where they mattered."""
    train = TrainConfig(sequence_length=256, global_batch_size=16)
    step = large_step(0, devices, mesh=mesh, train=train)
    found = set()
    for change in list_changes(step, ("fsdp", "tensor"), 8):
        if change.axis and not change.recomputed:
            assert make_mesh(change.config.mesh, jax.devices()[: change.devices]).size == change.devices
            gpus = f"{change.devices}: " if change.devices > devices else ""
            found.add(gpus + " ".join(change.list_options(step.program.config)))
    assert found == expected


def test_hosts_are_not_left_where_they_need_not_be():
    """Of 32 devices the largest part of `data` that is in one host goes to another axis."""
    step = replace(large_step(0, devices=8, train=TrainConfig(sequence_length=256)), devices_per_host=4)
    assert {change.config.mesh for change in list_changes(step, ("fsdp",), 8)} == {MeshConfig(), MeshConfig(fsdp=4)}


def test_kept_outputs_are_given_up():
    step = large_step(0, compute=ComputeConfig(kept_outputs=("down",)))
    options = [change.list_options(step.program.config) for change in list_changes(step, (), 2) if not change.micro]
    assert options == [("--compute.kept_outputs",), (OFFLOAD, "--compute.kept_outputs")]
