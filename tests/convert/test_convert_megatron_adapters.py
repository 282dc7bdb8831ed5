"""Megatron's adapters and PEFT's, both ways: against adapters that Megatron-Bridge trained, and against peft."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from megatron_files import (
    DORA,
    FIXTURES,
    HF,
    LORA,
    PEFT,
    Tensors,
    as_numpy,
    assert_same_parts,
    bits,
    convert,
    load_tensors,
    load_torch_dist,
    qkv_rows,
    save_torch_dist,
    twin_model,
)
from safetensors.numpy import load_file, save_file

from gemma2_jax.convert import verify
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import AdapterConfig


def peft_tensors(folder: Path) -> Tensors:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("parallel", ["tp1pp1", "tp2pp1"])
@pytest.mark.parametrize("based", [False, True])
def test_an_adapter_of_megatron_s_is_peft_s(parallel, based, tmp_path):
    source = open_checkpoint(FIXTURES / "peft" / f"A_f32_lora_{parallel}", base=HF["f32"] if based else None)
    expected = AdapterConfig(kind="lora", rank=8, alpha=16, after_norm=True, targets=tuple(table.PROJECTIONS))
    assert replace(source.adapter, targets=expected.targets) == expected
    assert set(source.adapter.targets) == set(expected.targets)
    assert any("attn/o and mlp/down act after the post-norm" in note for note in source.notes)
    job = Job(source=source, to="peft")
    assert re.search("attn/o and mlp/down was trained to be added after the post-norm", *job.warnings)
    write_checkpoint(job, tmp_path / "peft")
    assert bits(peft_tensors(tmp_path / "peft")) == bits(peft_tensors(PEFT))
    ours, expected = (peft.LoraConfig.from_pretrained(at) for at in (tmp_path / "peft", PEFT))
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "task_type"):
        assert getattr(ours, field) == getattr(expected, field), field
    assert set(ours.target_modules) == set(expected.target_modules)


def dora_parts(state: Tensors) -> Tensors:
    """PEFT's tensors of a fused adapter, row by row."""
    c, found = twin_model("f32"), {}
    modules = {"self_attention.linear_qkv": "qkv", "mlp.linear_fc1": ("gate", "up")}
    modules |= {"self_attention.linear_proj": "o", "mlp.linear_fc2": ("down",)}
    for module, projections in modules.items():
        for layer, projection in product(range(c.layers), projections):
            part = "self_attn" if module.startswith("self") else "mlp"
            at = f"base_model.model.model.layers.{layer}.{part}.{projection}_proj"
            a, b, m = (
                state[f"decoder.layers.{module}.adapter.{end}"][layer]
                for end in ("linear_in.weight", "linear_out.weight", "weight_magnitude")
            )
            if projection in "qkv":
                rows = [row for row, (name, _) in enumerate(qkv_rows(c)) if name == projection]
            else:
                half = list(projections).index(projection)
                rows = np.arange(len(b)).reshape(len(projections), -1)[half]
            found |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b[rows]}
            found[f"{at}.lora_magnitude_vector"] = m[rows]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dora_keeps_its_magnitudes_in_whatever_order(ranks, tmp_path):
    state = load_torch_dist(DORA / "iter_0000000")
    expected = bits(dora_parts(as_numpy(state)))
    name = "decoder.layers.mlp.linear_fc1.adapter.weight_magnitude"
    gate, up = state[name].chunk(2, 1)
    pieces = zip(gate.chunk(ranks, 1), up.chunk(ranks, 1), strict=True)
    state[name] = torch.cat([piece for pair in pieces for piece in pair], 1)
    folder = save_torch_dist(tmp_path / "it", state, DORA)
    run_path = folder / "iter_0000000" / "run_config.yaml"
    before = "tensor_model_parallel_size: 1"
    assert before in run_path.read_text()
    run_path.write_text(run_path.read_text().replace(before, f"tensor_model_parallel_size: {ranks}"))
    at = convert(folder, tmp_path / "peft", "peft")
    assert bits(peft_tensors(at)) == expected
    assert_same_parts(open_checkpoint(folder), open_checkpoint(at, hf_config=HF["f32"]))
    assert peft.LoraConfig.from_pretrained(at).use_dora
    # What we write says that it is of one rank, and has that order.
    again = convert(open_checkpoint(at, hf_config=HF["f32"]), tmp_path / "again", "megatron-adapter")
    assert bits(peft_tensors(convert(again, tmp_path / "back", "peft"))) == expected


