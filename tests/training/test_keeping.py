"""Which checkpoints are kept, when a run that gets no better ends, and what is exported of it."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ROOT, lines_of, small

from gemma2_jax.config import Config, TrainConfig
from gemma2_jax.convert import steps
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.training import loop
from gemma2_jax.training.best import BestLoss
from gemma2_jax.training.checkpoint import Checkpoints, make_policies

LOSSES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: None, 6: 2.0, 7: 6.0, 8: 6.5, 9: 7.0}


@pytest.mark.parametrize(
    ("newest", "every", "best", "kept"),
    [
        (2, 0, 0, {8, 9}),
        (1, 4, 0, {4, 8, 9}),
        (1, 0, 1, {6, 9}),
        (1, 0, 2, {4, 6, 9}),  # 2 and 4 are equal, and the later stays
        (2, 3, 3, {2, 3, 4, 6, 8, 9}),
    ],
)
def test_steps_that_are_kept(newest, every, best, kept, tmp_path):
    """Over a restart too; a step without a held-out loss is none of the best."""
    policies = make_policies(TrainConfig(checkpoint_every=1, eval_every=1, keep_every=every, keep_best=best))
    for part in (range(1, 6), range(6, 10)):
        with Checkpoints(tmp_path, newest, policies=policies) as checkpoints:
            for step in part:
                checkpoints.save(step, {"embedding": jnp.ones(2)}, {"count": jnp.ones(())}, {}, LOSSES[step])
            if best:
                assert checkpoints.best == (6 if part[-1] == 9 else 4 if best == 1 else 2)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == kept


def test_patience():
    best = BestLoss(patience=2)
    for step, (loss, ends) in enumerate(
        [(4.0, False), (3.0, False), (3.0, False), (2.5, False), (math.nan, False), (2.6, True)]
    ):
        best.add(step, loss)
        assert best.is_out_of_patience is ends
        assert best.find_loss(step) == (None if math.isnan(loss) else loss)
    assert best.find_loss(3) is None
    assert best.describe_end(5) == (
        "the held-out loss has not got better in 2 evaluations (the best is 2.5000, of step 3), so the run ends with "
        "step 5; more train.patience would go on"
    )
    resumed = BestLoss(3, best.get_state())
    assert not resumed.is_out_of_patience
    resumed.add(6, 2.5)
    assert resumed.is_out_of_patience
    assert not BestLoss(0, best.get_state()).is_out_of_patience


@pytest.mark.usefixtures("compiled_once")
def test_a_run_that_gets_no_better_ends(tmp_path, monkeypatch, capsys):
    """At the same step whether it was interrupted or not; its best step is exported, and more patience goes on."""
    monkeypatch.chdir(ROOT)
    losses = {0: 9.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.2, 10: 4.1, 12: 3.0, 14: 8.0}
    monkeypatch.setattr(loop, "compile_evaluation", lambda *_: lambda state: np.asarray(losses[int(state.step)]))

    def config(steps: int, patience: int) -> Config:
        run = small("tiny_sft", tmp_path / "run", steps=steps)
        options = dict(eval_every=2, checkpoint_every=2, keep_checkpoints=1, keep_best=1, export_best="hf")
        return replace(run, train=replace(run.train, patience=patience, upload=str(tmp_path / "copy"), **options))

    def kept() -> set[str]:
        return {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}

    assert loop.train(config(6, patience=3)).step == 6
    assert kept() == {"4", "6"}
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["4"]
    capsys.readouterr()
    assert loop.train(config(14, patience=3)).step == 10
    said = capsys.readouterr().out
    end = "has not got better in 3 evaluations (the best is 4.0000, of step 4), so the run ends with step 10"
    assert end in said and f"Best:      {tmp_path}/run/best/4 (hf, of step 4)" in said
    assert [line["step"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [0, 2, 4, 6, 8, 10]
    assert [(line["step"], line["event"]) for line in lines_of(tmp_path / "run") if "event" in line] == [(10, "end")]
    assert kept() == {"4", "10"}
    assert loop.train(config(14, patience=3)).step == 10
    assert f"there is nothing to do: the held-out loss {end}" in capsys.readouterr().out
    assert loop.train(config(14, patience=4)).step == 14
    assert kept() == {"12", "14"}
    assert {
        path.name: steps.find_damage(path) for path in (tmp_path / "copy" / "checkpoints").iterdir()
    }.items() >= dict.fromkeys(("4", "6", "10", "12", "14"), "").items()
    (exported,) = (tmp_path / "run" / "best").iterdir()
    best, model = open_checkpoint(tmp_path / "run" / "checkpoints" / "12"), open_checkpoint(exported)
    assert exported.name == "12" and model.format == "huggingface"
    whole = tuple(slice(size) for size in best.shapes["embedding"].shape)
    read = [checkpoint.sources[0].read("embedding", whole, np.dtype(np.float32)) for checkpoint in (best, model)]
    np.testing.assert_array_equal(*read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep_every=150), "keep_every is 150, and a checkpoint is written every 100 steps; give a multiple"),
        (
            dict(keep_best=1, eval_every=30),
            "some have no held-out loss, as one is computed every 30; make train.checkp",
        ),
        (dict(keep_best=1, eval_every=0), "train.keep_best is 1, but there is no held-out loss: set train.eval_every"),
        (
            dict(patience=3, eval_every=0),
            "train.patience is 3, but there is no held-out loss: set train.eval_every, and",
        ),
        (dict(export_best="hf"), "export_best is hf, but train.keep_best is 0, .*; set train.keep_best to 1"),
        (dict(export_best="hf", keep_best=1), "export_best is hf, but init is empty, .* set init, or leave out"),
        (dict(patience=-1), "train.patience is -1; it must be at least 0 and below"),
    ],
)
def test_what_cannot_be_kept(changes, message, tmp_path):
    config = small("tiny_lora", tmp_path)
    fresh = TrainConfig(sequence_length=64)
    with pytest.raises(ValueError, match=message):
        replace(config, train=replace(fresh, **changes))


def test_what_cannot_be_exported(tmp_path):
    full = small("tiny_sft", tmp_path)
    with pytest.raises(ValueError, match=r"export_best is peft, but adapter\.kind is none; export it as hf or orbax"):
        replace(full, train=replace(TrainConfig(sequence_length=64), keep_best=1, export_best="peft"))
    lora = small("tiny_lora", tmp_path, init="google/gemma-2-2b")
    lora = replace(lora, adapter=replace(lora.adapter, after_norm=True, targets=("attn/o", "mlp/down")))
    with pytest.raises(
        ValueError, match="no other program adds the adapter of attn/o and mlp/down after the post-norm"
    ):
        replace(lora, train=replace(TrainConfig(sequence_length=64), keep_best=1, export_best="hf"))
