"""A search: what is compiled next, what is left out, and how it goes on after an end. Nothing is compiled here."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from gemma2_jax import recipes
from gemma2_jax.planning import search as searching
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.layouts import find_own, predict
from gemma2_jax.planning.report import Plan, read_plan
from gemma2_jax.planning.search import Search, search_layouts
from gemma2_jax.planning.search_table import print_search
from gemma2_jax.planning.speed import StepTime

CONFIG = recipes.load_recipe("9b_sft")


def slowness(layout) -> float:
    """How much longer a step takes than is predicted, on the cluster of these tests."""
    return 3.0 if layout.mesh.fsdp == 4 else 1.2


class Cluster:
    """Stands for the processes that compile, whose plans follow from predictions."""

    def __init__(self, monkeypatch, tmp_path, *, memory=1.0, failing=lambda layout: False):
        self.compiled, self.memory, self.failing = [], memory, failing
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(searching, "PlanProcess", self.start)
        monkeypatch.setattr(searching, "count_workers", lambda: 1)

    def start(self, config, gpus, device):
        layout = find_own(config, gpus)
        self.compiled.append(layout)
        return SimpleNamespace(finish=lambda: self.finish(layout), end=lambda: None)

    def finish(self, layout):
        if self.failing(layout):
            raise RuntimeError("the process that compiles the step failed: killed")
        prediction = predict(CONFIG, layout, H100)
        times = {
            name: asdict(StepTime(total=seconds, work={}, sent={}))
            for name, seconds in (("bound", prediction.bound), ("estimate", prediction.estimate * slowness(layout)))
        }
        empty = {
            "memory": {},
            "peak": "",
            "collectives": [],
            "flops": {},
            "memory_traffic": 0,
            "layers_per_stage": None,
        }
        seconds = {"lower_seconds": 0.0, "compile_seconds": 0.0}
        total = round(prediction.memory * self.memory)
        return {
            "gpus": 4,
            "mesh": str(layout),
            "mesh_sizes": asdict(layout.mesh),
            "total": total,
            **empty,
            **seconds,
            **times,
        }


def test_what_a_step_shows_of_its_mesh_is_believed(monkeypatch, tmp_path):
    """fsdp 4 is predicted to be the fastest, and compiled first; as it is not, other meshes follow, and one wins."""
    cluster = Cluster(monkeypatch, tmp_path)
    search = search_layouts(CONFIG, 4, H100, 6)
    assert cluster.compiled[0].mesh.fsdp == 4 and all(layout.mesh.fsdp != 4 for layout in cluster.compiled[1:])
    assert len(cluster.compiled) == 6 and search.ranked[0].prediction.layout in cluster.compiled[1:]
    assert [one.plan.estimate.total for one in search.ranked] == sorted(
        one.plan.estimate.total for one in search.ranked
    )
    assert all(one.bound < search.ranked[0].plan.estimate.total for one in search.left) and search.pruned


def test_it_goes_on_where_it_was(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    search_layouts(CONFIG, 4, H100, 3)
    first = list(cluster.compiled)
    search = search_layouts(CONFIG, 4, H100, 5)
    assert len(cluster.compiled) == 5 and cluster.compiled[:3] == first
    assert {one.prediction.layout for one in search.tried} == {*cluster.compiled}
    damaged = next((tmp_path / "gemma2_jax/plans").glob("*.json"))
    damaged.write_text("{")
    search_layouts(CONFIG, 4, H100, 5)
    assert len(cluster.compiled) == 6 and isinstance(json.loads(damaged.read_text()), dict)


def test_a_disk_that_is_full_costs_no_plan(monkeypatch, tmp_path, capsys):
    Cluster(monkeypatch, tmp_path)

    def fail(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(searching.command_line, "write_whole", fail)
    assert len(search_layouts(CONFIG, 4, H100, 2).tried) == 2
    assert "a plan is not kept" in capsys.readouterr().err


def test_no_layout_is_compiled_twice(monkeypatch, tmp_path):
    """Memory is left, so that another set of kept outputs is proposed, but not while that is being compiled already."""
    cluster = Cluster(monkeypatch, tmp_path, memory=0.5)
    own = find_own(CONFIG, 4)
    assert own is not None
    plan = read_plan(cluster.finish(own), CONFIG, H100)
    searches = [Search(config=CONFIG, gpus=4, device=H100, left=[]) for _ in range(2)]
    searches[0].add(predict(CONFIG, own, H100), plan)
    (proposed,) = searches[0].left
    searches[1].taken.add(proposed.layout)
    searches[1].add(predict(CONFIG, own, H100), plan)
    assert not searches[1].left


def test_less_is_kept_where_a_step_does_not_fit(monkeypatch, tmp_path):
    """Steps take 1.3 times what was predicted: of a layout that keeps outputs, one that keeps fewer is tried."""
    cluster = Cluster(monkeypatch, tmp_path, memory=1.3)
    search = search_layouts(CONFIG, 4, H100, 12)
    large = [one for one in search.tried if not one.plan.fits and one.prediction.layout.kept_outputs]
    assert large and search.ranked
    for one in large:
        layout = one.prediction.layout
        others = [other for other in cluster.compiled if other.mesh == layout.mesh]
        again = [other for other in others if other.micro_batch_size == layout.micro_batch_size and other != layout]
        assert all(len(other.kept_outputs) < len(layout.kept_outputs) for other in again if other.remat == layout.remat)


def test_what_it_says(monkeypatch, tmp_path, capsys):
    own = find_own(CONFIG, 4)
    assert own is not None
    Cluster(monkeypatch, tmp_path, failing=lambda layout: layout.mesh.fsdp == 4)
    search = search_layouts(CONFIG, 4, H100, 3, own)
    print_search(Console(width=200), search, own)
    said = capsys.readouterr().out
    assert "(as given)" in said and "tensor 4" in said and "was not compiled: fsdp 4" in said and "killed" in said
    best = search.ranked[0].prediction.layout
    assert f"\n1  {' '.join(best.list_options(CONFIG))}\n" in said
    assert f"{len(search.left)} layouts were predicted to be slower" in said


def test_runs_that_cannot_fit(monkeypatch, tmp_path):
    Cluster(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="no layout of this run over 1 x H100 80GB can fit"):
        search_layouts(recipes.load_recipe("27b_sft"), 1, H100, 3)
    rows = replace(CONFIG, train=replace(CONFIG.train, global_batch_size=1, micro_batch_size=1))
    assert all(one.layout.micro_batch_size == 1 for one in search_layouts(rows, 4, H100, 1).left)


def test_plans_are_kept_by_all_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = searching.plan_path(CONFIG, 4, H100)
    assert path == searching.plan_path(replace(CONFIG, workdir="elsewhere"), 4, H100)
    others = [
        searching.plan_path(replace(CONFIG, steps=7), 4, H100),
        searching.plan_path(CONFIG, 8, H100),
        searching.plan_path(CONFIG, 4, replace(H100, memory_bytes=1)),
    ]
    assert path not in others and isinstance(Plan, type)
