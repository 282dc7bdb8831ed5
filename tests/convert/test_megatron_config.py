"""Megatron-Bridge's run_config.yaml and ours: the same model, written as they write it, nothing run or guessed."""

import copy
import functools
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.convert.formats import hf_config, megatron_config as megatron, table
from gemma2_jax.convert.formats.megatron_config import SavedAdapter
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, GEMMA2_TINY, AdapterConfig, ModelConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "megatron"
SAVED = sorted(path for path in FIXTURES.rglob("run_config.yaml"))
SIZES = {
    "2b": GEMMA2_2B,
    "9b": GEMMA2_9B,
    "27b": GEMMA2_27B,
    "tiny": GEMMA2_TINY,
}
EVERY = tuple(table.PROJECTIONS)


def _name(path: Path) -> str:
    return "-".join(path.relative_to(FIXTURES).parts[:2])


@functools.cache
def _parsed(path: Path) -> dict:
    return megatron.read_yaml(path)


def _fixture(name: str) -> dict:
    return copy.deepcopy(_parsed(next(path for path in SAVED if _name(path) == name)))


def _twin(path: Path) -> ModelConfig:
    dtype = "bf16" if "bf16" in _name(path) else "f32"
    return hf_config.model_config(json.loads((FIXTURES / "hf" / f"A_{dtype}" / "config.json").read_text()))


def _read(tmp_path: Path, content: str | bytes) -> dict:
    path = tmp_path / "run_config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return megatron.read_yaml(path)


@pytest.fixture
def saved() -> dict:
    """As Megatron-Bridge 0.3.1 writes it."""
    return _fixture("torch_dist-A_f32_tp1pp1")


@pytest.mark.parametrize("path", SAVED, ids=_name)
def test_it_is_the_model_that_hugging_face_has(path):
    run = megatron.read_yaml(path)
    assert megatron.model_config(run, path) == _twin(path)
    tensor, pipeline = megatron.parallel_sizes(run, path)
    assert f"tp{tensor}pp{pipeline}" in _name(path)
    assert megatron.stored_dtype(run, path) == ("bfloat16" if "bf16" in _name(path) else "float32")


@pytest.mark.parametrize("path", SAVED, ids=_name)
def test_what_we_write_is_what_they_write(path):
    saved = megatron.read_yaml(path)
    written = megatron.run_config(_twin(path), megatron.stored_dtype(saved))
    assert written["model"].pop("window_size") == [7, 0]
    assert saved["model"].pop("window_size") == [8, 0]  # as 0.3.1 had it
    if "tp2" in _name(path):
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            written["model"].pop(key)
    for key in ("save_optim", "save_rng", "pretrained_checkpoint") if "torch_dist" not in _name(path) else ():
        written["checkpoint"].pop(key)
    for name, section in written.items():
        if isinstance(section, dict):
            assert section == {key: saved[name][key] for key in section}, name
        elif name not in ("peft", "logger", "optimizer"):
            assert section == saved[name], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_a_model_survives_the_text(name, dtype, tmp_path):
    odd = dict(query_pre_attn_scalar=5.5, attn_softcap=None, final_softcap=None, rope_theta=12345.5, norm_eps=1e-5)
    for model in (SIZES[name], replace(SIZES[name], **odd), replace(SIZES[name], window=9, max_length=7)):
        run = _read(tmp_path, megatron.to_yaml(megatron.run_config(model, dtype)))
        assert megatron.model_config(run) == model
        assert megatron.stored_dtype(run) == dtype
        assert megatron.parallel_sizes(run) == (1, 1)


@pytest.mark.parametrize(
    ("size", "version", "window"),
    [
        ([8, 0], "0.3.1", 8),
        ([4096, 0], "0.3.1", 4096),
        ([7, 0], "0.4", 8),
        ([8, 0], "0.4", 9),
        ([4095, 0], "0.4", 4096),
        ([4096, 0], "0.5.1 without a conversion", 4096),
    ],
)
def test_window_of_either_spelling(saved, size, version, window):
    if version != "0.3.1":
        del saved["model"]["async_tensor_model_parallel_allreduce"]
    saved["model"]["window_size"] = size
    assert megatron.model_config(saved).window == window


