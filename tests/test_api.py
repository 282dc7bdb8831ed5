"""The front door: its examples run, weights are sharded and come back bit for bit, imports work in any order."""

import doctest
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_plugin
from flax import nnx
from peers import BITING, hf_model
from small_runs import shorten_python_docs
from strange_folders import configure

import gemma2_jax as g2
from gemma2_jax import api, config_text, recipes
from gemma2_jax.convert.files.folder import copy_companions
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.verify import compare_checkpoints, compute_logits
from gemma2_jax.inference.loaded import _plain_graph
from gemma2_jax.model import lora
from gemma2_jax.model.gemma2 import flatten_state

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-gemma2"
TOKENS = [2, 5, 17, 300, 301, 9]


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory) -> Path:
    """A Hugging Face folder in float32 whose heads divide into eight."""
    folder = tmp_path_factory.mktemp("hf")
    hf_model(BITING["27b"]).save_pretrained(folder)
    copy_companions(TINY, None, folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "mesh",
        "load",
        "generate",
        "save",
        "recipe",
        "train",
        "convert",
        pytest.param("plan", marks=[needs_plugin, pytest.mark.exhaustive]),
    ],
)
def test_examples_run(name, tmp_path, monkeypatch):
    """Each docstring's example, with its outputs, where assets/ is and Python's documentation is short."""
    shorten_python_docs(monkeypatch)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    function = getattr(api, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=vars(api).copy())
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


def test_every_verb_has_an_example():
    verbs = [name for name in g2.__all__ if name[0].islower()]
    assert [name for name in verbs if ">>>" not in getattr(api, name).__doc__] == []


def test_a_star_imports_the_front_door():
    """The verbs, shown and documented as such though some are modules too, and nothing that they are made of."""
    names: dict = {}
    exec("from gemma2_jax import *", names)
    del names["__builtins__"]
    assert sorted(names) == dir(g2) == sorted(g2.__all__)
    for name in ("convert", "generate", "load", "mesh", "plan", "recipe", "save", "train"):
        assert repr(names[name]).startswith("<function "), names[name]
        assert names[name].__doc__ == getattr(api, name).__doc__


ORDERS = {
    "front door first": "import gemma2_jax as g2; {use}; import {modules}",
    "modules first": "import {modules}; import gemma2_jax as g2; {use}",
    "from the package": "from gemma2_jax import mesh, train, plan, generate, convert; import gemma2_jax as g2; {use}",
}


@pytest.mark.parametrize("order", ORDERS)
def test_functions_and_modules_share_names(order):
    """In whatever order they are imported, both the function and what the module defines are there."""
    names = ("mesh", "train", "plan", "generate", "convert")
    use = "assert " + " and ".join(f"callable(g2.{name})" for name in names)
    modules = ", ".join(f"gemma2_jax.{name}" for name in names)
    code = ORDERS[order].format(use=use, modules=modules) + (
        "; from gemma2_jax import mesh, train; mesh.make_mesh, train.parse, mesh.AXES"
        "; import inspect; assert [*inspect.signature(g2.train).parameters] == ['config']"
        "; assert dict(g2.mesh().shape)['tensor'] == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_it_imports_no_jax():
    code = (
        "import sys, os; before = dict(os.environ); import gemma2_jax as g2; g2.Config, g2.recipe('tiny_lora'), dir(g2)"
    )
    code += "; assert 'jax' not in sys.modules and dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        g2.lod  # noqa: B018


@pytest.mark.parametrize(
    "sizes", [dict(tensor=8), dict(tensor=2, fsdp=2, data=2), dict(tensor=4, stage=2), dict(context=4, fsdp=2)]
)
def test_loads_sharded(eight_heads, sizes):
    """Logits are those of one device, which has no whole matrix; stages and context shards become shards of fsdp."""
    model = g2.load(eight_heads, mesh=g2.mesh(**sizes))
    assert isinstance(model, g2.Gemma2)
    shards = math.prod(sizes.values()) // sizes.get("data", 1)
    for path, w in flatten_state(nnx.state(model)).items():
        if path.endswith("norm/w"):
            continue
        whole = sizes.get("tensor") == 8 and path in (
            "blocks/attn/k/w",
            "blocks/attn/v/w",
        )  # four heads stay as they are
        assert len({shard.index for shard in w.addressable_shards}) == (1 if whole else shards), path
    expected = compute_logits(open_checkpoint(eight_heads), TOKENS)
    found = model([TOKENS])
    assert found.shape == (1, len(TOKENS), 384) and found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, atol=5e-5, rtol=0)  # as in test_generate


