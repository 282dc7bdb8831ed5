"""Every kind of export in transformers 4.57, in an environment that this makes: the tokens, texts and logits of 5.

It takes a package index and two minutes or so, of which the environment is 20 seconds; torch and peft are those of the
environment that runs it.
"""

import json
import random
import shutil
import site
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import ROOT, saved_run

from gemma2_jax import recipes
from gemma2_jax.convert.checkpoints import load_weights
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.companions import load_tokenizer
from gemma2_jax.convert.job import Format, Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import GEMMA2_TINY
from gemma2_jax.training.tokenizer import keep_tokenizer, load_run_tokenizer

pytestmark = pytest.mark.exhaustive

TINY = ROOT / "assets" / "tiny-gemma2"
PROGRAM = ROOT / "tests" / "load_exports.py"
# A tokenizer with traits of Gemma's: bytes for what it lacks, and symbols that are found before anything is merged.
TRAIN = """
import io, json, sys
import sentencepiece
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(open(sys.argv[1]).read().splitlines()), model_writer=model, model_type="bpe", vocab_size=600,
    pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
    user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\\n", "\\n\\n", "\u2581" * 2, "\u2581" * 3, "<table>"],
    byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
    remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
)
open(sys.argv[2] + "/tokenizer.model", "wb").write(model.getvalue())
pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
print(pieces.encode(json.loads(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment with transformers 4.57, over the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    interpreter = folder / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--quiet", "transformers>=4.57,<5", "sentencepiece")
    return interpreter


def run(*command: object) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def convert(source: Path, target: Path, to: Format, **options) -> Path:
    write_checkpoint(Job(source=open_checkpoint(source), to=to, **options), target)
    return target


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> list[Path]:
    """What is written of a run of full training, of one of an adapter, and of a model that was in Megatron's format."""
    folder = tmp_path_factory.mktemp("exports")
    source, random, runs = open_checkpoint(TINY), np.random.default_rng(0), {}
    for kind in ("sft", "lora"):
        config = replace(recipes.load_recipe(f"tiny_{kind}"), init=str(TINY), workdir=str(folder / kind))
        if kind == "sft":
            weights = {path: np.asarray(w, np.float32) for path, w in load_weights(source, source.shapes).items()}
        else:
            shapes = table.array_shapes(table.table_rows(config.adapter, GEMMA2_TINY.layers), GEMMA2_TINY)
            weights = {path: random.normal(0, 0.02, shape).astype(np.float32) for path, shape in shapes.items()}
        runs[kind] = saved_run(folder / kind, config, {1: weights})
        keep_tokenizer(config, source, load_run_tokenizer(config, source, resumes=False))
    return [
        TINY,
        convert(runs["sft"], folder / "hf", "hf"),
        convert(runs["lora"], folder / "merged", "hf", merge=True),
        convert(runs["lora"], folder / "peft", "peft"),
        convert(convert(TINY, folder / "megatron", "megatron"), folder / "back", "hf"),
        convert(convert(TINY, folder / "orbax", "orbax"), folder / "from_orbax", "hf"),
    ]


def test_exports_load_in_both(python, exports):
    old, new = (json.loads(run(interpreter, PROGRAM, *exports)) for interpreter in (python, sys.executable))
    assert old.pop("version").startswith("4.57.") and new.pop("version").startswith("5.")
    assert list(old) == list(new) == list(map(str, exports))
    for name, found in new.items():
        np.testing.assert_allclose(found.pop("logits"), old[name].pop("logits"), atol=1e-4, rtol=0, err_msg=name)
    assert all(found == new[str(TINY)] for found in (*old.values(), *new.values()))


def test_a_tokenizer_model_gives_sentencepiece_s_tokens_in_both(python, tmp_path):
    """Of a model that SentencePiece trained, and in transformers 4.57 too, from the tokenizer.json of an export."""
    bits = ["The  layers", "\n\n\n", "   of    ", "Gemma", "<start_of_turn>", "\t\t", "héllo", "漢字", "🙂👩‍🚀", " ",
            "42", "<table>", " " * 40, "\r\n", "\0", "▁▁", " convert(", "_layer_module"]  # fmt: skip
    chance = random.Random(0)
    texts = bits + ["".join(chance.choices(bits, k=chance.randrange(2, 12))) for _ in range(200)]
    source = shutil.copytree(TINY, tmp_path / "source", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    (tmp_path / "train.py").write_text(TRAIN)
    expected = json.loads(
        run(python, tmp_path / "train.py", ROOT / "docs" / "architecture.md", source, json.dumps(texts))
    )
    tokenizer = load_tokenizer(source)
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == expected
    export = convert(source, tmp_path / "export", "hf")
    code = "import json, sys, transformers as t; tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1]); print(["
    code += "tokenizer(text, add_special_tokens=False)['input_ids'] for text in json.loads(sys.argv[2])])"
    for interpreter in (python, sys.executable):
        assert json.loads(run(interpreter, "-c", code, export, json.dumps(texts))) == expected
