"""The table of names and layouts, and Hugging Face's config.json: all claimed, nothing guessed."""

import itertools
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from peers import BITING, hf_config, hf_model, state_dict

from gemma2_jax import dims
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.hf_config import hf_config as exported, model_config
from gemma2_jax.model import gemma2 as model, lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, GEMMA2_TINY, AdapterConfig

SIZES = {
    "2b": GEMMA2_2B,
    "9b": GEMMA2_9B,
    "27b": GEMMA2_27B,
    "tiny": GEMMA2_TINY,
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return state_dict(hf_model(BITING["2b"]))


@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_rows_are_the_model_s_arrays_and_dims(kind):
    adapter = AdapterConfig(kind=kind, rank=3)
    gemma = nnx.eval_shape(lambda: _gemma(adapter))
    assert {
        row.path: row.letters for row in table.MODEL + table.table_rows(adapter, BITING["2b"].layers)
    } == model.weight_dims(gemma)


def _gemma(adapter: AdapterConfig) -> model.Gemma2:
    rngs = nnx.Rngs(0)
    gemma = model.Gemma2(BITING["2b"], attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=rngs)
    lora.attach_adapters(gemma, adapter, rngs=rngs)
    return gemma


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", BITING)
def test_state_dict_round_trip_is_exact(name, dtype):
    config = BITING[name]
    tensors = {key: value.astype(dtype) for key, value in state_dict(hf_model(config)).items()}
    ours = table.from_hf(tensors, config)
    assert {path: w.shape for path, w in ours.items()} == table.array_shapes(table.MODEL, config)
    back = table.to_hf(ours, config)
    assert back.keys() == tensors.keys()
    assert all(back[key].dtype == dtype and np.array_equal(back[key], tensors[key]) for key in tensors)


def test_a_head_of_one_layer_is_where_it_is_expected(tensors):
    # Spelled out once without einops: layer 2's query head 3 reads the residual stream through rows 48 to 64.
    ours = table.from_hf(tensors, BITING["2b"])
    head = tensors["model.layers.2.self_attn.q_proj.weight"][48:64]
    np.testing.assert_array_equal(ours["blocks/attn/q/w"][2, :, 3], head.T)
    out = tensors["model.layers.2.self_attn.o_proj.weight"][:, 48:64]
    np.testing.assert_array_equal(ours["blocks/attn/o/w"][2, 3], out.T)


def test_parts_are_the_parts_of_the_whole(tensors):
    config = BITING["2b"]
    whole, size = table.from_hf(tensors, config), dims.dim_sizes(config)
    cuts = [slice(None), slice(1, 3), slice(0, 1)]
    for row in table.MODEL:
        for index in itertools.product(cuts, repeat=len(row.letters)):
            part = row.read_array(size, np.float32, lambda name, at: tensors[name][at], index)
            np.testing.assert_array_equal(part, whole[row.path][index])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lacks model.norm.weight;"),
        ({"model.layers.3.mlp.up_proj.weight": np.zeros(1)}, "has unexpected model.layers.3.mlp.up_proj.weight;"),
        ({"model.norm.weight": np.zeros(35)}, r"model.norm.weight has shape \(35,\) where its config expects \(36,\)"),
        ({"lm_head.weight": np.zeros((384, 36), np.float32)}, "untied head"),
        ({"lm_head.weight": np.zeros((384, 35), np.float32)}, "untied head"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, change, message):
    changed = {key: value for key, value in (tensors | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        table.from_hf(changed, BITING["2b"])


def test_a_head_that_is_the_embedding_is_accepted(tensors):
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    assert table.from_hf(tied, BITING["2b"]).keys() == table.from_hf(tensors, BITING["2b"]).keys()


def test_exporting_too_names_what_is_wrong(tensors):
    ours = table.from_hf(tensors, BITING["2b"])
    ours["blocks/attn/z/w"] = ours.pop("blocks/attn/q/w")
    with pytest.raises(ValueError, match="lacks blocks/attn/q/w and has unexpected blocks/attn/z/w"):
        table.to_hf(ours, BITING["2b"])


@pytest.mark.parametrize("config", [*SIZES.values(), *BITING.values()])
def test_config_round_trip(config):
    written = json.loads(json.dumps(exported(config, "bfloat16")))
    assert model_config(written) == config
    peer_config = transformers.Gemma2Config(**written)
    assert model_config(json.loads(peer_config.to_json_string(use_diff=False))) == config
    assert model_config(json.loads(peer_config.to_json_string())) == config
    assert (peer_config.bos_token_id, peer_config.eos_token_id, peer_config.pad_token_id) == (2, 1, 0)


@pytest.mark.parametrize("name", BITING)
def test_config_reads_what_transformers_wrote(name):
    assert model_config(hf_config(BITING[name]).to_dict()) == BITING[name]


# As google/gemma-2-9b had it at first: 224, no layer types, RoPE's base on its own.
EARLY_9B = json.loads("""{
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 224,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 256000
}""")


def test_a_query_scale_of_224_is_kept_when_a_config_says_it():
    config = model_config(EARLY_9B)
    assert config == replace(GEMMA2_9B, query_pre_attn_scalar=224)
    assert exported(config, "bfloat16")["query_pre_attn_scalar"] == 224
    assert GEMMA2_9B.query_pre_attn_scalar == 256


def test_what_an_original_config_says_besides_is_kept():
    written = exported(model_config(EARLY_9B), "bfloat16", EARLY_9B)
    assert written["eos_token_id"] == [1, 107] and written["cache_implementation"] == "hybrid"
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_older_names_are_understood():
    older = {key: value for key, value in EARLY_9B.items() if key != "hidden_activation"}
    newer = {key: value for key, value in EARLY_9B.items() if key != "rope_theta"}
    newer["rope_parameters"] = {"rope_theta": 20_000.0, "rope_type": "default"}
    assert model_config(older) == model_config(EARLY_9B)
    assert model_config(newer) == replace(model_config(EARLY_9B), rope_theta=20_000.0)


@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "query_pre_attn_scalar", "vocab_size", "sliding_window", "max_position_embeddings"),
        *("attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps", "rope_theta", "model_type"),
    ],
)
def test_a_missing_key_is_named_and_never_defaulted(key):
    with pytest.raises(ValueError, match=key):
        model_config({other: value for other, value in EARLY_9B.items() if other != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma3_text"),
        ("hidden_activation", "gelu"),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("tie_word_embeddings", "no"),
        ("use_bidirectional_attention", True),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("layer_types", ["full_attention", "sliding_attention"] * 21),
        ("layer_types", ["sliding_attention", "full_attention"] * 20),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("sliding_window", None),
        ("hidden_size", "3584"),
    ],
)
def test_a_value_without_implementation_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        model_config(EARLY_9B | {key: value})
