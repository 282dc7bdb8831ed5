"""One training step of the same small model here and with transformers and peft, full and LoRA, on CPU in float32.

Both sides get the same weights, rows, AdamW, clipping and targets, and are compared in loss before they are timed.
Attention is eager in transformers: its Gemma 2 has no other that caps scores. `cpu` runs each case in a process of
its own, so that peak memory is the case's.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gemma2_jax import config as configs
from gemma2_jax.config import GEMMA2_TINY, ModelConfig

ROWS, LENGTH, STEPS = 16, 256, 8
# The layers' share of the work is nearer to that of the large models.
SMALL = replace(GEMMA2_TINY, layers=8, width=384, mlp_width=1536, heads=6, kv_heads=3)
MODELS = {"tiny (3.7M)": GEMMA2_TINY, "small (19M)": SMALL}


def rows(model: ModelConfig) -> np.ndarray:
    """The same tokens for every case."""
    return np.random.default_rng(0).integers(3, model.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)


def ours(model: ModelConfig, kind: str) -> tuple[float, Callable[[], float]]:
    """The first step's loss, and a function that takes a step and returns its loss."""
    import jax

    from gemma2_jax.loop import place
    from gemma2_jax.mesh import make_mesh
    from gemma2_jax.step import Program

    recipe = configs.load(f"tiny_{kind}")
    config = replace(recipe, model=model, init="", optim=replace(recipe.optim, warmup_steps=0, weight_decay=0.0))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = Program(config, mesh)
    state = program.fresh(program.random_base())
    step = jax.jit(program.train_step, donate_argnums=0).lower(program.state, program.batch).compile()
    tokens = rows(model)
    batch = place(
        program,
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.ones((ROWS, LENGTH), np.int32),
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
            "weights": np.ones((ROWS, LENGTH), np.float32),
        },
    )

    def once() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return once(), once


def transformers(model: ModelConfig, kind: str) -> tuple[float, Callable[[], float]]:
    """The same with transformers, and peft for LoRA."""
    import peft
    import torch
    import transformers as hf

    recipe = configs.load(f"tiny_{kind}")
    torch.manual_seed(0)
    whole = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            num_hidden_layers=model.layers, hidden_size=model.width, intermediate_size=model.mlp_width,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_width,
            query_pre_attn_scalar=int(model.query_pre_attn_scalar), vocab_size=model.vocab_size,
            sliding_window=model.window, max_position_embeddings=model.max_length, attn_implementation="eager",
        )
    )  # fmt: skip
    if kind == "lora":
        targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        adapter = recipe.adapter
        whole = peft.get_peft_model(
            whole, peft.LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=targets)
        )
    whole.train()
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optim.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens = torch.tensor(rows(model), dtype=torch.int64)

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = whole(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return once(), once


def measure(start: Callable[[ModelConfig, str], tuple[float, Callable[[], float]]], model: str, kind: str) -> dict:
    """Tokens per second of the median of `STEPS` steps, the first (and compiling) left out."""
    first_loss, once = start(MODELS[model], kind)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_s": ROWS * LENGTH / float(np.median(seconds)), "first_loss": first_loss}
