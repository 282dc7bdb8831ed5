"""Checkpoints of Megatron that are damaged, incomplete, hostile or of another model: refused in a sentence."""

import argparse
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from megatron_files import (
    FIXTURES,
    HEAD,
    HF,
    LORA,
    ONE,
    PEFT,
    STACKED,
    Hostile,
    changed_ranks,
    convert,
    load_torch_dist,
    pad_embedding,
    save_legacy,
    save_torch_dist,
    twin_model,
)

from gemma2_jax import config as configs, config_text
from gemma2_jax.config import Config, OptimConfig
from gemma2_jax.convert import verify
from gemma2_jax.convert.checkpoints import load_weights
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.model_config import AdapterConfig
from gemma2_jax.training.checkpoint import Checkpoints

# A run that started from a checkpoint that does not say its config


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_run_from_megatron_lm(kind, tmp_path):
    start, model = FIXTURES / "megatron_lm" / "A_f32_tp1pp1", replace(twin_model("f32"), max_length=256)
    adapter = (
        AdapterConfig(kind=kind, rank=8, alpha=16, targets=tuple(table.PROJECTIONS))
        if kind == "lora"
        else AdapterConfig()
    )
    train = configs.TrainConfig(sequence_length=64)
    config = Config(workdir="x", model=model, adapter=adapter, optim=OptimConfig(lr=1.0), init=str(start), train=train)
    source = open_checkpoint(PEFT, base=HF["f32"]) if kind == "lora" else open_checkpoint(HF["f32"])
    params = {path: x for path, x in source.shapes.items() if ("/adapter/" in path) == (kind == "lora")}
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.txt").write_text(config_text.to_text(config))
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(1, load_weights(source, params), {"count": jnp.zeros(())}, {})
    run = open_checkpoint(workdir)
    assert run.model == model
    assert all(difference.within(0) for difference in verify.compare_checkpoints(run, source))


# Refusals


def remove_ranks(*ranks: str) -> Callable[[Path], object]:
    return lambda at: [shutil.rmtree(at / f"mp_rank_{rank}") for rank in ranks]


def increment_tensor(name: str) -> Callable[[dict], object]:
    return lambda content: content["model"][name].add_(1)


def declare_zarr(at: Path) -> None:
    (at / ".metadata").unlink()
    (at / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def assert_refused(folder: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(folder, **options)
    assert str(folder) in str(caught.value)


EMBEDDING, FINAL, FC1_KEY = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    f"{STACKED}mlp.linear_fc1.weight",
)
LAYER_FC1 = r"decoder\.layers\.0\.mlp\.linear_fc1\.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(FINAL), r"lacks decoder\.final_layernorm\.weight; check that its config and its weights"),
        (lambda s: s.update({"decoder.x.weight": torch.zeros(2)}), r"has unexpected decoder\.x\.weight; check"),
        (
            lambda s: s.update({FC1_KEY.replace("weight", "bias"): torch.zeros(4, 256)}),
            r"has unexpected decoder\.layers\.0\.mlp\.linear_fc1\.bias, .* and 1 more",
        ),
        (
            lambda s: s.update({n: torch.cat([x, x[:1]]) for n, x in s.items() if ".layers." in n}),
            r"has unexpected decoder\.layers\.4\.",
        ),
        (
            lambda s: s.update({FINAL: torch.zeros(65)}),
            r"decoder\.final_layernorm\.weight has shape \(65,\) where its config expects \(64,\)",
        ),
        (lambda s: s.update(pad_embedding(100)(s)), r"has shape \(612, 64\) where its config expects \(512, 64\)"),
        (lambda s: s.update({EMBEDDING: torch.zeros(384, 64)}), r"has shape \(384, 64\)"),
        (lambda s: s.update({"decoder.layers.x": torch.zeros(300_000)}), "300000 layers, which no model has"),
        (
            lambda s: s.update({f"{FC1_KEY}_w": s.pop(FC1_KEY)[:, :128]}),
            rf"lacks {LAYER_FC1}, .* and has unexpected {LAYER_FC1}_w",
        ),
    ],
    ids=itertools.count(),
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    state = load_torch_dist(ONE / "iter_0000000")
    change(state)
    assert_refused(save_torch_dist(tmp_path / "it", state, ONE), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at.parent / TRACKER).write_text("5"), r"names iteration 5, and there is no .*iter_0000005"),
        (lambda at: (at.parent / TRACKER).write_text("../x"), r"says '\.\./x'; it must name an iteration"),
        (lambda at: (at.parent / TRACKER).write_text(""), "says ''; it must name an iteration"),
        (lambda at: (at.parent / TRACKER).write_text("release"), "names iteration release"),
        (lambda at: [file.unlink() for file in at.iterdir()], r"metadata\.json is missing"),
        (
            lambda at: (at / "metadata.json").unlink(),
            r"json is missing: .*fsdp_dtensor, which this program does not read",
        ),
        (declare_zarr, "sharded_backend is 'zarr'; this program reads 'torch_dist'"),
        (lambda at: (at / ".metadata").unlink(), r"\.metadata is missing; copy the whole checkpoint again"),
        (lambda at: (at / "metadata.json").write_text("[" * 10**6), "is not JSON .*; download it again"),
        (lambda at: os.truncate(at / "metadata.json", 1 << 40), r"is not JSON \(it is larger than 32 MiB\)"),
        (lambda at: os.truncate(at / ".metadata", 1 << 40), r"no checkpoint's metadata \(it is larger than 256 MiB\)"),
        (lambda at: os.truncate(at / "run_config.yaml", 1 << 40), r"no run_config\.yaml .*it is larger than 1 MiB"),
    ],
    ids=itertools.count(),
)
def test_wrong_files_are_named(change, message, tmp_path):
    folder = Path(shutil.copytree(ONE, tmp_path / "it"))
    change(folder / "iter_0000000")
    assert_refused(folder, message)


