"""Pretrains Gemma 2 27B from random weights, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 27b_pretrain --data.train 'corpus/*.jsonl' --data.tokenizer google/gemma-2-27b
"""

from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import GEMMA2_27B
from gemma2_jax.recipes import pretrain


def config() -> Config:
    return pretrain("27b_pretrain", GEMMA2_27B, mesh=MeshConfig(stage=2, tensor=8))