def test_a_window_that_would_be_read_as_another_is_not_written():
    with pytest.raises(ValueError, match="window 4097 cannot be told from 4096"):
        megatron.run_config(replace(GEMMA2_2B, window=4097), "float32")


REFUSED = {
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": False,
    "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
    "gated_linear_unit": False,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "yarn",
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "rotary_scaling_factor": 8.0,
    "rope_scaling": True,
    "seq_len_interpolation_factor": 2.0,
    "mrope_section": [1, 2, 3],
    "no_rope_freq": 4,
    "softmax_scale": 0.1,
    "softmax_type": "learnable",
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": True,
    "attention_output_gate": True,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "window_attn_skip_freq": 2,
    "num_moe_experts": 8,
    "multi_latent_attention": True,
    "mtp_num_layers": 1,
    "use_mup": True,
    "experimental_attention_variant": "dsa",
    "linear_attention_freq": 2,
    "is_hybrid_model": True,
    "heterogeneous_block_specs": True,
    "restore_modelopt_state": True,
    "transformer_layer_spec": {"_call_": False, "_target_": "megatron.bridge.models.gpt_provider.default_layer_spec"},
    "attention_backend": {"_args_": [4], "_call_": True, "_target_": "megatron.core.transformer.enums.AttnBackend"},
    "window_size": None,
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_architecture_is_refused_by_name(saved, key):
    saved["model"][key] = REFUSED[key]
    with pytest.raises(ValueError, match=rf"here: model\.{key} is "):
        megatron.model_config(saved, "here")


def test_all_that_is_fixed_is_refused_above():
    assert set(REFUSED) - {"_target_", "attention_backend", "window_size"} == set(megatron._FIXED)


@pytest.mark.parametrize("key", [*megatron._FIELDS.values(), "window_size"])
def test_no_number_is_guessed(saved, key):
    del saved["model"][key]
    with pytest.raises(ValueError, match=rf"here lacks model\.{key}"):
        megatron.model_config(saved, "here")


@pytest.mark.parametrize("value", ["4", True, [4], 4.5, float("nan"), float("inf"), 10**400, {"_target_": "int"}])
def test_numbers_are_numbers(saved, value):
    saved["model"]["num_layers"] = value
    with pytest.raises(ValueError, match=r"here: model\.num_layers is .*a whole number"):
        megatron.model_config(saved, "here")


def test_a_number_that_yaml_takes_for_text_is_explained(tmp_path):
    text = megatron.to_yaml(megatron.run_config(GEMMA2_2B, "float32")).replace("1.0e-06", "1e-06")
    with pytest.raises(ValueError, match=r"layernorm_epsilon is '1e-06'.*with a point"):
        megatron.model_config(_read(tmp_path, text))


@pytest.mark.parametrize("size", [[8], [8, 0, 0], [8, 1], 8, "8, 0", [-1, 0], [None, 0], [[8], 0]])
def test_a_window_that_is_none_of_ours_is_refused(saved, size):
    saved["model"]["window_size"] = size
    with pytest.raises(ValueError, match="window"):
        megatron.model_config(saved)


def test_an_absent_cap_is_none_and_so_is_zero(saved):
    saved["model"] |= {"attn_logit_softcapping": None, "final_logit_softcapping": 0.0}
    model = megatron.model_config(saved)
    assert model.attn_softcap is None and model.final_softcap is None


def test_the_stored_rows_do_not_say_the_vocabulary(saved):
    saved["model"] |= {"vocab_size": 500, "should_pad_vocab": True, "make_vocab_size_divisible_by": 128}
    assert megatron.model_config(saved).vocab_size == 500


ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=3, alpha=7.5, dropout=0.1, targets=EVERY, after_norm=True),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=8, targets=("attn/q", "attn/k", "attn/v")),
    "canonical": AdapterConfig(kind="lora", rank=3, alpha=7, targets=("attn/q", "mlp/up", "mlp/down"), after_norm=True),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_survives_the_text(kind, tmp_path):
    adapter = ADAPTERS[kind]
    run = megatron.run_config(GEMMA2_2B, "bfloat16", SavedAdapter(adapter, "base", canonical=kind == "canonical"))
    run = _read(tmp_path, megatron.to_yaml(run))
    assert megatron.adapter_config(run, table.match_targets(adapter), "here") == adapter
    assert megatron.model_config(run) == GEMMA2_2B
    assert run["checkpoint"]["pretrained_checkpoint"] == "base"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_as_they_write_it(kind):
    saved = _fixture(f"peft-A_f32_{kind}_tp1pp1")
    adapter = megatron.adapter_config(saved, list(EVERY), "here")
    assert adapter == AdapterConfig(kind=kind, rank=8, alpha=16, targets=EVERY, after_norm=True)
    assert not megatron.adapter_config(saved, ["attn/q", "mlp/up"], "here").after_norm
    written = megatron.run_config(megatron.model_config(saved), "float32", SavedAdapter(adapter, "base"))["peft"]
    assert written == {key: saved["peft"][key] for key in written}


