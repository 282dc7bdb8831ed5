"""Adapters between PEFT and ours, both ways: the same tensors, the same model, nothing dropped silently."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from peers import BITING
from safetensors.numpy import load_file, save_file

from gemma2_jax import config as configs, config_text, dims
from gemma2_jax.config import Config, OptimConfig
from gemma2_jax.convert.checkpoints import Checkpoint, load_weights
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.peft_config import peft_config, stored_config
from gemma2_jax.convert.job import Format, Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model import gemma2 as model, lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model_config import AdapterConfig
from gemma2_jax.training.checkpoint import Checkpoints

CONFIG = BITING["2b"]
EVERY = tuple(table.PROJECTIONS)
KINDS = {
    "lora": AdapterConfig(kind="lora", rank=3, alpha=7.5, targets=EVERY),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=8, targets=EVERY),
    "rslora": AdapterConfig(kind="lora", rank=4, alpha=8, rslora=True, dropout=0.1, targets=EVERY),
    "part": AdapterConfig(
        kind="dora",
        rank=2,
        alpha=4,
        targets=("attn/v", "attn/o", "mlp/down"),
        layers=(0, 2),
        rank_pattern=(("mlp/down", 3),),
        alpha_pattern=(("attn/v", 1.5),),
        modules_to_save=("embedding", "pre_attn_norm"),
    ),
}
OPTIONS = {
    "dora": {"target_modules": "all-linear"},
    "part": {
        "target_modules": ["v_proj", "o_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"v_proj": 1.5},
        "modules_to_save": ["input_layernorm", "embed_tokens"],
        "ensure_weight_tying": True,
    },
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.arange(24)[None]


@pytest.fixture(scope="module")
def peft_adapters(base, tmp_path_factory) -> dict[str, Path]:
    """An adapter of every kind as PEFT writes it."""
    folder = tmp_path_factory.mktemp("peft")
    return {kind: _peft_adapter(base, folder / kind, adapter, kind) for kind, adapter in KINDS.items()}


def _peft_adapter(base: Path, path: Path, adapter: AdapterConfig, kind: str) -> Path:
    options = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "target_modules": LINEAR,
    }
    config = peft.LoraConfig(**(options | OPTIONS.get(kind, {})), task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
            elif "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    adapted.save_pretrained(path)
    return path


def _convert(source: Checkpoint, target: Path, to: Format, **options) -> Path:
    write_checkpoint(Job(source=source, to=to, **options), target)
    return target


@functools.cache
def _peft_logits(base: Path, adapter: Path) -> np.ndarray:
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return _logits(peft.PeftModel.from_pretrained(plain, adapter))


def _logits(torch_model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return torch_model.eval()(torch.tensor(TOKENS)).logits.numpy()


def _our_logits(source: Checkpoint) -> np.ndarray:
    _, shapes, logits = _program(source.adapter)
    assert shapes.keys() == source.shapes.keys()
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(load_weights(source, shapes)))


@functools.cache
def _program(adapter: AdapterConfig):
    graph, state = nnx.split(nnx.eval_shape(lambda: _gemma(adapter)))

    @jax.jit
    def logits(weights):
        gemma = model.rebuild_model(graph, weights)
        return gemma(TOKENS)

    shapes = {path: jax.ShapeDtypeStruct(w.shape, jnp.float32) for path, w in model.flatten_state(state).items()}
    return graph, shapes, logits


def _gemma(adapter: AdapterConfig) -> model.Gemma2:
    rngs = nnx.Rngs(0)
    gemma = model.Gemma2(CONFIG, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=rngs)
    lora.attach_adapters(gemma, adapter, rngs=rngs)
    return gemma


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_s_is_ours(base, peft_adapters, kind):
    source = open_checkpoint(peft_adapters[kind])  # it names its base
    assert (source.format, source.model, source.adapter) == ("peft", CONFIG, KINDS[kind])
    # Caps and attention amplify the last bits of float32: 1e-4 of logits up to 30.
    np.testing.assert_allclose(_our_logits(source), _peft_logits(base, peft_adapters[kind]), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_orbax_is_exact(base, peft_adapters, tmp_path, kind):
    orbax = _convert(open_checkpoint(peft_adapters[kind], base=base), tmp_path / "orbax", "orbax")
    source = open_checkpoint(orbax)
    assert (source.format, source.adapter, source.base) == ("orbax", KINDS[kind], str(base))
    back = _convert(source, tmp_path / "peft", "peft")
    written, original = (load_file(at / "adapter_model.safetensors") for at in (back, peft_adapters[kind]))
    assert written.keys() == original.keys()
    assert all(written[name].tobytes() == original[name].tobytes() for name in original)
    config, before = (peft.LoraConfig.from_pretrained(at) for at in (back, peft_adapters[kind]))
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "task_type"):
        assert getattr(config, field) == getattr(before, field), field
    assert config.base_model_name_or_path == str(base)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_written(base, peft_adapters, tmp_path, kind):
    target = _convert(open_checkpoint(peft_adapters[kind]), tmp_path / "peft", "peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = peft.get_peft_model(plain, peft.LoraConfig.from_pretrained(target))
    result = adapted.load_adapter(target, "default")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    np.testing.assert_array_equal(_logits(adapted), _peft_logits(base, peft_adapters[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_lora_s_merge_and_peft_s(base, peft_adapters, tmp_path, kind):
    source = open_checkpoint(peft_adapters[kind])
    merged = open_checkpoint(_convert(source, tmp_path / "merged", "hf", merge=True))
    assert merged.adapter.kind == "none"
    gemma = model.rebuild_model(_program(source.adapter)[0], load_weights(source, source.shapes))
    lora.merge_adapters(gemma)
    wanted, found = model.flatten_state(nnx.state(gemma)), load_weights(merged, merged.shapes)
    assert wanted.keys() == found.keys()
    for path in wanted:  # compiled and not, sums round differently in the last bit
        np.testing.assert_allclose(found[path], wanted[path], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(_our_logits(merged), _peft_logits(base, peft_adapters[kind]), atol=1e-4)


def test_merging_rounds_once(base, peft_adapters, tmp_path):
    source = open_checkpoint(peft_adapters["dora"])
    whole, rounded = (
        load_file(_convert(source, tmp_path / dtype, "hf", merge=True, dtype=dtype) / "model.safetensors")
        for dtype in ("float32", "bfloat16")
    )
    assert all(np.array_equal(rounded[name], whole[name].astype(jnp.bfloat16)) for name in whole)


@pytest.mark.parametrize("kind", ["lora", "part"])
def test_a_run_with_an_adapter(base, peft_adapters, tmp_path, kind):
    """What training leaves: the adapter alone, in float32, and the name of its base."""
    loaded = open_checkpoint(peft_adapters[kind])
    trained = {
        path: shape for path, shape in loaded.shapes.items() if "/adapter/" in path or loaded.adapter.replaces(path)
    }
    workdir = tmp_path / "run"
    workdir.mkdir()
    train = configs.TrainConfig(sequence_length=64)
    config = Config(
        workdir="x", model=CONFIG, adapter=KINDS[kind], optim=OptimConfig(lr=1.0), train=train, init=str(base)
    )
    (workdir / "config.txt").write_text(config_text.to_text(config))
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(5, load_weights(loaded, trained), {"count": jnp.zeros(())}, {})
    run = open_checkpoint(workdir)
    assert (run.format, run.adapter, run.base) == ("run", KINDS[kind], str(base))
    copy = shutil.copytree(base, tmp_path / "copy")
    assert open_checkpoint(workdir, base=copy).adapter == run.adapter
    _change_json(copy, "config.json", query_pre_attn_scalar=1.0)
    with pytest.raises(ValueError, match=r"run is an adapter to another model than .*copy; give its own, .*hf"):
        open_checkpoint(workdir, base=copy)
    np.testing.assert_array_equal(_our_logits(run), _our_logits(loaded))
    target = _convert(run, tmp_path / "peft", "peft")
    written, original = (load_file(at / "adapter_model.safetensors") for at in (target, peft_adapters[kind]))
    assert all(written[name].tobytes() == original[name].tobytes() for name in original)


def test_choices_that_lose_the_adapter_are_refused(base, peft_adapters, tmp_path):
    adapted, plain = open_checkpoint(peft_adapters["lora"]), open_checkpoint(base)
    with pytest.raises(ValueError, match="choose --merge for one model, or --to peft for the adapter alone"):
        Job(source=adapted, to="hf")
    with pytest.raises(ValueError, match="choose one of the two"):
        Job(source=adapted, to="peft", merge=True)
    with pytest.raises(ValueError, match="has no adapter; leave out --merge"):
        Job(source=plain, to="hf", merge=True)
    combined = _convert(adapted, tmp_path / "both", "orbax")
    with pytest.raises(ValueError, match=r"both has an adapter already, .*dora is another; merge the first one first"):
        open_checkpoint(peft_adapters["dora"], base=combined)
    with pytest.raises(ValueError, match="is not an adapter alone, so it takes no base model"):
        open_checkpoint(base, base=combined)
    with pytest.raises(ValueError, match="is named as its own base model"):
        open_checkpoint(base, base=base)


def test_an_adapter_without_its_base(base, peft_adapters, tmp_path):
    alone = Path(shutil.copytree(peft_adapters["lora"], tmp_path / "alone"))
    _change_json(alone, base_model_name_or_path="google/gemma-2-2b")
    source = open_checkpoint(alone)
    assert (source.model, source.adapter, source.shapes) == (None, KINDS["lora"], {})
    with pytest.raises(
        ValueError, match=r"an adapter to google/gemma-2-2b, whose weights are not at hand, .*give that model"
    ):
        Job(source=source, to="orbax")
    assert open_checkpoint(alone, base=base).base == "google/gemma-2-2b"


def test_an_adapter_beside_a_model_is_put_on_it(base, peft_adapters, tmp_path):
    combined = Path(shutil.copytree(base, tmp_path / "both"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(peft_adapters["lora"] / file, combined / file)
    assert open_checkpoint(combined).adapter == KINDS["lora"]


def _change_json(folder: Path, file: str = "adapter_config.json", **changes) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "some"),
        ("fan_in_fan_out", "no"),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", "all"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("rank_pattern", [8]),
        ("alpha_pattern", {"q_proj": "16"}),
        ("target_parameters", ["experts"]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [2]),
        ("init_lora_weights", "pissa"),
        ("something_of_next_year", {"on": True}),
    ],
)
def test_what_peft_has_and_this_program_has_not_is_named(peft_adapters, tmp_path, key, value):
    changed = Path(shutil.copytree(peft_adapters["lora"], tmp_path / "changed"))
    _change_json(changed, **{key: value})
    with pytest.raises(ValueError, match=key):
        open_checkpoint(changed)


def test_patterns_that_change_nothing_are_accepted(peft_adapters, tmp_path):
    changed = Path(shutil.copytree(peft_adapters["lora"], tmp_path / "changed"))
    _change_json(changed, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 7.5}, init_lora_weights="gaussian")
    assert open_checkpoint(changed).adapter == KINDS["lora"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(iter(s))), r"lacks base_model\.model\.model\.layers\.0\.mlp\.down_proj\.lora_A\.weight;"),
        (
            lambda s: s.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 384), "f4")}),
            r"lacks base_model\.model\.model\.embed_tokens\.lora_embedding_B;",
        ),
        (lambda s: s.clear(), "no projection has an adapter"),
        (
            lambda s: s.update({next(iter(s)): np.zeros((5, 96), "f4")}),
            r"has shape \(5, 96\) where its config expects \(3, 96\)",
        ),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_named(peft_adapters, tmp_path, change, message):
    changed = Path(shutil.copytree(peft_adapters["lora"], tmp_path / "changed"))
    stored = dict(sorted(load_file(changed / "adapter_model.safetensors").items()))
    change(stored)
    save_file(stored, changed / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_config_round_trip(kind):
    written = json.loads(json.dumps(peft_config(KINDS[kind], "base", CONFIG.layers)))
    shapes = table.array_shapes(table.table_rows(KINDS[kind], CONFIG.layers), CONFIG)
    assert stored_config(written, shapes, "x") == KINDS[kind]


def test_dora_without_magnitudes_is_refused(peft_adapters, tmp_path):
    changed = Path(shutil.copytree(peft_adapters["lora"], tmp_path / "changed"))
    _change_json(changed, use_dora=True)
    with pytest.raises(ValueError, match=r"lacks base_model.*lora_magnitude_vector"):
        open_checkpoint(changed)


def test_derived_rows_spelled_out():
    rows = {
        row.path: (row.dims, row.name, row.layout)
        for row in table.table_rows(AdapterConfig(kind="dora", targets=("attn/o",)), layers=1)
    }
    name = "base_model.model.model.layers.{L}.self_attn.o_proj"
    assert rows == {
        "blocks/attn/o/adapter/a": ("L N H R", f"{name}.lora_A.weight", "R (N H)"),
        "blocks/attn/o/adapter/b": ("L R D", f"{name}.lora_B.weight", "(D) R"),
        "blocks/attn/o/adapter/m": ("L D", f"{name}.lora_magnitude_vector", "(D)"),
    }
    assert dims.weight_shape("LRD", CONFIG, 4) == (3, 4, 36)