def test_positions_and_segments_have_defaults(eight_heads):
    model = g2.load(eight_heads)
    pair = jnp.asarray([TOKENS + TOKENS])
    halves = jnp.asarray([[0] * 6 + [1] * 6])
    positions = jnp.asarray([[*range(6), *range(6)]])
    np.testing.assert_allclose(model(pair, positions, halves)[0, 6:], model([TOKENS])[0], atol=2e-5, rtol=0)
    assert not np.allclose(model(pair)[0, 6:], model([TOKENS])[0], atol=1e-2)


def test_a_model_is_shown_in_a_line(eight_heads):
    """With what is on it and where it lies; every weight is shown by its state."""
    model = g2.load(eight_heads, mesh=g2.mesh(fsdp=2, data=4))
    count = f"{model.config.parameter_count():,}"
    size = f"{model.config.layers} layers of width {model.config.width}; {count} parameters in float32"
    shown = f"LoadedModel({size}; computes in float32; on data 4 x fsdp 2, from {eight_heads})"
    assert str(model) == repr(model) == shown
    lora.attach_adapters(model, g2.AdapterConfig(kind="lora", rank=2, targets=("attn/q",)), rngs=nnx.Rngs(0))
    assert re.search(rf"{count} parameters in float32 \+ [\d,]+ of adapters in float32; computes", repr(model))
    create = partial(g2.Gemma2, model.config, attention=model.attention, dtype="bfloat16")
    plain = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0)))
    assert repr(plain) == f"Gemma2({size}; computes in bfloat16)"


def test_adapters_of_ones_own_generate(eight_heads):
    """The model is what is in memory, and not what its checkpoint was: adapters were added, and merged again."""
    model = g2.load(eight_heads)
    draw = partial(g2.generate, prompts=["a"], max_new_tokens=8, temperature=5.0)
    plain = draw(model)
    lora.attach_adapters(model, g2.AdapterConfig(kind="lora", rank=2), rngs=nnx.Rngs(0))
    assert draw(model) == plain
    for projection in lora.projections(model).values():
        projection.adapter.b[...] += 0.3
    adapted = draw(model)
    lora.merge_adapters(model)
    assert draw(model) == adapted != plain


def test_models_of_one_shape_share_programs(eight_heads):
    first, second = (_plain_graph(g2.load(eight_heads)) for _ in range(2))
    assert first == second and hash(first) == hash(second)


def test_gradients_go_through_a_loaded_model(eight_heads):
    """Inside a traced function it is a plain module."""
    model = g2.load(eight_heads)

    @nnx.jit
    def loss(model):
        return jnp.mean(model(jnp.asarray([TOKENS])) ** 2)

    gradients = flatten_state(nnx.grad(loss)(model))
    assert float(jnp.abs(gradients["blocks/attn/q/w"]).max()) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["hf", "orbax", "megatron"])
def test_saving_changes_no_bit(eight_heads, format, dtype, tmp_path):
    """Through a mesh of eight, and back into what it was loaded from."""
    g2.convert(eight_heads, tmp_path / "start", to="hf", dtype=dtype)
    model = g2.load(tmp_path / "start", mesh=g2.mesh(data=2, fsdp=2, tensor=2))
    g2.save(model, tmp_path / "saved", format=format)
    found, start = open_checkpoint(tmp_path / "saved"), open_checkpoint(tmp_path / "start")
    differences = compare_checkpoints(found, start)
    assert len(differences) == 13 and all(difference.within(0) for difference in differences)
    assert {shape.dtype for shape in found.shapes.values()} == {jnp.dtype(dtype)}
    assert found.tokenizer is not None


