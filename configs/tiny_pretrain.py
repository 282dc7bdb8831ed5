"""Pretrains the tiny model, which assets/tiny-gemma2 holds, on the documentation inside Python.

python -m gemma2_jax.train --config tiny_pretrain
"""

from gemma2_jax.config import ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig
from gemma2_jax.model_config import GEMMA2_TINY
from gemma2_jax.recipes import pretrain


def config() -> Config:
    return pretrain(
        "tiny_pretrain",
        GEMMA2_TINY,
        data=DataConfig(kind="text", tokenizer="assets/tiny-gemma2"),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup_steps=100, weight_decay=0.1),
        train=TrainConfig(
            sequence_length=256,
            global_batch_size=16,
            micro_batch_size=16,
            seed=1234,
            eval_every=100,
            checkpoint_every=200,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=16),
        steps=1200,
    )
