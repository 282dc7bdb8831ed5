"""Configs, recipes and the command line: sizes, golden texts, and mistakes that are told apart."""

import dataclasses
import difflib
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma2_jax import config as configs, config_text, recipes, train
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, AdapterConfig

GOLDEN = Path(__file__).parent / "golden" / "configs"
REAL = [f"{size}_{kind}" for size in ("2b", "9b", "27b") for kind in ("pretrain", "sft", "lora", "dora")]
TINY = [f"tiny_{kind}" for kind in ("pretrain", "sft", "lora", "dora")]


def test_there_are_these_recipes():
    assert recipes.recipe_names() == sorted(REAL + TINY)


@pytest.mark.parametrize("name", REAL + TINY)
def test_recipes_are_golden(name):
    """A recipe says what it said. Where it is meant to change, write the new text: UPDATE_GOLDEN=1 pytest."""
    path, text = GOLDEN / f"{name}.txt", config_text.to_text(recipes.load_recipe(name))
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    changes = "\n".join(difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), lineterm=""))
    assert not changes, changes
    assert config_text.from_text(text) == recipes.load_recipe(name)


@pytest.mark.parametrize(
    ("model", "parameters", "gflops"),
    [
        (GEMMA2_2B, 2_614_341_888, (16.99, 17.97)),
        (GEMMA2_9B, 9_241_705_984, (59.68, 62.85)),
        (GEMMA2_27B, 27_227_128_320, (167.99, 171.46)),
    ],
)
def test_sizes(model, parameters, gflops):
    """Parameters as in the released checkpoints; training GFLOP per token at 4096 and 8192 tokens."""
    assert model.parameter_count() == parameters
    for length, expected in zip((4096, 8192), gflops, strict=True):
        assert 3 * model.forward_flops(length) / 1e9 == pytest.approx(expected, abs=0.006)


def test_flops_of_frozen_weights():
    """A frozen weight has no gradient; queries, keys and values have one each, whatever is trained."""
    trained, adapted = recipes.load_recipe("9b_sft"), recipes.load_recipe("9b_lora")
    length = trained.train.sequence_length
    model = trained.model
    # Keys that the queries of a row see, by hand: all layers are within the window.
    assert length == adapted.train.sequence_length <= model.window
    attention = 42 * 2 * 2 * 16 * 256 * (length + 1) / 2
    assert model.attention_flops(length) == attention
    assert trained.training_flops == pytest.approx(3 * model.forward_flops(length))
    assert adapted.training_flops == pytest.approx(2 * (model.forward_flops(length) - attention) + 3 * attention)


def test_what_is_often_wrong():
    """Values that other programs have had wrong."""
    assert GEMMA2_9B.mlp_width == 14336
    assert GEMMA2_9B.query_pre_attn_scalar == 256
    assert GEMMA2_27B.query_pre_attn_scalar == 144
    assert {m.window for m in (GEMMA2_2B, GEMMA2_9B, GEMMA2_27B)} == {4096}


