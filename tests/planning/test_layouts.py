"""Layouts of a run: all meshes that divide, what closed formulas say of each, and the options that give one."""

import shlex
from dataclasses import asdict, replace

import pytest

from gemma2_jax import recipes
from gemma2_jax.config import MeshConfig
from gemma2_jax.plan import Command
from gemma2_jax.planning import known_layouts
from gemma2_jax.planning.dense_step import DenseModel, DenseStep
from gemma2_jax.planning.gpus import GPUS, H100
from gemma2_jax.planning.kept_outputs import list_candidates
from gemma2_jax.planning.known_layouts import choose_layout, lay_out
from gemma2_jax.planning.layouts import Layout, find_own, list_meshes, list_predictions, predict
from gemma2_jax.planning.schedule import Loop, Send, list_work, sum_flops
from gemma2_jax.train import parse

MODEL = DenseModel(width=8, mlp_width=16, heads=4, kv_heads=2, head_width=4, layers=6, vocab_size=32)
WEIGHTS = 8 * (16 + 16) + 16 * 8 + 8 * 32 + 16 * 8  # of q, k and v; o; gate and up; down


def sent_bytes(items, times=1):
    """Bytes sent in a step, by axes."""
    total = {}
    for item in items:
        if isinstance(item, Send):
            total[item.axes] = total.get(item.axes, 0) + item.sent * times
        elif isinstance(item, Loop):
            for axes, size in sent_bytes(item.items, times * item.times).items():
                total[axes] = total.get(axes, 0) + size
    return total


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"fsdp": 4}, {"fsdp": 3 * 6 * (2 * WEIGHTS * 2 * 3 / 4 + WEIGHTS * 4 * 3 / 4)}),  # two gathers, one scatter
        ({"tensor": 2}, {"tensor": 3 * 6 * 6 * 2 * (1 / 2) * 2 * 64 * 8 * 2}),  # 2 sums in each of 3 passes of a layer
        ({"data": 2}, {"data": (6 * WEIGHTS + 32 * 8) * 4}),
        ({"stage": 3}, {"stage": 5 * 2 * 2 * 64 * 8 * 2}),  # five ticks, there and back
        # Keys and values go round forward and when that is computed again; with their gradients in the backward pass.
        ({"context": 2}, {"context": 3 * 6 * (4 * 32 * 2 * 2 * 2 * 4 * 2 + (2 * WEIGHTS * 2 + WEIGHTS * 4) / 2)}),
    ],
)
def test_bytes_that_a_step_sends(axes, expected):
    """Typed out: 3 passes of 2 rows of 64 tokens."""
    step = DenseStep(model=MODEL, rows=2, length=64, passes=3, gradient_bytes=4, **axes)
    assert sent_bytes(step.describe()) == pytest.approx(expected)


def test_shards_share_the_work():
    """All axes but stages, which also compute in idle ticks."""
    whole = sum_flops(DenseStep(model=MODEL, rows=8, length=64).describe()).total()
    for axes, rows in (({"fsdp": 2}, 4), ({"data": 2}, 4), ({"context": 2}, 8), ({"tensor": 2}, 8)):
        assert sum_flops(DenseStep(model=MODEL, rows=rows, length=64, **axes).describe()).total() == whole / 2, axes
    one_pass = DenseStep(model=MODEL, rows=8, length=64, passes=4, stage=3)
    assert sum_flops(one_pass.describe()).total() == pytest.approx(whole / 3 * (4 + 2))
    assert not any(
        work.part == "gradients" for work, _ in list_work(DenseStep(model=MODEL, rows=8, length=64).describe())
    )


def test_every_mesh_once():
    meshes = list(list_meshes(16, H100))
    assert len({tuple(asdict(mesh).values()) for mesh in meshes}) == len(meshes) == 69  # 70 products, and tensor 16
    assert list_meshes_of(2) == {(2, 1, 1, 1, 1), (1, 2, 1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2)}


def list_meshes_of(gpus):
    return {tuple(asdict(mesh).values()) for mesh in list_meshes(gpus, H100)}


