"""Fine-tunes DoRA adapters (rank 32) on Gemma 2 2B, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 2b_dora --data.train 'dialogues/*.jsonl'
"""

from gemma2_jax.config import Config
from gemma2_jax.model_config import GEMMA2_2B
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune("2b_dora", GEMMA2_2B, "google/gemma-2-2b", "dora")