def test_saving_leaves_nothing_half(eight_heads, tmp_path, monkeypatch):
    model = g2.load(eight_heads)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        g2.save(model, tmp_path / "full")
    monkeypatch.setattr("gemma2_jax.convert.writing._write_safetensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        g2.save(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_model_of_ones_own_is_saved(tmp_path):
    """It need not have been loaded: weights of a loop of one's own, in float32."""
    config = BITING["2b"]
    whole = g2.load(_saved(config, tmp_path / "start"))
    plain = g2.Gemma2(config, attention=whole.attention, dtype="float32", rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(whole))
    g2.save(plain, tmp_path / "saved")
    differences = compare_checkpoints(open_checkpoint(tmp_path / "saved"), open_checkpoint(tmp_path / "start"))
    assert all(difference.within(0) for difference in differences)


def _saved(config, folder: Path) -> Path:
    hf_model(config).save_pretrained(folder)
    return folder


def test_generates_the_same_on_a_mesh():
    """One row on a mesh with two data shards; a draw with the seed of another gives another text."""
    prompts = ["def main():", "The"]
    one, spread = g2.load(TINY, dtype="float32"), g2.load(TINY, mesh=g2.mesh(tensor=2, fsdp=2), dtype="float32")
    texts = g2.generate(one, prompts, max_new_tokens=12)
    assert g2.generate(spread, prompts, max_new_tokens=12) == texts
    end = texts[0][-3:]
    assert g2.generate(spread, prompts[:1], max_new_tokens=12, stop=[end]) == [texts[0].partition(end)[0]]
    draws = [g2.generate(one, prompts, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 2)]
    assert draws[0] != draws[1]
    pairs = g2.generate(one, prompts, max_new_tokens=12, temperature=1.0, seed=1, samples=2)
    assert pairs[::2] == draws[0] and not {*pairs[1::2]} & {*draws[0]}
    with pytest.raises(ValueError, match=r"prompts is .*; give a list of strings"):
        g2.generate(one, "The")
    with pytest.raises(ValueError, match=r"stop is 'a'; give a list of strings"):
        g2.generate(one, prompts, stop="a")


def test_trained_model_is_the_run(tmp_path):
    """LoRA on four stages, which layers do not fill: the logits are those of what converts from the run's folder."""
    config = g2.recipe(
        "tiny_lora",
        steps=2,
        workdir=str(tmp_path / "run"),
        init=str(TINY),
        optim=dict(lr=0.1, warmup_steps=1),
        data=dict(train=str(ROOT / "tests/fixtures/sums.jsonl")),
        train=dict(sequence_length=64, global_batch_size=4, micro_batch_size=1, eval_every=0),
        mesh=dict(data=1, fsdp=2, stage=4),
    )
    result = g2.train(config)
    assert (result.step, [*result.losses], result.folder) == (2, [1, 2], tmp_path / "run")
    found = result.model([TOKENS])[0]
    np.testing.assert_allclose(found, compute_logits(open_checkpoint(result.folder), TOKENS), atol=1e-4, rtol=0)
    assert not np.allclose(found, compute_logits(open_checkpoint(TINY), TOKENS), atol=1e-2)
    with pytest.raises(ValueError, match=r"format='hf' has no place for; choose merge=True .*, or format='peft' for"):
        g2.save(result.model, tmp_path / "merged")
    g2.save(result.model, tmp_path / "merged", merge=True)
    merged = g2.load(tmp_path / "merged")
    np.testing.assert_allclose(merged([TOKENS])[0], found, atol=0.1, rtol=0)  # its weights are rounded to bfloat16
    g2.save(result.model, tmp_path / "adapter", format="peft")
    adapted = g2.load(TINY, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(adapted([TOKENS])[0], found, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(step=3), r"there is no step; did you mean steps\?"),
        (dict(lr=1), r"there is no lr; did you mean optim=dict\(lr=...\)\?"),
        (dict(train=dict(batch_size=3)), "did you mean train.micro_batch_size or train.global_batch_size"),
        (dict(model=dict(zzz=3)), r"there is no model.zzz; there are model.layers, "),
        (dict(train=dict(global_batch_size=0)), "train.global_batch_size is 0"),
    ],
)
def test_recipes_refuse_unknown_names(changes, message):
    with pytest.raises(ValueError, match=message):
        g2.recipe("9b_lora", **changes)


def test_recipes_take_groups_and_fields():
    found = g2.recipe("9b_lora", steps=7, train=dict(seed=3), data=g2.DataConfig(train="x"), optim=dict(lr=1e-3))
    base = recipes.load_recipe("9b_lora")
    expected = replace(
        base,
        steps=7,
        train=replace(base.train, seed=3),
        data=g2.DataConfig(train="x"),
        optim=replace(base.optim, lr=1e-3),
    )
    assert found == expected


ADAPTER = ROOT / "tests/fixtures/megatron/peft/A_f32_lora_hfpeft"


def test_an_adapter_alone_asks_for_its_model():
    with pytest.raises(ValueError, match=r"is an adapter, and its model.*give both: python -m gemma2_jax.gen"):
        g2.load(ADAPTER)


