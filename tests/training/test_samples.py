"""What a run logs with its evaluations: samples, which are what `generate` gives, and the losses of held-out sets."""

import math
from dataclasses import replace

import jax
import pytest
from small_runs import ROOT, lines_of, small

import gemma2_jax as g2
from gemma2_jax import recipes
from gemma2_jax.config import DataConfig, MeshConfig, SampleConfig
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model_config import GEMMA2_TINY
from gemma2_jax.training import loop
from gemma2_jax.training.samples import Sampler, encode_prompts
from gemma2_jax.training.step import Program

pytestmark = pytest.mark.usefixtures("compiled_once")

QUESTION = "There are 51 bears, and 55 more come. How many are there?"
PROMPTS = (QUESTION, "What does json.dumps do?", f"{QUESTION} " * 10)  # the last is longer than the window


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes of the tiny model name assets/ relative to the repository."""
    monkeypatch.chdir(ROOT)


def test_samples_are_what_generate_gives(tmp_path, capsys):
    """Of each evaluation of a run that is resumed, on shards, with adapters; and the losses of two held-out sets."""
    lines = (ROOT / "tests/fixtures/sums.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("few", lines[:8]), ("many", lines[8:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    config = small("tiny_lora", tmp_path / "run", steps=4, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    config = replace(
        config,
        model=GEMMA2_TINY,
        optim=replace(config.optim, warmup_steps=1),
        init="assets/tiny-gemma2",
        data=replace(config.data, eval=f"{tmp_path}/few.jsonl,{tmp_path}/many.jsonl"),
        train=replace(config.train, eval_every=2, checkpoint_every=2, keep_checkpoints=9),
        sample=SampleConfig(prompts=PROMPTS, tokens=20),
    )
    loop.train(replace(config, steps=2))
    loop.train(config)
    logged = [line for line in lines_of(tmp_path / "run") if "samples" in line]
    assert [line["step"] for line in logged] == [0, 2, 4] and all(line["sample_seconds"] > 0 for line in logged)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    for line in logged:
        path = tmp_path / f"run/checkpoints/{line['step']}" if line["step"] else "assets/tiny-gemma2"
        texts = g2.generate(g2.load(path, mesh=mesh), PROMPTS, max_new_tokens=20, chat=True)
        assert line["samples"] == [
            {"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, texts, strict=True)
        ]
    completions = [sample["completion"] for line in logged for sample in line["samples"]]
    assert len({*completions}) > 6, "they show nothing of the training"
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "samples 3 prompt(s), as questions to the model, each with 20 new tokens at most, at every evaluation" in said
    )
    assert f"step 0: '{QUESTION}' -> '" in said
    last = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line][-1]
    for name in ("", "/few", "/many"):
        assert last[f"eval_perplexity{name}"] == pytest.approx(math.exp(last[f"eval_loss{name}"]), rel=1e-4)
    few, many = last["eval_loss/few"], last["eval_loss/many"]
    assert min(few, many) < last["eval_loss"] < max(few, many)
    assert f"few {few:.4f} ({math.exp(few):,.2f}), many {many:.4f} ({math.exp(many):,.2f})" in said


def test_no_shard_gathers_more_than_a_layer(tmp_path):
    """While samples are made, a device has less than two layers beside its shards of the weights.

    The weights are trained in float32 and computed with in bfloat16, the embedding too: a copy would have the size of
    six layers.
    """
    config = small("tiny_sft", tmp_path, mesh=MeshConfig(fsdp=8), sample=SampleConfig(prompts=("a",), tokens=4))
    shape = replace(config.model, layers=12, width=256, mlp_width=2048)
    config = replace(config, model=shape, compute=replace(config.compute, dtype="bfloat16"))
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer("assets/tiny-gemma2")
    with jax.set_mesh(mesh):
        program = Program(config, mesh)
        sampler = Sampler(program, encode_prompts(config, None, tokenizer, []), tokenizer)
    stats = sampler.compiled.memory_analysis()
    assert stats is not None
    stacked = sum(w.size for path, w in program.params.items() if path.startswith("blocks/"))
    layer = 4 * stacked / shape.layers  # bytes in float32, in which CPUs compute
    assert stats.temp_size_in_bytes < 2 * layer
    # The arguments are the weights alone: the optimizer's state would be twice as much again.
    assert stats.argument_size_in_bytes < 1.2 * 4 * sum(w.size for w in program.params.values()) / 8


def test_a_single_token(tmp_path):
    config = small("tiny_sft", tmp_path, mesh=MeshConfig(data=1), sample=SampleConfig(prompts=("a",), tokens=1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    tokenizer = load_tokenizer("assets/tiny-gemma2")
    with jax.set_mesh(mesh):
        program = Program(config, mesh)
        sampler = Sampler(program, encode_prompts(config, None, tokenizer, []), tokenizer)
        tokens_BC, counts_B = sampler.compiled(program.initial_state(program.random_base()))
    assert counts_B.tolist() == [1] and tokens_BC.tolist()[0][1:] == [0]


@pytest.mark.parametrize(
    ("kind", "shapes", "chat"),
    [
        ("instructions", [], True),
        ("instructions", ["messages", "prompt and completion"], True),
        ("instructions", ["prompt and completion"], False),
        ("text", ["text"], False),
    ],
)
def test_prompts_are_written_as_the_documents_are(kind, shapes, chat):
    config = replace(
        recipes.load_recipe("tiny_sft"), data=DataConfig(kind=kind), sample=SampleConfig(prompts=("a",), tokens=1)
    )
    prompts = encode_prompts(config, None, load_tokenizer("assets/tiny-gemma2"), shapes)
    assert prompts.chat == chat and (len(prompts.tokens[0]) > 2) == chat
    assert len(prompts.stop) == 1 + chat  # <eos>, and the end of a turn


def test_samples_that_cannot_be_made(tmp_path):
    sample = SampleConfig(prompts=("Hello",), tokens=8)
    with pytest.raises(ValueError, match=r"sample.tokens is 8, and sample.prompts is empty"):
        SampleConfig(tokens=8)
    config = small("tiny_sft", tmp_path, sample=sample)
    with pytest.raises(ValueError, match=r"sample.tokens is 8, and train.eval_every is 0, with"):
        replace(config, train=replace(config.train, eval_every=0))
    for axis, reason in (("stage", "keeps layers"), ("context", "splits the positions")):
        with pytest.raises(ValueError, match=rf"mesh.{axis} 2 {reason} .*; use mesh.fsdp or mesh.tensor instead"):
            loop.train(replace(config, mesh=MeshConfig(**{axis: 2})))
    longer = replace(config, model=replace(config.model, max_length=64), sample=replace(sample, tokens=60))
    with pytest.raises(ValueError, match=r"sample.prompts has 12 tokens, .* the model's context is 64; shorten the"):
        encode_prompts(longer, None, load_tokenizer("assets/tiny-gemma2"), [])
