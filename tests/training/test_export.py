"""From a training run to the Torch world: what transformers and peft load computes what was trained."""

import errno
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from gemma2_jax import config_text, recipes, train
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.convert import checkpoints, opening
from gemma2_jax.convert.files import safetensors as tensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model import gemma2 as model, lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import AdapterConfig
from gemma2_jax.training import export, loop, resume
from gemma2_jax.training.checkpoint import Checkpoints
from gemma2_jax.training.step import Program

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny-gemma2"
QUESTION = "<start_of_turn>user\nWhat does json.dumps do?<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(scope="module", params=["lora", pytest.param("dora", marks=pytest.mark.exhaustive)])
def run(request, tmp_path_factory) -> Path:
    """A few steps of the tiny recipe from the checkpoint in the repository, at a rate that shows."""
    workdir = tmp_path_factory.mktemp("run") / request.param
    recipe = recipes.load_recipe(f"tiny_{request.param}")
    sizes = dict(sequence_length=64, global_batch_size=8, micro_batch_size=1, eval_batches=1)
    saves = dict(checkpoint_every=1, export_adapter=True)
    loop.train(
        replace(
            recipe,
            init=str(TINY),
            workdir=str(workdir),
            steps=4,
            data=replace(recipe.data, train=str(ROOT / "tests" / "fixtures" / "sums.jsonl"), eval_fraction=0.05),
            optim=replace(recipe.optim, lr=0.02, min_lr=0.01, warmup_steps=0, decay_steps=4),
            train=replace(recipe.train, **sizes, **saves),
        )
    )
    return workdir


def logits(graph, weights, tokens: np.ndarray) -> np.ndarray:
    whole = model.rebuild_model(graph, weights)
    return jax.jit(lambda whole: whole(tokens))(whole)


def our_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of any checkpoint, adapters apart, in float32."""
    source = opening.open_checkpoint(path)

    def create() -> Gemma2:
        whole = Gemma2(source.model, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=nnx.Rngs(0))
        lora.attach_adapters(whole, source.adapter, rngs=nnx.Rngs(0))
        return whole

    graph, shapes = nnx.split(nnx.eval_shape(create))
    return logits(graph, checkpoints.load_weights(source, model.flatten_state(shapes)), tokens)


def convert(*arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "gemma2_jax.convert", *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """A question, asked over and over until it is longer than the window."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    return np.asarray([tokenizer(QUESTION * 8)["input_ids"]])


def test_merged_into_transformers(run, tokens, tmp_path):
    ours = our_logits(run, tokens)
    assert np.abs(ours - our_logits(TINY, tokens)).max() > 0.1, "training changed nothing"
    said = convert(run, tmp_path / "merged", "--to", "hf", "--merge", "--dtype", "float32")
    assert f"as a run: {run.name[0].upper()}o" in said
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.dtype == torch.float32
    with torch.no_grad():
        peer_logits = merged(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, peer_logits, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<bos>")


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory) -> Path:
    """What is exported of the run's last step."""
    target = tmp_path_factory.mktemp("exported") / "adapter"
    convert(run, target, "--to", "peft")
    return target


@pytest.fixture(scope="module")
def peft_logits(run, adapter, tokens) -> np.ndarray:
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(base, adapter)
    assert adapted.peft_config["default"].use_dora == (run.name == "dora")
    with torch.no_grad():
        return adapted(torch.tensor(tokens)).logits.numpy()


