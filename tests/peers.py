"""The models that ours are compared with, and configs that bite.

Each config is a real one shrunk: sequences are three windows long, the number of layers is odd for one of them, head
width times heads is not the model width where that holds for the real one. Weights are random and large enough for
attention scores and logits to reach their caps, norm weights are far from zero.
"""

import math
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import torch
import transformers

from gemma2_jax import recipes
from gemma2_jax.config import ComputeConfig, MeshConfig, TrainConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, AdapterConfig, ModelConfig
from gemma2_jax.training.step import Program

torch.set_num_threads(1)  # more are slower on models this small, and far slower beside another busy process

F32 = ComputeConfig(dtype="float32", frozen_dtype="float32", loss_chunk=8)
SMALL = dict(vocab_size=384, window=8, max_length=64)
BITING = {
    "2b": replace(
        GEMMA2_2B, layers=3, width=36, mlp_width=96, heads=4, kv_heads=2, head_width=16,
        query_pre_attn_scalar=16, **SMALL,
    ),
    "9b": replace(
        GEMMA2_9B, layers=4, width=56, mlp_width=80, heads=4, kv_heads=2, head_width=16,
        query_pre_attn_scalar=16, **SMALL,
    ),
    "27b": replace(
        GEMMA2_27B, layers=2, width=40, mlp_width=112, heads=8, kv_heads=4, head_width=8,
        query_pre_attn_scalar=5, **SMALL,
    ),
}  # fmt: skip


def hf_config(config: ModelConfig, **changes) -> transformers.Gemma2Config:
    """The transformers config of the same model, written out by hand: it must not come from our own mapping."""
    return transformers.Gemma2Config(
        num_hidden_layers=config.layers,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        query_pre_attn_scalar=int(config.query_pre_attn_scalar),  # it takes no other
        vocab_size=config.vocab_size,
        sliding_window=config.window,
        max_position_embeddings=config.max_length,
        attn_logit_softcapping=config.attn_softcap,
        final_logit_softcapping=config.final_softcap,
        rms_norm_eps=config.norm_eps,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",
        **changes,
    )


def hf_model(config: ModelConfig, seed: int = 0, gain: float = 1.0) -> transformers.Gemma2ForCausalLM:
    """A float32 transformers model with random weights that bite; `gain` scales the spread of its scores."""
    model = transformers.Gemma2ForCausalLM(hf_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    spread = {"q_proj": 4.0 * gain, "k_proj": 4.0 * gain, "embed_tokens": 4.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                std = parameter.shape[1] ** -0.5 * next((s for key, s in spread.items() if key in name), 1.0)
                parameter.normal_(0, std, generator=generator)
    return model


def rows_of(config: ModelConfig, batch: int = 2, length: int | None = None, seed: int = 0):
    """Random tokens, three windows and a bit long, with their positions and segments."""
    length = length or 3 * config.window + 3
    tokens = np.random.default_rng(seed).integers(3, config.vocab_size, (batch, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


def training_gradients(
    config: ModelConfig, adapter: AdapterConfig, weights, tokens, positions, segments, targets, counted, key=None,
    mesh: MeshConfig | None = None,
):  # fmt: skip
    """Mean loss and its gradients by path, as a training step forms them, of what `adapter` says is trained."""
    rows, length = tokens.shape
    kind = "sft" if adapter.kind == "none" else adapter.kind
    train = TrainConfig(sequence_length=length, global_batch_size=rows, micro_batch_size=rows)
    run = recipes.finetune("test", config, "", kind, adapter=adapter, train=train, compute=F32)
    sizes = mesh or MeshConfig(data=1)
    program = Program(run, make_mesh(sizes, jax.devices()[: math.prod(vars(sizes).values())]))
    params, frozen = ({path: weights[path] for path in part} for part in (program.params, program.frozen))
    arrays = dict(tokens=tokens, targets=targets, segments=segments, positions=positions, weights=counted)
    passes = {name: np.asarray(x)[None] for name, x in arrays.items()}
    with jax.set_mesh(program.mesh) if mesh else nullcontext():
        (loss, _), gradients = jax.jit(program.pipeline.gradients)(params, frozen, passes, key)
    return loss / counted.sum(), {path: g / counted.sum() for path, g in gradients.items()}


def state_dict(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A torch model's parameters by name, float32, each once."""
    return {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
