"""Pretrains Gemma 2 9B from random weights, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 9b_pretrain --data.train 'corpus/*.jsonl' --data.tokenizer google/gemma-2-9b
"""

from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import GEMMA2_9B
from gemma2_jax.recipes import pretrain


def config() -> Config:
    return pretrain("9b_pretrain", GEMMA2_9B, mesh=MeshConfig(tensor=8))
