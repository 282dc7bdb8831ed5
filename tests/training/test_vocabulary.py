"""A tokenizer with added tokens: the embedding grows for it, is trained and exported; what no one means is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from peers import hf_model
from small_runs import ROOT, small

from gemma2_jax import config as configs
from gemma2_jax.config import GEMMA2_TINY, AdapterConfig, Config, MeshConfig
from gemma2_jax.convert.checkpoints import load_weights, read_array
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.verify import compute_logits
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training import loop, resume
from gemma2_jax.training.step import Program
from gemma2_jax.training.tokenizer import grow_vocabulary

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = ROOT / "assets" / "tiny-gemma2"
MODEL = replace(GEMMA2_TINY, layers=2, width=48, mlp_width=128)  # that of `small`
ADDED = ["<tool>", "<call>", "blorp"]  # 4096 to 4098


def copy_tokenizer(folder: Path, added: list[str]) -> Path:
    """The tiny model's tokenizer with tokens added."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes((TINY / "tokenizer_config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A run of full training on a model of 4096 tokens, with a tokenizer of 4099 and data that has them."""
    folder = tmp_path_factory.mktemp("vocabulary")
    hf_model(MODEL).save_pretrained(folder / "model")
    copy_tokenizer(folder / "model", [])
    data = folder / "data.jsonl"
    line = json.dumps({"prompt": "What is a blorp?", "completion": "<tool>f<call> A blorp."})
    data.write_text(f"{line}\n" * 40)
    run = small("tiny_sft", folder / "run", init=str(folder / "model"), steps=2)
    tokenizer = copy_tokenizer(folder / "added", ADDED)
    return replace(
        run,
        data=replace(run.data, train=str(data), tokenizer=str(tokenizer), eval_fraction=0.0),
        optim=replace(run.optim, lr=0.01, warmup_steps=0),
        mesh=MeshConfig(data=1, stage=2, fsdp=2, tensor=2),
    )


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(),
        pytest.param(AdapterConfig(kind="lora", modules_to_save=("embedding",)), marks=pytest.mark.exhaustive),
    ],
    ids=["sft", "lora"],
)
def test_the_embedding_grows_is_trained_and_is_exported(config, adapter, tmp_path, capsys):
    config = replace(config, adapter=adapter, workdir=str(tmp_path / "run"))
    loop.train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"4,096 rows of {config.init} + 128 for added tokens = 4,224 (model.vocab_size); a new row starts as" in said
    assert configs.from_text((config.output / "config.txt").read_text()).model.vocab_size == 4224
    loop.train(replace(config, steps=3))  # by the same command, with the tokenizer that the run kept
    assert "resumes after step 2" in " ".join(capsys.readouterr().out.split())
    run = open_checkpoint(config.output)
    rows = read_array(run, "embedding", (slice(4096, None), slice(None)))
    assert rows.shape == (128, MODEL.width)
    assert np.abs(rows[:3] - rows[3:6]).max(1).min() > 1e-3, "rows of tokens that the data has were not trained"
    np.testing.assert_allclose(rows[4:], np.broadcast_to(rows[3], rows[4:].shape), atol=1e-6)
    write_checkpoint(Job(source=run, to="hf", dtype="float32", merge=adapter.kind != "none"), tmp_path / "hf")
    exported = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer("What is a blorp?<tool>f<call>" * 20)["input_ids"]
    assert exported.config.vocab_size == 4224 and len(tokens) > MODEL.window and 4098 in tokens
    with torch.no_grad():
        expected = exported(torch.tensor([tokens])).logits[0].numpy()
    # Of what was written, as an adapter beside the weights is rounded otherwise than a merged one.
    np.testing.assert_allclose(compute_logits(open_checkpoint(tmp_path / "hf"), tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, stage=2), MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig()])
def test_new_rows_are_those_of_transformers(config, mesh):
    """The mean, from which those of transformers differ by a hundred-thousandth; the others are as they were."""
    model = hf_model(MODEL)
    old = model.model.embed_tokens.weight.detach().numpy().copy()
    torch.manual_seed(0)
    model.resize_token_embeddings(4099, pad_to_multiple_of=128)
    expected = model.model.embed_tokens.weight.detach().numpy()
    source = resume.open_source(config)
    program = grow_vocabulary(Program(config, make_mesh(mesh)), source, load_tokenizer(config.data.tokenizer))
    (found,) = load_weights(source, {"embedding": program.base["embedding"]}).values()
    assert found.shape == expected.shape and found.sharding == program.params["embedding"].sharding
    np.testing.assert_array_equal(found[:4096], old)
    np.testing.assert_allclose(found[4096:], expected[4096:], atol=1e-4)
    np.testing.assert_allclose(
        found[4096:], np.broadcast_to(old.mean(0, dtype=np.float64), (128, MODEL.width)), atol=1e-7
    )


def swap_tokens(folder: Path) -> Path:
    """The tokenizer with added tokens, and two of the model's in each other's place."""
    file = copy_tokenizer(folder, ADDED) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {"if": vocabulary["or"], "or": vocabulary["if"]}
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "tokenizer", "message"),
    [
        (dict(init=""), "added", r"has 4,099 entries, and the embedding 4,096 rows; give --model.vocab_size 4224"),
        (dict(adapter=AdapterConfig(kind="lora")), "added", r"kind lora the rows of the added tokens would not be"),
        (dict(model=replace(MODEL, vocab_size=4100)), "own", r"is 4,100, which its tokenizer does not need"),
        ({}, "swapped", r"not the model's own with tokens added, as '(if|or)' is \d+ in it and \d+ in"),
    ],
)
def test_what_cannot_be_meant_is_refused(config, tmp_path, changes, tokenizer, message):
    folders = {"added": config.data.tokenizer, "own": config.init, "swapped": swap_tokens(tmp_path)}
    config = replace(config, mesh=MeshConfig(), **changes)
    program = Program(config, make_mesh(config.mesh))
    with pytest.raises(ValueError, match=message):
        grow_vocabulary(program, resume.open_source(config), load_tokenizer(folders[tokenizer]))


def test_a_size_that_is_given_is_kept_to(config):
    config = replace(config, mesh=MeshConfig(), model=replace(MODEL, vocab_size=4100))
    program = Program(config, make_mesh(config.mesh))
    grown = grow_vocabulary(program, resume.open_source(config), load_tokenizer(config.data.tokenizer))
    assert grown.params["embedding"].shape == (4100, MODEL.width)