NORM = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
STAGE = "decoder.layers.0.self_attention.linear_qkv.weight"
RANKS, LM = FIXTURES / "legacy" / "A_bf16_tp2pp2", FIXTURES / "megatron_lm" / "A_f32_tp1pp1"
TRACKER = "latest_checkpointed_iteration.txt"
TWO = r"mp_rank_00 and .*mp_rank_00_000 are of one rank at two layouts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_ranks("00_001"), r"lacks the file of tensor-parallel rank 0, stage 1; copy it too"),
        (remove_ranks("01_001"), r"lacks the file of tensor-parallel rank 1, stage 1"),
        (remove_ranks("01_000", "01_001"), r"rank 1, stage 0"),  # which only their arguments tell
        (remove_ranks("00_001", "01_001"), r"rank 0, stage 1"),
        (lambda at: (at / "mp_rank_00_000").rename(at / "mp_rank_9999_9999"), r"rank 0, stage 0"),
        (lambda at: (at / "mp_rank_00_001" / "model_optim_rng.pt").unlink(), r"mp_rank_00_001.*is missing; copy it"),
        (lambda at: (at / "mp_rank_01_001_000").mkdir(), r"mp_rank_01_001_000 is no rank's folder"),
        (lambda at: shutil.copytree(at / "mp_rank_00_000", at / "mp_rank_00"), TWO),
    ],
    ids=itertools.count(),
)
def test_ranks_that_are_missing_are_named(change, message, tmp_path):
    folder = Path(shutil.copytree(RANKS, tmp_path / "it"))
    change(folder / "iter_0000010")
    assert_refused(folder, message, hf_config=HF["bf16"])


def test_ranks_that_arguments_alone_tell_of(tmp_path):
    content = {"args": argparse.Namespace(tensor_model_parallel_size=10**15), "checkpoint_version": 3.0, "model": {}}
    message = "lacks the file of tensor-parallel rank 1, stage 0"  # and finds that out at once
    assert_refused(save_legacy(tmp_path / "it", {"mp_rank_00": content}), message, hf_config=HF["f32"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (increment_tensor(NORM), rf"ranks have different {re.escape(NORM)}, of which each has all"),
        (increment_tensor(HEAD), r"lm_head\.weight is not the embedding"),
        (lambda c: c["model"].pop(STAGE), rf"{re.escape(STAGE)} is not a tensor of every tensor-parallel rank"),
        (lambda c: c["model"].update(x=torch.zeros(2)), "x is not a tensor of every tensor-parallel rank"),
        (lambda c: c["model"].update({STAGE: c["model"][STAGE][:8]}), "ranks have .* in different shapes or dtypes"),
        (
            lambda c: c["model"].update({STAGE: c["model"][STAGE].float()}),
            "ranks have .* in different shapes or dtypes",
        ),
        (lambda c: c.update(checkpoint_version=1.0), r"checkpoint_version is 1\.0; before 2\.0 q, k and v"),
        (lambda c: c.pop("checkpoint_version"), r"checkpoint_version is None"),
        (lambda c: c.pop("model"), "holds no model; copy it again"),
    ],
    ids=itertools.count(),
)
def test_wrong_ranks_are_named(change, message, tmp_path, megatron):
    with changed_ranks(tmp_path) as files:
        change(files["mp_rank_01_001"])
    assert_refused(tmp_path / "it", message, hf_config=HF["bf16"])


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        (LM, None, r"does not say its config \(there is no run_config\.yaml\); give --hf-config"),
        (RANKS, None, r"does not say its config"),
        (ONE, {"num_hidden_layers": 5}, r"run_config\.yaml is of another model than .*layers 4 and not 5"),
        (ONE, {"vocab_size": 500}, r"run_config\.yaml is of another model than .*vocab_size 512 and not 500"),
        (LM, {"num_hidden_layers": 5}, "its argument num_layers is 4 where the config has 5"),
        (LM, {"num_key_value_heads": 4}, "its argument num_query_groups is 2 where the config has 4"),
        (RANKS, {"intermediate_size": 64}, "ffn_hidden_size is 128 where the config has 64"),
    ],
    ids=itertools.count(),
)
def test_wrong_configs_are_named(folder, change, message, tmp_path):
    content = json.loads((HF["f32"] / "config.json").read_text()) | (change or {})
    content.pop("layer_types")
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_refused(folder, message, hf_config=tmp_path if change else None)


