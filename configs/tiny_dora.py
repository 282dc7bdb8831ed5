"""Fine-tunes DoRA adapters on the tiny model to answer questions about Python's standard library.

python -m gemma2_jax.train --config tiny_dora
"""

from gemma2_jax.config import ComputeConfig, Config, OptimConfig, TrainConfig
from gemma2_jax.model_config import GEMMA2_TINY, AdapterConfig
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune(
        "tiny_dora",
        GEMMA2_TINY,
        "assets/tiny-gemma2",
        "dora",
        adapter=AdapterConfig(kind="dora", rank=8, alpha=16.0),
        optim=OptimConfig(lr=5e-3, warmup_steps=10),
        train=TrainConfig(sequence_length=256, global_batch_size=16, micro_batch_size=16),
        compute=ComputeConfig(dtype="float32", frozen_dtype="float32", remat="none", loss_chunk=16),
    )