def copy_adapter(folder: Path, change=lambda tensors: None, only: str = "", **config) -> Path:
    """A changed copy of PEFT's adapter to the fixture's model, with the projections that the pattern `only` matches."""
    shutil.copytree(PEFT, folder)
    tensors = {name: x for name, x in peft_tensors(PEFT).items() if re.search(only, name)}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    modules = sorted({module for name in tensors for module in re.findall(r"\w+_proj", name)})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": modules} | config))
    return folder


def increment_a(projection: str, layer: int = 3) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        (name,) = [name for name in tensors if re.search(rf"\.{layer}\..*{projection}_proj\.lora_A", name)]
        tensors[name] = tensors[name] + 1

    return change


FUSED, CANONICAL = "megatron.bridge.peft.lora.LoRA", "megatron.bridge.peft.canonical_lora.CanonicalLoRA"
QKV, FC1 = "self_attention.linear_qkv.adapter.", "mlp.linear_fc1.adapter."
ALONE = {"self_attention.linear_proj.adapter.", "mlp.linear_fc2.adapter."}
OWN_QKV, OWN_FC1 = {f"{QKV}adapter_{x}." for x in "qkv"}, {f"{FC1}adapter_gate.", f"{FC1}adapter_up."}
EVERY_OWN = OWN_QKV | OWN_FC1 | ALONE
# Megatron-Bridge loads no adapter on a part of what it fuses, so that these get zeros.
ZEROS = {"q and v": ["attn/k"], "gate": ["mlp/up"], "v, o and down": ["attn/q", "attn/k"]}
ADAPTERS: dict[str, tuple[dict, str, set[str]]] = {
    "as exported": ({}, FUSED, {QKV, FC1, *ALONE}),
    "another k": ({"change": increment_a("k")}, CANONICAL, EVERY_OWN),
    "another up": ({"change": increment_a("up", 0)}, CANONICAL, EVERY_OWN),
    "q and v": ({"only": "[qv]_proj"}, CANONICAL, OWN_QKV),
    "gate": ({"only": "gate_proj"}, CANONICAL, OWN_FC1),
    "o": ({"only": "o_proj"}, FUSED, {"self_attention.linear_proj.adapter."}),
    "attention": ({"only": "[qkvo]_proj"}, FUSED, {QKV, "self_attention.linear_proj.adapter."}),
    "v, o and down": ({"only": "(v|o|down)_proj"}, CANONICAL, OWN_QKV | ALONE),
    "rslora": ({"use_rslora": True, "lora_dropout": 0.25}, FUSED, {QKV, FC1, *ALONE}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_of_peft_s_is_megatron_s(case, tmp_path):
    options, target, modules = ADAPTERS[case]
    before = open_checkpoint(copy_adapter(tmp_path / "peft", **options), hf_config=HF["f32"])
    job = Job(source=before, to="megatron-adapter")
    before_norm = [name for name in ("attn/o", "mlp/down") if name in table.match_targets(before.adapter)]
    zeros, alone = ZEROS.get(case, []), modules >= OWN_FC1
    adapted = " and ".join(before_norm)
    expected = [f"adapter of {adapted} was trained to be added before the post-norm"] * bool(before_norm)
    expected += [f"{' and '.join(zeros)} had no adapter"] * bool(zeros) + ["these are for TP 1 alone"] * alone
    assert len(job.warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, job.warnings, strict=True))
    write_checkpoint(job, tmp_path / "megatron")
    names = set(dcp.FileSystemReader(str(tmp_path / "megatron" / "iter_0000000")).read_metadata().state_dict_metadata)
    ends = [end + rest for end, rest in product(("linear_in", "linear_out"), (".weight", *STATES))]
    assert names == {f"decoder.layers.{module}{end}" for module in modules for end in ends}
    section = yaml.safe_load((tmp_path / "megatron" / "iter_0000000" / "run_config.yaml").read_text())["peft"]
    assert section["_target_"] == target and section["dim"] == 8
    assert section["alpha"] / 8 == pytest.approx(before.adapter.scale, rel=1e-15)
    after = open_checkpoint(tmp_path / "megatron")
    assert after.adapter.after_norm == bool(before_norm) and after.adapter.dropout == before.adapter.dropout
    assert after.adapter.scale == pytest.approx(before.adapter.scale, rel=1e-15)
    back, original = peft_tensors(convert(after, tmp_path / "back", "peft")), peft_tensors(tmp_path / "peft")
    assert bits({name: back[name] for name in original}) == bits(original)
    added = back.keys() - original.keys()
    assert {name.split(".")[-3][0] for name in added} == {name.split("/")[1][0] for name in zeros}
    assert len(added) == 8 * len(zeros) and not any(back[name].any() for name in added)


STATES = [f"._extra_state/shard_{layer}_4" for layer in range(4)]


def half_ranks(rows: np.ndarray, ranks: int) -> np.ndarray:
    """Rows [..., F, R] as Megatron-Bridge saves those of gate, or of up, alone: it takes each rank's for both."""
    halves = [np.split(share, 2, -2) for share in np.split(rows, ranks, -2)]
    return np.concatenate([first for first, _ in halves] + [second for _, second in halves], -2)


def save_canonical(folder: Path, ranks: int) -> Path:
    """The fixture as it would be if `ranks` ranks had saved it, with one chunk for each tensor."""
    state, expected = load_torch_dist(CANONICAL_TP2 / "iter_0000000"), peft_tensors(EXPECTED)
    for part in ("gate", "up"):
        b = [expected[f"base_model.model.model.layers.{n}.mlp.{part}_proj.lora_B.weight"] for n in range(4)]
        saved = torch.tensor(half_ranks(np.stack(b), ranks))
        name = f"decoder.layers.{FC1}adapter_{part}.linear_out.weight"
        assert ranks != 2 or torch.equal(saved, state[name])  # the rule is that of the fixture
        state[name] = saved
    save_torch_dist(folder, state, CANONICAL_TP2)
    change_yaml(folder, lambda run: run["model"].update(tensor_model_parallel_size=ranks))
    return folder


CANONICAL_TP2, EXPECTED = (FIXTURES / "peft" / f"A_f32_canonical_{end}" for end in ("tp2pp1", "hfpeft"))


def test_gate_and_up_of_a_canonical_adapter_that_two_ranks_saved(tmp_path):
    found = peft_tensors(convert(CANONICAL_TP2, tmp_path / "peft", "peft"))
    assert bits(found) == bits(peft_tensors(EXPECTED))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gate_and_up_of_a_canonical_adapter_in_the_order_of_its_ranks(ranks, tmp_path):
    folder = save_canonical(tmp_path / "it", ranks)
    back = convert(folder, tmp_path / "peft", "peft")
    assert bits(peft_tensors(back)) == bits(peft_tensors(EXPECTED))
    assert_same_parts(open_checkpoint(folder), open_checkpoint(CANONICAL_TP2))


def test_an_order_of_ranks_that_is_not_certain_is_refused(tmp_path):
    folder = Path(shutil.copytree(CANONICAL_TP2, tmp_path / "it"))
    change_yaml(folder, lambda run: run["model"].update(tensor_model_parallel_size=1))
    with pytest.raises(ValueError, match=r"was saved at TP 1, and .*adapter_gate\S* has the 4 chunks of TP 2"):
        open_checkpoint(folder)
    change_yaml(folder, lambda run: run["model"].update(tensor_model_parallel_size=3))
    with pytest.raises(ValueError, match=r"at TP 3, and .* has 128 rows, of which each rank cannot have two halves"):
        open_checkpoint(folder)
    change_yaml(folder, lambda run: run["model"].pop("tensor_model_parallel_size"))
    with pytest.raises(ValueError, match=r"lacks model\.tensor_model_parallel_size"):
        open_checkpoint(folder)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_canonical_adapter_is_written_for_the_ranks_that_load_it(ranks, tmp_path):
    at = copy_adapter(tmp_path / "peft", increment_a("up"), "(gate|up)_proj")
    config = json.loads((HF["f32"] / "config.json").read_text()) | {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(at, hf_config=tmp_path)
    with pytest.raises(ValueError, match="the adapter's rank 8 cannot be divided into 16"):
        Job(source=source, to="megatron-adapter", ranks=(16, 1))
    job = Job(source=source, to="megatron-adapter", ranks=(ranks, 1))
    assert any(f"these are for TP {ranks} alone" in warning for warning in job.warnings)
    write_checkpoint(job, tmp_path / "out")
    state, tensors = as_numpy(load_torch_dist(tmp_path / "out" / "iter_0000000")), peft_tensors(at)
    for part in ("gate", "up"):
        b = [tensors[f"base_model.model.model.layers.{n}.mlp.{part}_proj.lora_B.weight"] for n in range(4)]
        saved = state[f"decoder.layers.{FC1}adapter_{part}.linear_out.weight"]
        np.testing.assert_array_equal(saved, half_ranks(np.stack(b), ranks))
    back = convert(open_checkpoint(tmp_path / "out"), tmp_path / "back", "peft")
    assert bits(peft_tensors(back)) == bits(tensors)
    # The chunks tell the ranks too.
    change_yaml(tmp_path / "out", lambda run: run["model"].update(tensor_model_parallel_size=8))
    with pytest.raises(ValueError, match=f"has the {2 * ranks} chunks of TP {ranks}"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ((), (2, 1), "is read at any parallelism; leave out --tp and --pp"),
        (("up",), (2, 2), "is read at any pipeline parallelism, so that --pp must be 1"),
        (("k",), (4, 1), "kv_heads 2 cannot be divided into 4"),
    ],
)
def test_ranks_of_an_adapter_that_makes_no_use_of_them_are_refused(change, ranks, message, tmp_path):
    at = copy_adapter(tmp_path / "peft", lambda tensors: [increment_a(name)(tensors) for name in change])
    with pytest.raises(ValueError, match=message):
        Job(source=open_checkpoint(at, hf_config=HF["f32"]), to="megatron-adapter", ranks=ranks)


def add_magnitudes(tensors: Tensors) -> None:
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if "lora_B" in name]:
        rows = rng.random(len(tensors[name]), dtype=np.float32)
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = rows


