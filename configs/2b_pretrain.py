"""Pretrains Gemma 2 2B from random weights, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 2b_pretrain --data.train 'corpus/*.jsonl' --data.tokenizer google/gemma-2-2b
"""

from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import GEMMA2_2B
from gemma2_jax.recipes import pretrain


def config() -> Config:
    return pretrain("2b_pretrain", GEMMA2_2B, mesh=MeshConfig(tensor=2))
