"""Training steps of the same small model here and with transformers and peft, full and LoRA, on CPU in float32.

Both sides have the same weights, rows, AdamW, clipping and targets; the losses of their first steps are compared.
`cpu` runs it.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.options import describe_library
from benchmarks.peer import MODELS, our_weights, transformers_model
from gemma2_jax import recipes
from gemma2_jax.model_config import ModelConfig

SIZES = {"medium, 40M": (4, 512)}  # rows of a step and tokens of a row
USUAL_SIZE, STEPS = (16, 256), 5
Step = Callable[[], float]  # takes a step, and returns its loss


def rows(model: ModelConfig, size: tuple[int, int]) -> np.ndarray:
    """The same tokens on both sides, each row with the target of its last."""
    return np.random.default_rng(0).integers(3, model.vocab_size, (size[0], size[1] + 1)).astype(np.int32)


def ours(model: ModelConfig, kind: str, weights: Path, size: tuple[int, int]) -> Step:
    import jax

    from gemma2_jax.mesh import make_mesh
    from gemma2_jax.training.loop import place_batch
    from gemma2_jax.training.step import Program

    recipe = recipes.load_recipe(f"tiny_{kind}")
    config = replace(
        recipe,
        model=model,
        init="",
        optim=replace(recipe.optim, warmup_steps=0, weight_decay=0.0),
        train=replace(recipe.train, sequence_length=size[1], global_batch_size=size[0], micro_batch_size=size[0]),
    )
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = program.initial_state(our_weights(model, weights))
    step = jax.jit(program.train_step, donate_argnums=0).lower(program.state, program.batch).compile()
    tokens = rows(model, size)
    batch = place_batch(
        program,
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.ones(size, np.int32),
            "positions": np.broadcast_to(np.arange(size[1], dtype=np.int32), size),
            "weights": np.ones(size, np.float32),
        },
    )

    def once() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return once


def transformers(model: ModelConfig, kind: str, weights: Path, size: tuple[int, int]) -> Step:
    import warnings

    import peft
    import torch

    # peft 0.21 calls what transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    recipe = recipes.load_recipe(f"tiny_{kind}")
    whole = transformers_model(model)
    if kind == "lora":
        targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        adapter = peft.LoraConfig(
            r=recipe.adapter.rank, lora_alpha=int(recipe.adapter.alpha), target_modules=targets, lora_dropout=0.0
        )
        whole = peft.get_peft_model(whole, adapter)
    whole.train()
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optim.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens = torch.tensor(rows(model, size), dtype=torch.int64)

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = whole(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return once


def measure(start: Callable[..., Step], model: str, kind: str, weights: Path) -> tuple[float, list[float]]:
    """Tokens per second by the median of `STEPS` steps, and the losses; the first step is not timed."""
    size = SIZES.get(model, USUAL_SIZE)
    once = start(MODELS[model], kind, weights, size)
    losses, seconds = [once()], []
    for _ in range(STEPS):
        began = time.perf_counter()
        losses.append(once())
        seconds.append(time.perf_counter() - began)
    return math.prod(size) / statistics.median(seconds), losses


if __name__ == "__main__":
    describe_library("training", __doc__)