def test_megatron_bridge_defaults():
    """The table of its Gemma 2 recipes."""
    pretrain, sft, lora, dora = (recipes.load_recipe(f"9b_{kind}") for kind in ("pretrain", "sft", "lora", "dora"))
    assert (pretrain.optim.lr, pretrain.optim.min_lr, pretrain.optim.warmup_steps) == (3e-4, 3e-5, 500)
    assert (pretrain.train.global_batch_size, pretrain.train.micro_batch_size) == (32, 2)
    assert (pretrain.train.sequence_length, pretrain.steps, pretrain.train.seed) == (4096, 300_000, 1234)
    assert (sft.optim.lr, sft.optim.min_lr, sft.optim.warmup_steps, sft.steps) == (5e-6, 0.0, 10, 100)
    assert (lora.adapter.rank, lora.adapter.alpha, lora.optim.lr) == (32, 32.0, 1e-4)
    assert (dora.adapter.rank, dora.adapter.alpha, dora.optim.lr) == (32, 64.0, 1e-4)
    for config in (sft, lora, dora):
        assert (config.train.sequence_length, config.train.global_batch_size, config.train.seed) == (2048, 128, 5678)
        assert (config.optim.b1, config.optim.b2, config.optim.eps, config.optim.weight_decay) == (
            0.9,
            0.95,
            1e-8,
            0.033,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, "model.heads 6 is not a multiple of model.kv_heads 4"),
        ({"head_width": 15}, "model.head_width 15 is odd"),
        ({"layers": 0}, "model.layers is 0; it must be at least 1"),
        ({"attn_softcap": 0.0}, "use a positive cap, or None for no cap"),
    ],
)
def test_impossible_models(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(GEMMA2_2B, **change)


def test_no_evaluation_may_be_asked():
    assert not configs.DataConfig(eval_fraction=0.0).has_eval
    assert configs.DataConfig(eval_fraction=0.0, eval="here").has_eval
    assert configs.TrainConfig(eval_every=0).eval_every == 0
    for group, fields, message in (
        (configs.DataConfig, {"eval_fraction": 1.0}, "data.eval_fraction is 1.0; it must be at least 0 and below 1"),
        (configs.TrainConfig, {"eval_every": -1}, "train.eval_every is -1; it must be at least 0"),
        (configs.TrainConfig, {"log_every": 0}, "train.log_every is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            group(**fields)


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ("optim", {"lr": math.inf}, "optim.lr is inf; it must be positive and finite"),
        ("optim", {"weight_decay": math.inf}, "optim.weight_decay is inf; it must not be negative, nor infinite"),
        ("mesh", {"tensor": 0}, "tensor 0: every axis must be at least 1"),
        ("mesh", {"fsdp": -1}, "at most one may be -1"),
        ("adapter", {"rank": 10**9}, "adapter.rank is 1000000000, and no weight of the model is wider than 9216"),
        ("adapter", {"targets": ("",)}, "adapter.targets is empty"),
        ("train", {"seed": 10**20}, "train.seed is 100000000000000000000; it must be"),
        ("train", {"eval_batches": 2**31}, "train.eval_batches is 2147483648; it must be at least 1 and below 2**31"),
        ("", {"steps": 10**12}, "steps is 1000000000000; it must be at least 1 and below 2**31"),
        ("", {"workdir": ""}, "workdir is empty"),
    ],
)
def test_values_that_no_run_can_have(group, fields, message):
    recipe = recipes.load_recipe("2b_lora")
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(
            recipe, **({group: dataclasses.replace(getattr(recipe, group), **fields)} if group else fields)
        )


def test_booleans_as_megatron_bridge_writes_them():
    for value, packing in (("false", False), ("TRUE", True), ("False", False)):
        assert train.parse(["--config", "9b_dora", f"data.packing={value}"]).run.data.packing is packing
        assert train.parse(["--config", "9b_dora", "--data.packing", value]).run.data.packing is packing
    assert train.parse(["--config", "9b_dora", "data.train=true"]).run.data.train == "true"


def test_adapters_without_what_they_are_for():
    recipe = recipes.load_recipe("2b_lora")
    with pytest.raises(ValueError, match="init_adapter is here, and init is empty; set init to the model it is for"):
        dataclasses.replace(recipe, init="", init_adapter="here")
    exporting = dataclasses.replace(recipe.train, export_adapter=True)
    for changes in ({"init": ""}, {"adapter": AdapterConfig()}):
        with pytest.raises(ValueError, match=r"export_adapter is True, .* it takes adapter.kind lora or dora, on a"):
            dataclasses.replace(recipe, train=exporting, **changes)


def test_config_text_of_another_version():
    text = config_text.to_text(recipes.load_recipe("2b_lora"))
    with pytest.raises(ValueError, match=r"another version of this program: .*'hue'"):
        config_text.from_text(text + "optim.hue = 'red'\n")
    with pytest.raises(ValueError, match=r"another version of this program: unknown groups \['paint'\]"):
        config_text.from_text(text + "paint.hue = 'red'\n")
    with pytest.raises(ValueError, match=r"config.txt:2: .model.layers = __import__"):
        config_text.from_text("steps = 1\nmodel.layers = __import__('os').getcwd()\n")


def test_both_ways_of_naming_a_field():
    dashed = train.parse(["--config", "9b_dora", "--optim.lr", "0.5", "--train.sequence-length", "1024"])
    assigned = train.parse(["optim.lr=0.5", "train.sequence_length=1024", "--config=9b_dora"])
    assert dashed == assigned
    assert dashed.run.optim.lr == 0.5
    assert dashed.run.adapter.alpha == 64.0
    assert train.parse(["--config", "tiny_lora", "--steps", "7", "workdir=a=b", "init="]).run.workdir == "a=b"
    # --adapter alone is where it starts from; --adapter.rank and the like, what it is.
    for short in (["--adapter", "a"], ["--adapter=a"], ["adapter=a"]):
        run = train.parse(["--config", "tiny_lora", *short, "--adapter.rank", "3"]).run
        assert (run.init_adapter, run.adapter.rank) == ("a", 3)


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from gemma2_jax.model_config import GEMMA2_2B\nfrom gemma2_jax.recipes import finetune\n\n"
        "def config():\n    return finetune('mine', GEMMA2_2B, 'somewhere', 'lora', steps=3)\n"
    )
    assert recipes.load_recipe(str(path)).steps == 3
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"has no function config\(\)"):
        recipes.load_recipe(str(path))


@pytest.mark.parametrize("module", ["train", "generate", "plan", "convert", "data"])
def test_help_answers_at_once(module):
    """In about a second, of which the interpreter takes some: JAX is not loaded."""
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_module('gemma2_jax.{module}', run_name='__main__')"
    )
    checked = f"import atexit, sys; atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr)); {code}"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "False"
    assert time.perf_counter() - started < 5


def test_help_lists_every_field():
    text = subprocess.run(
        [sys.executable, "-m", "gemma2_jax.train", "--config", "27b_lora", "--help"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"},
    ).stdout  # fmt: skip
    for line in config_text.to_text(recipes.load_recipe("27b_lora")).splitlines():
        key = line.split(" = ")[0].replace("_", "-")
        shown = re.search(rf"--{re.escape(key)}[^\n]*", text)
        assert shown, f"--{key} is not listed"
    for first in ("--config", "--workdir", "--steps", "--init", "--print"):
        assert first in text
    assert "peak learning rate (default: 0.0001)" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.columns", "prompt=q,completion=a"],
        ["--data.columns=prompt=q,completion=a"],
        ["data.columns=prompt=q,completion=a"],
    ],
)
def test_columns_on_the_command_line(arguments):
    run = train.parse(["--config", "tiny_lora", *arguments, "steps=3"]).run
    assert (run.data.column_names, run.steps) == ({"prompt": "q", "completion": "a"}, 3)


def test_columns_of_earlier_runs():
    text = config_text.to_text(recipes.load_recipe("tiny_lora"))
    old = "data.text_key = 'text'\ndata.prompt_key = 'q'\ndata.completion_key = 'completion'\n"
    assert config_text.from_text(text.replace("data.columns = ''\n", old)).data.column_names == {"prompt": "q"}
