"""The small models that are timed, and the same in transformers.

Attention is eager there: its Gemma 2 has no other that caps scores ("sdpa does not support softcapping", it says).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.options import describe_library
from gemma2_jax.model_config import GEMMA2_TINY, ModelConfig

MODELS = {
    "tiny, 3.7M": GEMMA2_TINY,
    "small, 19M": replace(GEMMA2_TINY, layers=8, width=384, mlp_width=1536, heads=6, kv_heads=3),
    "medium, 40M": replace(
        GEMMA2_TINY, layers=6, width=512, mlp_width=2048, heads=8, kv_heads=4, head_width=64,
        query_pre_attn_scalar=64.0, vocab_size=32_000,
    ),
}  # fmt: skip


def transformers_model(model: ModelConfig):
    """Random weights; small embeddings, so that a generated token is not followed by itself for ever."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    whole = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            num_hidden_layers=model.layers, hidden_size=model.width, intermediate_size=model.mlp_width,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_width,
            query_pre_attn_scalar=int(model.query_pre_attn_scalar), vocab_size=model.vocab_size,
            sliding_window=model.window, max_position_embeddings=model.max_length, attn_implementation="eager",
        )
    )  # fmt: skip
    torch.nn.init.normal_(whole.model.embed_tokens.weight, std=0.3 * model.width**-0.5)
    return whole


def save_weights(model: ModelConfig, path: Path) -> None:
    """Writes the weights of `transformers_model` for ours, which then needs no torch in its process."""
    weights = {name: w.detach().numpy() for name, w in transformers_model(model).named_parameters()}
    np.savez(path, **weights)


def our_weights(model: ModelConfig, path: Path) -> dict:
    """Those weights by our paths."""
    import jax

    from gemma2_jax.convert.formats.table import from_hf

    with np.load(path) as saved:
        return jax.device_put(from_hf(dict(saved), model))


if __name__ == "__main__":
    describe_library("peer", __doc__)
