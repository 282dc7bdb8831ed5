"""Fine-tunes LoRA adapters (rank 32) on Gemma 2 9B, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 9b_lora --data.train 'dialogues/*.jsonl'
"""

from gemma2_jax.config import Config
from gemma2_jax.model_config import GEMMA2_9B
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune("9b_lora", GEMMA2_9B, "google/gemma-2-9b", "lora")
