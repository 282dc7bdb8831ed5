"""Fine-tunes all weights of the tiny model to answer questions about Python's standard library.

python -m gemma2_jax.train --config tiny_sft
"""

from gemma2_jax.config import ComputeConfig, Config, OptimConfig, TrainConfig
from gemma2_jax.model_config import GEMMA2_TINY
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune(
        "tiny_sft",
        GEMMA2_TINY,
        "assets/tiny-gemma2",
        "sft",
        optim=OptimConfig(lr=5e-4, warmup_steps=10),
        train=TrainConfig(sequence_length=256, global_batch_size=16, micro_batch_size=16),
        compute=ComputeConfig(dtype="float32", frozen_dtype="float32", remat="none", loss_chunk=16),
    )