def test_adapter_into_peft(run, tokens, peft_logits):
    np.testing.assert_allclose(our_logits(run, tokens), peft_logits, atol=1e-4, rtol=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_adapters_that_a_run_exports_are_those_of_its_checkpoints(run, adapter):
    kept = [{path.name for path in (run / name).iterdir()} for name in ("adapters", "checkpoints")]
    assert kept == [{"3", "4"}, {"3", "4"}]
    assert contents(run / "adapters" / "4") == contents(adapter)
    assert contents(run / "adapters" / "3") != contents(adapter)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (run / "tokenizer" / file).read_bytes() == contents(adapter)[file] == (TINY / file).read_bytes()
    exported = opening.open_checkpoint(run / "adapters" / "4")
    assert (exported.format, exported.base) == ("peft", str(TINY))
    for place in (run, adapter):  # a config that is given does not hide the weights that are there
        assert opening.open_checkpoint(place, hf_config=TINY).has_weights


def going_on(run: Path, adapter: Path, workdir: Path, **changes) -> Config:
    """The run's config, with that adapter to start from."""
    config = config_text.from_text((run / "config.txt").read_text())
    return replace(config, **{"init_adapter": str(adapter), "workdir": str(workdir)} | changes)


def test_training_starts_from_an_adapter(run, adapter, tokens, peft_logits, tmp_path):
    """Of any format, on a mesh with stages that layers do not fill: the file's tensors, and peft's logits."""
    write_checkpoint(Job(source=opening.open_checkpoint(run), to="orbax"), tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "weights")
    config = going_on(run, adapter, tmp_path / "run", mesh=MeshConfig(data=1, stage=4, tensor=2))
    program = Program(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        state, _ = resume.start_state(program, resume.open_source(config), SimpleNamespace(latest=None))
    for path, w in state.params.items():
        assert w.dtype == "float32" and w.sharding == program.params[path].sharding
        assert w.shape[0] == 8 and not np.any(w[6:])
    weights = {path: np.asarray(w) for path, w in {**state.frozen, **state.params}.items()}
    weights |= {path: w[:6] for path, w in weights.items() if path.startswith("blocks/")}
    stored = load_file(adapter / tensors.ADAPTER)
    ours = dict(pair for row in table.table_rows(config.adapter, 6) for pair in row.to_tensors(weights[row.path]))
    assert ours.keys() == stored.keys()
    assert all(np.array_equal(ours[name], stored[name]) for name in stored)
    np.testing.assert_allclose(logits(program.graph, weights, tokens), peft_logits, atol=1e-4, rtol=0)
    for given in (tmp_path / "orbax", run, run / "checkpoints" / "4"):
        source = resume.open_source(replace(config, init_adapter=str(given)))
        for path, w in checkpoints.load_weights(source, program.params).items():
            np.testing.assert_array_equal(w, state.params[path])


def test_weights_trained_beside_an_adapter_resume_and_are_exported(tmp_path):
    """On a mesh with stages that layers do not fill, as `modules_to_save`, and nothing of layers without an adapter."""
    parts = AdapterConfig(
        kind="lora", rank=2, targets=("attn/q",), layers=(1, 5), modules_to_save=("embedding", "pre_*_norm")
    )
    recipe = recipes.load_recipe("tiny_lora")
    short = replace(recipe.train, sequence_length=64, micro_batch_size=1)
    config = replace(recipe, adapter=parts, train=short, init=str(TINY), workdir=str(tmp_path / "run"))
    program = Program(config, make_mesh(MeshConfig(data=2, stage=4)))
    with jax.set_mesh(program.mesh):
        source = resume.open_source(config)
        start, _ = resume.start_state(program, source, SimpleNamespace(latest=None))
        trained = {path: 2 * w for path, w in start.params.items()}
        with Checkpoints(tmp_path / "run", keep=1) as kept:
            kept.save(3, trained, start.optimizer, {"data": 0})
        with Checkpoints(tmp_path / "run", keep=1) as kept:
            state, _ = resume.start_state(program, source, kept)
    assert state.frozen.keys() == program.frozen.keys() and "embedding" in state.params
    for path, w in trained.items():
        np.testing.assert_array_equal(state.params[path], w, err_msg=path)
    (tmp_path / "run" / "config.txt").write_text(config_text.to_text(config))
    write_checkpoint(Job(source=opening.open_checkpoint(tmp_path / "run"), to="peft"), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / tensors.ADAPTER)
    layers = {int(name.split(".")[4]) for name in stored if "lora_A" in name}
    norms = [name for name in stored if "layernorm" in name]
    assert layers == {1, 5} and len(norms) == 12
    np.testing.assert_array_equal(stored["base_model.model.lm_head.weight"], trained["embedding"])
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    loaded = peft.get_peft_model(reference, peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    assert not loaded.load_adapter(tmp_path / "adapter", "default").unexpected_keys


def evaluations(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


@pytest.mark.parametrize("run", ["lora"], indirect=True)
def test_training_goes_on_from_an_adapter(run, adapter, tmp_path, capsys):
    """From the loss that it had; and what comes of it resumes and is exported, whatever became of its exports."""
    config = going_on(run, adapter, tmp_path / "run", steps=1)
    loop.train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"weights {TINY} adapter starts from peft {adapter} parameters" in said
    assert evaluations(tmp_path / "run")[0] == pytest.approx(evaluations(run)[4], rel=1e-6)
    folder = tmp_path / "run" / "adapters"
    assert f"For PEFT: {folder}/1 " in said
    first = contents(folder / "1")
    assert first["adapter_config.json"] == (adapter / "adapter_config.json").read_bytes()
    assert first[tensors.ADAPTER] != (adapter / tensors.ADAPTER).read_bytes()
    # As a run leaves it that is killed before its checkpoint is whole, and while it writes another.
    (folder / "1").rename(folder / "3")
    (folder / ".2.partial").mkdir()
    loop.train(replace(config, steps=2))
    assert "adapter started from peft" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in folder.iterdir()} == {"1", "2"}
    assert contents(folder / "1") == first
    write_checkpoint(Job(source=opening.open_checkpoint(tmp_path / "run"), to="peft"), tmp_path / "adapter")
    assert contents(folder / "2") == contents(tmp_path / "adapter")


@pytest.mark.parametrize("run", ["lora"], indirect=True)
def test_a_full_disk_leaves_out_an_adapter(run, adapter, tmp_path, monkeypatch, capsys):
    config = going_on(run, adapter, tmp_path / "run")
    exports, rooms = export.AdapterExports(config, resume.open_source(config)), iter([False, False, True, False])
    exports.folder.mkdir(parents=True)

    def write(job, folder):
        if not next(rooms):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(export, "write_checkpoint", write)
    failed = "the adapter of step {} could not be written for PEFT (No space left on device)"
    exports.save(1, {})
    exports.save(2, {})
    assert capsys.readouterr().err == f"warning: {failed.format(1)}; training goes on\n"
    with pytest.raises(OSError, match=re.escape(failed.format(2))):
        exports.finish()
    exports.save(3, {})
    exports.finish()
    exports.save(4, {})
    assert capsys.readouterr().err.startswith(f"warning: {failed.format(4)}")


def test_adapters_that_do_not_fit_are_refused(run, adapter, tmp_path):
    config = going_on(run, adapter, tmp_path / "run")
    other = AdapterConfig(kind="lora", rank=4, alpha=8, rslora=True, dropout=0.5, targets=("attn/q", "attn/v"))
    kind = "it has kind dora, and adapter.kind is lora; " if run.name == "dora" else ""
    fix = f"give {'--adapter.kind dora ' if kind else ''}--adapter.rank 8 --adapter.alpha 16"
    every = "attn/q attn/k attn/v attn/o mlp/gate mlp/up mlp/down"
    message = (
        f"the adapter {adapter} is not of the kind that this run trains: {kind}it has rank 8, and adapter.rank is 4; "
        f"it has alpha 16, and adapter.alpha is 8; it has rslora False, and adapter.rslora is True; it has targets "
        f"{every}, and adapter.targets is attn/q attn/v; {fix} --adapter.rslora False --adapter.targets {every}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resume.open_source(replace(config, adapter=other))
    # What it says mends it. Dropout may differ.
    sft = ["--config", "tiny_sft", "--init", str(TINY), "--adapter", str(adapter), "--adapter.dropout", "0.1"]
    with pytest.raises(ValueError, match=f"it has kind {run.name}, and adapter.kind is none; ") as caught:
        resume.open_source(train.parse(sft).run)
    options = str(caught.value).partition("; give ")[2].split()
    assert resume.open_source(train.parse([*sft, *options]).run).adapter == replace(
        config.adapter, targets=tuple(every.split())
    )
    kind = {"lora": "LoRA", "dora": "DoRA"}[run.name]
    message = rf"init {adapter} has a {kind} on it; give its model, {TINY}, as --init and the adapter alone as"
    with pytest.raises(ValueError, match=message):
        resume.open_source(replace(config, init=str(adapter), init_adapter=""))


def changed_adapter(adapter: Path, folder: Path, settings: dict, **added: np.ndarray) -> Path:
    """A copy with other settings and more tensors."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    save_file(load_file(adapter / tensors.ADAPTER) | added, folder / tensors.ADAPTER)
    return folder


@pytest.mark.parametrize("run", ["lora"], indirect=True)
def test_settings_are_compared_as_values_and_the_vocabulary_before_them(run, adapter, tmp_path):
    config = going_on(run, adapter, tmp_path / "run")
    whole = changed_adapter(adapter, tmp_path / "whole", {"alpha_pattern": {"q_proj": 4}})
    patterns = replace(config.adapter, alpha_pattern=(("attn/q", 4.0),))
    source = resume.open_source(replace(config, init_adapter=str(whole), adapter=patterns))
    assert source is not None and source.adapter.alpha_pattern == patterns.alpha_pattern
    with pytest.raises(ValueError, match=r"it has alpha_pattern attn/q 4, and adapter.alpha_pattern is none; give"):
        resume.open_source(replace(config, init_adapter=str(whole)))
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    rows = np.zeros((4099, config.model.width), np.float32)
    grown = changed_adapter(adapter, tmp_path / "grown", saved, **dict.fromkeys(names, rows))
    with pytest.raises(ValueError, match=r"grown the vocabulary to 4099 tokens.*; merge it first .* 4099$"):
        resume.open_source(replace(config, init_adapter=str(grown)))


def test_the_checkpoint_in_the_repository():
    """It is small, loads in transformers as it does here, and predicts Python's documentation."""
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 8e6
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    text = "Return a list of the names of the files in the directory."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        output = peer(ids, labels=ids)
    assert output.loss < 4, "an untrained model has 8.3"
    np.testing.assert_allclose(our_logits(TINY, ids.numpy()), output.logits.numpy(), atol=1e-4, rtol=0)