def test_the_scale_of_rslora_is_kept():
    adapter = AdapterConfig(kind="lora", rank=8, alpha=5, rslora=True, targets=EVERY)
    run = megatron.run_config(GEMMA2_2B, "float32", SavedAdapter(adapter))
    assert megatron.adapter_config(run, list(EVERY), "here").scale == pytest.approx(adapter.scale, rel=1e-15)


@pytest.mark.parametrize(
    ("kind", "targets", "canonical", "message"),
    [
        ("lora", ("attn/q", "attn/v"), False, "linear_qkv takes one adapter"),
        ("dora", ("mlp/up",), False, "linear_fc1 takes one adapter"),
        ("dora", EVERY, True, "one A for q, k and v"),
    ],
)
def test_an_adapter_that_they_do_not_have_is_not_written(kind, targets, canonical, message):
    adapter = AdapterConfig(kind=kind, targets=targets)
    with pytest.raises(ValueError, match=message):
        megatron.run_config(GEMMA2_2B, "float32", SavedAdapter(adapter, canonical=canonical))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "megatron.bridge.peft.lora.VLMLoRA"}, r"peft\._target_ is"),
        ({"_target_": "os.system"}, r"peft\._target_ is"),
        ({"_target_": {"_target_": "os.system"}}, r"peft\._target_ is"),
        ({"dropout": 0.1, "dropout_position": "post"}, r"peft\.dropout_position is 'post'"),
        ({"use_rslora": True}, r"peft\.use_rslora is True"),
        ({"dim": "8"}, r"peft\.dim is '8'"),
        ({"dim": 0}, "rank"),
        ({"alpha": None}, r"peft\.alpha is None"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_another_adapter_is_refused_by_name(changes, message):
    run = _fixture("peft-A_f32_lora_tp1pp1")
    run["peft"] |= changes
    with pytest.raises(ValueError, match=message):
        megatron.adapter_config(run, list(EVERY), "here")


def test_an_adapter_needs_its_numbers_and_its_tensors(saved):
    run = _fixture("peft-A_f32_lora_tp1pp1")
    with pytest.raises(ValueError, match="no projection has an adapter"):
        megatron.adapter_config(run, [], "here")
    for key in ("dim", "alpha"):
        part = run | {"peft": {name: value for name, value in run["peft"].items() if name != key}}
        with pytest.raises(ValueError, match=rf"lacks peft\.{key}"):
            megatron.adapter_config(part, list(EVERY), "here")
    with pytest.raises(ValueError, match="no section peft"):
        megatron.adapter_config(saved, list(EVERY), "here")


HOSTILE = {
    "call": ("a: !!python/object/apply:os.system ['touch {marker}']", "could not determine a constructor"),
    "new": ("a: !!python/object/new:os.system ['touch {marker}']", "could not determine a constructor"),
    "name": ("a: !!python/name:os.system", "could not determine a constructor"),
    "tag": ("a: !Thing {{b: 1}}", "could not determine a constructor"),
    "itself": ("a: &a [*a]", "alias of what the alias is in"),
    "unknown alias": ("a: *b", "undefined alias"),
    "list": ("- 1", "not a mapping"),
    "empty": ("", "not a mapping"),
    "text": ("abc", "not a mapping"),
    "two": ("a: 1\n---\nb: 2", "expected a single document"),
    "open": ("a: [1, 2", "expected"),
    "unhashable": ("? [1]\n: 2", "unhashable"),
    "bool": ("a: !!bool maybe", "maybe"),
    "int": ("a: !!int ''", "index out of range"),
    "time": ("a: !!timestamp never", "NoneType"),
    "date": ("a: 2001-13-45", "month"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_none_of_theirs_is_refused(name, tmp_path):
    text, message = HOSTILE[name]
    with pytest.raises(ValueError, match=rf"run_config\.yaml is no run_config\.yaml(.|\n)*{message}"):
        _read(tmp_path, text.format(marker=tmp_path / "marker"))
    assert not (tmp_path / "marker").exists()


BOMBS = {
    "aliases": "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)),
    "merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 20)),
    "nested": "a: " + "[" * 5000,
    "nested mappings": "".join(" " * n + "a:\n" for n in range(500)),
    "base 60": "a: " + "1:" * 200_000 + "1",
    "digits": "a: " + "9" * 200_000,
    "long": "a: " + "b" * (2 << 20),
    "many": "- a\n" * 200_000,
    "not UTF-8": b"a: \xff\xfe\x80",
    "NUL": b"a: \0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_costs_little_however_it_is_made(name, tmp_path):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"run_config\.yaml is") as caught:
        _read(tmp_path, BOMBS[name])
    assert time.process_time() - start < 5  # bombs that go off take minutes, or the machine's memory
    assert len(str(caught.value)) < 1000 and "recursion" not in str(caught.value)


def test_what_their_files_may_hold(tmp_path):
    run = _read(tmp_path, "a: !!set {x: null}\nb: &b [1]\nc: [*b, *b]\nd: '" + "x" * 20_000 + "'\ne: 'Gemma ♊'")
    assert run == {"a": {"x"}, "b": [1], "c": [[1], [1]], "d": "x" * 20_000, "e": "Gemma ♊"}


def _all_that_is_read(run: dict) -> None:
    for read in (
        megatron.model_config,
        megatron.parallel_sizes,
        megatron.stored_dtype,
        lambda run, source: megatron.adapter_config(run, list(EVERY), source),
    ):
        try:
            read(run, "here")
        except ValueError:
            continue


def test_changed_bytes_give_a_config_or_a_sentence(tmp_path):
    run = megatron.run_config(GEMMA2_2B, "bfloat16", SavedAdapter(ADAPTERS["lora"], "base"))
    text = megatron.to_yaml(run).encode()
    rng = random.Random(0)
    alphabet = b" \n\t:-[]{}&*!|>'\"%@`#,?<0123456789abcdefxyz_.~\x00\xff"
    for _ in range(700):
        data = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            at, what = rng.randrange(len(data)), rng.randrange(4)
            if what == 0:
                data[at] = rng.choice(alphabet)
            elif what == 1:
                data.insert(at, rng.choice(alphabet))
            elif what == 2:
                del data[at : at + rng.randint(1, 30)]
            else:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 60)]
        try:
            run = _read(tmp_path, bytes(data))
        except ValueError:
            continue
        _all_that_is_read(run)


def test_changed_values_give_a_config_or_a_sentence():
    values = [
        *(None, True, False, 0, 1, -1, 3, 2**70, 10**5000, 0.5, -0.0, 1e308, float("nan"), float("inf")),
        *(
            "",
            "x",
            "1e-6",
            b"1",
            [],
            [1],
            [[]],
            {},
            {1: 2},
            {"_target_": "os.system"},
            {"_target_": ["x"]},
            {"x"},
            (8, 0),
        ),
        {"_target_": "os.system", "_call_": False},
    ]
    run = _fixture("peft-A_f32_dora_tp1pp1")
    for name in ("model", "peft", "checkpoint"):
        for value in values:
            _all_that_is_read(run | {name: value})
    keys = [("model", key) for key in run["model"]] + [("peft", key) for key in run["peft"]] + [("peft", "new")]
    for section, key in keys:
        for value in values:
            _all_that_is_read(run | {section: run[section] | {key: value}})


# What Megatron-LM core_r0.16.0 wrote of the same model, where it bears on the model.
ARGS = dict(
    num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    group_query_attention=True, rotary_base=10000, rotary_percent=1.0, rotary_interleaved=False,
    layernorm_epsilon=1e-06, layernorm_zero_centered_gamma=True, normalization="RMSNorm", add_bias_linear=False,
    add_qkv_bias=False, position_embedding_type="rope", add_position_embedding=True, use_rope_scaling=False,
    softmax_type="vanilla", apply_query_key_layer_scaling=False, apply_residual_connection_post_layernorm=False,
    attention_output_gate=False, qk_layernorm=False, qk_l2_norm=False, num_experts=None, multi_latent_attention=False,
    mtp_num_layers=None, untie_embeddings_and_output_weights=False, swiglu=True, seq_length=128,
    max_position_embeddings=128, vocab_size=512, padded_vocab_size=512, tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1, context_parallel_size=1, expert_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None, sequence_parallel=False, bf16=False, fp16=False, no_save_optim=True,
    skipped_train_samples=0, consumed_valid_samples=0, ckpt_fully_parallel_save=True,
)  # fmt: skip


def test_arguments_of_megatron_lm():
    model = _twin(SAVED[0])
    megatron.check_args(ARGS | {"window_size": None, "attention_dropout": 0.1}, model, "here")
    args = megatron.megatron_args(model, "float32")
    assert {key: args[key] for key in ARGS} == ARGS
    assert args["params_dtype"] == np.float32
    for size in SIZES.values():
        args = megatron.megatron_args(size, "bfloat16", 7)
        megatron.check_args(args, size, "here")
        assert (args["params_dtype"], args["bf16"], args["iteration"]) == (jnp.bfloat16, True, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 5},
        {"hidden_size": 32},
        {"ffn_hidden_size": 256},
        {"num_attention_heads": 8},
        {"num_query_groups": 4},
        {"group_query_attention": False},
        {"kv_channels": 32},
        {"rotary_base": 500000},
        {"layernorm_epsilon": 1e-5},
        {"normalization": "LayerNorm"},
        {"layernorm_zero_centered_gamma": False},
        {"untie_embeddings_and_output_weights": True},
        {"position_embedding_type": "learned_absolute"},
        {"use_rope_scaling": True},
        {"num_experts": 8},
        {"window_size": (15, 0)},
        {"padded_vocab_size": 384},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_arguments_that_contradict_are_named(changes):
    with pytest.raises(ValueError, match=f"here: its argument {next(iter(changes))} is "):
        megatron.check_args(ARGS | changes, _twin(SAVED[0]), "here")


def test_arguments_may_say_less_and_more():
    model = _twin(SAVED[0])
    megatron.check_args({}, model, "here")
    megatron.check_args(dict.fromkeys(ARGS), model, "here")
    megatron.check_args(ARGS | {"padded_vocab_size": 1024, "window_size": (7, 0)}, model, "here")
    heads = replace(model, kv_heads=4)  # without groups, their number has a default that means nothing
    megatron.check_args(ARGS | {"group_query_attention": False, "num_query_groups": 1}, heads, "here")


def test_what_else_is_stored():
    assert megatron.common_state(3) == {
        "checkpoint_version": 3.0,
        "iteration": 3,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    state = megatron.train_state(3)
    assert {name: value.item() for name, value in state.items()} == {
        "step": 3,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "floating_point_operations_so_far": 0.0,
        "do_train": False,
        "do_valid": False,
        "do_test": False,
    }
    run = megatron.run_config(GEMMA2_2B, "float32", tokenizer="google/gemma-2-2b")
    assert run["tokenizer"]["tokenizer_model"] == "google/gemma-2-2b"
