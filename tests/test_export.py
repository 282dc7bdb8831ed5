"""From a training run to the Torch world: what transformers and peft load computes what was trained."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from gemma2_jax import config as configs, loop, lora, model
from gemma2_jax.config import ComputeConfig
from gemma2_jax.convert import checkpoints
from gemma2_jax.model import Gemma2

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-gemma2"
QUESTION = "<start_of_turn>user\nWhat does json.dumps do?<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(scope="module", params=["lora", "dora"])
def run(request, tmp_path_factory) -> Path:
    """A few steps of the tiny recipe from the checkpoint in the repository, at a rate that shows."""
    workdir = tmp_path_factory.mktemp("run") / request.param
    recipe = configs.load(f"tiny_{request.param}")
    sizes = dict(sequence_length=64, global_batch_size=8, micro_batch_size=1, eval_batches=1)
    loop.train(
        replace(
            recipe,
            init=str(TINY),
            workdir=str(workdir),
            steps=4,
            optim=replace(recipe.optim, lr=0.02, warmup_steps=0),
            train=replace(recipe.train, **sizes),
        )
    )
    return workdir


def our_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of any checkpoint, adapters apart, in float32."""
    source = checkpoints.open_checkpoint(path)

    def create() -> Gemma2:
        whole = Gemma2(source.model, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
        lora.attach(whole, source.adapter, rngs=nnx.Rngs(0))
        return whole

    graph, shapes = nnx.split(nnx.eval_shape(create))
    weights = checkpoints.load(source, model.flat(shapes))
    whole = model.rebuild(graph, weights)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return jax.jit(lambda whole: whole.logits(whole(tokens, positions, np.ones_like(tokens))))(whole)


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
        theirs = merged(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<bos>")


def test_adapter_into_peft(run, tokens, tmp_path):
    convert(run, tmp_path / "adapter", "--to", "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert adapted.peft_config["default"].use_dora == (run.name == "dora")
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(run, tokens), theirs, atol=1e-4, rtol=0)


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