@pytest.mark.parametrize(
    "options",
    [{"also": increment_a("k")}, {"also": increment_a("gate", 1)}, {"only": "[qv]_proj"}],
    ids=itertools.count(),
)
def test_dora_with_an_a_each_is_refused(options, tmp_path):
    also, only = options.get("also", lambda tensors: None), options.get("only", "")
    at = copy_adapter(tmp_path / "peft", lambda tensors: (also(tensors), add_magnitudes(tensors)), only, use_dora=True)
    source = open_checkpoint(at, hf_config=HF["f32"])
    with pytest.raises(
        ValueError, match=r"is a DoRA with an A of its own for each of .*, and Megatron-Bridge's has one"
    ):
        convert(source, tmp_path / "out", "megatron-adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize("only", ["", "(o|down)_proj"])
def test_dora_of_peft_s_is_megatron_s(only, tmp_path):
    at = copy_adapter(tmp_path / "peft", add_magnitudes, only, use_dora=True)
    there = convert(open_checkpoint(at, hf_config=HF["f32"]), tmp_path / "megatron", "megatron-adapter")
    assert open_checkpoint(there).adapter.kind == "dora"
    assert bits(peft_tensors(convert(there, tmp_path / "back", "peft"))) == bits(peft_tensors(at))


def test_what_can_be_merged_merges_as_peft_s(tmp_path):
    state = load_torch_dist(LORA / "iter_0000000")
    mergeable = {name: x for name, x in state.items() if "linear_qkv" in name or "linear_fc1" in name}
    source = open_checkpoint(save_torch_dist(tmp_path / "it", mergeable, LORA), base=HF["f32"])
    assert not source.notes and not source.adapter.unmergeable_targets
    found = load_tensors(convert(source, tmp_path / "hf", "hf", merge=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(HF["f32"])
    adapter = copy_adapter(tmp_path / "peft", only="(q|k|v|gate|up)_proj")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, x in found.items():
        np.testing.assert_allclose(x, merged[name].numpy(), rtol=1e-6, atol=1e-6)
    assert bits(found) != bits(load_tensors(HF["f32"]))
    whole = open_checkpoint(LORA, base=HF["f32"])
    with pytest.raises(ValueError, match=r"attn/o and mlp/down cannot be merged: it is added after the post-norm"):
        Job(source=whole, to="megatron", merge=True)


def test_importing_runs_it_as_it_was_trained():
    source = open_checkpoint(LORA, base=HF["f32"])
    assert source.adapter.after_norm
    other = replace(source, adapter=replace(source.adapter, after_norm=False))
    after, before = (verify.compute_logits(found, range(3, 27)) for found in (source, other))
    assert np.abs(after - before).max() > 0.1 * np.abs(after).max()


def test_an_adapter_finds_its_base_where_its_config_says(tmp_path, monkeypatch):
    base = convert(HF["f32"], tmp_path / "base", "megatron")
    source = open_checkpoint(convert(open_checkpoint(PEFT, base=base), tmp_path / "adapter", "megatron-adapter"))
    # PEFT's own config names a Hugging Face model, which Megatron-Bridge takes once it is a Megatron checkpoint.
    run = yaml.safe_load((tmp_path / "adapter" / "iter_0000000" / "run_config.yaml").read_text())
    assert run["checkpoint"]["pretrained_checkpoint"] == str(tmp_path / "adapter-base")
    assert (
        source.base
        == run["model"]["hf_model_id"]
        == json.loads((PEFT / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert "embedding" not in source.shapes
    convert(HF["f32"], tmp_path / "adapter-base", "megatron")
    assert "embedding" in open_checkpoint(tmp_path / "adapter").shapes
    shutil.copytree(LORA, tmp_path / "lora")
    (tmp_path / "mg" / "torch_dist").mkdir(parents=True)
    base.rename(tmp_path / "mg" / "torch_dist" / "A_f32_tp1pp1")
    monkeypatch.chdir(tmp_path)
    found = open_checkpoint(tmp_path / "lora")
    assert "embedding" in found.shapes and found.base == "mg/torch_dist/A_f32_tp1pp1"
    with pytest.raises(ValueError, match="has an adapter, which --to megatron has no place for"):
        Job(source=replace(found, adapter=replace(found.adapter, after_norm=False)), to="megatron")


@pytest.mark.parametrize(
    "checkpoint", [5, ["x"], {"pretrained_checkpoint": 5}, {"pretrained_checkpoint": {"a": 1}}, None]
)
def test_a_base_that_is_no_path_is_none(checkpoint, tmp_path):
    folder = Path(shutil.copytree(LORA, tmp_path / "it"))
    change_yaml(folder, lambda run: run.update(checkpoint=checkpoint))
    assert open_checkpoint(folder).base == "hf/A_f32"
    change_yaml(folder, lambda run: run["model"].update(hf_model_id=checkpoint))
    assert open_checkpoint(folder).base == ""


def change_yaml(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "iter_0000000" / "run_config.yaml"
    run = yaml.safe_load(path.read_text())
    change(run)
    path.write_text(yaml.safe_dump(run))