@pytest.mark.parametrize(
    ("src", "options", "message"),
    [
        (TINY, dict(to="peft"), "has no adapter, and to='peft' writes nothing else; write its weights with to='hf'"),
        (TINY, dict(to="hf", merge=True), "has no adapter; leave out merge=True"),
        (TINY, dict(to="orbax", ranks=(2, 1)), "to='orbax' is read at any parallelism; leave out ranks"),
        (TINY, dict(to="hf", dtype="float16"), "dtype='float16' goes with to='gguf' only; choose float32 or bfloat16"),
        (TINY, dict(to="hf", drop=["v_head.*"]), "drop=['v_head.*'] fits none of the 68 tensors"),
        (ADAPTER, dict(to="hf"), "and to='hf' writes them too; give that model as src and this adapter as adapter='/"),
    ],
)
def test_refusals_name_the_arguments_and_no_options(src, options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        g2.convert(src, tmp_path / "out", **options)
    assert "--" not in str(refused.value)


def test_notes_are_logged(tmp_path, caplog):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    configure(tie_word_embeddings=False)(folder)
    g2.convert(folder, tmp_path / "out", to="orbax")
    assert caplog.messages == [f"{folder}: its config unties the output matrix, which is the embedding all the same"]


def test_commands_are_listed_and_found():
    """The list is whole: every module with a command line is in it."""
    run = [sys.executable, "-m", "gemma2_jax"]
    listed = subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    modules = [path.stem for path in (ROOT / "gemma2_jax").glob("*.py") if "\ndef main()" in path.read_text()]
    for name in {*modules, "convert", "data"} - {"__main__"}:
        assert f"  {name} " in listed
    wrong = subprocess.run([*run, "trian"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "did you mean train?" in wrong.stderr
    helped = subprocess.run([*run, "plan", "--help"], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "--gpus" in helped.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps="two"), "steps is 'two'; it must be a whole number"),
        (dict(steps=True), "steps is True; it must be a whole number"),
        (dict(adapter=dict(kind="qlora")), "adapter.kind is 'qlora'; it must be one of 'none', 'lora', 'dora'"),
        (dict(adapter=dict(rslora="False")), "adapter.rslora is 'False'; it must be True or False"),
        (dict(optim=dict(decay_steps=0.5)), "optim.decay_steps is 0.5; it must be a whole number or None"),
        (dict(train=5), "train is 5; give a dict of its fields, or a TrainConfig"),
        ({"train.seed": 3}, r"there is no train.seed; give train=dict\(seed=...\)"),
    ],
)
def test_a_recipe_takes_values_of_the_right_type(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        g2.recipe("tiny_lora", **changes)


def test_paths_and_lists_become_what_config_txt_holds():
    config = g2.recipe("tiny_lora", workdir=Path("out/run"), adapter=dict(targets=["attn/q"]))
    assert config_text.from_text(config_text.to_text(config)) == config


def test_what_a_format_cannot_hold_is_warned_of(tmp_path):
    """No file of a canonical adapter is right at every tensor-parallel size."""
    fixtures = Path(__file__).parent / "fixtures/megatron"
    adapter = fixtures / "peft/A_f32_canonical_tp2pp1"
    with pytest.warns(UserWarning, match="these are for TP 2 alone"):
        g2.convert(fixtures / "hf/A_f32", tmp_path / "out", to="megatron-adapter", adapter=adapter, ranks=(2, 1))


def test_a_format_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no format 'pfet'; did you mean peft"):
        g2.convert(TINY, tmp_path / "out", to="pfet")
    with pytest.raises(ValueError, match=r"there is no format 'xyz'\. There are orbax, hf"):
        g2.convert(TINY, tmp_path / "out", to="xyz")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: g2.load(None), "the path of a checkpoint is None; give a string or a Path"),
        (lambda out: g2.load("~nobody-of-that-name/x"), "there is no user of that name; begin it with ./ or /"),
        (lambda out: g2.save("a", out), "model is 'a'; give what load gives"),
        (lambda out: g2.convert(TINY, None, to="hf"), "dst is None; give a string or a Path"),
        (lambda out: g2.convert(TINY, f"{out}\udcff", to="orbax"), "has bytes that are not UTF-8; give another name"),
        (lambda out: g2.convert(TINY, out, to="hf", dtype="int8"), "dtype is 'int8'; it may be float32, bfloat16"),
        (lambda out: g2.convert(TINY, out, to="hf", drop="*"), r"give a list of patterns, such as \['\*'\]"),
        (lambda out: g2.convert(TINY, out, to="megatron-legacy", ranks=(1.0, 2)), "give two whole numbers"),
    ],
)
def test_arguments_of_other_types_are_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_no_config():
    with pytest.raises(ValueError, match=r"give a Config, such as gemma2_jax.recipe\('tiny_lora'\)"):
        g2.train("tiny_lora")


def test_tokens_that_the_model_cannot_take_are_refused():
    model = g2.load(TINY)
    for tokens, message in (
        ([[2, 999_999]], "tokens are 2 to 999999, and the model's are 0 to 4095"),
        ([[2, -1]], "tokens are -1 to 2"),
        ([2, 651], r"of shape \(2,\); give whole numbers"),
        ([[]], "give whole numbers"),
        ([[1, 2], [3]], "rows of unequal length"),
        ([[2] * 513], "a row has 513 tokens, and the model's context is 512"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens)
