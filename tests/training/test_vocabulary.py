"""A tokenizer with added tokens: the embedding grows for it, is trained and exported; what no one means is refused."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from peers import hf_model
from small_runs import ROOT, small

from gemma2_jax import config_text
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.convert.checkpoints import Checkpoint, load_weights, read_array
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.verify import compute_logits
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model_config import GEMMA2_TINY, TOKEN_ROWS, AdapterConfig
from gemma2_jax.training import loop, resume
from gemma2_jax.training.step import Program
from gemma2_jax.training.tokenizer import find_tokens, grow_vocabulary

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = ROOT / "assets" / "tiny-gemma2"
MODEL = replace(GEMMA2_TINY, layers=2, width=48, mlp_width=128)  # that of `small`
TOKENIZER = load_tokenizer(TINY)
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


ROWS = AdapterConfig(kind="lora", rank=2, targets=("attn/q", "mlp/down"), trainable_tokens=("added", "for", 300))


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(AdapterConfig(), marks=pytest.mark.exhaustive),
        pytest.param(AdapterConfig(kind="lora", modules_to_save=("embedding",)), marks=pytest.mark.exhaustive),
        ROWS,
    ],
    ids=["sft", "lora", "tokens"],
)
def test_the_embedding_grows_is_trained_and_is_exported(config, adapter, tmp_path, capsys):
    config = replace(config, adapter=adapter, workdir=str(tmp_path / "run"))
    loop.train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"4,096 rows of {config.init} + 128 for added tokens = 4,224 (model.vocab_size); a new row starts as" in said
    assert config_text.from_text((config.output / "config.txt").read_text()).model.vocab_size == 4224
    loop.train(replace(config, steps=3))  # by the same command, with the tokenizer that the run kept
    assert "resumes after step 2" in " ".join(capsys.readouterr().out.split())
    run = open_checkpoint(config.output)
    if adapter.trainable_tokens:
        check_token_rows(config, run, tmp_path)
    write_checkpoint(Job(source=run, to="hf", dtype="float32", merge=adapter.kind != "none"), tmp_path / "hf")
    rows = read_array(open_checkpoint(tmp_path / "hf"), "embedding", (slice(4096, None), slice(None)))
    assert rows.shape == (128, MODEL.width)
    assert np.abs(rows[:3] - rows[3:6]).max(1).min() > 1e-3, "rows of tokens that the data has were not trained"
    np.testing.assert_allclose(rows[4:], np.broadcast_to(rows[3], rows[4:].shape), atol=1e-6)
    exported = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer("What is a blorp?<tool>f<call>" * 20)["input_ids"]
    assert exported.config.vocab_size == 4224 and len(tokens) > MODEL.window and 4098 in tokens
    with torch.no_grad():
        expected = exported(torch.tensor([tokens])).logits[0].numpy()
    # Weights that are off by one rounding (2**-24) move transformers' own logits by 1.4e-6 to 1.8e-6 of their size, and
    # single ones by up to 1.7e-4, which is as far as they are from those in float64. Ours are 2.3e-6 from them,
    # whether the adapter is merged or beside the weights: no order of sums is to blame.
    for source in (open_checkpoint(tmp_path / "hf"), run):
        error = np.linalg.norm(compute_logits(source, tokens) - expected) / np.linalg.norm(expected)
        assert error < 6e-6, f"relative L2 error {error:.2e}"


def check_token_rows(config: Config, run: Checkpoint, folder: Path) -> None:
    """What is kept of rows that were trained, that a straight run has the same, and that peft computes with them."""
    ids = (4096, 4097, 4098, TOKENIZER.encode("for", add_special_tokens=False)[0], 300)
    saved = config_text.from_text((config.output / "config.txt").read_text())
    assert saved.adapter.trainable_tokens == run.adapter.trainable_tokens == ids
    result = loop.train(replace(config, steps=3, workdir=str(folder / "straight")))
    every = slice(None), slice(None)
    np.testing.assert_array_equal(result.state.params[TOKEN_ROWS], read_array(run, TOKEN_ROWS, every))
    moments = [w for w in jax.tree.leaves(result.state.optimizer) if w.shape == (len(ids), MODEL.width)]
    assert len(moments) == 2
    write_checkpoint(Job(source=run, to="peft"), folder / "peft")
    written = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == list(ids) and written["modules_to_save"] is None
    model = transformers.Gemma2ForCausalLM.from_pretrained(config.init, attn_implementation="eager")
    model.resize_token_embeddings(4224, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(model, folder / "peft")
    tokens = [2, 4098, 300, 4096, 7, 4097, ids[3], 12]
    with torch.no_grad():
        expected = loaded(torch.tensor([tokens])).logits[0].numpy()
    error = np.linalg.norm(compute_logits(run, tokens) - expected) / np.linalg.norm(expected)
    assert error < 6e-6, f"relative L2 error {error:.2e}"
    for name, source in (("orbax", run), ("read", open_checkpoint(folder / "peft", base=config.init))):
        write_checkpoint(Job(source=source, to="orbax"), folder / name)
        write_checkpoint(Job(source=open_checkpoint(folder / name), to="peft"), folder / f"{name}-peft")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (folder / f"{name}-peft" / file).read_bytes() == (folder / "peft" / file).read_bytes(), name


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, stage=2), MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig()])
def test_new_rows_are_those_of_transformers(config, mesh):
    """The mean, from which those of transformers differ by a hundred-thousandth; the others are as they were."""
    model = hf_model(MODEL)
    old = model.model.embed_tokens.weight.detach().numpy().copy()
    torch.manual_seed(0)
    model.resize_token_embeddings(4099, pad_to_multiple_of=128)
    expected = model.model.embed_tokens.weight.detach().numpy()
    source = resume.open_source(config)
    program = Program(grow_vocabulary(config, source, load_tokenizer(config.data.tokenizer)), make_mesh(mesh))
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
        (
            dict(adapter=AdapterConfig(kind="lora")),
            "added",
            r"lora 3 rows of added tokens would not be trained. Train them too, with --adapter.trainable_tokens added",
        ),
        (dict(adapter=replace(ROWS, trainable_tokens=(4097, 300))), "added", r"lora 2 rows of added tokens would not"),
        (
            dict(adapter=ROWS),
            "own",
            r"has 'added', and the tokenizer of .* has no tokens beyond the 4,096 of the model",
        ),
        (
            dict(adapter=replace(ROWS, trainable_tokens=("a blorp",))),
            "added",
            r"has 'a blorp', which the tokenizer of .* makes \d tokens of, \[.*, 4098\]; give one of their ids, or a",
        ),
        (dict(model=replace(MODEL, vocab_size=4100)), "own", r"is 4,100, which its tokenizer does not need"),
        ({}, "swapped", r"not the model's own with tokens added, as '(if|or)' is \d+ in it and \d+ in"),
    ],
)
def test_what_cannot_be_meant_is_refused(config, tmp_path, changes, tokenizer, message):
    folders = {"added": config.data.tokenizer, "own": config.init, "swapped": swap_tokens(tmp_path)}
    config, tokenizer = replace(config, **changes), load_tokenizer(folders[tokenizer])
    source = resume.open_source(config)
    with pytest.raises(ValueError, match=message):
        grow_vocabulary(find_tokens(config, source, tokenizer), source, tokenizer)


def test_a_size_that_is_given_is_kept_to(config):
    config = replace(config, model=replace(MODEL, vocab_size=4100))
    grown = grow_vocabulary(config, resume.open_source(config), load_tokenizer(config.data.tokenizer))
    assert grown == config