@pytest.mark.parametrize("folder", [ONE, LM, RANKS], ids=lambda folder: folder.parent.name)
def test_weights_take_no_base(folder):
    assert_refused(folder, "is not an adapter alone, so it takes no base model", base=HF["f32"])


def test_an_adapter_needs_its_scale(tmp_path):
    folder = Path(shutil.copytree(LORA, tmp_path / "it"))
    (folder / "iter_0000000" / "run_config.yaml").unlink()
    assert_refused(
        folder, r"holds an adapter, and no run_config\.yaml that says its scale; copy that", hf_config=HF["f32"]
    )


def test_a_config_that_says_the_same_is_taken(tmp_path):
    for folder in (HF["f32"], ONE, convert(HF["f32"], tmp_path / "orbax", "orbax")):
        assert open_checkpoint(folder, hf_config=HF["f32"]).model == twin_model("f32")
    wrong = Path(shutil.copytree(HF["f32"], tmp_path / "wrong"))
    content = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(content | {"sliding_window": 9}))
    for folder in (HF["f32"], ONE, tmp_path / "orbax"):
        with pytest.raises(ValueError, match=r"of another model than was asked for \(window 8 and not 9\)"):
            open_checkpoint(folder, hf_config=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "megatron-legacy", "ranks": (4, 1)}, r"kv_heads 2 cannot be divided into 4; \[1, 2\] are possible"),
        ({"to": "megatron-legacy", "ranks": (1, 3)}, r"layers 4 cannot be divided into 3; \[1, 2, 4\] are possible"),
        ({"to": "megatron-legacy", "ranks": (0, 1)}, r"kv_heads 2 cannot be divided into 0"),
        ({"to": "megatron-legacy", "ranks": (1, -1)}, r"layers 4 cannot be divided into -1"),
        ({"to": "megatron", "ranks": (2, 1)}, "--to megatron is read at any parallelism; leave out --tp and --pp"),
        ({"to": "hf", "ranks": (1, 2)}, "--to hf is read at any parallelism; leave out --tp and --pp"),
        (
            {"to": "megatron-adapter"},
            "has no adapter, and --to megatron-adapter writes nothing else; write its",
        ),
    ],
)
def test_what_cannot_be_written_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        Job(source=open_checkpoint(HF["f32"]), **options)


@pytest.mark.parametrize("where", ["common.pt", ".metadata", "object", "rank"])
def test_a_hostile_pickle_is_refused_and_not_run(where, tmp_path):
    sentinel = tmp_path / "was-run"
    state = load_torch_dist(ONE / "iter_0000000")
    folder = save_torch_dist(
        tmp_path / "it", state, ONE, {"iteration": Hostile(sentinel)} if where == "common.pt" else None
    )
    if where == ".metadata":
        (folder / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(Hostile(sentinel)))
    if where == "object":
        shutil.rmtree(folder)
        save_torch_dist(tmp_path / "it", state | {"common_state/shard_0_1": [Hostile(sentinel)]}, ONE)
    if where == "rank":
        shutil.rmtree(folder)
        save_legacy(folder, {"mp_rank_00": {"model": {}, "checkpoint_version": 3.0, "args": Hostile(sentinel)}})
    with pytest.raises(
        ValueError, match=r"names '(posix|os)\.system', which no Megatron checkpoint has; it was not run"
    ):
        open_checkpoint(folder, hf_config=HF["f32"])
    assert not sentinel.exists()