def test_predictions_fit_and_are_in_order():
    config = recipes.load_recipe("9b_sft")
    found = list_predictions(config, 8, H100)
    assert all(one.memory <= H100.usable_bytes and one.bound <= one.estimate for one in found)
    assert [one.estimate for one in found] == sorted(one.estimate for one in found)
    for one in found:
        rows = one.layout.micro_batch_size * one.layout.mesh.data * one.layout.mesh.fsdp
        assert config.train.global_batch_size % rows == 0
    assert not list_predictions(recipes.load_recipe("27b_sft"), 1, H100)
    assert list_predictions(recipes.load_recipe("27b_lora"), 1, H100), (
        "the tables of docs/parallelism.md say that it fits"
    )


def test_what_is_kept_is_not_computed_again():
    config, mesh = recipes.load_recipe("2b_sft"), MeshConfig(data=1)
    plain = Layout(mesh=mesh, micro_batch_size=1, remat="block")
    kept = replace(plain, kept_outputs=("down",))
    one, other = (predict(config, layout, H100) for layout in (plain, kept))
    (down,) = (one for one in list_candidates(config, asdict(mesh)) if one.name == "down")
    assert one.bound - other.bound == pytest.approx(down.flops / 989.5e12)
    assert 0 <= other.memory - one.memory - 1.1 * down.size < 2


def test_options_give_the_layout():
    layout = Layout(
        mesh=MeshConfig(data=1, stage=1, fsdp=8), micro_batch_size=4, remat="offload", kept_outputs=("o", "down")
    )
    config = recipes.load_recipe("27b_sft")
    options = shlex.split(" ".join(layout.list_options(config)))
    run = parse(["--config", "27b_sft", *options], Command).run
    assert run == replace(layout.apply(config), mesh=replace(layout.mesh, data=-1))
    assert find_own(run, 8) == layout
    assert find_own(run, 12) is None and find_own(replace(run, mesh=layout.mesh), 16) is None
    assert not layout.list_options(run)


def test_the_choice_for_a_run(monkeypatch):
    config = recipes.load_recipe("9b_sft")
    known = Layout(mesh=MeshConfig(data=1, fsdp=2), micro_batch_size=4, remat="block", kept_outputs=("down",))
    monkeypatch.setattr(known_layouts, "KNOWN", {("9b_sft", 2): known})
    same = replace(config, steps=7, workdir="elsewhere")
    assert choose_layout(same, 2, H100) == (known, "a search found it for 9b_sft on 2 x H100 80GB")
    run, reason = lay_out(same, 2, H100.device_kind)
    assert run == known.apply(same) and reason == f"{known}: a search found it for 9b_sft on 2 x H100 80GB"
    longer = replace(config, train=replace(config.train, sequence_length=1024))
    small = replace(H100, name="mine", memory_bytes=H100.memory_bytes - 2**30)
    for run, gpus, device in ((longer, 2, H100), (config, 4, H100), (config, 2, GPUS["h200"]), (config, 4, small)):
        layout, reason = choose_layout(run, gpus, device)
        assert reason.startswith("predicted to be the fastest of ") and find_own(layout.apply(run), gpus) == layout
    with pytest.raises(ValueError, match="no layout of this run over 1 x H100 80GB can fit"):
        choose_layout(recipes.load_recipe("27b_sft"), 1, H100)


@pytest.mark.parametrize(("recipe", "gpus"), known_layouts.KNOWN)
def test_known_layouts_are_of_their_recipes(recipe, gpus):
    config, layout = recipes.load_recipe(recipe), known_layouts.KNOWN[recipe, gpus]
    assert find_own(layout.apply(config), gpus) == layout
    assert choose_layout(config, gpus, H100)[0] == layout


def test_devices_that_the_planner_does_not_know():
    tiny = recipes.load_recipe("tiny_lora")
    assert lay_out(replace(tiny, mesh=MeshConfig(data=1, tensor=2)), 1, "cpu")[0].mesh == MeshConfig(data=1)
    with pytest.raises(ValueError, match=r"the planner knows no cpu, only h100, .*--mesh.fsdp 4"):
        lay_out(tiny, 4, "cpu")
