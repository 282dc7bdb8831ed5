"""Fine-tunes LoRA adapters (rank 32) on Gemma 2 27B, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 27b_lora --data.train 'dialogues/*.jsonl'
"""

from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import GEMMA2_27B
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune("27b_lora", GEMMA2_27B, "google/gemma-2-27b", "lora", mesh=MeshConfig(tensor=4))
